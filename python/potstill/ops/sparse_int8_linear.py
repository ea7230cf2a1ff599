"""Linear layer with int8 weights of which most blocks are zero, activations quantised on the fly.

The scheme is that of :mod:`potstill.ops.int8_linear`, and so are the results, bit for bit: blocks of zeros are only
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from potstill import _C
from potstill.ops.int8_linear import (
    ROW_DEVICES,
    check_ends,
    fake,
    int8_linear,
    note,
    setup_context,
    straight_through,
)
from potstill.ops.int8_linear import pack as pack_dense
from potstill.ops.op import Cost, Kernel, Op, Sample, gpu_function
from potstill.ops.sparse import (
    ROWS,
    Rows,
    as_windows,
    check_packed,
    check_windows,
    from_blocks,
    from_windows,
    pack,
    to_blocks,
    unpack,
)
from potstill.ops.sparse_samples import MANY, bench_samples, csr_linear, random_blocks, test_samples

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})


def lay(mask: Tensor, values: Tensor, k: int, rows: Rows, device_type: str) -> Tensor:
    """The blocks of an int8 weight in the layout that kernels of ``device_type`` take; GPUs take one for all rows."""
    return as_windows(mask, values, k) if device_type in ROW_DEVICES else pack(mask, values, k, rows)


def blocks(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mask and values of ``weight``, in either layout, as :func:`sparse.to_blocks` returns them."""
    return from_windows(weight, k) if weight.dtype == torch.int32 else unpack(weight)


def laid_out(weight: Tensor, k: int, rows: Rows, device_type: str) -> Tensor:
    """``weight``, in either layout, in the one that the kernels of ``device_type`` take.

    It stays on its device; one that is laid out so already is returned itself.

    >>> packed = pack(*to_blocks(torch.eye(8, dtype=torch.int8)), 8, "few")
    >>> windows = laid_out(packed, 8, "few", "cuda")
    >>> windows.shape, laid_out(windows, 8, "few", "cuda") is windows
    (torch.Size([7, 8]), True)
    >>> laid_out(windows, 8, "few", "cpu").equal(packed)
    True
    """
    if (weight.dtype == torch.int32) == (device_type in ROW_DEVICES):
        return weight
    return lay(*blocks(weight, k), k, rows, device_type)


def _integers(weight: Tensor, k: int) -> Tensor:
    return from_blocks(*blocks(weight, k), k)


def _reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    if weight.dtype == torch.int32:
        check_windows("sparse_int8_linear", weight, scale.numel(), x.shape[-1])
    else:
        check_packed("sparse_int8_linear", weight, scale.numel(), x.shape[-1], 1)
    packed = pack_dense(_integers(weight, x.shape[-1]))
    y: Tensor = int8_linear.reference(x, packed, scale, bias, activation, residual, factor)
    return y


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
    if weight.dtype == torch.int32 and weight.dim() == 2:
        raise ValueError(
            f"sparse_int8_linear: weight has the layout of GPUs, int32 {list(weight.shape)}, but x is on the CPU, "
            "whose kernels take it packed; laid_out(weight, k, rows, 'cpu') does that, and SparseLinear.to(device) by "
            "itself"
        )
    if residual is None and x.dim() == 2 and x.is_contiguous():  # the common case, kept short
        y = x.new_empty(x.shape[0], n)  # sizes one by one: as a tuple they take 0.4 us more
        _C.sparse_int8_linear(x, weight, scale, bias, activation, None, factor, y)
        return y
    y = x.new_empty(*x.shape[:-1], n)
    rows = math.prod(x.shape[:-1])
    x = x.reshape(rows, x.shape[-1]).contiguous()
    if residual is not None:
        residual = residual.reshape(rows, n).contiguous()
    _C.sparse_int8_linear(x, weight, scale, bias, activation, residual, factor, y.view(rows, n))
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
    launch = gpu_function("sparse_int8_linear", "launch")
    if launch is None:
        return _reference(x, weight, scale, bias, activation, residual, factor)
    n, k = scale.numel(), x.shape[-1]
    check_ends("sparse_int8_linear", x, n, activation, residual)
    if weight.dtype == torch.uint8:
        raise ValueError(
            f"sparse_int8_linear: weight is packed, {weight.numel()} bytes, as CPU kernels take it, but x is on a GPU; "
            "laid_out(weight, k, rows, 'cuda') changes that, and SparseLinear.to(device) by itself"
        )
    check_windows("sparse_int8_linear", weight, n, k)
    y: Tensor = launch(x, weight, scale, bias, activation, residual, factor)
    return y


def _lay_out(arguments: dict[str, Any], device_type: str) -> dict[str, Any]:
    k = arguments["x"].shape[-1]
    rows: Rows = "few" if arguments["x"].numel() < MANY * k else "many"
    return arguments | {"weight": laid_out(arguments["weight"], k, rows, device_type)}


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return straight_through(ctx, grad, sparse_int8_linear, lambda weight, _, k: _integers(weight, k))


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
    factor: bool = False,
) -> dict[str, Any]:
    k = shape[-1]
    random = torch.Generator().manual_seed(k * 7919 + n)
    integers = torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)
    integers *= random_blocks(n, k, sparsity, random)
    x = torch.randn(shape, generator=random)
    for row, value in enumerate(special):  # one in each of the first rows
        x.view(-1, k)[row, k // 2] = value
    return {
        "x": x.to(dtype),
        "weight": pack(*to_blocks(integers), k, rows),
        "scale": torch.rand(n, generator=random) * 0.01 + 1e-4,
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
        "activation": activation,
        "residual": torch.randn((*shape[:-1], n), generator=random).to(dtype) if residual else None,
        "factor": torch.rand(k, generator=random) * 0.9 + 0.1 if factor else None,
    }


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        yield from bench_samples(_arguments)
        return
    yield from test_samples(_arguments, (math.nan, math.inf, -math.inf, 3e38, 1e-45))
    for rows in ROWS:
        for shape in ((2, 7, 43), (1, 40)):
            yield Sample(f"factors, {list(shape)}, {rows} rows", partial(_arguments, shape, 83, rows, factor=True))


def _cost(x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None = None, **_: Any) -> Cost:
    n, k = scale.numel(), x.shape[-1]
    m = x.numel() // max(k, 1)
    kept, outputs = float(blocks(weight, k)[1].numel()), n if residual is None else 2 * n
    mask = n * k / 4 / 8  # a bit for each block
    return Cost(int8_ops=2.0 * m * kept, bytes=kept + mask + x.element_size() * m * (outputs + k))


def _rivals(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, **_: Any
) -> dict[str, Callable[[], Any]]:
    integers = _integers(weight, x.shape[-1])
    packed, floats = pack_dense(integers), integers.float() * scale[:, None]
    return {
        "torch eager": lambda: torch.nn.functional.linear(x, floats, bias),
        "torch CSR": csr_linear(x, floats, bias),
        "int8_linear": lambda: int8_linear(x, packed, scale, bias),
    }


sparse_int8_linear = Op(
    "sparse_int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, str activation='none', "
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

- ``weight``: int8 weights in [-127, 127], on the CPU packed by :func:`sparse.pack` for many rows of x or for few, on
  GPUs as :func:`sparse.as_windows` lays them out.
- all else: as for :data:`int8_linear`, whose result this is, bit for bit.

>>> from potstill.ops.int8_linear import quantize_weight
>>> integers, scale = quantize_weight(torch.eye(8))
>>> packed = pack(*to_blocks(integers), 8, "few")
>>> sparse_int8_linear(torch.arange(8.0)[None], packed, scale).round(decimals=1)
tensor([[0., 1., 2., 3., 4., 5., 6., 7.]])
"""
