"""``int4_linear`` on GPUs: products with 4-bit weights that are unpacked in registers, and scaled sums of groups.

A weight's row has blocks of 32 bytes for 64 inputs: byte j has input j in its low half and input j + 32 in its high
half. So either half of a run of bytes is a run of inputs, and both come out of four bytes by a few 32-bit instructions.
What those are in PTX the interpreter cannot run: INTERPRETED has the same in plain operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from potstill.ops.triton.int8_linear_kernel import place
from potstill.ops.triton.quantize_rows import load, magnitude, rounded, scaling

MIDDLE = tl.constexpr(8)
"""The zero point of symmetric weights."""

# Four numbers w in 0..15 less z in 0..15 as int8: no byte of 128 + w - z borrows from the next, and its highest bit
# inverted is the sign.
LOW = tl.constexpr("lop3.b32 $0, $1, 0x0F0F0F0F, 0x80808080, 0xEA; sub.u32 $0, $0, $2; xor.b32 $0, $0, 0x80808080;")
HIGH = tl.constexpr("shr.u32 $0, $1, 4; " + LOW.value.replace("$1", "$0"))
DOT4 = tl.constexpr("dp4a.s32.s32 $0, $1, $2, 0;")


@triton.jit
def dot4(a, b, INTERPRETED: tl.constexpr):
    """The sum of the products of four int8 each, which a and b have as an int32."""
    if INTERPRETED:
        sums = (a << 24 >> 24) * (b << 24 >> 24) + (a << 16 >> 24) * (b << 16 >> 24)
        return sums + (a << 8 >> 24) * (b << 8 >> 24) + (a >> 24) * (b >> 24)
    return tl.inline_asm_elementwise(DOT4, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def low(packed, zero, INTERPRETED: tl.constexpr):
    """The lower halves of bytes [outputs, 32], less the zero points [outputs]: int8."""
    zero = tl.broadcast_to(zero.to(tl.uint8)[:, None], packed.shape)
    if INTERPRETED:
        return (packed & 15).to(tl.int8) - zero.to(tl.int8)
    return tl.inline_asm_elementwise(LOW, "=&r,r,r", [packed, zero], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def high(packed, zero, INTERPRETED: tl.constexpr):
    """The higher halves."""
    zero = tl.broadcast_to(zero.to(tl.uint8)[:, None], packed.shape)
    if INTERPRETED:
        return (packed >> 4).to(tl.int8) - zero.to(tl.int8)
    return tl.inline_asm_elementwise(HIGH, "=&r,r,r", [packed, zero], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def finish(total, row_scale, rows, columns, bias, y, m, n):
    """Stores results [columns, rows] of their sums."""
    total *= row_scale[None, :]
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    at = rows.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(rows < m)[None, :] & (columns < n)[:, None])


@triton.jit
def keep(total, part, rows, columns, parts, m, n):
    """Stores the sums of one part of the inputs, to be added by :func:`add_kernel`."""
    at = (part.to(tl.int64) * m + rows)[None, :] * n + columns[:, None]
    tl.store(parts + at, total, mask=(rows < m)[None, :] & (columns < n)[:, None])


@triton.jit
def of_groups(table, outputs, first, groups, COUNT: tl.constexpr, ALIGN: tl.constexpr):
    """Scales or zero points of COUNT groups from ``first`` on: [outputs, COUNT], 0 beyond the last group.

    ALIGN divides COUNT and groups: so many are loaded at once.
    """
    group = first + tl.arange(0, COUNT)
    at = tl.multiple_of(outputs * groups, ALIGN)[:, None] + group[None, :]
    return tl.load(table + at, mask=(group < groups // ALIGN * ALIGN)[None, :], other=0)


@triton.jit
def of_halves(x, GROUP: tl.constexpr):
    """What :func:`of_groups` loaded for 128 inputs, by 32 inputs: four times [outputs]."""
    if GROUP == 32:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
    elif GROUP == 64:
        first, third = tl.split(x)
        second, fourth = first, third
    else:
        first = tl.reshape(x, (x.shape[0],))
        second, third, fourth = first, first, first
    return first, second, third, fourth


@triton.jit
def add_product(sums, w, x, HALF: tl.constexpr):
    """``sums`` (None: 0) + w [outputs, 32] times x [rows, 32], exactly: int32, or HALF: float32 of float16 products.

    The latter, for chips that are slow with int8, are exact too: all sums of a group are below 128 x 127 x 15 < 2^24.
    """
    if HALF:
        sums = tl.dot(w.to(tl.float16), tl.trans(x.to(tl.float16)), sums)
    else:
        sums = tl.dot(w, tl.trans(x), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def add_scaled(total, sums, scale):
    """``total`` + sums [outputs, rows] times scale [outputs]."""
    return tl.fma(sums.to(tl.float32), scale[:, None], total)


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    x, x_scale, weight, scale, zero, bias, y, parts, m, n, blocks, groups, span,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, ORDER: tl.constexpr,
    EVEN: tl.constexpr, HALF: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile [BN, BM] of the transposed result, from quantised rows x [m, 64 blocks], and 64 zeros more if not EVEN.

    The weight is the left operand: it goes from registers into the product, and the sums of a thread belong to few
    outputs, whose scales it keeps. ``span``: blocks of a part, an even number. EVEN: so is ``blocks``.
    """
    down, across = place(m, n, BM, BN, ORDER)
    rows, columns = down * BM + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    half = tl.arange(0, 32)[None, :]
    x += tl.minimum(rows, m - 1).to(tl.int64)[:, None] * (tl.cdiv(blocks, 2) * 128) + half
    outputs = tl.minimum(columns, n - 1).to(tl.int64)
    weight += outputs[:, None] * (blocks * 32) + half
    COUNT: tl.constexpr = 128 // GROUP
    start = tl.program_id(1) * span
    total = tl.zeros([BN, BM], tl.float32)
    for block in range(start, tl.minimum(start + span, blocks), 2):
        first = tl.load(weight + block * 32)
        if EVEN:
            second = tl.load(weight + block * 32 + 32)
        else:
            second = tl.load(weight + block * 32 + 32, mask=half < (blocks - block - 1) * 32, other=0)
        at = x + block * 64
        x0, x1, x2, x3 = tl.load(at), tl.load(at + 32), tl.load(at + 64), tl.load(at + 96)
        factors = of_groups(scale, outputs, block // 2 * COUNT, groups, COUNT, ALIGN).to(tl.float32)
        s0, s1, s2, s3 = of_halves(factors, GROUP)
        if zero is None:
            z0 = tl.full([BN], MIDDLE, tl.uint8)
            z1, z2, z3 = z0, z0, z0
        else:
            z0, z1, z2, z3 = of_halves(of_groups(zero, outputs, block // 2 * COUNT, groups, COUNT, ALIGN), GROUP)
        sums = add_product(None, low(first, z0, INTERPRETED), x0, HALF)
        if GROUP == 32:
            total = add_scaled(total, sums, s0)
            sums = None
        sums = add_product(sums, high(first, z1, INTERPRETED), x1, HALF)
        if GROUP <= 64:
            total = add_scaled(total, sums, s1)
            sums = None
        sums = add_product(sums, low(second, z2, INTERPRETED), x2, HALF)
        if GROUP == 32:
            total = add_scaled(total, sums, s2)
            sums = None
        sums = add_product(sums, high(second, z3, INTERPRETED), x3, HALF)
        total = add_scaled(total, sums, s3)
    if parts is None:
        finish(total, tl.load(x_scale + rows, mask=rows < m, other=0.0), rows, columns, bias, y, m, n)
    else:
        keep(total, tl.program_id(1), rows, columns, parts, m, n)


@triton.jit
def words_of(x, block, inverse, used, k, HALF_BLOCK: tl.constexpr):
    """The quantised inputs of one half of each block, four to an int32: [blocks, 8]."""
    word = HALF_BLOCK * 32 + tl.arange(0, 8) * 4
    columns = (block * 64)[:, None, None] + word[None, :, None] + tl.arange(0, 4)[None, None, :]
    bits = rounded(load(x, None, columns, k, True), inverse, used).to(tl.int32) & 255
    return tl.sum(bits << (tl.arange(0, 4) * 8)[None, None, :], 2)


@triton.jit
def dot_halves(x_words, w_words, INTERPRETED: tl.constexpr):
    """[blocks, 8] times [outputs, blocks, 8]: the sums of half a block, [outputs, blocks]."""
    return tl.sum(dot4(x_words[None], w_words, INTERPRETED), 2)


@triton.jit
def row_kernel(
    x, x_scale, weight, scale, zero, bias, y, parts, n, k, blocks, groups, span,
    BN: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BN results of a single float row x, which each program quantises for itself, BLOCKS of 64 inputs at a time.

    It looks for the row's largest number WIDE columns at a time. Zero points count by the sums of the inputs of their
    groups: sum x (w - z) = sum x w - z sum x. ``span``: blocks of a part, a multiple of BLOCKS.
    """
    wide = tl.arange(0, WIDE)
    bits = tl.zeros([WIDE], tl.int32)
    for at in range(0, k, WIDE):
        bits = tl.maximum(bits, magnitude(load(x, None, at + wide, k, True)))
    used, inverse, own = scaling(tl.max(bits, 0))
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    outputs = tl.minimum(columns, n - 1).to(tl.int64)
    words = weight.to(tl.pointer_type(tl.int32), bitcast=True) + (outputs * (blocks * 8))[:, None, None]
    ones = tl.full([BLOCKS, 8], 0x01010101, tl.int32)
    COUNT: tl.constexpr = 2 if GROUP == 32 else 1
    total = tl.zeros([BN, BLOCKS], tl.float32)
    start = tl.program_id(1) * span
    for first in tl.range(start, tl.minimum(start + span, blocks), BLOCKS, num_stages=STAGES):
        block = first + tl.arange(0, BLOCKS)
        word = (block * 8)[:, None] + tl.arange(0, 8)[None, :]
        w = tl.load(words + word[None], mask=(block < blocks)[None, :, None], other=0)
        x_low, x_high = words_of(x, block, inverse, used, k, 0), words_of(x, block, inverse, used, k, 1)
        low_sums = dot_halves(x_low, w & 0x0F0F0F0F, INTERPRETED)
        high_sums = dot_halves(x_high, (w >> 4) & 0x0F0F0F0F, INTERPRETED)
        low_inputs = tl.sum(dot4(x_low, ones, INTERPRETED), 1)[None, :]
        high_inputs = tl.sum(dot4(x_high, ones, INTERPRETED), 1)[None, :]
        group = (block if GROUP <= 64 else block // 2)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        of_group = tl.multiple_of(outputs * groups, ALIGN)[:, None, None] + group[None]
        inside = (group < groups // ALIGN * ALIGN)[None]
        factor = tl.load(scale + of_group, mask=inside, other=0.0).to(tl.float32)
        if zero is None:
            shift = tl.full([BN, BLOCKS, COUNT], MIDDLE, tl.int32)
        else:
            shift = tl.load(zero + of_group, mask=inside, other=0).to(tl.int32)
        if GROUP == 32:
            low_factor, high_factor = tl.split(factor)
            low_shift, high_shift = tl.split(shift)
            total += (low_sums - low_shift * low_inputs).to(tl.float32) * low_factor
            total += (high_sums - high_shift * high_inputs).to(tl.float32) * high_factor
        else:
            sums = low_sums + high_sums - tl.reshape(shift, (BN, BLOCKS)) * (low_inputs + high_inputs)
            total += sums.to(tl.float32) * tl.reshape(factor, (BN, BLOCKS))
    result = tl.sum(total, 1)[:, None]
    row = tl.arange(0, 1)
    if parts is None:
        finish(result, own + tl.zeros([1], tl.float32), row, columns, bias, y, 1, n)
    else:
        keep(result, tl.program_id(1), row, columns, parts, 1, n)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(x_scale, own)


@triton.jit(do_not_specialize=["m", "count"])
def add_kernel(x_scale, bias, y, parts, m, n, count, BN: tl.constexpr):
    """Some outputs of one row: adds the sums of ``count`` parts in their order, and finishes them."""
    rows = tl.program_id(1) + tl.arange(0, 1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BN, 1], tl.float32)
    for part in range(count):
        at = (rows + part * m.to(tl.int64))[None, :] * n + columns[:, None]
        total += tl.load(parts + at, mask=(columns < n)[:, None], other=0.0)
    finish(total, tl.load(x_scale + rows), rows, columns, bias, y, m, n)
