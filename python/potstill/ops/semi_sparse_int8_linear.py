"""Linear layer with int8 weights of which two of each four inputs are stored, activations quantised on the fly.

The scheme is that of :mod:`potstill.ops.int8_linear`, and so are the results, bit for bit: zeros are only left out.
There is no CPU kernel: CPUs have no instructions that skip two of four inputs, and would expand the weight first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from potstill.ops.activation import ACTIVATIONS, activation_gradient
from potstill.ops.int8_linear import as_rows, check_ends, fake, int8_linear, note
from potstill.ops.int8_linear import pack as pack_dense
from potstill.ops.op import Cost, Kernel, Op, Sample, gpu_function
from potstill.ops.semi_sparse import ALIGNED, GROUP, UNIT, check_semi, from_semi, laid_out, to_semi

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _reference(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    algorithm: int = 0,
) -> Tensor:
    k = x.shape[-1]
    check_ends("semi_sparse_int8_linear", x, scale.numel(), activation, residual)
    check_semi("semi_sparse_int8_linear", values, indices, scale.numel(), k, (UNIT, ALIGNED))
    weight = as_rows(from_semi(values, indices, k))
    y: Tensor = int8_linear.reference(x, weight, scale, bias, activation, residual)
    return y


def _cuda(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    algorithm: int = 0,
) -> Tensor:
    launch = gpu_function("semi_sparse_int8_linear", "launch")
    if launch is None:
        return _reference(x, values, indices, scale, bias, activation, residual)
    n, k = scale.numel(), x.shape[-1]
    check_ends("semi_sparse_int8_linear", x, n, activation, residual)
    check_semi("semi_sparse_int8_linear", values, indices, n, k, (ALIGNED,))
    y: Tensor = launch(x, values, indices, scale, bias, activation, residual, packed, algorithm)
    return y


def _lay_out(arguments: dict[str, Any], device_type: str) -> dict[str, Any]:
    k = arguments["x"].shape[-1]
    values, indices = laid_out(arguments["values"], arguments["indices"], k, device_type)
    return arguments | {"values": values, "indices": indices}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, scale, bias, ctx.activation, *_ = inputs
    # The activation's derivative needs its input, which is computed again; keeping it would undo the fusion.
    ctx.save_for_backward(values, indices, scale, *((x, bias) if ctx.activation != "none" else ()))
    ctx.in_features, ctx.x_dtype = x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The rounding of x counts as the identity, so dy/dx is the dequantised weight."""
    values, indices, scale, *again = ctx.saved_tensors
    grad_x = grad_bias = None
    grad_residual = grad if ctx.needs_input_grad[6] else None
    if again:
        x, bias = again
        inside = semi_sparse_int8_linear(x.detach(), values, indices, scale, bias)
        grad = activation_gradient(ctx.activation, grad, inside)
    if ctx.needs_input_grad[0]:
        weight = from_semi(values, indices, ctx.in_features).to(grad.dtype)
        grad_x = ((grad * scale.to(grad.dtype)) @ weight).to(ctx.x_dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, scale.shape[0]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, grad_residual, None, None


def _arguments(
    shape: tuple[int, ...],
    n: int,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    special: Iterable[float] = (),
    activation: str = "none",
    residual: bool = False,
) -> dict[str, Any]:
    k = shape[-1]
    random = torch.Generator().manual_seed(k * 7919 + n)
    weight = torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)
    ranks = torch.rand(n, -(-k // GROUP), GROUP, generator=random).argsort(-1)
    values, indices = to_semi(weight * (ranks >= 2).flatten(1)[:, :k])
    x = torch.randn(shape, generator=random)
    for row, value in enumerate(special):  # one in each of the first rows
        x.view(-1, k)[row, k // 2] = value
    return {
        "x": x.to(dtype),
        "values": values,
        "indices": indices,
        "scale": torch.rand(n, generator=random) * 0.01 + 1e-4,
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
        "activation": activation,
        "residual": torch.randn((*shape[:-1], n), generator=random).to(dtype) if residual else None,
    }


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        for k, n in ((1024, 4096), (4096, 4096)):
            for m in (1, 16, 64):
                yield Sample(f"m={m} k={k} n={n}", partial(_arguments, (m, k), n))
        return
    shapes: list[tuple[tuple[int, ...], int]] = [
        ((1, 16), 16), ((1, 1), 1), ((0, 8), 5), ((3, 5), 0), ((7, 770), 1000), ((2, 3, 33), 17), ((13,), 31),
        ((9, 64), 64), ((5, 127), 49), ((1, 1021), 113), ((67, 96), 130), ((130, 24), 40), ((17, 4), 33),
    ]  # fmt: skip
    special = (math.nan, math.inf, -math.inf, 3e38, 1e-45)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for shape, n in shapes:
            yield Sample(f"{list(shape)} -> {n} {name}", partial(_arguments, shape, n, n % 2 == 0, dtype))
        for activation in ACTIVATIONS:
            make = partial(_arguments, (2, 7, 40), 83, True, dtype, (), activation, True)
            yield Sample(f"{activation}, residual, {name}", make)
    yield Sample("nan inf extremes", partial(_arguments, (9, 40), 20, special=special))
    yield Sample("zeros", lambda: _arguments((4, 12), 18) | {"x": torch.zeros(4, 12)})
    columns = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    yield Sample("strided", lambda: _arguments((6, 20), 18) | {"x": columns.t()[::2]})


def _cost(x: Tensor, values: Tensor, scale: Tensor, residual: Tensor | None = None, **_: Any) -> Cost:
    n, k = scale.numel(), x.shape[-1]
    m = x.numel() // max(k, 1)
    outputs = n if residual is None else 2 * n
    # Of the units that skip half of the products: each stored weight is one multiply-add.
    return Cost(int8_ops=float(m * n * k), bytes=0.625 * n * k + x.element_size() * m * (outputs + k))


def _rivals(
    x: Tensor, values: Tensor, indices: Tensor, scale: Tensor, bias: Tensor | None = None, **_: Any
) -> dict[str, Callable[[], Any]]:
    integers = from_semi(values, indices, x.shape[-1])
    packed, floats = pack_dense(integers), integers.float() * scale[:, None]
    return {
        "torch eager": lambda: torch.nn.functional.linear(x, floats, bias),
        "int8_linear": lambda: int8_linear(x, packed, scale, bias),
    }


semi_sparse_int8_linear = Op(
    "semi_sparse_int8_linear(Tensor x, Tensor values, Tensor indices, Tensor scale, Tensor? bias=None, "
    "str activation='none', Tensor? residual=None, Tensor? packed=None, int algorithm=0) -> Tensor",
    reference=_reference,
    fake=lambda x, values, indices, scale, *_, **__: fake(x, values, scale),
    kernels={"cuda": Kernel(_cuda, _DTYPES, "triton", note)},
    lay_out=_lay_out,
    autocast=True,
    differentiable=(0, 4, 6),
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3},
    cost=_cost,
    rivals=_rivals,
)
"""``y = activation(x @ (weight * scale[:, None]).t() + bias) + residual`` with x quantised per row to int8.

- ``values``, ``indices``: the weight, int8 in [-127, 127], as :func:`semi_sparse.to_semi` makes them and
  :func:`semi_sparse.laid_out` lays them out for a device.
- ``packed``: the same weight as :mod:`sparse_units` compresses it, for its ``algorithm``, or None. Given, the sparse
  units of a GPU multiply it, for many rows; without it a kernel that reads half of the weights, for few.
- all else: as for :data:`int8_linear`, whose result this is, bit for bit, either way.

>>> from potstill.ops.int8_linear import quantize_weight
>>> integers, scale = quantize_weight(torch.eye(8))
>>> semi_sparse_int8_linear(torch.arange(8.0)[None], *to_semi(integers), scale).round(decimals=1)
tensor([[0., 1., 2., 3., 4., 5., 6., 7.]])
"""
