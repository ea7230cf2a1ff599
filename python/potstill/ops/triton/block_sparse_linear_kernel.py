"""``block_sparse_linear`` on GPUs: products of tiles of x and of the blocks that a block row stores.

The blocks of a block row lie one behind the other, so its stored inputs are numbered on through all of them; a program
takes BK of them at a time, which are part of a block, or several small ones. Operands are loaded as they lie, inputs
side by side, and the weight's tile is transposed as it enters the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from potstill.ops.triton.int8_linear_kernel import finish, place


@triton.jit
def multiply(sums, a, b, INTERPRETED: tl.constexpr):
    """``sums`` + a [rows, inputs] times b [outputs, inputs], which is rounded to a's dtype.

    Three products of tf32 numbers make one of float32. INTERPRETED: the interpreter's products of bfloat16 are wrong.
    """
    b = b.to(a.dtype)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), sums, input_precision="tf32x3")


@triton.jit(do_not_specialize=["m", "rows", "blocks"])
def block_sparse_kernel(
    x, values, columns, first, order, bias, residual, y, m, n, k, stride, rows, blocks,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PIECE: tl.constexpr, ACTIVATION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of the result, BN outputs of one block row; EVEN: SIZE divides k.

    Whatever the numbers in ``columns``, ``first`` and ``order``, nothing beyond the tensors is read or written.
    """
    down, across = place(m, rows * SIZE, BM, BN, GROUP)
    row = tl.load(order + across // (SIZE // BN))
    row = tl.minimum(tl.maximum(row, 0), rows - 1)
    begin = tl.minimum(tl.maximum(tl.load(first + row), 0), blocks)
    end = tl.minimum(tl.maximum(tl.load(first + row + 1), begin), blocks)
    stored = (end - begin) * SIZE
    outputs = across % (SIZE // BN) * BN
    place_x = tl.minimum(down * BM + tl.arange(0, BM), m - 1).to(tl.int64) * stride
    place_w = (begin.to(tl.int64) * SIZE + outputs + tl.arange(0, BN)) * SIZE
    depth = tl.arange(0, BK)
    sums = tl.zeros([BM, BN], tl.float32)
    for at in range(0, stored, BK):
        input = at + depth
        here = input < stored
        column = tl.load(columns + begin + input // SIZE, mask=here, other=0)
        column = tl.minimum(tl.maximum(column, 0), (k - 1) // SIZE)
        inside = column * SIZE + input % SIZE
        a = tl.load(x + place_x[:, None] + inside[None, :], mask=(here & (inside < k))[None, :], other=0.0)
        within = (input // SIZE).to(tl.int64) * (SIZE * SIZE) + input % SIZE
        b = tl.load(values + place_w[:, None] + within[None, :], mask=here[None, :], other=0.0)
        sums = multiply(sums, a, b, INTERPRETED)
    finish(
        sums, None, down * BM + tl.arange(0, BM), row * SIZE + outputs, None, bias, residual, y, m, n,
        PIECE, ACTIVATION,
    )  # fmt: skip
