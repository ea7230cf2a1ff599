"""Rows rounded to int8 on GPUs, to the same integers and scales as :func:`potstill.ops.int8_linear.quantize_rows`.

No kernel that rounds may be compiled with fused multiply-adds (``enable_fp_fusion``): :func:`rounded` needs the
product rounded to float32 before it is rounded to an integer, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 16384
"""Numbers of a row that a program keeps in registers: 32 per thread. Longer rows are read twice, from L2 then."""

_MAGIC = tl.constexpr(12582912.0)  # 1.5 x 2^23: from here to 2^24 neighbouring floats differ by 1
_INFINITY = tl.constexpr(0x7F800000)  # bits of float32
_SMALLEST = tl.constexpr(0x0D800000)  # of 2^-100


def quantize_rows(x: Tensor, factor: Tensor | None = None, width: int | None = None) -> tuple[Tensor, Tensor]:
    """``x`` [m, k], times ``factor`` [k] float32 if there is one: int8 [m, k] in [-127, 127], and scales [m] float32.

    With a ``width`` above k the integers are [m, width], those beyond k 0. ``x`` is float32, bfloat16 or float16, its
    rows as far apart as they may be. A row with a NaN or an infinity is all 0 with the scale NaN; one whose values are
    all below 2^-100 is all 0 with the scale 0.
    """
    m, k = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    width = k if width is None else width
    q, scale = x.new_empty((m, width), dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    if m > 0:
        block = min(LARGEST_BLOCK, max(128, triton.next_power_of_2(width)))
        with torch.cuda.device_of(x):
            quantize_rows_kernel[(m,)](
                x, factor, q, scale, k, width, x.stride(0),
                BLOCK=block, WHOLE=width <= block, num_warps=max(1, block // 1024), enable_fp_fusion=False,
            )  # fmt: skip
    return q, scale


@triton.jit
def magnitude(x):
    """The bits of |x|, as an integer: larger for larger numbers, and largest for infinity and then NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scaling(bits):
    """By the largest :func:`magnitude` of a row: whether its numbers count, what each is multiplied by, its scale."""
    finite = bits < _INFINITY
    used = finite & (bits >= _SMALLEST)
    largest = tl.where(used, bits, 0x3F800000).to(tl.float32, bitcast=True)  # 1 stands in
    inverse = tl.div_rn(127.0, largest)
    scale = tl.where(used, tl.div_rn(largest, 127.0), tl.where(finite, 0.0, float("nan")))
    return used, inverse, scale


@triton.jit
def rounded(x, inverse, used):
    """``x * inverse`` to the nearest int8, ties to even; 0 where not used.

    Added to 1.5 x 2^23 a number within 2^22 loses its fraction, and the sum's lowest byte is the integer's.
    """
    bits = (x * inverse + _MAGIC).to(tl.int32, bitcast=True)
    return tl.where(used, bits, 0).to(tl.int8)


@triton.jit
def load(x, factor, columns, k, mask):
    """A block of a row, or of several, as float32; 0 from column k on and where the mask is false."""
    values = tl.load(x + columns, mask=mask & (columns < k), other=0.0).to(tl.float32)
    if factor is not None:
        values *= tl.load(factor + columns, mask=columns < k, other=0.0)
    return values


@triton.jit
def quantize_rows_kernel(x, factor, q, scale, k, width, stride, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One program per row. WHOLE: the row is one block."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    q += row * width
    columns = tl.arange(0, BLOCK)
    values = load(x, factor, columns, k, True)
    bits = magnitude(values)
    if not WHOLE:
        for at in range(BLOCK, width, BLOCK):
            bits = tl.maximum(bits, magnitude(load(x, factor, at + columns, k, True)))
    used, inverse, own = scaling(tl.max(bits, 0))
    tl.store(scale + row, own)
    tl.store(q + columns, rounded(values, inverse, used), mask=columns < width)
    if not WHOLE:
        for at in range(BLOCK, width, BLOCK):
            values = load(x, factor, at + columns, k, True)
            tl.store(q + at + columns, rounded(values, inverse, used), mask=at + columns < width)
