"""Linear layer with float32 weights of which most blocks are zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import _C
from potstill.ops.activation import ACTIVATIONS, activation_gradient, check_activation
from potstill.ops.op import Cost, Kernel, Op, Sample
from potstill.ops.sparse import Rows, check_packed, from_blocks, pack, to_blocks, unpack
from potstill.ops.sparse_samples import bench_samples, csr_linear, random_blocks, test_samples


def _check(x: Tensor, weight: Tensor, out_features: int, activation: str) -> None:
    check_activation("sparse_linear", activation)
    check_packed("sparse_linear", weight, out_features, x.shape[-1], 4)


def _reference(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    _check(x, weight, out_features, activation)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    finite = torch.isfinite(x)
    y = F.linear(x.where(finite, 0.0).to(wide), from_blocks(*unpack(weight), x.shape[-1]).to(wide))
    y = y.masked_fill(~finite.all(-1, keepdim=True), math.nan)
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y)
    return (y if residual is None else y + residual).to(dtype)


def _fake(x: Tensor, weight: Tensor, out_features: int, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _cpu(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    y = x.new_empty(*x.shape[:-1], out_features)
    rows = math.prod(x.shape[:-1])
    x = x.reshape(rows, x.shape[-1]).contiguous()
    if residual is not None:
        residual = residual.reshape(rows, out_features).contiguous()
    _C.sparse_linear(x, weight, out_features, bias, activation, residual, y.view(rows, out_features))
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, out_features, bias, activation, _ = inputs
    ctx.activation, ctx.out_features, ctx.in_features = activation, out_features, x.shape[-1]
    ctx.save_for_backward(weight, *((x, bias) if activation != "none" else ()))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, *again = ctx.saved_tensors
    grad_x = grad_bias = None
    grad_residual = grad if ctx.needs_input_grad[5] else None
    if again:
        x, bias = again
        grad = activation_gradient(ctx.activation, grad, sparse_linear(x.detach(), weight, ctx.out_features, bias))
    if ctx.needs_input_grad[0]:
        grad_x = grad @ from_blocks(*unpack(weight), ctx.in_features).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, grad_residual


def _arguments(
    shape: tuple[int, ...],
    n: int,
    rows: Rows,
    sparsity: float = 0.8,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    special: Iterable[float] = (),
    activation: str = "none",
    residual: bool = False,
) -> dict[str, Any]:
    k = shape[-1]
    random = torch.Generator().manual_seed(k * 7919 + n)
    weight = torch.randn(n, k, generator=random) * random_blocks(n, k, sparsity, random)
    x = torch.randn(shape, generator=random)
    for row, value in enumerate(special):  # one in each of the first rows, where a block meets it
        x.view(-1, k)[row, k // 2] = value
    return {
        "x": x.to(dtype),
        "weight": pack(*to_blocks(weight), k, rows),
        "out_features": n,
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
        "activation": activation,
        "residual": torch.randn((*shape[:-1], n), generator=random).to(dtype) if residual else None,
    }


def _samples(size: str) -> Iterable[Sample]:
    return (
        bench_samples(_arguments)
        if size == "bench"
        else test_samples(_arguments, (math.nan, math.inf, -math.inf, 1e-45))
    )


def _cost(x: Tensor, weight: Tensor, out_features: int, residual: Tensor | None = None, **_: Any) -> Cost:
    n, k = out_features, x.shape[-1]
    m = x.numel() // max(k, 1)
    kept, outputs = float(unpack(weight)[1].numel()), n if residual is None else 2 * n
    mask = n * k / 4 / 8  # a bit for each block
    return Cost(f32_ops=2.0 * m * kept, bytes=4 * kept + mask + x.element_size() * m * (outputs + k))


def _rivals(
    x: Tensor, weight: Tensor, out_features: int, bias: Tensor | None = None, **_: Any
) -> dict[str, Callable[[], Any]]:
    floats = from_blocks(*unpack(weight), x.shape[-1])
    return {
        "torch eager": partial(F.linear, x, floats, bias),
        "torch CSR": csr_linear(x, floats, bias),
    }


sparse_linear = Op(
    "sparse_linear(Tensor x, Tensor weight, int out_features, Tensor? bias=None, str activation='none', "
    "Tensor? residual=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": Kernel(_cpu, frozenset({torch.float32, torch.bfloat16}))},
    autocast=True,
    differentiable=(0, 3, 5),
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3},
    cost=_cost,
    rivals=_rivals,
)
"""``y = activation(x @ weight.t() + bias) + residual`` over the blocks of the weight that are stored.

- ``x``: [..., in_features], float32 or bfloat16 for the kernel (any float dtype for the reference).
- ``weight``: float32 weights, packed by :func:`sparse.pack` for many rows of x or for few.
- ``out_features``: of the weight; ``bias``: [out_features] or None.
- ``activation``, ``residual``: as for :data:`int8_linear`.

Returns [..., out_features] of x's dtype, summed in float32. A row of x with a NaN or an infinity gives a row of NaN.

>>> packed = pack(*to_blocks(torch.eye(8)), 8, "few")
>>> sparse_linear(torch.arange(8.0)[None], packed, 8)
tensor([[0., 1., 2., 3., 4., 5., 6., 7.]])
"""
