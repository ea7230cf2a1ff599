"""GPTQ: rounds a weight column by column and lets the columns to come make up for each error.

Frantar, Ashkboos, Hoefler and Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers". For one output w and its rounding q the error is (w - q) H (w - q)' with H = sum x'x over the inputs x.
When column j has been rounded, the columns after it that minimise the rest are found in closed form: with the upper
triangular U of H^-1 = U'U they change by -(w_j - q_j) / U_jj * U_j,j+1.. , and the error of column j comes to
((w_j - q_j) / U_jj)^2. That is also what tells which clipping of the group's scale is best.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from potstill.errors import PotstillError
from potstill.transform.grid import Grid

_BLOCK = 128  # columns that are rounded before those after them hear of it; groups are blocks of their own
_DAMPINGS = (0.01, 0.1, 1.0, 10.0)

WORKSPACE = 3 * 8
"""Bytes for each entry of a Hessian while its factor is computed: three matrices in double precision."""


Fit = tuple[Tensor, Tensor | None]
"""The scale and zero of each output of a group."""


class FactorisationError(PotstillError):
    """Second moments that GPTQ can do nothing with."""


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Rounds ``weight`` [n, k] for inputs with the second moments ``hessian`` [k, k].

    Returns int8 [n, k]; the scale and zero, [n] or with groups [n, groups]; and the damping that was needed.
    """
    order = torch.arange(len(hessian), device=hessian.device)
    if grid.group is None:  # strongest inputs first: what is rounded last has the fewest others to make up for it
        order = hessian.diagonal().argsort(descending=True)  # groups gain nothing by it, as they must stay together
    factor, damping = inverse_factor(hessian[order][:, order])
    columns = weight.detach().float().t()[order]
    integers = torch.empty_like(columns, dtype=torch.int8)
    with _one_thread():
        fits = list(_round_columns(columns, integers, factor, grid))
    scales, zeros = zip(*fits, strict=True)
    return integers[order.argsort()].t().contiguous(), *grid.stack(scales, zeros), damping


def _round_columns(columns: Tensor, integers: Tensor, factor: Tensor, grid: Grid) -> Iterator[Fit]:
    """Rounds ``columns`` [k, n] into ``integers`` [k, n], and yields scale and zero of each group."""
    importance = factor.diagonal().square().reciprocal()
    for start in range(0, len(columns), grid.group or _BLOCK):
        block = columns[start : start + (grid.group or _BLOCK)]
        stop = start + len(block)
        if grid.group or not start:
            members = slice(start, stop if grid.group else None)
            scale, zero = grid.fit(columns[members].t(), importance[members])
            yield scale, zero
        errors, inside = torch.empty_like(block), factor[start:stop, start:stop].t().contiguous()
        for i, column in enumerate(block):
            column.addmv_(errors[:i].t(), inside[i, :i], alpha=-1)
            rounded = grid.round(column, scale, zero)
            integers[start + i] = rounded
            errors[i] = (column - grid.read(rounded, scale, zero)) / inside[i, i]
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A column is too little work to share out: beside other programs threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def inverse_factor(hessian: Tensor) -> tuple[Tensor, float]:
    """The upper triangular U with (H + d mean(diag H) I)^-1 = U'U, and the damping d.

    d is 0.01, and ten times as much whenever the factorisation fails. An input that was always zero gets the mean on
    the diagonal: its weights are rounded to nearest and change no others. Reversed, H = R R' with an upper triangular
    R, and U = R^-1; so H is factorised once and never inverted. That takes double precision: with 4096 inputs the
    eigenvalues of a damped H spread over 4096 / 0.01 = 4e5, too much for the 2^-24 of float32.

    Raises :class:`FactorisationError` if H is far from positive definite.
    """
    h = hessian.double().flip(0, 1)
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean
    added = 0.0
    for damping in _DAMPINGS:
        diagonal += (damping - added) * mean
        added = damping
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            del h, diagonal
            one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1).float(), damping
    raise FactorisationError(
        f"the second moments of its inputs are not positive definite, even damped by {_DAMPINGS[-1]:g}"
    )
