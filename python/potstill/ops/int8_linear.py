"""Linear layer with int8 weights and activations quantised on the fly (W8A8, dynamic, symmetric).

The quantisation scheme is that of LLM.int8() (Dettmers et al. 2022, section 3.1) without outlier columns: one scale
per row of the activations (per token) and one per row of the weight (per output channel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import _C
from potstill.ops.activation import ACTIVATIONS, activation_gradient, check_activation
from potstill.ops.op import Cost, Kernel, Op, Sample, gpu_function

PANEL = 16
"""Outputs in one panel of packed weights."""

MAX_FEATURES = (2**31 - 1) // 127**2
"""Inputs of a layer whose integer sums fit 32 bits whatever its weights: 133,144."""

ROW_DEVICES = frozenset({"cuda"})
"""Types of the devices whose kernels take a weight as :func:`as_rows` lays it out; all others take it packed."""

ALIGNED = 16
"""Inputs whose multiple a row of a weight has on GPUs."""

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})
_SMALLEST_ROW = 2.0**-100  # a row whose values are all smaller counts as zero; keeps 127 / max finite


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of ``weight`` to int8 in [-127, 127]; returns the integers and the fp32 scales.

    ``weight`` is [out_features, in_features], any float dtype; scales are max|row| / 127, and 1 for a row of zeros.
    Raises :class:`ValueError` if a weight is not finite.

    >>> quantize_weight(torch.tensor([[1.0, -0.5, 0.25]]))[0]
    tensor([[127, -64,  32]], dtype=torch.int8)
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("quantize_weight: weight has NaN or infinite values; int8 cannot hold them")
    rows = weight.detach().to(torch.float32)
    largest = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(rows.shape[0], 1)
    scale = torch.where(largest < _SMALLEST_ROW, torch.ones_like(largest), largest / 127.0)
    return torch.round(rows / scale).clamp_(-127, 127).to(torch.int8), scale.squeeze(1)


def pack(weight: Tensor) -> Tensor:
    """Reorders int8 weights [n, k] into the layout that CPU kernels stream: [ceil(n/16), ceil(k/4) + 1, 64] int8.

    A panel holds 16 outputs: per group of 4 inputs 16 x 4 bytes, then the outputs' weight sums as 16 int32. Rows and
    columns beyond n and k are zero. It is the same for every instruction set. Undone by :func:`unpack`.

    >>> w = torch.randint(-127, 128, (20, 7), dtype=torch.int8)
    >>> pack(w).shape, torch.equal(unpack(pack(w), 20, 7), w)
    (torch.Size([2, 3, 64]), True)
    """
    n, k = weight.shape
    panels, groups = -(-n // PANEL), -(-k // 4)
    padded = F.pad(weight, (0, groups * 4 - k, 0, panels * PANEL - n))
    body = padded.view(panels, PANEL, groups, 4).transpose(1, 2).reshape(panels, groups, 4 * PANEL)
    sums = padded.sum(dim=1, dtype=torch.int32).view(panels, 1, PANEL).view(torch.int8)
    return torch.cat([body, sums], dim=1)


def unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """The int8 weights [n, k] that :func:`pack` was given."""
    panels, groups = packed.shape[0], packed.shape[1] - 1
    rows = packed[:, :-1].reshape(panels, groups, PANEL, 4).transpose(1, 2).reshape(panels * PANEL, groups * 4)
    return rows[:n, :k].contiguous()


def as_rows(weight: Tensor) -> Tensor:
    """A copy of int8 weights [n, k] in the layout of GPUs: [n, k rounded up to 16], where the rest is 0.

    So every row begins at an address from which 16 bytes can be loaded at once. Undone by :func:`integers`.
    """
    return F.pad(weight, (0, -weight.shape[1] % ALIGNED))


def integers(weight: Tensor, n: int, k: int) -> Tensor:
    """The int8 weights [n, k] of ``weight``, which :func:`pack` or :func:`as_rows` has laid out."""
    return unpack(weight, n, k) if weight.dim() == 3 else weight[:, :k]


def laid_out(weight: Tensor, n: int, k: int, device_type: str) -> Tensor:
    """``weight``, in either layout, in the one that the kernels of ``device_type`` take.

    It stays on its device; one that is laid out so already is returned itself.

    >>> w = torch.randint(-127, 128, (20, 7), dtype=torch.int8)
    >>> rows = laid_out(pack(w), 20, 7, "cuda")
    >>> rows.shape, laid_out(rows, 20, 7, "cuda") is rows, laid_out(rows, 20, 7, "cpu").equal(pack(w))
    (torch.Size([20, 16]), True, True)
    """
    if device_type in ROW_DEVICES:
        return as_rows(integers(weight, n, k)) if weight.dim() == 3 else weight
    return pack(integers(weight, n, k)) if weight.dim() == 2 else weight


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of ``x`` [m, k] to integers in [-127, 127]; returns them as float64 and the fp32 scales [m, 1].

    A row with a NaN or an infinity has scale NaN; a row whose values are all below 2^-100 counts as zero.
    """
    rows = x.to(torch.float32)
    largest = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(rows.shape[0], 1)
    finite = torch.isfinite(largest)
    used = finite & (largest >= _SMALLEST_ROW)
    inverse = torch.where(
        used, torch.full_like(largest, 127.0) / largest, torch.zeros_like(largest)
    )  # not 127 * (1 / x)
    rounded = torch.where(used, torch.round(rows * inverse), torch.zeros_like(rows)).to(torch.float64)
    scale = torch.where(used, largest / 127.0, torch.zeros_like(largest))
    return rounded, torch.where(finite, scale, torch.full_like(scale, torch.nan))


def check_ends(op: str, x: Tensor, n: int, activation: str, residual: Tensor | None) -> None:
    """Raises :class:`ValueError` for an activation, a residual or more features than ``op`` with n outputs takes."""
    k = x.shape[-1]
    check_activation(op, activation)
    if residual is not None and (residual.shape != (*x.shape[:-1], n) or residual.dtype != x.dtype):
        raise ValueError(
            f"{op}: residual is {residual.dtype} {list(residual.shape)}, expected the output's {x.dtype} "
            f"{[*x.shape[:-1], n]}"
        )
    if k > MAX_FEATURES:
        raise ValueError(
            f"{op}: x has {k} features; sums of int8 products are exact up to {MAX_FEATURES}; split the layer"
        )


def _check(x: Tensor, weight: Tensor, scale: Tensor, activation: str, residual: Tensor | None) -> None:
    n, k = scale.numel(), x.shape[-1]
    check_ends("int8_linear", x, n, activation, residual)
    packed = (-(-n // PANEL), -(-k // 4) + 1, 4 * PANEL)
    rows = (n, -(-k // ALIGNED) * ALIGNED)
    if tuple(weight.shape) not in (packed, rows):
        raise ValueError(
            f"int8_linear: weight has shape {list(weight.shape)}, but {n} scales and x with {k} features need "
            f"{list(packed)}, which pack([out_features, in_features]) makes, or on a GPU {list(rows)} by as_rows()"
        )


def _reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    _check(x, weight, scale, activation, residual)
    n, k = scale.numel(), x.shape[-1]
    rows = x.reshape(-1, k)
    rounded, x_scale = quantize_rows(rows if factor is None else rows.to(torch.float32) * factor)
    sums = rounded @ integers(weight, n, k).to(torch.float64).t()  # exact: |sums| < 2^53
    wide = torch.promote_types(x.dtype, torch.float32)
    y = sums.to(wide) * (x_scale * scale).to(wide)
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y).reshape(*x.shape[:-1], n)
    return (y if residual is None else y + residual).to(x.dtype)


def fake(x: Tensor, weight: Tensor, scale: Tensor, *_: Any, **__: Any) -> Tensor:
    """A result of the right shape and dtype; also of :data:`sparse_int8_linear`, as are the two below."""
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    n = scale.shape[0]
    if weight.dim() == 2:
        raise ValueError(
            f"int8_linear: weight has the layout of GPUs, {list(weight.shape)}, but x is on the CPU, whose kernels "
            "take it packed; laid_out(weight, n, k, 'cpu') does that, and Int8Linear.to(device) by itself"
        )
    if residual is not None:
        _check(x, weight, scale, activation, residual)
        residual = residual.reshape(-1, n).contiguous()
    if x.dim() == 2 and x.is_contiguous():  # the common case, kept short: it is half the time of a small layer
        y = x.new_empty(x.shape[0], n)  # sizes one by one: as a tuple they take 0.4 us more
        _C.int8_linear(x, weight, scale, bias, activation, residual, factor, y)
        return y
    y = x.new_empty(*x.shape[:-1], n)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else y.numel() // max(n, 1)
    x = x.reshape(rows, x.shape[-1]).contiguous()
    _C.int8_linear(x, weight, scale, bias, activation, residual, factor, y.view(rows, n))
    return y


def _cuda(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    launch = gpu_function("int8_linear", "launch")
    if launch is None:
        return _reference(x, weight, scale, bias, activation, residual, factor)
    _check(x, weight, scale, activation, residual)
    if weight.dim() == 3:
        raise ValueError(
            f"int8_linear: weight is packed, {list(weight.shape)}, as CPU kernels take it, but x is on a GPU; "
            "laid_out(weight, n, k, 'cuda') changes that, and Int8Linear.to(device) by itself"
        )
    y: Tensor = launch(x, weight, scale, bias, activation, residual, factor)
    return y


def _lay_out(arguments: dict[str, Any], device_type: str) -> dict[str, Any]:
    n, k = arguments["scale"].numel(), arguments["x"].shape[-1]
    return arguments | {"weight": laid_out(arguments["weight"], n, k, device_type)}


def note() -> str:
    """What GPUs multiply int8 numbers as; see :func:`tiles.told`."""
    told = gpu_function("tiles", "told")
    return "" if told is None else str(told())


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what :func:`straight_through` needs."""
    x, weight, scale, bias, activation, _, factor = inputs
    ctx.activation = activation
    # The activation's derivative needs its input, which is computed again; keeping it would undo the fusion.
    ctx.save_for_backward(weight, scale, factor, *((x, bias) if activation != "none" else ()))
    ctx.in_features, ctx.x_dtype = x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def straight_through(
    ctx: Any, grad: Tensor, op: Callable[..., Tensor], integers: Callable[[Tensor, int, int], Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of ``op``, whose weight holds ``integers(weight, n, k)``.

    The rounding of x counts as the identity, so dy/dx is the dequantised weight.
    """
    weight, scale, factor, *again = ctx.saved_tensors
    grad_x = grad_bias = None
    grad_residual = grad if ctx.needs_input_grad[5] else None
    if again:
        x, bias = again
        grad = activation_gradient(ctx.activation, grad, op(x.detach(), weight, scale, bias, factor=factor))
    if ctx.needs_input_grad[0]:
        grad_x = (grad * scale.to(grad.dtype)) @ integers(weight, scale.shape[0], ctx.in_features).to(grad.dtype)
        grad_x = (grad_x if factor is None else grad_x * factor).to(ctx.x_dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, scale.shape[0]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, grad_residual, None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return straight_through(ctx, grad, int8_linear, integers)


def _arguments(
    shape: tuple[int, ...],
    n: int,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    special: Iterable[float] = (),
    activation: str = "none",
    residual: bool = False,
    factor: bool = False,
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(shape[-1] * 7919 + n)
    weight = torch.randint(-127, 128, (n, shape[-1]), generator=random, dtype=torch.int8)
    x = torch.randn(shape, generator=random)
    for row, value in enumerate(special):  # one in each of the first rows
        x.view(-1, shape[-1])[row, shape[-1] // 2] = value
    return {
        "x": x.to(dtype),
        "weight": pack(weight),
        "scale": torch.rand(n, generator=random) * 0.01 + 1e-4,
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
        "activation": activation,
        "residual": torch.randn((*shape[:-1], n), generator=random).to(dtype) if residual else None,
        "factor": torch.rand(shape[-1], generator=random) * 0.9 + 0.1 if factor else None,
    }


_BENCH_LAYERS = [(768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096)]


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        for k, n in _BENCH_LAYERS:
            for m in (1, 8, 32, 128, 512):
                yield Sample(f"m={m} k={k} n={n}", lambda m=m, k=k, n=n: _arguments((m, k), n))  # type: ignore[misc]
        return
    shapes: list[tuple[tuple[int, ...], int]] = [
        ((1, 16), 16), ((1, 1), 1), ((0, 8), 5), ((3, 5), 0), ((7, 770), 1000), ((2, 3, 33), 17), ((13,), 31),
        ((9, 64), 64), ((5, 127), 49), ((12, 256), 80), ((1, 1021), 113), ((67, 96), 130), ((1030, 24), 40),
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for shape, n in shapes:
            label = f"{list(shape)} -> {n} {str(dtype).removeprefix('torch.')}"
            yield Sample(label, lambda s=shape, n=n, d=dtype: _arguments(s, n, n % 2 == 0, d))  # type: ignore[misc]
    special = (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45)
    for activation in ACTIVATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{activation}, residual, {str(dtype).removeprefix('torch.')}"
            yield Sample(label, lambda a=activation, d=dtype: _arguments((2, 7, 40), 83, True, d, (), a, True))  # type: ignore[misc]
        yield Sample(f"{activation}, no bias", lambda a=activation: _arguments((9, 40), 20, False, activation=a))  # type: ignore[misc]
    yield Sample("gelu, nan inf extremes", lambda: _arguments((9, 40), 20, special=special[:3], activation="gelu"))
    yield Sample("nan inf extremes", lambda: _arguments((9, 40), 20, special=special))
    for dtype in (torch.float32, torch.bfloat16):
        label = f"factors, {str(dtype).removeprefix('torch.')}"
        yield Sample(label, lambda d=dtype: _arguments((2, 7, 43), 83, True, d, activation="relu", factor=True))  # type: ignore[misc]
    yield Sample("factors, nan inf", lambda: _arguments((9, 40), 20, special=special[:3], factor=True))
    yield Sample("zeros", lambda: _arguments((4, 12), 18) | {"x": torch.zeros(4, 12)})
    yield Sample("tiny rows", lambda: _arguments((4, 12), 18) | {"x": torch.full((4, 12), 1e-40)})
    yield Sample("strided", lambda: _arguments((6, 20), 18) | {"x": torch.randn(20, 12).t()[::2]})


def _cost(x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None = None, **_: Any) -> Cost:
    n, k = scale.numel(), x.shape[-1]
    m = x.numel() // max(k, 1)
    outputs = n if residual is None else 2 * n
    return Cost(int8_ops=2.0 * m * n * k, bytes=float(n * k + x.element_size() * m * (outputs + k)))


def _rivals(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, **_: Any
) -> dict[str, Callable[[], Any]]:
    from potstill.ops.rivals import quantize_dynamic

    n, k = scale.numel(), x.shape[-1]
    linear = torch.nn.Linear(k, n, bias=bias is not None).requires_grad_(False)
    linear.weight.copy_(integers(weight, n, k).float() * scale[:, None])
    if bias is not None:
        linear.bias.copy_(bias)
    return {"torch eager": lambda: linear(x)} | quantize_dynamic(linear, x)


int8_linear = Op(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, str activation='none', "
    "Tensor? residual=None, Tensor? factor=None) -> Tensor",
    reference=_reference,
    fake=fake,
    kernels={
        "cpu": Kernel(_cpu, _KERNEL_DTYPES),
        "cuda": Kernel(_cuda, _KERNEL_DTYPES | {torch.float16}, "triton", note),
    },
    lay_out=_lay_out,
    autocast=True,
    differentiable=(0, 3, 5),
    setup_context=setup_context,
    backward=_backward,
    samples=_samples,
    tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3},
    cost=_cost,
    rivals=_rivals,
)
"""``y = activation(x @ (weight * scale[:, None]).t() + bias) + residual`` with x quantised per row to int8.

- ``x``: [..., in_features], float32 or bfloat16 for the kernels, on GPUs float16, too (any float dtype for the
  reference).
- ``weight``: int8 weights in [-127, 127], on the CPU as :func:`pack`, on GPUs as :func:`as_rows` lays them out.
- ``scale``: [out_features] float32; ``bias``: [out_features] or None.
- ``activation``: "none", "relu", "gelu", "gelu_tanh" or "silu", as in torch, applied while the sums are in registers.
  Largest errors against float64, as a share of max(1, |x|): gelu 9e-7, gelu_tanh and silu 4e-7.
- ``residual``: of the result's shape and dtype, or None; added last.
- ``factor``: [in_features] float32, or None: x is multiplied by it before it is quantised. With weights divided by it,
  inputs whose values are much larger than the others' take less of the eight bits (SmoothQuant, Xiao et al. 2022).

Returns [..., out_features] of x's dtype. The integer sums are exact; more than :data:`MAX_FEATURES` in_features, whose
sums might not fit 32 bits, raise :class:`ValueError`. A row of x with a NaN or an infinity gives a row of NaN. The
gradient of x takes the rounding as the identity (straight-through); weight and scale get none.

>>> integers, scale = quantize_weight(torch.eye(3))
>>> int8_linear(torch.tensor([[1.0, 2.0, 4.0]]), pack(integers), scale).round(decimals=1)
tensor([[1., 2., 4.]])
"""
