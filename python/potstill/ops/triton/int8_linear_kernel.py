"""``int8_linear`` on GPUs: products of int8 tiles, and what is done with their sums before they are stored.

Sums are int32 and exact, so neither the size of tiles nor a split of the inputs changes a result's bits. Both operands
are loaded as they lie, inputs side by side, and the weight's tile is transposed as it enters the product: loaded as
[inputs, outputs] its bytes would have to be unpacked and packed again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from potstill.ops.triton.quantize_rows import load, magnitude, rounded, scaling

LEAST = tl.constexpr(16)
"""Rows that a product has at least."""


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """As :data:`potstill.ops.activation.ACTIVATIONS` has them; a NaN stays one."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def halves(x):
    """The left columns of a block, and the right ones; each thread keeps its own."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, WIDTH)), (0, 2, 1)))


@triton.jit
def finish(
    sums, row_scale, rows, first, scale, bias, residual, y, m, n, PIECE: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Stores the results of sums in ``rows`` and the columns from ``first`` on; those of integers have scales.

    PIECE columns at a time, as what all of them need besides their sums would not fit the registers.
    """
    if sums.shape[1] > PIECE:
        left, right = halves(sums)
        finish(left, row_scale, rows, first, scale, bias, residual, y, m, n, PIECE, ACTIVATION)
        finish(right, row_scale, rows, first + left.shape[1], scale, bias, residual, y, m, n, PIECE, ACTIVATION)
    else:
        columns = first + tl.arange(0, sums.shape[1])
        inside = columns < n
        x = sums.to(tl.float32)
        if scale is not None:
            x *= row_scale[:, None] * tl.load(scale + columns, mask=inside, other=0.0)[None, :]
        if bias is not None:
            x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        x = activate(x, ACTIVATION)
        at = rows.to(tl.int64)[:, None] * n + columns[None, :]
        inside = (rows < m)[:, None] & inside[None, :]
        if residual is not None:
            x += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, x.to(y.dtype.element_ty), mask=inside)


@triton.jit
def keep(sums, part, rows, columns, total, m, n):
    """Stores the sums of one part of the inputs, to be added by :func:`add_kernel`."""
    at = (part.to(tl.int64) * m + rows)[:, None] * n + columns[None, :]
    tl.store(total + at, sums, mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def multiply(sums, a, b, HALF: tl.constexpr):
    """``sums`` + a [rows, inputs] times b [outputs, inputs].

    HALF: by float16 products, for chips that are slow with int8. int8 is exact in it; the float32 sums of one tile are
    below 1024 x 127^2 < 2^24, and so exact as well.
    """
    if HALF:
        tl.static_assert(a.shape[1] <= 1024)
        return sums + tl.dot(a.to(tl.float16), tl.trans(b.to(tl.float16))).to(tl.int32)
    return tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)


@triton.jit
def load_tile(tile, left, EVEN: tl.constexpr):
    """A tile at the pointers ``tile`` [.., inputs], of which ``left`` are left."""
    if EVEN:
        return tl.load(tile)
    depth = tl.arange(0, tile.shape[1])
    return tl.load(tile, mask=(depth < left)[None, :], other=0)


@triton.jit
def pointers(base, places, size, k, start, BK: tl.constexpr):
    """To the inputs from ``start`` on, in the rows ``places`` of [size, k]; beyond the last row to the last again."""
    places = tl.minimum(places, size - 1).to(tl.int64)
    return base + places[:, None] * k + (start + tl.arange(0, BK))[None, :]


@triton.jit
def place(m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The block of rows and that of columns of this program.

    Programs that run at the same time have GROUP blocks of rows, over which the same weights are read from L2.
    """
    number = tl.program_id(0)
    across, down = tl.cdiv(n, BN), tl.cdiv(m, BM)
    group = number // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = number % (GROUP * across)
    return group * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    x, x_scale, weight, scale, bias, residual, y, total, m, n, k, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr,
    PIECE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of the result, from quantised rows x [m, k].

    ``total``: int32 [parts, m, n] for the sums of parts of ``span`` inputs, or None: all inputs are one part.
    EVEN: BK divides k.
    """
    down, across = place(m, n, BM, BN, GROUP)
    rows, columns = down * BM + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    start = part * span
    a, b = pointers(x, rows, m, k, start, BK), pointers(weight, columns, n, k, start, BK)
    sums = tl.zeros([BM, BN], tl.int32)
    for at in range(start, tl.minimum(start + span, k), BK):
        sums = multiply(sums, load_tile(a, k - at, EVEN), load_tile(b, k - at, EVEN), HALF)
        a += BK
        b += BK
    if total is None:
        row_scale = tl.load(x_scale + rows, mask=rows < m, other=0.0)
        finish(sums, row_scale, rows, across * BN, scale, bias, residual, y, m, n, PIECE, ACTIVATION)
    else:
        keep(sums, part, rows, columns, total, m, n)


@triton.jit
def repeat(x, ROWS: tl.constexpr, BK: tl.constexpr):
    """A block [ROWS, BK] over and over, up to LEAST rows."""
    return tl.reshape(tl.broadcast_to(x[None], (LEAST // ROWS, ROWS, BK)), (LEAST, BK))


@triton.jit
def row_scaling(x, factor, k, here, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """What :func:`scaling` says of the float rows at the pointers x [ROWS, 1]; WIDE columns are looked at at a time."""
    wide = tl.arange(0, WIDE)[None, :]
    bits = tl.zeros([ROWS, WIDE], tl.int32)
    for at in range(0, k, WIDE):
        bits = tl.maximum(bits, magnitude(load(x, factor, at + wide, k, here)))
    return scaling(tl.max(bits, 1))


@triton.jit(do_not_specialize=["m"])
def fused_kernel(
    x, factor, x_scale, weight, scale, bias, residual, y, total, m, n, k, width, stride, span,
    ROWS: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr,
    PIECE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """As :func:`gemm_kernel`, from float rows x [m, k], m <= ROWS, that each program quantises for itself.

    The weight is [n, width], 0 beyond k.
    """
    row = tl.arange(0, ROWS)
    depth = tl.arange(0, BK)[None, :]
    here = (row < m)[:, None]
    x += row.to(tl.int64)[:, None] * stride
    used, inverse, own = row_scaling(x, factor, k, here, ROWS, WIDE)
    rows, columns = tl.arange(0, LEAST), tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    start = part * span
    b = pointers(weight, columns, n, width, start, BK)
    sums = tl.zeros([LEAST, BN], tl.int32)
    for at in range(start, tl.minimum(start + span, width), BK):
        a = rounded(load(x, factor, at + depth, k, here), inverse[:, None], used[:, None])
        sums = multiply(sums, repeat(a, ROWS, BK), load_tile(b, width - at, EVEN), HALF)
        b += BK
    if total is None:
        row_scale = tl.reshape(repeat(own[:, None], ROWS, 1), (LEAST,))
        finish(sums, row_scale, rows, tl.program_id(0) * BN, scale, bias, residual, y, m, n, PIECE, ACTIVATION)
    else:
        keep(sums, part, rows, columns, total, m, n)
        if (tl.program_id(0) == 0) & (part == 0):
            tl.store(x_scale + row, own, mask=row < m)


@triton.jit(do_not_specialize=["m", "parts"])
def add_kernel(
    x_scale, scale, bias, residual, y, total, m, n, parts,
    BN: tl.constexpr, PIECE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Some outputs of one row: adds the sums of all parts, and finishes them."""
    rows = tl.program_id(1) + tl.arange(0, 1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros([1, BN], tl.int32)
    for part in range(parts):
        at = (rows + part * m.to(tl.int64))[:, None] * n + columns[None, :]
        sums += tl.load(total + at, mask=(columns < n)[None, :], other=0)
    finish(
        sums, tl.load(x_scale + rows), rows, tl.program_id(0) * BN, scale, bias, residual, y, m, n, PIECE, ACTIVATION
    )
