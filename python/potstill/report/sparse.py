"""From which sparsity on sparse linear layers are faster than dense ones, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.ops.int8_linear import quantize_weight
from potstill.ops.op import Sample
from potstill.ops.sparse import ROWS, Rows, pack, to_blocks
from potstill.ops.sparse_samples import random_blocks
from potstill.report.bench import BenchRow

Pattern = Literal["1x4", "unstructured"]
Weights = Literal["int8", "float"]


@dataclass(frozen=True)
class Course:
    """How much faster the sparse layer is than ``rival`` (above 1: faster) at each of ``sparsities``, rising.

    ``orders``: which order of its weight, "many" rows or "few", was the faster one there; ``seconds``: its median.
    """

    m: int
    k: int
    n: int
    threads: int
    rival: str
    sparsities: tuple[float, ...]
    speedups: tuple[float, ...]
    orders: tuple[Rows, ...]
    seconds: tuple[float, ...]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Sparsity and speed-up."""
        return list(zip(self.sparsities, self.speedups, strict=True))


def course(sizes: tuple[int, int, int], rival: str, sparsities: Sequence[float], rows: Sequence[BenchRow]) -> Course:
    """From what was measured of the :func:`samples` of each sparsity in turn."""
    by_sparsity = []
    for sparsity, pair in zip(sparsities, zip(rows[::2], rows[1::2], strict=True), strict=True):
        order, best = min(zip(ROWS, pair, strict=True), key=lambda entry: entry[1].ours.median)
        by_sparsity.append((sparsity, best.times_faster_than(rival), order, best.ours.median))
    return Course(*sizes, rows[0].threads, rival, *zip(*sorted(by_sparsity), strict=True))


def samples(m: int, k: int, n: int, sparsity: float, pattern: Pattern, weights: Weights) -> list[Sample]:
    """One random layer of n outputs, packed for many rows and for few; ``sparsity`` is of blocks or of single weights.

    >>> [sample.label for sample in samples(1, 8, 4, 0.5, "1x4", "int8")]
    ['m=1 k=8 n=4 0.5 many', 'm=1 k=8 n=4 0.5 few']
    """
    make = partial(_arguments, m, k, n, sparsity, pattern, weights)
    return [Sample(f"m={m} k={k} n={n} {sparsity:g} {rows}", partial(make, rows)) for rows in ROWS]


def _arguments(
    m: int, k: int, n: int, sparsity: float, pattern: Pattern, weights: Weights, rows: Rows
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=random) * _kept(n, k, sparsity, pattern, random)
    x, bias = torch.randn(m, k, generator=random), torch.randn(n, generator=random)
    if weights == "float":
        return {"x": x, "weight": pack(*to_blocks(weight), k, rows), "out_features": n, "bias": bias}
    integers, scale = quantize_weight(weight)
    return {"x": x, "weight": pack(*to_blocks(integers), k, rows), "scale": scale, "bias": bias}


def _kept(n: int, k: int, sparsity: float, pattern: Pattern, random: torch.Generator) -> Tensor:
    if pattern == "1x4":
        return random_blocks(n, k, sparsity, random)
    return torch.rand(n, k, generator=random) >= sparsity


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The least sparsity of (sparsity, speed-up) where the speed-up reaches 1, linear between the points.

    None if it rises through 1 nowhere, which is also so if it is above everywhere.

    >>> break_even([(0.5, 0.8), (0.7, 1.2)])
    0.6
    """
    for (low, slow), (high, fast) in pairwise(sorted(points)):
        if slow < 1 <= fast:
            return round(low + (1 - slow) / (fast - slow) * (high - low), 6)
    return None


def verdict(points: Sequence[tuple[float, float]], rival: str) -> str:
    """The break-even in words.

    >>> verdict([(0.5, 0.8), (0.7, 1.2)], "int8_linear")
    'faster than int8_linear from a sparsity of 0.60 on'
    """
    found = break_even(points)
    if found is not None:
        return f"faster than {rival} from a sparsity of {found:.2f} on"
    every = all(speedup >= 1 for _, speedup in points)
    none = all(speedup < 1 for _, speedup in points)
    where = "at every sparsity measured" if every or none else "up to a sparsity between those measured"
    return f"{'slower' if none else 'faster'} than {rival} {where}"
