"""Linear layer with 4-bit weights in groups and activations quantised on the fly (W4A8, dynamic).

Weights have a scale, and where asymmetric a zero point, per output and group of inputs, as in GPTQ (Frantar et al.
2022, section 4); activations are quantised per row as in :mod:`potstill.ops.int8_linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import _C
from potstill.ops.int4_layout import (
    BLOCK,
    ROW_BLOCK,
    by_output,
    integers,
    laid_out,
    pack,
    pack_scales,
    scales_laid_out,
)
from potstill.ops.int8_linear import PANEL, quantize_rows
from potstill.ops.op import Cost, Kernel, Op, Sample, gpu_function

GROUP_SIZES = (32, 64, 128)
"""How many inputs may share a scale."""

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})
_MIDDLE = 8  # the zero point of symmetric weights
_SMALLEST_GROUP = 2.0**-100  # a group whose values are all smaller counts as zero


def quantize_groups(weight: Tensor, group_size: int, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rounds ``weight`` to 4 bits; returns integers in 0..15, bfloat16 scales and zero points.

    ``weight`` is [out_features, in_features], any float dtype; the integers have its shape, scales and zero points are
    [out_features, ceil(in_features / group_size)]. A weight is ``(integer - zero) * scale``; symmetric weights have no
    zero points (None), which stands for 8. Scales are rounded to bfloat16 before the integers are chosen, so that the
    short scale costs no accuracy.

    The weight of largest magnitude in a symmetric group becomes -8 times the scale, whose sign follows: all 16 integers
    are used, and the mean squared error of Gaussian weights in groups of 32 is 21 % less than with integers in [-7, 7].
    Raises :class:`ValueError` for another group size, or if a weight is not finite.

    >>> integers, scale, zero = quantize_groups(torch.tensor([[0.5, -1.0, 0.25]]), 32)
    >>> integers, scale, zero
    (tensor([[12,  0, 10]], dtype=torch.uint8), tensor([[0.1250]], dtype=torch.bfloat16), None)
    """
    check_group_size("quantize_groups", group_size)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("quantize_groups: weight has NaN or infinite values; 4 bits cannot hold them")
    n, k = weight.shape
    groups = -(-k // group_size)
    padded = F.pad(weight.detach().to(torch.float32), (0, groups * group_size - k)).view(n, groups, group_size)
    if symmetric:
        largest = padded.gather(2, padded.abs().argmax(2, keepdim=True)).squeeze(2)
        scale, shift = largest / -_MIDDLE, torch.full_like(largest, _MIDDLE)
    else:
        low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
        largest = scale = (high - low) / 15
        shift = torch.round(-low / scale).nan_to_num_(0)
    used = largest.abs() >= _SMALLEST_GROUP
    scale = torch.where(used, scale, torch.ones_like(scale)).to(torch.bfloat16)
    shift = torch.where(used, shift, torch.zeros_like(shift) if not symmetric else shift)
    integers = torch.round(padded / scale.to(torch.float32)[:, :, None]) + shift[:, :, None]
    integers = integers.clamp_(0, 15).to(torch.uint8).view(n, groups * group_size)[:, :k].contiguous()
    return integers, scale, None if symmetric else shift.to(torch.uint8)


def dequantize_groups(integers: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """The float32 weights [out_features, in_features] that the results of :func:`quantize_groups` stand for.

    >>> weight = torch.tensor([[0.5, -1.0, 0.25]])
    >>> dequantize_groups(*quantize_groups(weight, 32), 32)
    tensor([[ 0.5000, -1.0000,  0.2500]])
    """
    columns = torch.arange(integers.shape[1], device=integers.device) // group_size
    shift = _MIDDLE if zero is None else zero[:, columns].to(torch.float32)
    return (integers.to(torch.float32) - shift) * scale[:, columns].to(torch.float32)


def check_group_size(caller: str, group_size: int) -> None:
    """Raises :class:`ValueError` if there is no kernel for ``group_size``."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{caller}: group_size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}")


def _check(x: Tensor, weight: Tensor, scale: Tensor, n: int, group_size: int, zero: Tensor | None) -> None:
    check_group_size("int4_linear", group_size)
    k, panels = x.shape[-1], -(-n // PANEL)
    if weight.dim() == 2:
        scales, makes = [n, -(-k // group_size)], "pack_rows makes the weight, and the others are contiguous"
        shape = [n, -(-k // ROW_BLOCK) * ROW_BLOCK // 2]
    else:
        scales, makes = [panels, -(-k // group_size), PANEL], "pack and pack_scales make it"
        shape = [panels, -(-k // BLOCK), BLOCK * PANEL // 2]
    for name, tensor, expected in (("weight", weight, shape), ("scale", scale, scales), ("zero", zero, scales)):
        if tensor is not None and list(tensor.shape) != expected:
            raise ValueError(
                f"int4_linear: packed {name} has shape {list(tensor.shape)}, but {n} outputs and x with {k} features "
                f"in groups of {group_size} need {expected}; {makes}"
            )


def _reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out_features: int,
    group_size: int,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    _check(x, weight, scale, out_features, group_size, zero)
    n, k = out_features, x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    rounded, x_scale = quantize_rows(x.reshape(math.prod(x.shape[:-1]), k))
    weights, scales = integers(weight, n, k).to(torch.float64), by_output(scale, n).to(wide)
    zeros = None if zero is None else by_output(zero, n).to(torch.float64)
    y = torch.zeros(rounded.shape[0], n, dtype=wide, device=x.device)
    for g, begin in enumerate(range(0, k, group_size)):  # the order of the additions is part of the definition
        shift = _MIDDLE if zeros is None else zeros[:, g : g + 1]
        group = slice(begin, begin + group_size)
        sums = rounded[:, group] @ (weights[:, group] - shift).t()  # exact: |sums| < 2^18
        y = y + sums.to(wide) * scales[:, g]
    y = y * x_scale.to(wide)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], n)


def _fake(x: Tensor, weight: Tensor, scale: Tensor, out_features: int, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out_features: int,
    group_size: int,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    n = out_features
    if weight.dim() == 2:
        raise ValueError(
            f"int4_linear: weight has the layout of GPUs, {list(weight.shape)}, but x is on the CPU, whose kernels "
            "take it packed; laid_out(weight, n, k, 'cpu') does that, and Int4Linear.to(device) by itself"
        )
    y = x.new_empty(*x.shape[:-1], n)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else y.numel() // max(n, 1)
    _C.int4_linear(x.reshape(rows, x.shape[-1]).contiguous(), weight, scale, zero, bias, y.view(rows, n), n, group_size)
    return y


def _cuda(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out_features: int,
    group_size: int,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    launch = gpu_function("int4_linear", "launch")
    if launch is None:
        return _reference(x, weight, scale, out_features, group_size, zero, bias)
    _check(x, weight, scale, out_features, group_size, zero)
    if weight.dim() == 3:
        raise ValueError(
            f"int4_linear: weight is packed, {list(weight.shape)}, as CPU kernels take it, but x is on a GPU; "
            "laid_out(weight, n, k, 'cuda') changes that, and Int4Linear.to(device) by itself"
        )
    y: Tensor = launch(x, weight, scale, out_features, group_size, zero, bias)
    return y


def _lay_out(arguments: dict[str, Any], device_type: str) -> dict[str, Any]:
    n, zero = arguments["out_features"], arguments.get("zero")
    return arguments | {
        "weight": laid_out(arguments["weight"], n, arguments["x"].shape[-1], device_type),
        "scale": scales_laid_out(arguments["scale"], n, device_type),
        "zero": None if zero is None else scales_laid_out(zero, n, device_type),
    }


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, ctx.out_features, ctx.group_size, zero, bias = inputs
    ctx.save_for_backward(weight, scale, zero)
    ctx.in_features, ctx.x_dtype = x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Straight-through: the rounding of x counts as the identity, so dy/dx is the dequantised weight.
    weight, scale, zero = ctx.saved_tensors
    n = ctx.out_features
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        zeros = None if zero is None else by_output(zero, n)
        values = dequantize_groups(integers(weight, n, ctx.in_features), by_output(scale, n), zeros, ctx.group_size)
        grad_x = (grad @ values.to(grad.dtype)).to(ctx.x_dtype)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, n).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias


def _arguments(
    shape: tuple[int, ...],
    n: int,
    group_size: int = 32,
    zeros: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    special: Iterable[float] = (),
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(shape[-1] * 7919 + n)
    groups = -(-shape[-1] // group_size)
    x = torch.randn(shape, generator=random)
    for row, value in enumerate(special):  # one in each of the first rows
        x.view(-1, shape[-1])[row, shape[-1] // 2] = value
    scale = torch.rand(n, groups, generator=random) * 0.1 - 0.03
    zero = torch.randint(0, 16, (n, groups), generator=random, dtype=torch.uint8)
    return {
        "x": x.to(dtype),
        "weight": pack(torch.randint(0, 16, (n, shape[-1]), generator=random, dtype=torch.uint8)),
        "scale": pack_scales(scale.to(torch.bfloat16)),
        "out_features": n,
        "group_size": group_size,
        "zero": pack_scales(zero) if zeros else None,
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
    }


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        for k, n in [(768, 768), (768, 3072), (4096, 4096)]:
            for m in (1, 8, 32, 128):
                for g in (32, 128):
                    label = f"m={m} k={k} n={n} group={g}"
                    yield Sample(label, lambda m=m, k=k, n=n, g=g: _arguments((m, k), n, g))  # type: ignore[misc]
        return
    shapes: list[tuple[tuple[int, ...], int]] = [
        ((1, 32), 16), ((1, 1), 1), ((0, 8), 5), ((3, 5), 0), ((7, 770), 200), ((2, 3, 33), 17), ((13,), 31),
        ((9, 64), 64), ((5, 127), 49), ((12, 256), 80), ((1, 1021), 113), ((67, 96), 130), ((1030, 24), 40),
    ]  # fmt: skip
    for i, (shape, n) in enumerate(shapes):
        for j, dtype in enumerate((torch.float32, torch.bfloat16)):
            g, zeros = GROUP_SIZES[(i + j) % 3], (i + j) % 2 == 1
            label = f"{list(shape)} -> {n} {str(dtype).removeprefix('torch.')} group={g}{' zeros' if zeros else ''}"
            yield Sample(label, lambda s=shape, n=n, g=g, z=zeros, d=dtype: _arguments(s, n, g, z, n % 2 == 0, d))  # type: ignore[misc]
    special = (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45)
    yield Sample("nan inf extremes", lambda: _arguments((9, 40), 20, special=special))
    yield Sample("zero rows", lambda: _arguments((4, 12), 18) | {"x": torch.zeros(4, 12)})
    yield Sample("strided", lambda: _arguments((6, 20), 18) | {"x": torch.randn(20, 12).t()[::2]})


def _cost(x: Tensor, weight: Tensor, scale: Tensor, out_features: int, zero: Tensor | None = None, **_: Any) -> Cost:
    k = x.shape[-1]
    m = x.numel() // max(k, 1)
    weights = weight.numel() + 2 * scale.numel() + (0 if zero is None else zero.numel())
    moved = weights + x.element_size() * m * (out_features + k)
    return Cost(int8_ops=2.0 * m * out_features * k, bytes=float(moved))


def _rivals(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out_features: int,
    group_size: int,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Callable[[], Any]]:
    from potstill.ops import int8_linear as int8
    from potstill.ops.rivals import matmul_nbits

    n, k = out_features, x.shape[-1]
    numbers, scales = integers(weight, n, k), by_output(scale, n)
    zeros = None if zero is None else by_output(zero, n)
    values = dequantize_groups(numbers, scales, zeros, group_size)
    linear = torch.nn.Linear(k, n, bias=bias is not None).requires_grad_(False)
    linear.weight.copy_(values)
    if bias is not None:
        linear.bias.copy_(bias)
    bytes_, byte_scale = int8_weight(values)
    return {
        "torch eager": lambda: linear(x),
        "our int8_linear": lambda: int8(x, bytes_, byte_scale, bias),
    } | matmul_nbits(x, numbers, scales, zeros, bias, group_size)


def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The packed int8 weights and scales of ``weight``, for :data:`ops.int8_linear`."""
    from potstill.ops.int8_linear import pack as pack_int8
    from potstill.ops.int8_linear import quantize_weight

    integers, scale = quantize_weight(weight)
    return pack_int8(integers), scale


int4_linear = Op(
    "int4_linear(Tensor x, Tensor weight, Tensor scale, int out_features, int group_size, Tensor? zero=None, "
    "Tensor? bias=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": Kernel(_cpu, _KERNEL_DTYPES), "cuda": Kernel(_cuda, _KERNEL_DTYPES | {torch.float16}, "triton")},
    autocast=True,
    differentiable=(0, 6),
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3},  # one rounding per group, of sums that partly cancel
    cost=_cost,
    rivals=_rivals,
    lay_out=_lay_out,
)
"""``y = x @ ((weight - zero) * scale).t() + bias`` with x quantised per row to int8 and 4-bit weights in groups.

- ``x``: [..., in_features], float32 or bfloat16 for the kernels, on GPUs float16 too (any float dtype for the
  reference).
- ``weight``: integers in 0..15, packed by :func:`int4_layout.pack`, on GPUs by :func:`int4_layout.pack_rows`.
- ``scale``: one bfloat16 per output and group of ``group_size`` inputs (32, 64 or 128; the last group may be short), on
  the CPU packed by :func:`pack_scales`, on GPUs [out_features, groups]. ``zero``: likewise, uint8 in 0..15; None stands
  for 8 everywhere.
- ``bias``: [out_features] or None.

Returns [..., out_features] of x's dtype. The sums over a group are exact integers; times their scales they are added in
float32 in the order of the groups (on GPUs in another, always the same). A row of x with a NaN or an infinity gives a
row of NaN. The gradient of x takes the rounding as the identity (straight-through); weight, scale and zero get none.

>>> integers, scale, _ = quantize_groups(torch.eye(3), 32)
>>> x = torch.tensor([[1.0, 2.0, 4.0]])
>>> int4_linear(x, pack(integers), pack_scales(scale), 3, 32).round(decimals=1)
tensor([[1., 2., 4.]])
"""
