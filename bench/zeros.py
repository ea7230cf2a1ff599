"""Linear layers of whose weights many are zero, and from which sparsity on ours are faster than other libraries'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

import torch
from rich import box
from rich.table import Table
from torch import nn

import potstill
from peers import Job
from peers.torch_ import single
from potstill.nn import SparseLinear
from potstill.ops.op import Cost
from potstill.ops.sparse_int8_linear import sparse_int8_linear
from potstill.report import sparse_view
from potstill.report.sparse import Course, Pattern, verdict
from standings import Row

SHAPES = tuple((m, k, n) for k, n in ((768, 3072), (4096, 4096)) for m in (1, 32, 128))
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
PEER = "the best peer"
DENSE = "potstill int8"


@dataclass(frozen=True)
class Layer:
    """``m`` rows by a layer of ``k`` inputs and ``n`` outputs; ``sparsity`` is the share of weights that are zero."""

    m: int
    k: int
    n: int
    pattern: Pattern
    sparsity: float

    @property
    def label(self) -> str:
        return f"m={self.m} k={self.k} n={self.n} {self.pattern} {100 * self.sparsity:g} %"

    def job(self) -> Job:
        """A random layer, pruned by magnitude, as plain ``nn.Linear``."""
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(self.k, self.n))
        potstill.prune_(module, potstill.Prune(self.sparsity, self.pattern))
        module[0] = module[0].to_float()
        return Job(module.eval().requires_grad_(False), (torch.randn(self.m, self.k),))


def layers(shapes: Iterable[tuple[int, int, int]]) -> list[Layer]:
    """Each shape in each pattern, at rising sparsities."""
    return [Layer(*shape, *zeros) for shape in shapes for zeros in product(get_args(Pattern), SPARSITIES)]


def cost(job: Job) -> Cost:
    """Of the blocks that our layer keeps."""
    layer = SparseLinear.from_float(single(job.module))
    return sparse_int8_linear.cost(job.inputs[0], layer.weight, layer.scale)


def courses(measured: Sequence[Layer], rows: Sequence[Row], rival: str) -> list[tuple[Pattern, Course]]:
    """How much faster ours are than ``rival``, :data:`PEER` or a contestant's name, over the sparsities of a layer.

    One for each shape, pattern and number of threads; points where one of the two has no time are left out.
    """
    by_label = {layer.label: layer for layer in measured}
    points: dict[tuple[int, Pattern, tuple[int, int, int]], list[tuple[float, float, str, float]]] = {}
    for row in rows:
        layer = by_label[row.label]
        theirs = row.peer if rival == PEER else rival
        own, other = (row.seconds(name) if name else None for name in (row.ours, theirs))
        if row.ours and own and other:
            order = row.ours.rpartition(" ")[2]
            key = (row.threads, layer.pattern, (layer.m, layer.k, layer.n))
            points.setdefault(key, []).append((layer.sparsity, other / own, order, own))
    return [
        (pattern, Course(*shape, threads, rival, *zip(*sorted(found), strict=True)))
        for (threads, pattern, shape), found in points.items()
    ]


def table(found: Sequence[tuple[Pattern, Course]]) -> Table:
    """One line per course: the speed-ups, and from which sparsity on ours are faster."""
    rival = next((course.rival for _, course in found), "others: nothing was measured")
    result = Table(title=f"sparse: times as fast as {rival}, by share of zeros", box=box.SIMPLE_HEAD, padding=(0, 1))
    result.add_column("", no_wrap=True)
    for heading in ("threads", *(f"{100 * sparsity:g} %" for sparsity in SPARSITIES)):
        result.add_column(heading, justify="right")
    result.add_column("")
    for pattern, course in found:
        speedups = dict(course.points)
        cells = (f"{speedups[sparsity]:.2f}" if sparsity in speedups else "-" for sparsity in SPARSITIES)
        result.add_row(_layer(pattern, course), str(course.threads), *cells, verdict(course.points, "it"))
    return result


def pages(found: Sequence[tuple[Pattern, Course]]) -> Iterator[tuple[Pattern, str]]:
    """For each pattern an HTML document with the curves of its courses."""
    for pattern in dict.fromkeys(pattern for pattern, _ in found):
        title = f"sparse_int8_linear, zeros: {pattern}"
        yield pattern, sparse_view.page(title, [course for other, course in found if other == pattern])


def verdicts(found: Iterable[tuple[Pattern, Course]]) -> list[str]:
    """The last column of :func:`table`, for files."""
    return [
        f"{_layer(pattern, course)}, threads: {course.threads}: {verdict(course.points, course.rival)}"
        for pattern, course in found
    ]


def _layer(pattern: Pattern, course: Course) -> str:
    return f"m={course.m} k={course.k} n={course.n} {pattern}"
