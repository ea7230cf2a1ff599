"""Linear layer with float weights of which whole square blocks are zero."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.ops.activation import ACTIVATIONS, activation_gradient, check_activation
from potstill.ops.block_sparse import (
    block_rows,
    check_block_sparse,
    from_block_sparse,
    longest_first,
    to_block_sparse,
)
from potstill.ops.op import Cost, Kernel, Op, Sample, gpu_function

_AT_ONCE = 1 << 24  # inputs that the definition gathers at a time: 64 MB


def _check(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    first: Tensor,
    order: Tensor,
    out_features: int,
    activation: str,
    residual: Tensor | None,
) -> None:
    check_activation("block_sparse_linear", activation)
    check_block_sparse("block_sparse_linear", values, columns, first, order, out_features, x.shape[-1])
    if residual is not None and (residual.shape != (*x.shape[:-1], out_features) or residual.dtype != x.dtype):
        raise ValueError(
            f"block_sparse_linear: residual is {residual.dtype} {list(residual.shape)}, expected the output's "
            f"{x.dtype} {[*x.shape[:-1], out_features]}"
        )


def _reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    first: Tensor,
    order: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    _check(x, values, columns, first, order, out_features, activation, residual)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    size, k = values.shape[-1], x.shape[-1]
    rows = F.pad(x.reshape(math.prod(x.shape[:-1]), k), (0, -k % size)).to(wide)
    parts = rows.split(max(1, _AT_ONCE // max(1, len(values) * size)))
    values, to = values.to(dtype).to(wide).transpose(1, 2), block_rows(first, len(values))
    sums = [_sums(part.view(len(part), -(-k // size), size), values, columns, to, len(order)) for part in parts]
    y = torch.cat(sums)[:, :out_features].contiguous().view(*x.shape[:-1], out_features)
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y)
    return (y if residual is None else y + residual).to(dtype)


def _sums(x: Tensor, values: Tensor, columns: Tensor, rows: Tensor, count: int) -> Tensor:
    """The products of x [m, blocks of inputs, size] and the transposed blocks, in sum by block row, of ``count``."""
    products = x.transpose(0, 1)[columns.long()].bmm(values)
    return x.new_zeros((count, *products.shape[1:])).index_add_(0, rows, products).transpose(0, 1).flatten(1)


def _fake(
    x: Tensor, values: Tensor, columns: Tensor, first: Tensor, order: Tensor, out_features: int, *_: Any, **__: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _cuda(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    first: Tensor,
    order: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    launch = gpu_function("block_sparse_linear", "launch")
    arguments = x, values, columns, first, order, out_features, bias, activation, residual
    if launch is None:
        return _reference(*arguments)
    _check(x, values, columns, first, order, out_features, activation, residual)
    y: Tensor = launch(*arguments)
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, first, order, out_features, bias, activation, _ = inputs
    ctx.activation, ctx.out_features, ctx.in_features = activation, out_features, x.shape[-1]
    ctx.save_for_backward(values, columns, first, order, *((x, bias) if activation != "none" else ()))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, columns, first, order, *again = ctx.saved_tensors
    grad_x = grad_bias = None
    grad_residual = grad if ctx.needs_input_grad[8] else None
    if again:
        x, bias = again
        y = block_sparse_linear(x.detach(), values, columns, first, order, ctx.out_features, bias)
        grad = activation_gradient(ctx.activation, grad, y)
    if ctx.needs_input_grad[0]:
        grad_x = grad @ from_block_sparse(values, columns, first, ctx.out_features, ctx.in_features).to(grad.dtype)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias, None, grad_residual


def _arguments(
    shape: tuple[int, ...],
    n: int,
    size: int,
    density: float,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    activation: str = "none",
    residual: bool = False,
    weights: torch.dtype | None = None,
    special: Iterable[float] = (),
) -> dict[str, Any]:
    k = shape[-1]
    random = torch.Generator().manual_seed(k * 7919 + n)
    kept = torch.rand(-(-n // size), -(-k // size), generator=random) < density
    weight = torch.randn(n, k, generator=random) * kept.repeat_interleave(size, 0).repeat_interleave(size, 1)[:n, :k]
    x = torch.randn(shape, generator=random)
    for row, value in enumerate(special):  # one in each of the first rows
        x.view(-1, k)[row, k // 2] = value
    values, columns, first = to_block_sparse(weight.to(weights or dtype), size)
    return {
        "x": x.to(dtype),
        "values": values,
        "columns": columns,
        "first": first,
        "order": longest_first(first),
        "out_features": n,
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
        "activation": activation,
        "residual": torch.randn((*shape[:-1], n), generator=random).to(dtype) if residual else None,
    }


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        for m in (16, 512, 4096):
            for density in (0.1, 0.2, 0.5):
                for block in (64, 32):
                    label = f"m={m} k=4096 n=4096 block={block} density={density}"
                    yield Sample(label, partial(_arguments, (m, 4096), 4096, block, density, torch.bfloat16))
        return
    shapes: list[tuple[tuple[int, ...], int, int, float]] = [
        ((1, 16), 16, 16, 1.0), ((1, 1), 1, 16, 1.0), ((0, 32), 40, 16, 0.5), ((3, 5), 0, 16, 0.5),
        ((7, 770), 300, 64, 0.3), ((2, 3, 33), 17, 16, 0.6), ((65,), 31, 32, 0.7), ((9, 128), 256, 128, 0.0),
        ((5, 127), 149, 32, 0.4), ((33, 300), 260, 128, 0.5), ((70, 96), 130, 16, 0.3),
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for shape, n, block, density in shapes:
            label = f"{list(shape)} -> {n}, blocks {block}, {density}, {name}"
            yield Sample(label, partial(_arguments, shape, n, block, density, dtype, n % 2 == 0))
        for activation in ACTIVATIONS:
            make = partial(_arguments, (2, 7, 40), 83, 16, 0.5, dtype, True, activation, True)
            yield Sample(f"{activation}, residual, {name}", make)
    yield Sample("float32 weights", partial(_arguments, (9, 70), 50, 16, 0.5, torch.bfloat16, weights=torch.float32))
    special = (math.nan, math.inf, -math.inf, 1e-45)
    yield Sample("nan inf extremes", partial(_arguments, (9, 80), 100, 16, 0.4, special=special))
    columns = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    for label, x in (("zeros", torch.zeros(6, 40)), ("strided", columns.t()[::2])):
        yield Sample(label, partial(_with, x))


def _with(x: Tensor) -> dict[str, Any]:
    return _arguments(tuple(x.shape), 50, 16, 0.6) | {"x": x}


def _cost(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    first: Tensor,
    out_features: int,
    residual: Tensor | None = None,
    **_: Any,
) -> Cost:
    n, k = out_features, x.shape[-1]
    m, kept = x.numel() // max(k, 1), float(values.numel())
    outputs = n if residual is None else 2 * n
    weight = values.element_size() * kept + 4.0 * (columns.numel() + first.numel())
    return Cost(f32_ops=2.0 * m * kept, bytes=weight + x.element_size() * m * (outputs + k))


def _rivals(
    x: Tensor, values: Tensor, columns: Tensor, first: Tensor, out_features: int, bias: Tensor | None = None, **_: Any
) -> dict[str, Callable[[], Any]]:
    dense = from_block_sparse(values, columns, first, out_features, x.shape[-1]).to(x.dtype)
    return {"torch eager": partial(F.linear, x, dense, bias)} | bsr_linear(x, dense, bias, values.shape[-1])


def bsr_linear(x: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> dict[str, Callable[[], Tensor]]:
    """A linear layer by torch's product with a matrix of blocks, to be called, where torch has one for these."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that torch's BSR is in beta
            blocks = weight.to_sparse_bsr(size)
            F.linear(x, blocks, bias)
    except RuntimeError:  # other devices, dtypes and sizes
        return {}
    return {"torch BSR": partial(F.linear, x, blocks, bias)}


block_sparse_linear = Op(
    "block_sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor first, Tensor order, int out_features, "
    "Tensor? bias=None, str activation='none', Tensor? residual=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels={"cuda": Kernel(_cuda, frozenset({torch.float32, torch.bfloat16, torch.float16}), "triton")},
    autocast=True,
    differentiable=(0, 6, 8),
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3},
    cost=_cost,
    rivals=_rivals,
)
"""``y = activation(x @ weight.t() + bias) + residual`` over the square blocks of the weight that are stored.

- ``x``: [..., in_features], any float dtype; float32, bfloat16 and float16 have a kernel on GPUs. Elsewhere plain torch
  multiplies block by block.
- ``values``, ``columns``, ``first``: the weight, by :func:`block_sparse.to_block_sparse`, its blocks of one of
  :data:`block_sparse.SIZES`; values of another dtype than x's are rounded to it.
- ``order``: :func:`block_sparse.longest_first` of ``first``: in which order a GPU begins block rows.
- ``out_features``: of the weight; ``bias``: [out_features] or None.
- ``activation``, ``residual``: as for :data:`int8_linear`.

Returns [..., out_features] of x's dtype, summed in float32. A NaN or an infinity in x meets only what is stored. The
gradient of x is that of the dense layer; the weight gets none.

>>> values, columns, first = to_block_sparse(torch.eye(32), 16)
>>> block_sparse_linear(torch.arange(32.0)[None], values, columns, first, longest_first(first), 32)[0, :5]
tensor([0., 1., 2., 3., 4.])
"""
