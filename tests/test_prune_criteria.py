"""Every criterion against its definition, written out slowly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import Prune, prune_
from potstill.errors import PotstillError
from potstill.nn import MaskedLinear
from potstill.transform.criteria import CRITERIA, LayerFacts, SparseGPT, criterion
from potstill.transform.patterns import Blocks, NofM, parse_pattern

Batch = tuple[Tensor, Tensor]


def _data(inputs: int = 12, count: int = 3) -> list[Batch]:
    return [(torch.randn(8, inputs) * torch.linspace(0.2, 3, inputs), torch.arange(8) % 3) for _ in range(count)]


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 3))


def _loss(model: nn.Module):
    return lambda item: F.cross_entropy(model(item[0]), item[1])


def _lowest(scores: Tensor, count: int) -> set[int]:
    return set(scores.flatten().argsort()[:count].tolist())


def _gradients(model: nn.Sequential, data: list[Batch]) -> list[list[Tensor]]:
    """dL/dw of both layers for each batch."""
    model.eval()
    found = []
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found.append([model[i].weight.grad.clone() for i in (0, 3)])
    model.zero_grad()
    return found


def _by_definition(name: str, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    scores = torch.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            w, g = weight[i, j], torch.stack([each[i, j] for each in gradients])
            mean = g.mean()
            scores[i, j] = {"taylor": ((w * g) ** 2).mean(), "snip": (w * mean).abs(), "movement": -w * mean}[name]
    return scores


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["taylor", "snip", "movement"])
def test_criteria_of_gradients(name: str, scope: str) -> None:
    model, data = _model(), _data()
    gradients = _gradients(model, data)
    scores = [_by_definition(name, model[i].weight.detach(), [g[k] for g in gradients]) for k, i in enumerate((0, 3))]
    prune_(model, Prune(0.6, "unstructured", name, scope), data, loss=_loss(model))
    gone = [set((~model[i].mask).flatten().nonzero().flatten().tolist()) for i in (0, 3)]
    if scope == "layer":
        assert gone == [_lowest(scores[0], 72), _lowest(scores[1], 18)]
    else:
        assert gone[0] | {120 + i for i in gone[1]} == _lowest(torch.cat([s.flatten() for s in scores]), 90)
    assert model[0].weight.grad is None


def test_gradients_of_masked_weights_are_those_of_what_the_layer_computes_with() -> None:
    """A weight may come back: the score of a masked one is -w dL/dw at the point where it counts as zero."""
    model, data = nn.Sequential(nn.Linear(12, 3)), _data()
    prune_(model, Prune(0.5, "unstructured", "random"))
    master, mask = model[0].weight.detach().clone(), model[0].mask.clone()
    effective = (master * mask).requires_grad_()
    sum(F.cross_entropy(F.linear(x, effective, model[0].bias), y) for x, y in data).backward()
    prune_(model, Prune(0.5, "unstructured", "movement"), data, loss=_loss(model))
    expected = _lowest(-master * effective.grad, 18)
    assert set((~model[0].mask).flatten().nonzero().flatten().tolist()) == expected
    assert bool((model[0].mask & ~mask).any()), "the test needs a weight that comes back"
    assert torch.equal(model[0].weight, master)


def test_magnitude_random_and_their_blocks() -> None:
    weight = torch.randn(6, 10)
    for pattern, rows, columns in (("unstructured", 1, 1), ("1x4", 1, 4), ("4x2", 4, 2)):
        model = nn.Sequential(nn.Linear(10, 6))
        model[0].weight.data = weight.clone()
        prune_(model, Prune(0.5, pattern))
        blocks = {
            (i, j): weight[i : i + rows, j : j + columns].abs().mean().item()
            for i in range(0, 6, rows)
            for j in range(0, 10, columns)
        }
        lowest = sorted(blocks, key=blocks.get)[: int(0.5 * len(blocks) + 0.5)]
        expected = torch.ones(6, 10, dtype=torch.bool)
        for i, j in lowest:
            expected[i : i + rows, j : j + columns] = False
        assert torch.equal(model[0].mask, expected)
    masks = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 10))
        prune_(model, Prune(0.5, "unstructured", "random", seed=seed))
        masks.append([m.mask.clone() for m in model])
        assert all(m.sparsity == 0.5 for m in model)
    assert torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][0], masks[2][0])
    assert not torch.equal(masks[0][0].flatten(), masks[0][1].flatten())


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4", "2x3"])
def test_wanda(pattern: str) -> None:
    model, data = _model(), _data()
    weight = model[0].weight.detach().clone()
    norms = torch.zeros(12)
    for j in range(12):
        norms[j] = sum(x[r, j].item() ** 2 for x, _ in data for r in range(len(x))) ** 0.5
    prune_(model, Prune(None if ":" in pattern else 0.5, pattern, "wanda"), data)
    scores, shape = weight.abs() * norms, parse_pattern(pattern)
    if isinstance(shape, NofM):
        expected = shape.mask(scores)
    else:
        expected = torch.ones(10, 12, dtype=torch.bool)
        for i in range(0, 10, shape.rows):
            starts = range(0, 12, shape.columns)
            block = {j: scores[i : i + shape.rows, j : j + shape.columns].mean().item() for j in starts}
            for j in sorted(block, key=block.get)[: int(len(block) / 2 + 0.5)]:
                expected[i : i + shape.rows, j : j + shape.columns] = False
    assert torch.equal(model[0].mask, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "same", "groups": 2},
        {"groups": 4, "padding": (1, 0)},
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_inputs_of_convolutions(arguments: dict) -> None:
    """Wanda's norms, and the price of one column by SparseGPT's moments, by a convolution with one weight at a time."""
    conv = nn.Conv2d(4, 8, (3, 2), bias=False, **arguments)
    data = [torch.randn(4, 4, 6, 7).cumsum(-1).cumsum(-2) for _ in range(2)]
    scores = torch.zeros(8, conv.weight[0].numel())
    probe = nn.Conv2d(4, 8, (3, 2), bias=False, **arguments)
    for j in range(scores.shape[1]):
        with torch.no_grad():
            probe.weight.zero_().flatten(1)[:, j] = 1
            power = sum(probe(x).square().sum((0, 2, 3)) for x in data)
        scores[:, j] = conv.weight.detach().flatten(1)[:, j].abs() * power.sqrt()
    model = nn.Sequential(conv)
    prune_(model, Prune(0.5, "unstructured", "wanda"), data)
    assert torch.equal(model[0].mask.flatten(1), Blocks().mask(scores, scores.numel() // 2, balanced=True))
    dense, x = model[0].weight.detach().clone(), torch.cat(data)
    errors = {}
    for name in ("magnitude", "sparsegpt"):
        other = nn.Sequential(nn.Conv2d(4, 8, (3, 2), bias=False, **arguments))
        other[0].weight.data = dense.clone()
        wanted = other(x)
        prune_(other, Prune(0.5, "unstructured", name), data)
        errors[name] = (other(x) - wanted).norm().item()
    assert errors["sparsegpt"] < errors["magnitude"]


def _correlated(rows: int, inputs: int) -> Tensor:
    """Inputs that share a few causes, and differ in size."""
    mixing = torch.randn(max(inputs // 4, 1), inputs)
    return (torch.randn(rows, len(mixing)) @ mixing + 0.3 * torch.randn(rows, inputs)) * torch.rand(inputs).add(0.1)


def _facts(weight: Tensor, x: Tensor) -> LayerFacts:
    return LayerFacts("0", weight, torch.ones_like(weight, dtype=torch.bool), {"second moments": (x.t() @ x)[None]})


def _damped(x: Tensor) -> Tensor:
    h = (x.t() @ x).double()
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


@pytest.mark.parametrize("pattern", ["unstructured", "1x3", "2:4"])
def test_sparsegpt_is_optimal_brain_surgeon_column_by_column(pattern: str) -> None:
    """Every weight that goes changes those behind it by the closed form of Hassibi and Stork, in double precision."""
    weight, x = torch.randn(5, 12), _correlated(200, 12)
    shape = parse_pattern(pattern)
    half = shape.count(weight.shape) // 2 if isinstance(shape, Blocks) else 0
    mask, new = SparseGPT().choose(_facts(weight, x), shape, half, False)
    assert new is not None
    h, w = _damped(x), weight.double()
    expected = w.clone()
    for j in range(12):
        inverse = torch.linalg.inv(h[j:, j:])
        if isinstance(shape, NofM) and j % 4 == 0:
            left = [torch.linalg.inv(h[c:, c:])[0, 0] for c in range(j, j + 4)]
            assert torch.equal(mask[:, j : j + 4], NofM(2, 4).mask(expected[:, j : j + 4] ** 2 / torch.stack(left)))
        for i in range(5):
            if not mask[i, j]:
                expected[i, j:] -= expected[i, j] / inverse[0, 0] * inverse[:, 0]
    torch.testing.assert_close(new, expected.float(), rtol=1e-4, atol=1e-4)
    assert bool((new[~mask] == 0).all())
    if isinstance(shape, Blocks):
        prices = torch.stack([w[:, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0] for j in range(12)], 1)
        assert torch.equal(mask, shape.mask(prices, half))


def test_sparsegpts_scores_are_what_the_best_repair_leaves_as_error() -> None:
    """Of one weight: the least (w - q) H (w - q)' over all q with a zero there, by solving for the other weights."""
    weight, x = torch.randn(3, 6), _correlated(100, 6)
    x[:, 4] = 0
    scores = SparseGPT().scores(_facts(weight, x))
    h = _damped(x)
    h[4, 4] = h.diagonal().max()  # whatever it is: no other input has a part in it
    for j in (0, 1, 2, 3, 5):
        rest = [i for i in range(6) if i != j]
        move = torch.zeros(3, 6, dtype=torch.float64)
        move[:, j] = -weight[:, j].double()
        move[:, rest] = -torch.linalg.solve(h[rest][:, rest], h[rest][:, [j]] @ move[:, [j]].t()).t()
        expected = (move @ h * move).sum(1)
        torch.testing.assert_close(scores[:, j].double(), expected, rtol=1e-3, atol=1e-5)
    assert not scores[:, 4].any()


def test_sparsegpt_finds_the_least_squares_solution_if_the_first_columns_go() -> None:
    weight, x = torch.randn(3, 8), _correlated(100, 8)
    weight[:, :3] *= 1e-3
    mask, new = SparseGPT().choose(_facts(weight, x), Blocks(), 9, False)
    assert new is not None
    assert not mask[:, :3].any()
    h = _damped(x)
    best = torch.linalg.solve(h[3:, 3:], h[3:] @ weight.double().t()).t()
    torch.testing.assert_close(new[:, 3:], best.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4"])
def test_sparsegpt_changes_the_outputs_less_than_magnitude_and_wanda(pattern: str) -> None:
    """With more than the 128 columns of one block, and at 50 %."""
    x, weight = _correlated(600, 160), torch.randn(48, 160)
    errors = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        model = nn.Sequential(nn.Linear(160, 48))
        model[0].weight.data = weight.clone()
        wanted = model(x)
        report = prune_(model, Prune(None if ":" in pattern else 0.5, pattern, name), [x])
        assert report.sparsity == pytest.approx(0.5)
        errors[name] = (model(x) - wanted).norm().item()
    assert errors["sparsegpt"] < 0.6 * min(errors["magnitude"], errors["wanda"]), errors


@pytest.mark.parametrize("balanced", [False, True])
def test_sparsegpt_removes_exactly_as_many(balanced: bool) -> None:
    x = _correlated(300, 150)
    model = nn.Sequential(nn.Linear(150, 7))
    row = prune_(model, Prune(0.7, "1x4", "sparsegpt", balanced=balanced), [x]).rows[0]
    assert row.blocks == 7 * 38
    each = int(0.7 * row.blocks + 0.5) / 7
    gone = 7 * int(each + 0.5) if balanced else int(0.7 * row.blocks + 0.5)
    assert row.blocks - row.kept_blocks == gone
    lost = 38 - Blocks(1, 4).reduce(model[0].mask).count_nonzero(dim=1)
    assert (len(lost.unique()) == 1) == balanced


def test_sparsegpt_takes_dead_inputs_first_and_a_pruned_model_as_it_is() -> None:
    x = _correlated(100, 8)
    x[:, 5] = 0
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight.data[:, 5] = 100
    prune_(model, Prune(0.25, "unstructured", "sparsegpt"), [x])
    assert not model[0].mask[:, 5].any()
    once, weight = model(x), model[0].weight.clone()
    prune_(model, Prune(0.25, "unstructured", "sparsegpt"), [x])
    torch.testing.assert_close(model(x), once)
    torch.testing.assert_close(model[0].weight, weight)


def test_sparsegpt_starts_from_what_counts_not_from_masters() -> None:
    x = _correlated(100, 12)
    model = nn.Sequential(nn.Linear(12, 6))
    prune_(model, Prune(0.5, "unstructured"))
    before, mask = model(x), model[0].mask.clone()
    assert bool(model[0].weight[~mask].all())
    prune_(model, Prune(0.5, "unstructured", "sparsegpt", balanced=False), [x])
    assert torch.equal(model[0].mask, mask), "what is zero already costs nothing"
    torch.testing.assert_close(model(x), before)


def test_a_criterion_of_the_user() -> None:
    told = []

    @criterion("small gradient", needs="gradient")
    def small_gradient(facts: LayerFacts) -> Tensor:
        told.append(facts)
        return facts.gradient.abs()

    @criterion("forgot", needs="nothing")
    def forgot(facts: LayerFacts) -> Tensor:
        return facts.norms

    @criterion("wrong shape")
    def wrong(facts: LayerFacts) -> Tensor:
        return facts.weight.sum(0)

    @criterion("nan")
    def nan(facts: LayerFacts) -> Tensor:
        return facts.weight * torch.nan

    try:
        model, data = _model(), _data()
        mean = torch.stack([g[0] for g in _gradients(model, data)]).mean(0)
        prune_(model, Prune(0.5, "unstructured", small_gradient), data, loss=_loss(model))
        assert set((~model[0].mask).flatten().nonzero().flatten().tolist()) == _lowest(mean.abs(), 60)
        torch.testing.assert_close(told[0].gradient, mean)
        assert [facts.name for facts in told] == ["0", "3"]
        with pytest.raises(ValueError, match="norms of 0 is not known; the criterion has to say needs='norms'"):
            prune_(_model(), Prune(criterion="forgot"), data)
        with pytest.raises(ValueError, match=r"returned \[12\] for 0, expected a score for each weight.* \[10, 12\]"):
            prune_(_model(), Prune(criterion="wrong shape"))
        with pytest.raises(ValueError, match="NaN or infinite"):
            prune_(_model(), Prune(criterion=nan))
        with pytest.raises(ValueError, match="needs is 'inputs', expected one of 'nothing', 'norms'"):
            criterion("mine", needs="inputs")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="exists already"):
            criterion("nan")(lambda facts: facts.weight)
    finally:
        for name in ("small gradient", "forgot", "wrong shape", "nan"):
            del CRITERIA[name]


@pytest.mark.parametrize("name", ["taylor", "wanda"])
def test_what_is_missing_is_said(name: str) -> None:
    model, data = _model(), _data()
    with pytest.raises(ValueError, match="pass data"):
        prune_(model, Prune(criterion=name))
    with pytest.raises(TypeError, match="put a single batch in a list"):
        prune_(model, Prune(criterion=name), data[0][0])
    with pytest.raises(PotstillError, match="yielded nothing"):
        prune_(model, Prune(criterion=name), [], loss=_loss(model))
    assert all(type(m) is not MaskedLinear for m in model)


def test_losses_that_are_none() -> None:
    model, data = _model(), _data()
    with pytest.raises(ValueError, match="and loss, a function of a batch"):
        prune_(model, Prune(criterion="snip"), data)
    with pytest.raises(ValueError, match="expected a scalar tensor that depends"):
        prune_(model, Prune(criterion="snip"), data, loss=lambda item: 1.0)
    with pytest.raises(ValueError, match=r"a tensor \[8, 3\]"):
        prune_(model, Prune(criterion="snip"), data, loss=lambda item: model(item[0]))
    with pytest.raises(PotstillError, match="loss of batch 1 is nan"):
        prune_(model, Prune(criterion="snip"), data, loss=lambda item: model(item[0]).sum() * torch.nan)
    assert all(type(m) is not MaskedLinear for m in model)
    assert model[0].weight.grad is None


@pytest.mark.parametrize("name", ["taylor", "wanda", "sparsegpt"])
def test_layers_that_the_data_never_reach_are_kept(name: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(12, 3), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Two()
    report = prune_(model, Prune(criterion=name), _data(), loss=_loss(model))
    assert [row.action for row in report.rows] == ["pruned", "kept"]
    assert report.rows[1].reason in ("the data never reach it", "the loss does not depend on it")
    assert type(model.idle) is nn.Linear
