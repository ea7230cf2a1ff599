"""Residual addition and layer normalisation (Ba, Kiros and Hinton 2016) in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import _C
from potstill.ops.op import Cost, Kernel, Op, Sample, gpu_function

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"add_layer_norm: residual is {residual.dtype} {list(residual.shape)}, expected that of x, "
            f"{x.dtype} {list(x.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"add_layer_norm: {name} has shape {list(parameter.shape)}, expected {list(x.shape[-1:])}: "
                f"one value per feature of x, which has shape {list(x.shape)}"
            )


def _normalised(x: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Each row of ``x + residual`` less its mean, times 1 / sqrt(var + eps); and that factor [..., 1]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    centred = z - z.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def _reference(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check(x, residual, weight, bias)
    y, _ = _normalised(x, residual, eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _cpu(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _C.add_layer_norm(x, None if residual is None else residual.contiguous(), weight, bias, eps, y)
    return y


def _cuda(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check(x, residual, weight, bias)
    launch = gpu_function("add_layer_norm", "launch")
    y: Tensor = (_reference if launch is None else launch)(x, residual, weight, bias, eps)
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, residual, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
    # With u the normalised row, s its factor and g = grad * weight:  dz = s (g - mean(g) - u mean(g u)).
    x, residual, weight = ctx.saved_tensors
    unit, inverse = _normalised(x, residual, ctx.eps)
    grad = grad.to(unit.dtype)
    grad_z = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        g = grad if weight is None else grad * weight
        grad_z = inverse * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))
        grad_z = grad_z.to(x.dtype)
    if ctx.needs_input_grad[2]:
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_z, None if residual is None else grad_z, grad_weight, grad_bias, None


def _arguments(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, residual: bool = True, affine: bool = True
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(shape[-1] * 7919 + len(shape))
    features = shape[-1:]
    return {
        "x": torch.randn(shape, generator=random).to(dtype),
        "residual": torch.randn(shape, generator=random).to(dtype) if residual else None,
        "weight": torch.randn(features, generator=random).to(dtype) if affine else None,
        "bias": torch.randn(features, generator=random).to(dtype) if affine else None,
        "eps": 1e-5,
    }


def _with_nan_and_infinities() -> dict[str, Any]:
    arguments = _arguments((9, 40))
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        arguments["x"][row, 7 * row] = value
    arguments["residual"][5, 39] = float("nan")
    return arguments


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        for rows, features in ((128, 768), (1, 768), (8, 768), (1024, 768), (512, 1024), (2048, 4096)):
            for dtype in (torch.float32, torch.bfloat16):
                label = f"{rows} x {features} {str(dtype).removeprefix('torch.')}"
                yield Sample(label, lambda s=(rows, features), d=dtype: _arguments(s, d))  # type: ignore[misc]
        return
    shapes: list[tuple[int, ...]] = [
        (1, 16), (3, 2), (0, 8), (3, 0), (7, 770), (2, 3, 33), (13,), (5, 64), (4, 127), (67, 96), (3, 4099), (700, 31),
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for i, shape in enumerate(shapes):
            label = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
            yield Sample(label, lambda s=shape, d=dtype, i=i: _arguments(s, d, i % 3 != 1, i % 4 != 2))  # type: ignore[misc]
    yield Sample("one feature", lambda: _arguments((5, 1)))
    yield Sample("nan inf", _with_nan_and_infinities)
    yield Sample("far from zero", lambda: _arguments((6, 515)) | {"residual": torch.full((6, 515), 20.0)})
    yield Sample("zeros", lambda: _arguments((4, 24)) | {"x": torch.zeros(4, 24), "residual": torch.zeros(4, 24)})
    yield Sample("tiny rows", lambda: _arguments((4, 24), residual=False) | {"x": torch.full((4, 24), 1e-40)})
    yield Sample("strided", lambda: _arguments((6, 12)) | {"x": torch.randn(12, 12).t()[::2]})
    yield Sample("float32 parameters", lambda: _arguments((6, 45)) | {n: torch.randn(6, 45).bfloat16() for n in _XR})


_XR = ("x", "residual")


def _cost(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Cost:
    reads = 1 if residual is None else 2
    return Cost(f32_ops=9.0 * x.numel(), bytes=float((reads + 1) * x.nbytes))


def _rivals(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> dict[str, Callable[[], Any]]:
    def eager() -> Tensor:
        return F.layer_norm(x if residual is None else x + residual, x.shape[-1:], weight, bias, eps)

    return {"torch eager": eager}


add_layer_norm = Op(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": Kernel(_cpu, _KERNEL_DTYPES), "cuda": Kernel(_cuda, _KERNEL_DTYPES | {torch.float16}, "triton")},
    differentiable=(0, 1, 2, 3),
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    tolerance={torch.float32: 4e-6, torch.bfloat16: 4e-3},
    cost=_cost,
    rivals=_rivals,
)
"""``F.layer_norm(x + residual, x.shape[-1:], weight, bias, eps)`` in one pass, without a temporary.

- ``x``: [..., features], float32 or bfloat16 for the kernels, on GPUs float16 too (any float dtype for the reference).
- ``residual``: of x's shape and dtype, or None.
- ``weight``, ``bias``: [features], float32 or bfloat16 (on GPUs float16 too) whatever x is, or None.

Returns x's shape and dtype. Sums and statistics are float32 and ``x + residual`` is not rounded to bfloat16. A row with
a NaN or an infinity gives a row of NaN. Raises :class:`ValueError` for shapes or dtypes that do not agree. All four
tensors get gradients.

>>> add_layer_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]), None, None, 1e-5)
tensor([[-1.0000,  1.0000]])
"""
