"""``add_layer_norm`` on GPUs: the mean, then the squares of what is left, in float32, as the reference has them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_sum(x, residual, columns, inside):
    """A block of the row, 0 beyond its end."""
    z = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        z += tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
    return z


@triton.jit
def _store_scaled(y, unit, weight, bias, columns, inside):
    if weight is not None:
        unit *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        unit += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + columns, unit.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rows_kernel(x, residual, weight, bias, y, features, x_stride, r_stride, eps, BLOCK: tl.constexpr):
    """A row that one block holds is read once."""
    row = tl.program_id(0).to(tl.int64)
    if residual is not None:
        residual += row * r_stride
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    z = _load_sum(x + row * x_stride, residual, columns, inside)
    centred = tl.where(inside, z - tl.sum(z, 0) / features, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / features + eps)
    _store_scaled(y + row * features, centred * inverse, weight, bias, columns, inside)


@triton.jit
def long_rows_kernel(x, residual, weight, bias, y, features, x_stride, r_stride, eps, BLOCK: tl.constexpr):
    """A longer row is read twice. The means and squares of its blocks merge as Chan, Golub and LeVeque (1983) have it:
    for n values of the mean m, and b more of the mean m + d, the squares grow by the block's own and d^2 n b / (n + b).
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * features
    if residual is not None:
        residual += row * r_stride
    mean, squares = 0.0, 0.0
    for start in range(0, features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < features
        z = _load_sum(x, residual, columns, inside)
        count = tl.minimum(BLOCK, features - start)
        own = tl.sum(z, 0) / count
        centred = tl.where(inside, z - own, 0.0)
        more, share = own - mean, count / (start + count)
        mean += more * share
        squares += tl.sum(centred * centred, 0) + more * more * share * start
    inverse = tl.rsqrt(squares / features + eps)
    for start in range(0, features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < features
        unit = (_load_sum(x, residual, columns, inside) - mean) * inverse
        _store_scaled(y, unit, weight, bias, columns, inside)
