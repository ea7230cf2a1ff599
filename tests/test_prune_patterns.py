"""Patterns: which blocks go, and how many, against loops over blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from potstill import Prune, prune_
from potstill.transform.patterns import Blocks, NofM, parse_pattern

SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 21))


def _blocks(shape: tuple[int, int], rows: int, columns: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in range(shape[0]):
        for j in range(shape[1]):
            found.setdefault((i // rows, j // columns), []).append((i, j))
    return found


def _scores(shape: tuple[int, int], values: int) -> Tensor:
    """With few values there are ties."""
    return torch.randint(values, shape).float()


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5), st.integers(1, 6), st.floats(0, 0.999), st.sampled_from([1, 3, 10**6]), st.booleans())
def test_the_lowest_blocks_go_and_exactly_as_many_as_asked(
    shape: tuple[int, int], rows: int, columns: int, sparsity: float, values: int, balanced: bool
) -> None:
    scores, blocks = _scores(shape, values), _blocks(shape, rows, columns)
    pruned = math.floor(sparsity * len(blocks) + 0.5)
    mask = Blocks(rows, columns).mask(scores, pruned, balanced)
    assert Blocks(rows, columns).count(scores.shape) == len(blocks)
    means = {block: sum(scores[at].item() for at in own) / len(own) for block, own in blocks.items()}
    kept = {block: {mask[at].item() for at in own} for block, own in blocks.items()}
    assert all(len(values) == 1 for values in kept.values()), "a block goes as a whole"
    gone = [block for block, values in kept.items() if values == {False}]
    if not balanced:
        assert len(gone) == pruned
        assert sorted(means[b] for b in gone) == pytest.approx(sorted(means.values())[:pruned])
        return
    lines = 1 + max(block[0] for block in blocks)
    for line in range(lines):
        own = sorted(mean for block, mean in means.items() if block[0] == line)
        lost = sorted(means[b] for b in gone if b[0] == line)
        assert len(lost) == math.floor(pruned / lines + 0.5)
        assert lost == pytest.approx(own[: len(lost)])


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 10**6]))
def test_n_of_m(shape: tuple[int, int], n: int, more: int, values: int) -> None:
    m, scores = n + more, _scores(shape, values)
    mask = NofM(n, m).mask(scores)
    for i in range(shape[0]):
        for start in range(0, shape[1], m):
            group = range(start, min(start + m, shape[1]))
            best = sorted((scores[i, j].item() for j in group), reverse=True)[:n]
            assert sorted((scores[i, j].item() for j in group if mask[i, j]), reverse=True) == best


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "4x1", "16x4", "3x5"])
@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.8, 0.97])
def test_equal_weights_are_pruned_to_the_exact_count(pattern: str, sparsity: float) -> None:
    layer = nn.Linear(50, 37)
    nn.init.constant_(layer.weight, 0.1)
    model = nn.Sequential(layer)
    report = prune_(model, Prune(sparsity, pattern))
    row = report.rows[0]
    assert row.blocks - row.kept_blocks == math.floor(sparsity * row.blocks + 0.5)
    assert row.sparsity == pytest.approx((~model[0].mask).double().mean().item())
    if pattern != "unstructured":
        kept = parse_pattern(pattern).reduce(model[0].mask).flatten().tolist()
        assert kept == sorted(kept), "of equal blocks, partial ones among them, the first go"


def test_a_partial_block_counts_the_mean_of_what_it_has() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0]])
    assert Blocks(1, 4).mask(scores, 1).tolist() == [[False] * 4 + [True]]
    assert Blocks(4, 1).mask(scores.t(), 1).tolist() == [[False]] * 4 + [[True]]


@pytest.mark.parametrize(
    ("text", "expected"), [("4x1", Blocks(4, 1)), ("1:8", NofM(1, 8)), ("unstructured", Blocks(1, 1))]
)
def test_names(text: str, expected: object) -> None:
    assert parse_pattern(text) == expected


@pytest.mark.parametrize("text", ["", "4:2", "4:4", "0x4", "1x", "1 x 4", "block", "1x4x4", "-1x4", "2:4\n", None, 4])
def test_other_names_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected 'unstructured', blocks"):
        Prune(pattern=text)  # type: ignore[arg-type]
