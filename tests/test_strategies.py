"""What every registered strategy keeps: a minimum at the teacher, exact gradients, masks, precision, resumption."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distill_runs import Runner, StopError, equal
from tests.strategy_cases import (
    CASES,
    CLASSES,
    ROWS,
    MapNet,
    TokenNet,
    map_item,
    of_features,
    outputs_of,
    seeded,
    token_item,
)
from torch import Tensor, nn

from potstill.distill import (
    STRATEGIES,
    AttentionRelations,
    Batch,
    Contrastive,
    HardLabels,
    HiddenStates,
    LayerStrategy,
    Outputs,
    Strategy,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Every strategy on tokens, and on maps those that can.
RUNS = [(name, "tokens") for name in CASES] + [(name, "maps") for name, case in CASES.items() if case.maps]
LAYERED = [(name, kind) for name, kind in RUNS if isinstance(CASES[name].tokens(), LayerStrategy)]
by_run = pytest.mark.parametrize(("name", "kind"), RUNS)
by_layered = pytest.mark.parametrize(("name", "kind"), LAYERED)


def test_every_registered_strategy_has_a_case() -> None:
    assert CASES.keys() == STRATEGIES.keys()
    for name, case in CASES.items():
        assert type(case.tokens()) is STRATEGIES[name]


def strategy_of(name: str, kind: str) -> Any:
    return getattr(CASES[name], kind)()


def models(kind: str, student: int = 4, teacher: int = 6) -> tuple[nn.Module, nn.Module]:
    """Of different widths, and on maps of different sizes."""
    if kind == "tokens":
        return seeded(lambda: TokenNet(student), 1), seeded(lambda: TokenNet(teacher), 2)
    return seeded(lambda: MapNet(student, stride=2), 1), seeded(lambda: MapNet(teacher), 2)


def item_of(kind: str, rows: int = ROWS) -> Any:
    return token_item(rows) if kind == "tokens" else map_item(rows)


def prepared(name: str, kind: str) -> tuple[Any, Outputs]:
    strategy = strategy_of(name, kind)
    outputs = outputs_of(strategy, *models(kind), item_of(kind))
    strategy.prepare(outputs)
    return strategy, outputs


# --- the term itself


@by_run
def test_config_builds_the_strategy_anew(name: str, kind: str) -> None:
    strategy = strategy_of(name, kind)
    again = type(strategy)(**strategy.config())
    assert again.config() == strategy.config()
    assert repr(again) == repr(strategy)


def at_best(name: str, kind: str) -> tuple[Any, Outputs]:
    """A strategy, and outputs that nothing could improve."""
    strategy, (_, teacher) = strategy_of(name, kind), models(kind)
    outputs = outputs_of(strategy, copy.deepcopy(teacher), teacher, item_of(kind))
    strategy.prepare(outputs)
    if name == "hard_labels":
        sure = 100.0 * nn.functional.one_hot(outputs.target, CLASSES).double()
        outputs = Outputs(outputs.batch, sure.requires_grad_(), None)
    if name == "contrastive":  # what is nearest of all can still be nearer, unless there is nothing else
        batch = Batch(outputs.batch.args, outputs.batch.kwargs, torch.zeros(ROWS, dtype=torch.long))
        outputs = Outputs(batch, None, None, outputs.student_features, outputs.teacher_features)
    return strategy, outputs


@by_run
def test_a_student_that_is_the_teacher_has_nothing_to_learn(name: str, kind: str) -> None:
    strategy, outputs = at_best(name, kind)
    loss = strategy(outputs)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    leaves = [outputs.student] if outputs.student is not None else []
    leaves += [outputs.student_features[layer] for layer in strategy.student_layers()]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert any(g is not None for g in gradients)
    assert all(float(g.abs().max()) < 1e-9 for g in gradients if g is not None)


@by_run
def test_another_student_has(name: str, kind: str) -> None:
    strategy, outputs = prepared(name, kind)
    loss = strategy(outputs)
    assert loss.shape == ()
    assert loss.item() > 1e-4


@by_run
def test_gradients_are_those_of_finite_differences(name: str, kind: str) -> None:
    strategy, outputs = prepared(name, kind)
    logits = outputs.student.detach().requires_grad_()
    names = strategy.student_layers()
    own = {layer: outputs.student_features[layer].detach().requires_grad_() for layer in names}
    leaf = Outputs(outputs.batch, logits, outputs.teacher, own, outputs.teacher_features)
    inputs = [*own.values(), *strategy.parameters()] if names else [logits]
    torch.autograd.gradcheck(lambda *_: strategy(leaf), inputs)


def gradients(strategy: Strategy, outputs: Outputs) -> list[Tensor]:
    leaves = [outputs.student_features[layer] for layer in strategy.student_layers()] or [outputs.student]
    return list(torch.autograd.grad(strategy(outputs), leaves))


@by_run
def test_no_gradient_flows_to_the_teacher(name: str, kind: str) -> None:
    strategy, outputs = prepared(name, kind)
    logits = outputs.teacher.requires_grad_()
    other = {layer: outputs.teacher_features[layer].clone().requires_grad_() for layer in strategy.teacher_layers()}
    strategy(Outputs(outputs.batch, outputs.student, logits, outputs.student_features, other)).backward()
    assert logits.grad is None
    assert all(x.grad is None for x in other.values())


# --- precision


def cast(strategy: Strategy, outputs: Outputs, dtype: torch.dtype) -> Outputs:
    own = {layer: outputs.student_features[layer].to(dtype) for layer in strategy.student_layers()}
    other = {layer: outputs.teacher_features[layer].to(dtype) for layer in strategy.teacher_layers()}
    return Outputs(outputs.batch, outputs.student.to(dtype), outputs.teacher.to(dtype), own, other)


@by_run
def test_half_precision_is_widened_also_under_autocast(name: str, kind: str) -> None:
    strategy, outputs = prepared(name, kind)
    strategy.float()
    half = cast(strategy, outputs, torch.bfloat16)
    expected = strategy(cast(strategy, half, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found, inside = strategy(half), strategy(cast(strategy, half, torch.float32))
    assert found.dtype == expected.dtype == torch.float32
    if name == "hard_labels":  # torch's own loss, in the precision of its logits
        assert inside.item() == expected.item()
        return
    assert found.item() == inside.item() == expected.item()


@by_run
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e8])
def test_extreme_features_have_finite_gradients(name: str, kind: str, scale: float) -> None:
    strategy, outputs = prepared(name, kind)
    strategy.float()
    outputs = cast(strategy, outputs, torch.float32)
    own = {layer: (scale * outputs.student_features[layer]).detach() for layer in strategy.student_layers()}
    for x in own.values():
        x.requires_grad_()
    logits = (min(scale, 1e4) * outputs.student).detach().requires_grad_()
    extreme = Outputs(outputs.batch, logits, outputs.teacher, own, outputs.teacher_features)
    found = [strategy(extreme), *gradients(strategy, extreme)]
    assert all(bool(x.isfinite().all()) for x in found)


# --- padding


@pytest.mark.parametrize("name", [name for name, kind in LAYERED if kind == "tokens"])
def test_padded_tokens_count_for_nothing(name: str) -> None:
    strategy, outputs = prepared(name, "tokens")
    padded = outputs.batch.kwargs["attention_mask"] == 0
    assert padded.any()

    def disturbed(features: Any, names: list[str]) -> dict[str, Tensor]:
        return {layer: features[layer].detach() + 9.0 * padded[..., None] for layer in names}

    own = disturbed(outputs.student_features, strategy.student_layers())
    for x in own.values():
        x.requires_grad_()
    other = disturbed(outputs.teacher_features, strategy.teacher_layers())
    changed = Outputs(outputs.batch, None, None, own, other)
    assert strategy(changed).item() == pytest.approx(strategy(outputs).item(), rel=1e-12)
    assert all(float(g[padded].abs().max()) == 0.0 for g in gradients(strategy, changed))
    unmasked = Outputs(Batch((), {}, outputs.target), None, None, own, other)
    assert abs(strategy(unmasked).item() - strategy(outputs).item()) > 1e-4


@pytest.mark.parametrize("name", [name for name, kind in LAYERED if kind == "tokens"])
def test_an_example_of_padding_alone(name: str) -> None:
    strategy, outputs = prepared(name, "tokens")
    outputs.batch.kwargs["attention_mask"][0] = 0
    found = [strategy(outputs), *gradients(strategy, outputs)]
    assert all(bool(x.isfinite().all()) for x in found)


# --- in the Distiller


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def part(item: Any, rows: slice) -> Any:
    x, y = item
    return ({key: value[rows] for key, value in x.items()} if isinstance(x, dict) else x[rows]), y[rows]


def accumulated(name: str, kind: str, sizes: list[int]) -> tuple[Tensor, float]:
    item, (student, teacher) = item_of(kind), models(kind)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    batches = [part(item, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    torch.manual_seed(3)
    run = Runner(teacher, student, strategy_of(name, kind), optimizer=sgd, accumulate=len(sizes), sample=item_of(kind))
    losses = run.fit(batches, 1, quiet=True).losses
    found = [p.grad.flatten() for p in (*student.parameters(), *run.strategies.parameters()) if p.grad is not None]
    return torch.cat(found), losses[0]


@by_run
def test_micro_batches_add_up_to_their_batch_where_examples_are_not_related(name: str, kind: str) -> None:
    expected, loss = accumulated(name, kind, [ROWS])
    found, sum_of_parts = accumulated(name, kind, [3, 3, 2])
    assert float(expected.abs().max()) > 1e-5
    if CASES[name].additive:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert sum_of_parts == pytest.approx(loss, rel=1e-9)
    else:
        assert float((found - expected).norm() / expected.norm()) > 0.01
        assert bool(found.isfinite().all())


@by_run
def test_micro_batches_of_one_example(name: str, kind: str) -> None:
    found, loss = accumulated(name, kind, [1] * ROWS)
    assert bool(found.isfinite().all())
    assert 0.0 <= loss < 100.0


class Items(list[Any]):
    """A loader that fails before its item number ``at``."""

    def __init__(self, items: list[Any], at: int | None = None) -> None:
        super().__init__(items)
        self.at = at

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(super().__iter__()):
            if index == self.at:
                raise StopError
            yield item


@by_run
def test_a_resumed_run_is_bit_identical(name: str, kind: str, tmp_path: Path) -> None:
    make_item = token_item if kind == "tokens" else map_item
    items = [make_item(5, seed) for seed in range(4)]

    def distiller(path: Path | None, seed: int) -> Runner:
        torch.manual_seed(seed)  # of the projections
        student, teacher = models(kind)
        terms = [strategy_of(name, kind), (0.5, HardLabels())]
        return Runner(
            teacher, student, terms, optimizer=adam, accumulate=2, checkpoint=path, checkpoint_every=1, sample=items[0]
        )

    torch.manual_seed(0)
    whole = distiller(tmp_path / "whole.pt", 0)
    history = whole.fit(Items(items), 1, quiet=True)
    assert history.step == 2
    with pytest.raises(StopError):
        distiller(tmp_path / "run.pt", 0).fit(Items(items, at=2), 1, quiet=True)
    resumed = distiller(tmp_path / "run.pt", 7)
    assert resumed.fit(Items(items), 1, quiet=True).losses == history.losses
    assert equal(resumed.student, whole.student)
    assert equal(resumed.strategies, whole.strategies)


@by_layered
def test_projections_are_trained(name: str, kind: str) -> None:
    student, teacher = models(kind)
    run = Runner(teacher, student, strategy_of(name, kind), optimizer=adam, sample=item_of(kind))
    before = copy.deepcopy(run.strategies)
    losses = run.fit([item_of(kind)] * 30, 1, quiet=True).losses
    assert losses[-1] < losses[0]
    changed = [not torch.equal(a, b) for a, b in zip(run.strategies.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    assert bool(changed) == (name in ("hidden_states", "gram", "contrastive"))


@pytest.mark.parametrize("name", ["hidden_states", "gram"])
def test_without_a_sample_widths_must_be_the_same(name: str) -> None:
    run = Runner(*models("tokens"), strategy_of(name, "tokens"), optimizer=adam)
    with pytest.raises(ValueError, match=r"'embed' returned 6 features and the teacher's 'embed' 4; pass Distiller"):
        run.fit([token_item()], 1)
    same = Runner(*models("tokens", 6, 6), strategy_of(name, "tokens"), optimizer=adam)
    assert same.fit([token_item()], 1).losses[0] > 0.0
    assert not list(same.strategies.parameters())


def test_contrastive_needs_a_sample() -> None:
    with pytest.raises(ValueError, match=r"Contrastive trains projections of layers, .*pass one as sample="):
        Runner(*models("tokens"), Contrastive("embed"), optimizer=adam)


# --- layers by name


def hooks(*roots: nn.Module) -> int:
    return sum(len(module._forward_hooks) for root in roots for module in root.modules())


class Failing(TokenNet):
    """Raises at its end when it is called in training."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        found = super().forward(x, attention_mask)
        if self.training:
            raise StopError
        return found


def test_hooks_are_removed_also_after_an_exception() -> None:
    item, (student, teacher) = token_item(), models("tokens")
    Runner(teacher, student, HiddenStates("*"), optimizer=adam, sample=item).fit([item], 1)
    assert hooks(student, teacher) == 0
    failing = seeded(lambda: Failing(4), 1)
    run = Runner(teacher, failing, HiddenStates(["query", "key"]), optimizer=adam, sample=item)
    with pytest.raises(StopError):
        run.fit([item], 1)
    assert hooks(failing, teacher) == 0


def deep(layers: int) -> nn.Module:
    blocks = (nn.ModuleDict({"attention": nn.Linear(4, 4), "output": nn.Linear(4, 4)}) for _ in range(layers))
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def test_layers_are_paired_by_wildcards() -> None:
    strategy = HiddenStates("layers.*.output")
    strategy.attach(deep(2), deep(4))
    assert strategy.pairs == [("layers.0.output", "layers.1.output"), ("layers.1.output", "layers.3.output")]
    several = AttentionRelations(("layers.1.attention", "layers.*.output", "layers.1.*"), heads=1)
    with pytest.raises(ValueError, match=r"no module of the student is named 'layers\.1\.attention'"):
        several.attach(deep(1), deep(2))
    several.attach(deep(2), deep(2))
    assert [own for own, _ in several.pairs] == [
        "layers.1.attention",
        "layers.0.output",
        "layers.1.output",
        "layers.1.attention",
        "layers.1.output",
    ]


def test_layers_that_cannot_be_compared() -> None:
    with pytest.raises(RuntimeError, match="HiddenStates: it has no layers yet"):
        HiddenStates("a")(Outputs(Batch((), {}, torch.zeros(2)), None, None))
    message = r"the student's 'a' returned \[2, 3\] and the teacher's 'a' \[2, 4, 3\]; expected the same batch first"
    with pytest.raises(ValueError, match=message):
        of_features(HiddenStates("a"), {"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 4, 3)})
    with pytest.raises(ValueError, match="expected the same batch first"):
        of_features(HiddenStates("a"), {"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="expected the same batch first"):
        of_features(HiddenStates("a"), {"a": torch.zeros(2)}, {"a": torch.zeros(2)})
