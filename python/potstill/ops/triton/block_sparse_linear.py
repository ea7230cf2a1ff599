"""The CUDA implementation of ``block_sparse_linear``: chooses a tile and launches, and never waits for the device."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from potstill.ops.triton import operands, tiles
from potstill.ops.triton.block_sparse_linear_kernel import block_sparse_kernel
from potstill.ops.triton.int8_linear import PIECE

TABLE = {
    "16": tiles.Tile(16, 32, 128, 4, 7),
    "64": tiles.Tile(64, 64, 64, 4, 7),
    "more": tiles.Tile(128, 128, 64, 8, 5),
}
"""The tiles for up to so many rows, for 16-bit numbers; no tile has more outputs than a block. Of 32-bit numbers half
as many inputs are taken at a time, and 64 rows at most: three products for one need the registers.

A tile of x is loaded once its column is known, so that half of the stages wait for columns and half for tiles.

- "16": the stored weights are read once, which is all the time it takes. Few outputs to a program, so that 4096 are 128
  programs; it has 3 stages of 8 KB of weights under way.
- "more": a block of weights meets 128 rows: 32 KB are read for 2^20 products with blocks of 128, 24 KB for 2^19 with
  64. At the 2048 products a cycle of an H100 these are 64 and 96 bytes, of which L2 gives some 64; smaller blocks read
  yet more for a product. Nobody has measured it.
"""


def launch(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    first: Tensor,
    order: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The result, as the reference has it."""
    n, k, size = out_features, x.shape[-1], values.shape[-1]
    operands.check(
        "block_sparse_linear",
        x,
        {
            "values": (values, None, values.shape),
            "columns": (columns, torch.int32, (len(values),)),
            "first": (first, torch.int32, (triton.cdiv(n, size) + 1,)),
            "order": (order, torch.int32, (triton.cdiv(n, size),)),
            "bias": (bias, None, (n,)),
        },
    )
    y = x.new_empty((*x.shape[:-1], n))
    m = math.prod(x.shape[:-1])
    if y.numel() > 0:
        rows = x.reshape(m, k)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        shape = tile(m, size, max(x.element_size(), values.element_size()), rows.stride(0) % 16 == 0)
        with torch.cuda.device_of(x):
            block_sparse_kernel[(triton.cdiv(m, shape.bm) * len(order) * (size // shape.bn),)](
                x=rows,
                values=values,
                columns=columns,
                first=first,
                order=order,
                bias=bias,
                residual=None if residual is None else residual.contiguous(),
                y=y,
                m=m,
                n=n,
                k=k,
                stride=rows.stride(0),
                rows=len(order),
                blocks=len(values),
                SIZE=size,
                BM=shape.bm,
                BN=shape.bn,
                BK=shape.bk,
                GROUP=shape.group,
                EVEN=k % size == 0,
                PIECE=PIECE if n % 16 == 0 else PIECE // 2,  # what is not aligned takes more registers
                ACTIVATION=activation,
                INTERPRETED=bool(triton.knobs.runtime.interpret),
                num_warps=shape.warps,
                num_stages=shape.stages,
                enable_fp_fusion=False,  # so that what comes after the sums rounds as the reference
            )
    return y


def tile(m: int, size: int, width: int, aligned: bool) -> tiles.Tile:
    """The tile for ``m`` rows, ``aligned`` or not, blocks of ``size`` and numbers of ``width`` bytes."""
    shape = TABLE[next(name for name, most in (("16", 16), ("64", 64), ("more", m)) if m <= most)]
    few = size < 64 and not aligned  # 4 warps would spill some of 128 rows that they load a number at a time
    return shape._replace(
        bm=min(shape.bm, 64 if few else 256 // width),
        bn=min(shape.bn, size),
        bk=shape.bk * 2 // width,
        warps=shape.warps if size >= 64 else 4,
    )
