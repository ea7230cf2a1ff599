"""``semi_sparse_int8_linear`` on GPUs: reads two of each four weights, and multiplies the dense tile they expand to.

The two values of a group and its half byte become the four weights of the group in one int32: each value is shifted to
the byte where it belongs. The bytes of that word are side by side as the product takes them, so none changes its place.
Whatever a half byte holds, a value is shifted by 0 to 24 bits: no index leads out of its word, and none to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from potstill.ops.triton.int8_linear_kernel import (
    LEAST,
    finish,
    keep,
    load_tile,
    multiply,
    place,
    pointers,
    repeat,
    row_scaling,
)
from potstill.ops.triton.quantize_rows import load, rounded
from potstill.ops.triton.sparse_int8_linear_kernel import bytes_of

BLOCK = tl.constexpr(128)
"""Inputs whose multiple a row of the weight has."""


@triton.jit
def each_group(words):
    """A word for eight groups [outputs, words], for each of its groups [outputs, groups]."""
    OUTPUTS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    return tl.reshape(tl.broadcast_to(words[:, :, None], (OUTPUTS, WORDS, 8)), (OUTPUTS, WORDS * 8))


@triton.jit
def weights(values, indices, outputs, blocks, tile, BK: tl.constexpr):
    """Pointers to the values of a group (int16) and to the words of eight groups, from the ``tile`` of BK inputs on."""
    row = outputs.to(tl.int64)[:, None]
    return values + row * (blocks * 32) + tile * (BK // 4), indices + row * (blocks * 4) + tile * (BK // 32)


@triton.jit
def expand(values, indices, left, BK: tl.constexpr, EVEN: tl.constexpr):
    """The weights of BK inputs at pointers of :func:`weights`: [outputs, BK] int8; ``left`` blocks are left."""
    group, word = tl.arange(0, BK // 4)[None, :], tl.arange(0, BK // 32)[None, :]
    if EVEN:
        pairs, halves = tl.load(values + group), tl.load(indices + word)
    else:
        pairs = tl.load(values + group, mask=group // 32 < left, other=0)
        halves = tl.load(indices + word, mask=word // 4 < left, other=0)
    half = each_group(halves) >> (group % 8 * 4)
    pairs = pairs.to(tl.int32)
    return bytes_of((pairs & 255) << (half & 3) * 8 | (pairs >> 8 & 255) << (half >> 2 & 3) * 8)


@triton.jit(do_not_specialize=["m"])
def semi_kernel(
    x, x_scale, values, indices, scale, bias, residual, y, total, m, n, blocks, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr,
    PIECE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of the result, from quantised rows x [m, 128 blocks]; the rest as in :func:`gemm_kernel`."""
    down, across = place(m, n, BM, BN, GROUP)
    rows, columns = down * BM + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    start, k = part * span, blocks * BLOCK
    a = pointers(x, rows, m, k, start, BK)
    values, indices = weights(values, indices, tl.minimum(columns, n - 1), blocks, start // BK, BK)
    sums = tl.zeros([BM, BN], tl.int32)
    for at in range(start, tl.minimum(start + span, k), BK):
        b = expand(values, indices, blocks - at // BLOCK, BK, EVEN)
        sums = multiply(sums, load_tile(a, k - at, EVEN), b, HALF)
        a += BK
        values += BK // 4
        indices += BK // 32
    if total is None:
        row_scale = tl.load(x_scale + rows, mask=rows < m, other=0.0)
        finish(sums, row_scale, rows, across * BN, scale, bias, residual, y, m, n, PIECE, ACTIVATION)
    else:
        keep(sums, part, rows, columns, total, m, n)


@triton.jit(do_not_specialize=["m"])
def fused_semi_kernel(
    x, x_scale, values, indices, scale, bias, residual, y, total, m, n, k, blocks, stride, span,
    ROWS: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr,
    PIECE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """As :func:`semi_kernel`, from float rows x [m, k], m <= ROWS, that each program quantises for itself."""
    row = tl.arange(0, ROWS)
    depth = tl.arange(0, BK)[None, :]
    here = (row < m)[:, None]
    x += row.to(tl.int64)[:, None] * stride
    used, inverse, own = row_scaling(x, None, k, here, ROWS, WIDE)
    rows, columns = tl.arange(0, LEAST), tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    start, width = part * span, blocks * BLOCK
    values, indices = weights(values, indices, tl.minimum(columns, n - 1), blocks, start // BK, BK)
    sums = tl.zeros([LEAST, BN], tl.int32)
    for at in range(start, tl.minimum(start + span, width), BK):
        a = rounded(load(x, None, at + depth, k, here), inverse[:, None], used[:, None])
        sums = multiply(sums, repeat(a, ROWS, BK), expand(values, indices, blocks - at // BLOCK, BK, EVEN), HALF)
        values += BK // 4
        indices += BK // 32
    if total is None:
        row_scale = tl.reshape(repeat(own[:, None], ROWS, 1), (LEAST,))
        finish(sums, row_scale, rows, tl.program_id(0) * BN, scale, bias, residual, y, m, n, PIECE, ACTIVATION)
    else:
        keep(sums, part, rows, columns, total, m, n)
        if (tl.program_id(0) == 0) & (part == 0):
            tl.store(x_scale + row, own, mask=row < m)
