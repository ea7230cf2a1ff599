"""How sparsity is spread over layers: counts, the closed form of ERK, and the least sum of errors by trying all."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from potstill import Prune, prune_
from potstill.transform.allocation import cheapest, erk, ranked, relative
from potstill.transform.patterns import Blocks


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 50), nn.ReLU(), nn.Linear(50, 21), nn.Linear(21, 4)
    )


def _data() -> list[Tensor]:
    return [torch.randn(8, 3, 5, 5) for _ in range(2)]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["layer", "global", "erk", "error"]),
    st.sampled_from(["unstructured", "1x4", "4x1", "3x5"]),
    st.sampled_from(["magnitude", "random"]),
    st.floats(0, 0.97),
)
def test_the_total_is_what_was_asked_for(scope: str, pattern: str, criterion: str, sparsity: float) -> None:
    model = _model()
    report = prune_(model, Prune(sparsity, pattern, criterion, scope), _data())  # type: ignore[arg-type]
    blocks = sum(row.blocks for row in report.rows)
    gone = blocks - sum(row.kept_blocks for row in report.rows)
    if scope == "layer":
        assert [r.blocks - r.kept_blocks for r in report.rows] == [int(sparsity * r.blocks + 0.5) for r in report.rows]
    else:
        assert gone == math.floor(sparsity * blocks + 0.5)


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.9, 0.99])
def test_erk_is_the_closed_form(sparsity: float) -> None:
    """density = min(1, eps * raw), with eps found by bisection; Evci et al. 2020."""
    shapes = [(8, 3, 3, 3), (50, 72), (21, 50), (4, 21)]
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    assert raw[0] == pytest.approx((8 + 3 + 3 + 3) / (8 * 3 * 3 * 3))
    low, high = 0.0, 1e6
    for _ in range(200):
        eps = (low + high) / 2
        kept = sum(min(1.0, eps * r) * n for r, n in zip(raw, sizes, strict=True))
        low, high = (eps, high) if kept < (1 - sparsity) * sum(sizes) else (low, eps)
    expected = [(1 - min(1.0, low * r)) * n for r, n in zip(raw, sizes, strict=True)]
    counts = erk(shapes, sizes, sparsity)
    assert all(abs(count - value) < 1.5 for count, value in zip(counts, expected, strict=True))
    assert sum(counts) == math.floor(sparsity * sum(sizes) + 0.5)
    report = prune_(_model(), Prune(sparsity, "unstructured", scope="erk"))
    assert [row.blocks - row.kept_blocks for row in report.rows] == counts


def test_global_ranks_all_layers_together_and_does_not_mind_a_layers_scale() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    scores = []
    for layer in model:  # LAMP, by its definition
        w = layer.weight.detach().flatten().double()
        scores.append(torch.stack([v**2 / (w[w.abs() >= v.abs()] ** 2).sum() for v in w]))
    lowest = set(torch.cat(scores).argsort()[:120].tolist())
    masks = []
    for factor in (1.0, 100.0):
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[1].weight.div_(factor)
        prune_(model, Prune(0.6, "unstructured", scope="global"))
        masks.append(torch.cat([m.mask.flatten() for m in model]))
    assert set((~masks[0]).nonzero().flatten().tolist()) == lowest
    assert torch.equal(*masks)


def test_global_leaves_something_of_every_layer() -> None:
    model = nn.Sequential(*(nn.Linear(size, size) for size in (4, 64)))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    prune_(model, Prune(0.99, "unstructured", scope="global"))
    assert model[0].mask.any()


def test_relative_scores_of_ties_zeros_and_blocks() -> None:
    assert relative(torch.zeros(3)).tolist() == [0, 0, 0]
    shares = relative(torch.ones(2, 2))
    torch.testing.assert_close(shares, torch.tensor([[1 / 4, 1 / 3], [1 / 2, 1.0]]))
    assert ranked([torch.ones(2, 2), torch.ones(3)], 3 / 7) == [3, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=3), min_size=1, max_size=3),
    st.floats(0, 1),
)
def test_cheapest_has_the_least_sum_of_errors(steps: list[list[float]], share: float) -> None:
    """Against all ways to spread the blocks, on convex curves (slopes in rising order)."""
    curves = []
    for slopes in steps:
        places = list(itertools.accumulate([2] * len(slopes)))
        curves.append(list(zip(places, itertools.accumulate(2 * s for s in sorted(slopes)), strict=True)))
    ends = [curve[-1][0] for curve in curves]
    pruned = round(share * sum(ends))

    def error(counts: tuple[int, ...]) -> float:
        total = 0.0
        for count, slopes in zip(counts, steps, strict=True):
            total += sum(sorted(slopes)[i // 2] for i in range(count))
        return total

    ways = [c for c in itertools.product(*(range(end + 1) for end in ends)) if sum(c) == pruned]
    counts = cheapest(curves, pruned)
    assert sum(counts) == pruned
    assert error(tuple(counts)) == pytest.approx(min(map(error, ways)))


def test_cheapest_jumps_over_a_hump_and_says_when_it_cannot() -> None:
    assert cheapest([[(5, 10.0), (10, 11.0)], [(10, 14.0)]], 10) == [10, 0]
    with pytest.raises(ValueError, match="5 more than the curves reach"):
        cheapest([[(5, 1.0)]], 10)


def test_by_error_spares_the_layer_that_matters() -> None:
    """The output is almost that of one layer alone."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 0.01 * self.quiet(x)

    model, x = Sum(), torch.randn(64, 32)
    wanted = model(x)
    twin = Sum()
    twin.load_state_dict(model.state_dict())
    report = prune_(model, Prune(0.5, "unstructured", scope="error"), [x])
    loud, quiet = (row.sparsity for row in report.rows)
    assert quiet > 0.8 > 0.3 > loud
    assert loud + quiet == pytest.approx(1.0)
    prune_(twin, Prune(0.5, "unstructured"))
    assert (model(x) - wanted).norm() < 0.5 * (twin(x) - wanted).norm()


def test_by_error_with_new_weights() -> None:
    """SparseGPT's trials leave no trace: each layer gets what it gets by itself at that sparsity."""
    x = torch.randn(100, 24) @ torch.randn(24, 24)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    alone = copy.deepcopy(model)
    report = prune_(model, Prune(0.5, "1x4", "sparsegpt", "error"), [x])
    assert report.sparsity == pytest.approx(0.5)
    for name in ("1", "0"):  # the last first, so that its inputs are those of the whole model
        row = report.rows[int(name)]
        prune_(alone, Prune(row.sparsity, "1x4", "sparsegpt"), [x], include=name)
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


@pytest.mark.parametrize("scope", ["layer", "erk", "global", "error"])
def test_balanced_rows_in_every_scope(scope: str) -> None:
    model = _model()
    prune_(model, Prune(0.7, "2x4", scope=scope, balanced=True), _data())  # type: ignore[arg-type]
    for i in (0, 3, 5, 6):
        mask = model[i].mask.flatten(1)
        kept = Blocks(2, 4).reduce(mask).count_nonzero(dim=1)
        assert len(kept.unique()) == 1
