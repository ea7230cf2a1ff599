"""What the sparse linear ops are tested and timed on, and against."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from potstill.ops.activation import ACTIVATIONS
from potstill.ops.op import Sample
from potstill.ops.sparse import ROWS, Rows

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
LAYERS = [(768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096)]
MANY = 16
"""Rows from which on the order for many is faster."""


def random_blocks(n: int, k: int, sparsity: float, generator: torch.Generator) -> Tensor:
    """Which weights [n, k] stay if ``sparsity`` of their blocks are cut at random; the first of several outputs none.

    >>> random_blocks(2, 6, 0.0, torch.Generator()).tolist()
    [[False, False, False, False, False, False], [True, True, True, True, True, True]]
    """
    mask = torch.rand(n, -(-k // 4), generator=generator) >= sparsity
    mask[:1] &= n == 1
    return mask.repeat_interleave(4, 1)[:, :k]


def bench_samples(arguments: Callable[..., dict[str, Any]]) -> Iterable[Sample]:
    """The dense layers' shapes at four sparsities, each in the order for its number of rows."""
    for k, n in LAYERS:
        for m in (1, 8, 32, 128, 512):
            for sparsity in SPARSITIES:
                order: Rows = "many" if m >= MANY else "few"
                label = f"m={m} k={k} n={n} sparsity={sparsity}"
                yield Sample(label, partial(arguments, (m, k), n, order, sparsity))


def test_samples(arguments: Callable[..., dict[str, Any]], special: tuple[float, ...]) -> Iterable[Sample]:
    """Odd shapes, sparsities and dtypes in both orders; ``special`` values in the first rows."""
    shapes: list[tuple[tuple[int, ...], int, float]] = [
        ((1, 16), 16, 0.5), ((1, 1), 1, 0.0), ((0, 8), 5, 0.5), ((3, 5), 0, 0.5), ((7, 770), 1000, 0.9),
        ((2, 3, 33), 17, 0.3), ((13,), 31, 0.5), ((9, 64), 64, 1.0), ((5, 127), 49, 0.8), ((1, 1021), 113, 0.0),
        ((16, 1600), 130, 0.8), ((17, 96), 129, 0.7), ((31, 640), 200, 0.5), ((67, 96), 130, 0.5),
        ((1030, 24), 40, 0.5),
    ]  # fmt: skip
    for rows in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{rows} rows, {str(dtype).removeprefix('torch.')}"
            for shape, n, sparsity in shapes:
                make = partial(arguments, shape, n, rows, sparsity, n % 2 == 0, dtype)
                yield Sample(f"{list(shape)} -> {n}, {sparsity}, {name}", make)
            for activation in ACTIVATIONS:
                make = partial(arguments, (2, 7, 40), 83, rows, 0.6, True, dtype, (), activation, True)
                yield Sample(f"{activation}, residual, {name}", make)
        yield Sample(f"nan inf extremes, {rows} rows", partial(arguments, (9, 40), 20, rows, 0.5, special=special))
        columns = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
        for label, x in (("zeros", torch.zeros(6, 20)), ("strided", columns.t()[::2])):
            yield Sample(f"{label}, {rows} rows", partial(_with, arguments, x, 18, rows))


def _with(arguments: Callable[..., dict[str, Any]], x: Tensor, n: int, rows: Rows) -> dict[str, Any]:
    return arguments(tuple(x.shape), n, rows, 0.5) | {"x": x}


def csr_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """A linear layer by torch's product of a sparse matrix, whose dense factor and result are columns, to be called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch's CSR is in beta
        csr = weight.to_sparse_csr()

    def run() -> Tensor:
        y = (csr @ x.t()).t()
        return y if bias is None else y + bias

    return run
