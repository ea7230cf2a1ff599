"""The strategies' numbers against their papers' formulas, written out here in another way; and their errors."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.strategy_cases import of_features
from torch import Tensor, nn

from potstill.distill import (
    DIST,
    STRATEGIES,
    AttentionRelations,
    AttentionTransfer,
    Batch,
    Contrastive,
    Gram,
    HiddenStates,
    LogitStandardisation,
    Outputs,
    Relational,
    Similarity,
    SoftTargets,
)

ROWS, CLASSES = 6, 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def of_logits(student: Tensor, teacher: Tensor, target: Tensor) -> Outputs:
    return Outputs(Batch((), {}, target), student, teacher)


def close(found: Tensor, expected: Any) -> None:
    assert float(found) == pytest.approx(float(expected), rel=1e-10)


LABELS = torch.tensor([0, 4, -100, 2, 2, -100])
VALID = [0, 1, 3, 4]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


# --- logits


def test_soft_targets_takes_every_divergence() -> None:
    s, t = random(ROWS, CLASSES), random(ROWS, CLASSES)
    q, p = (s / 2)[VALID].softmax(-1), (t / 2)[VALID].softmax(-1)
    m = 0.3 * p + 0.7 * q
    expected = {
        "forward_kl": 4 * (p * (p / q).log()).sum(-1).mean(),
        "reverse_kl": 4 * (q * (q / p).log()).sum(-1).mean(),
        "jsd": 4 * (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1).mean(),
        "tv": 4 * 0.5 * (q - p).abs().sum(-1).mean(),
        "soft_ce": -4 * (p * q.log()).sum(-1).mean(),
        "mse": (s - t)[VALID].square().mean(),
    }
    for divergence, value in expected.items():
        strategy = SoftTargets(2.0, 1.0, divergence=divergence, beta=0.3 if divergence == "jsd" else None)
        close(strategy(of_logits(s, t, LABELS)), value)
    mixed = SoftTargets(2.0, 0.4, divergence="tv")
    hard = F.cross_entropy(s[VALID], LABELS[VALID])
    close(mixed(of_logits(s, t, LABELS)), 0.4 * expected["tv"] + 0.6 * hard)


def test_soft_targets_config_names_the_divergence_only_where_it_is_chosen() -> None:
    assert list(SoftTargets().config()) == ["temperature", "alpha", "ignore_index", "label_smoothing"]
    chosen = SoftTargets(divergence="dkd", beta=2.0)
    assert SoftTargets(**chosen.config()).config() == chosen.config()
    assert chosen.config()["beta"] == 2.0
    with pytest.raises(ValueError, match="divergence is 'l2'; expected one of forward_kl"):
        SoftTargets(divergence="l2")
    with pytest.raises(ValueError, match=r"beta is 0\.5, but tv has none"):
        SoftTargets(divergence="tv", beta=0.5)


@pytest.mark.parametrize("sequence", [False, True])
def test_dist_is_pearsons_correlation(sequence: bool) -> None:
    s, t = random(ROWS, CLASSES), random(ROWS, CLASSES)
    q, p = ((x[VALID] / 3).softmax(-1).numpy() for x in (s, t))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    strategy = DIST(3.0, inter=0.5, intra=2.0)
    shape = (2, 3, -1) if sequence else (ROWS, -1)
    close(
        strategy(of_logits(s.reshape(*shape), t.reshape(*shape), LABELS.reshape(shape[:-1]))),
        9 * (0.5 * inter + 2 * intra),
    )
    assert strategy.rows(LABELS) == 4


def test_dist_of_what_is_constant() -> None:
    s, t = torch.zeros(1, CLASSES, requires_grad=True), torch.randn(1, CLASSES)
    loss = DIST()(of_logits(s, t, torch.tensor([1])))
    loss.backward()
    assert loss.item() == 0.0
    assert not s.grad.any()
    one = torch.randn(1, CLASSES)
    inter = DIST(intra=0.0)(of_logits(one, t, torch.tensor([1])))
    assert float(inter) > 0.1
    assert float(DIST()(of_logits(one, t, torch.tensor([1])))) == float(inter)  # one row has no intra-class relation


def test_logit_standardisation_is_the_kl_of_z_scores() -> None:
    s, t = random(ROWS, CLASSES), random(ROWS, CLASSES)
    z = [(x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True)) for x in (s, t)]
    soft = F.kl_div((z[0][VALID] / 2).log_softmax(-1), (z[1][VALID] / 2).softmax(-1), reduction="batchmean") * 4
    hard = F.cross_entropy(s[VALID], LABELS[VALID])
    close(LogitStandardisation(2.0, 1.0)(of_logits(s, t, LABELS)), soft)
    close(LogitStandardisation(2.0, 0.3)(of_logits(s, t, LABELS)), 0.3 * soft + 0.7 * hard)
    scaled = LogitStandardisation(2.0, 1.0)(of_logits(0.1 * s - 3, 5 * t + 1, LABELS))
    assert float(scaled) == pytest.approx(float(soft), rel=1e-5)
    assert LogitStandardisation().rows(LABELS) == 4


@pytest.mark.parametrize("strategy", [DIST(), LogitStandardisation()])
def test_logits_that_do_not_fit(strategy: Any) -> None:
    for s, t, y in (((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (3,)), ((2, 3), (2, 3), (2, 3))):
        with pytest.raises(ValueError, match=r"the student's logits are \[2, 3\], the teacher's .*; expected"):
            strategy(of_logits(random(*s), random(*t), torch.zeros(y, dtype=torch.long)))


# --- layers


@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_hidden_states_of_tokens(loss: str, width: int) -> None:
    strategy = HiddenStates(["a", "b"], loss=loss)
    s, t = ({name: random(3, 4, w) for name in "ab"} for w in (width, 7))
    outputs = of_features(strategy, s, t, MASK)
    terms = []
    for pair, name in enumerate("ab"):
        mapped = strategy.projections[pair](s[name])
        assert isinstance(strategy.projections[pair], nn.Identity if width == 7 else nn.Linear)
        for example in range(3):
            a, b = mapped[example][MASK[example].bool()], t[name][example][MASK[example].bool()]
            terms.append(F.mse_loss(a, b) if loss == "mse" else (1 - F.cosine_similarity(a, b, dim=-1)).mean())
    close(strategy(outputs).detach(), torch.stack(terms).mean().detach())


def test_hidden_states_of_maps_and_rows() -> None:
    strategy = HiddenStates("a")
    s, t = random(3, 2, 4, 6), random(3, 5, 8, 3)
    outputs = of_features(strategy, {"a": s}, {"a": t})
    linear = strategy.projections[0]
    small = s.reshape(3, 2, 4, 3, 2).mean(4), t.reshape(3, 5, 4, 2, 3).mean(3)
    mapped = F.conv2d(small[0], linear.weight[:, :, None, None], linear.bias)
    close(strategy(outputs).detach(), F.mse_loss(mapped, small[1]).detach())
    rows = HiddenStates("a")
    s, t = random(3, 4), random(3, 4)
    close(rows(of_features(rows, {"a": s}, {"a": t})), F.mse_loss(s, t))


def test_attention_transfer() -> None:
    strategy = AttentionTransfer("a")
    s, t = random(3, 2, 4, 6), random(3, 5, 4, 6)

    def attention(x: Tensor) -> Tensor:  # as in the authors' code
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    expected = 24 * (attention(s) - attention(t)).pow(2).mean()
    close(strategy(of_features(strategy, {"a": s}, {"a": t})), expected)
    tokens = [x.flatten(2).transpose(1, 2) for x in (s, t)]
    close(strategy(of_features(strategy, {"a": tokens[0]}, {"a": tokens[1]})), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_relations(masked: bool) -> None:
    strategy = AttentionRelations(("q", "k", "v"), heads=2)
    s, t = {n: random(3, 4, 6) for n in "qkv"}, {n: random(3, 4, 10) for n in "qkv"}
    terms = []
    for name, example, head in itertools.product("qkv", range(3), range(2)):
        tokens = MASK[example].bool() if masked else slice(None)
        a = s[name][example][tokens][:, 3 * head : 3 * head + 3]
        b = t[name][example][tokens][:, 5 * head : 5 * head + 5]
        log_q, p = (a @ a.T / math.sqrt(3)).log_softmax(-1), (b @ b.T / math.sqrt(5)).softmax(-1)
        terms.append(F.kl_div(log_q, p, reduction="batchmean"))
    close(strategy(of_features(strategy, s, t, MASK if masked else None)), torch.stack(terms).mean())


def test_similarity() -> None:
    strategy = Similarity("a")
    s, t = random(3, 2, 2, 2), random(3, 5, 3, 3)
    grams = []
    for x in (s, t):
        gram = torch.tensor([[float((x[i] * x[j]).sum()) for j in range(3)] for i in range(3)], dtype=torch.float64)
        grams.append(gram / gram.norm(dim=1, keepdim=True))
    close(strategy(of_features(strategy, {"a": s}, {"a": t})), ((grams[0] - grams[1]) ** 2).sum() / 9)


def huber(x: float, y: float) -> float:
    return 0.5 * (x - y) ** 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def test_relational() -> None:
    s, t = random(5, 3), 4 * random(5, 2, 2)
    clouds = [x.flatten(1).numpy() for x in (s, t)]
    pairs, triples = list(itertools.permutations(range(5), 2)), list(itertools.permutations(range(5), 3))
    lengths, cosines = [], []
    for x in clouds:
        found = [np.linalg.norm(x[i] - x[j]) for i, j in pairs]
        lengths.append([d / np.mean(found) for d in found])
        units = {(i, j): (x[i] - x[j]) / np.linalg.norm(x[i] - x[j]) for i, j in pairs}
        cosines.append([units[i, j] @ units[k, j] for i, j, k in triples])
    distance = np.mean([huber(a, b) for a, b in zip(*lengths, strict=True)])
    angle = np.mean([huber(a, b) for a, b in zip(*cosines, strict=True)])
    for weights in ((1.0, 2.0), (3.0, 0.0), (0.0, 0.5)):
        strategy = Relational("a", distance=weights[0], angle=weights[1])
        found = strategy(of_features(strategy, {"a": s}, {"a": t}))
        close(found, weights[0] * distance + weights[1] * angle)


@pytest.mark.parametrize("rows", [1, 2])
def test_relational_of_few_examples(rows: int) -> None:
    strategy = Relational("a")
    s = random(rows, 3).requires_grad_()
    loss = strategy(of_features(strategy, {"a": s}, {"a": random(rows, 4)}))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-15)  # a single distance is its own mean
    assert float(s.grad.abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("labels", "negatives"),
    [
        ([0, 1, 0, -100, -100], [[1, 3, 4], [0, 2, 3, 4], [1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]),
        ([[0, 0]] * 5, [[j for j in range(5) if j != i] for i in range(5)]),
        ([0.0] * 5, [[j for j in range(5) if j != i] for i in range(5)]),
    ],
)
def test_contrastive(labels: Any, negatives: list[list[int]]) -> None:
    strategy = Contrastive("a", width=4, temperature=0.5)
    s, t = random(5, 3, 2, 2), random(5, 6, 3, 3)
    found = of_features(strategy, {"a": s}, {"a": t})
    outputs = Outputs(Batch((), {}, torch.tensor(labels)), None, None, found.student_features, found.teacher_features)
    a = F.normalize(strategy.student_heads[0](s.mean((2, 3))).detach())
    b = F.normalize(strategy.teacher_heads[0](t.mean((2, 3))).detach())
    terms = []
    for i in range(5):
        positive = math.exp(float(a[i] @ b[i]) / 0.5)
        rest = sum(math.exp(float(a[i] @ b[j]) / 0.5) for j in negatives[i])
        terms.append(-math.log(positive / (positive + rest)))
    close(strategy(outputs).detach(), np.mean(terms))


def test_contrastive_of_padded_tokens_means_the_others() -> None:
    strategy = Contrastive("a", width=4)
    s, t = random(3, 4, 2), random(3, 4, 6)
    tokens = strategy(of_features(strategy, {"a": s}, {"a": t}, MASK)).detach()
    means = [torch.stack([x[i][MASK[i].bool()].mean(0) for i in range(3)]) for x in (s, t)]
    batch = Batch((), {}, torch.arange(3))
    close(tokens, strategy(Outputs(batch, None, None, {"a": means[0]}, {"a": means[1]})).detach())


@pytest.mark.parametrize("width", [3, 5])
def test_gram_of_maps(width: int) -> None:
    strategy = Gram(("a", "b"))
    s = {"a": random(3, width, 4, 4), "b": random(3, 6, 2, 2)}
    t = {"a": random(3, 5, 3, 3), "b": random(3, 6, 3, 3)}
    outputs = of_features(strategy, s, t)
    assert [type(p) for p in strategy.projections] == [nn.Linear if width == 3 else nn.Identity, nn.Identity]
    terms = []
    for i in range(3):
        begin = s["a"][i].reshape(width, 2, 2, 2, 2).mean((2, 4)).flatten(1)
        if width == 3:
            begin = strategy.projections[0](begin.T).T.detach()
        own = begin @ s["b"][i].flatten(1).T / 4
        other = t["a"][i].flatten(1) @ t["b"][i].flatten(1).T / 9
        terms.append((own - other).square().mean())
    close(strategy(outputs).detach(), torch.stack(terms).mean())


def test_gram_of_tokens() -> None:
    strategy = Gram(("a", "a"))
    s, t = random(3, 4, 2), random(3, 4, 2)
    terms = []
    for i in range(3):
        seen = MASK[i].bool()
        grams = [x[i][seen].T @ x[i][seen] / int(seen.sum()) for x in (s, t)]
        terms.append(F.mse_loss(*grams))
    close(strategy(of_features(strategy, {"a": s}, {"a": t}, MASK)), torch.stack(terms).mean())


# --- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DIST(0.0), "DIST: temperature is 0.0; expected a positive number"),
        (lambda: DIST(inter=-1.0), "DIST: inter is -1.0 and intra is 1.0; expected numbers of at least 0"),
        (lambda: DIST(inter=0.0, intra=0.0), "and one of them positive"),
        (lambda: LogitStandardisation(0.0), "temperature"),
        (lambda: LogitStandardisation(alpha=1.5), "alpha"),
        (lambda: HiddenStates("a", loss="l1"), "HiddenStates: loss is 'l1'; expected one of mse, cosine"),
        (lambda: HiddenStates([]), r"HiddenStates: student is \[\]; expected the name of a module"),
        (lambda: HiddenStates("a", ["b", 3]), r"HiddenStates: teacher is \['b', 3\]; expected the name"),
        (lambda: AttentionRelations("q"), "student is 'q'; expected 3 names, of the layers of the queries"),
        (lambda: AttentionRelations("qkv"), "student is 'qkv'; expected 3 names"),
        (lambda: AttentionRelations(("q", "k", "v"), ("q", "k")), r"teacher is \['q', 'k'\]; expected 3 names"),
        (lambda: AttentionRelations(("q", "k", "v"), heads=0), "heads is 0; expected at least 1"),
        (lambda: Relational("a", distance=0.0, angle=0.0), "distance is 0.0 and angle is 0.0"),
        (lambda: Relational("a", angle=float("nan")), "angle is nan"),
        (lambda: Contrastive("a", width=0), "width is 0; expected at least 1"),
        (lambda: Contrastive("a", temperature=float("inf")), "temperature is inf; expected a positive number"),
        (lambda: Gram("a"), "student is 'a'; expected 2 names, of the layers where a flow begins"),
        (lambda: Gram(("a", "b"), ("a", "b", "c")), "expected 2 names"),
    ],
)
def test_arguments_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("strategy", "shape", "other", "message"),
    [
        (HiddenStates("a"), (2, 4, 3), (2, 5, 3), "returned 4 tokens and the teacher's 'a' 5; they must be the same"),
        (AttentionTransfer("a"), (2, 4, 3), (2, 5, 3), "AttentionTransfer: .* 4 tokens"),
        (AttentionTransfer("a"), (2, 3), (2, 3), "'a' and 'a' returned .batch, features., which have no positions"),
        (AttentionRelations(["a", "a", "a"], heads=2), (2, 4, 6), (2, 5, 6), "AttentionRelations: .* 4 tokens"),
        (AttentionRelations(["a", "a", "a"], heads=2), (2, 4, 3), (2, 4, 6), r"'a' returned \[2, 4, 3\]; expected"),
        (AttentionRelations(["a", "a", "a"], heads=2), (2, 6), (2, 6), "with a multiple of 2 features"),
        (Gram(("a", "a")), (2, 3), (2, 3), r"Gram: 'a' to 'a' .* is from \[2, 3\] to \[2, 3\]; expected two times"),
    ],
)
def test_features_that_do_not_fit(strategy: Any, shape: Any, other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(of_features(strategy, {"a": random(*shape)}, {"a": random(*other)}))


def test_gram_needs_as_many_ends_as_beginnings_of_the_same_positions() -> None:
    with pytest.raises(ValueError, match=r"1 layers of the student fit 'a' and 2 fit '\?'; expected as many"):
        of_features(
            Gram(("a", "?")), {"a": random(2, 4, 3), "b": random(2, 4, 3)}, {"a": random(2, 4, 3), "b": random(2, 4, 3)}
        )
    strategy, features = Gram(("a", "b")), {"a": random(2, 4, 3), "b": random(2, 5, 3)}
    with pytest.raises(ValueError, match=r"is from \[2, 4, 3\] to \[2, 5, 3\]"):
        strategy(of_features(strategy, features, features))


# --- the page


def test_the_page_shows_the_numbers_of_the_results_file() -> None:
    root = Path(__file__).parents[1]
    results = json.loads((root / "bench" / "results" / "strategies-digits.json").read_text())
    page = (root / "docs" / "strategies.md").read_text()
    assert {row["strategy"] for row in results["rows"]} == STRATEGIES.keys()
    for row in results["rows"]:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{row['strategy']}` |")]
        assert f"| {100 * row['mean']:.1f} |" in line
        if row["strategy"] != "hard_labels":
            assert f"| {row['weight']:g} |" in line
            assert f"| {100 * row['difference']:+.1f} ± {100 * row['half_interval']:.1f} |" in line
    for strategy in STRATEGIES.values():
        assert f"| `{strategy.__name__}` |" in page
