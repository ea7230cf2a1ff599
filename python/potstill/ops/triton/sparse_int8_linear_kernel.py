"""``sparse_int8_linear`` on GPUs: reads only the blocks that are stored, and multiplies the dense tile they expand to.

What is not a zero is looked up: a block's place is the first of its window's, plus how many of the blocks before it in
the window are stored. The word that is found there is four weights, side by side as the product takes them, so no byte
changes its place. Sums are those of :mod:`potstill.ops.triton.int8_linear_kernel`, and exact as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from potstill.ops.triton.int8_linear_kernel import finish, keep, load_tile, multiply, place, pointers

WINDOW = tl.constexpr(32)  # as potstill.ops.sparse has it: blocks that one mask tells of
INPUTS = tl.constexpr(128)  # of a window


@triton.jit
def ones(x):
    """How many bits of each uint32 are set, in the form that LLVM knows to be one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def each_block(x):
    """A number for each window [outputs, windows], for each of its blocks [outputs, blocks]."""
    OUTPUTS: tl.constexpr = x.shape[0]
    WINDOWS: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], (OUTPUTS, WINDOWS, WINDOW)), (OUTPUTS, WINDOWS * WINDOW))


@triton.jit
def bytes_of(words):
    """The bytes of each int32, the lowest first: [rows, columns] -> [rows, 4 columns] int8, which takes no code."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def expand(weight, columns, at, n, windows, last, BK: tl.constexpr):
    """The weights of the outputs ``columns`` for BK inputs from ``at`` on: [outputs, BK] int8.

    ``weight`` is laid out by :func:`potstill.ops.sparse.as_windows`. Nothing beyond it is read whatever it holds:
    places lie from 0 to ``last``, the number of its words less 32, and ranks below 32.
    """
    window = at // INPUTS + tl.arange(0, BK // INPUTS)[None, :]
    inside = window < windows
    mask = weight + columns.to(tl.int64)[:, None] + window.to(tl.int64) * n
    bits = each_block(tl.load(mask, mask=inside, other=0)).to(tl.uint32, bitcast=True)
    first = tl.load(mask + windows.to(tl.int64) * n, mask=inside, other=0)
    first = each_block(tl.minimum(tl.maximum(first, 0), last))
    bit = ((1 << (tl.arange(0, BK // 4) % WINDOW)).to(tl.uint32))[None, :]
    rank = ones(bits & (bit - 1)).to(tl.int32)
    words = weight + 2 * windows.to(tl.int64) * n
    return bytes_of(tl.load(words + (first + rank), mask=(bits & bit) != 0, other=0))


@triton.jit(do_not_specialize=["m", "last"])
def sparse_kernel(
    x, x_scale, weight, scale, bias, residual, y, total, m, n, windows, last, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr,
    PIECE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of the result, from quantised rows x [m, 128 windows]; the rest as in :func:`gemm_kernel`."""
    down, across = place(m, n, BM, BN, GROUP)
    rows, columns = down * BM + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    start, k = part * span, windows * INPUTS
    a = pointers(x, rows, m, k, start, BK)
    outputs = tl.minimum(columns, n - 1)
    sums = tl.zeros([BM, BN], tl.int32)
    for at in range(start, tl.minimum(start + span, k), BK):
        b = expand(weight, outputs, at, n, windows, last, BK)
        sums = multiply(sums, load_tile(a, k - at, EVEN), b, HALF)
        a += BK
    if total is None:
        row_scale = tl.load(x_scale + rows, mask=rows < m, other=0.0)
        finish(sums, row_scale, rows, across * BN, scale, bias, residual, y, m, n, PIECE, ACTIVATION)
    else:
        keep(sums, part, rows, columns, total, m, n)
