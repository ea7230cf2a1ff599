"""The CUDA implementation of ``sparse_int8_linear``: launches the kernels, and never waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from potstill.ops.sparse import WINDOW, WINDOW_INPUTS, window_count
from potstill.ops.triton import operands, tiles
from potstill.ops.triton.int8_linear import ADDED, PIECE
from potstill.ops.triton.int8_linear_kernel import add_kernel
from potstill.ops.triton.quantize_rows import quantize_rows
from potstill.ops.triton.sparse_int8_linear_kernel import sparse_kernel

TABLE = {
    "16": tiles.Tile(16, 64, 256, 4, 3),
    "64": tiles.Tile(64, 64, 256, 4, 3),
}
"""The tiles for up to 16 rows, and for more. The layer is for few rows, whose time is that of the weight, of which a
share s of zeros leaves (1 - s) + 1/16 of the dense one's bytes. A block takes some 16 instructions in all, 9 of them on
the integer units: by these an H100 (132 x 64 a cycle, 1.7 GHz) expands 6.2 TB/s of dense bytes, twice what it reads.
So it is at most twice as fast as the dense layer, from six tenths of zeros on; nobody has measured it."""


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """The result, as the reference has it; ``weight`` is laid out by :func:`potstill.ops.sparse.as_windows`."""
    n, k = weight.shape[1], x.shape[-1]
    operands.check(
        "sparse_int8_linear",
        x,
        {
            "weight": (weight, torch.int32, weight.shape),
            "scale": (scale, torch.float32, (n,)),
            "bias": (bias, None, (n,)),
            "factor": (factor, torch.float32, (k,)),
        },
    )
    y = x.new_empty((*x.shape[:-1], n))
    m = math.prod(x.shape[:-1])
    if y.numel() > 0:
        ends = operands.ends(scale, bias, activation, residual, y, m, n)
        with torch.cuda.device_of(x):
            _run(x.reshape(m, k), factor, weight, ends)
    return y


def _run(x: Tensor, factor: Tensor | None, weight: Tensor, ends: dict[str, Any]) -> None:
    (m, k), n = x.shape, weight.shape[1]
    windows = window_count(k)
    width = windows * WINDOW_INPUTS
    chip = tiles.chip(x.device)
    half = tiles.products(chip.capability)[0] == "float16"
    tile = TABLE["16" if m <= tiles.ROWS["16"] else "64"]
    if half:  # twice the registers for as many inputs
        tile = tile._replace(bk=WINDOW_INPUTS)
    parts, span = tiles.split(tile, m, n, width, chip)
    total = None if parts == 1 else x.new_empty((parts, m, n), dtype=torch.int32)
    integers, x_scale = quantize_rows(x, factor, width)
    sparse_kernel[(triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn), parts)](
        x=integers,
        x_scale=x_scale,
        weight=weight,
        total=total,
        windows=windows,
        last=weight.numel() - 2 * windows * n - WINDOW,
        span=span,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        GROUP=tile.group,
        EVEN=width % tile.bk == 0,
        HALF=half,
        PIECE=PIECE if n % 16 == 0 else PIECE // 2,  # what is not aligned takes more registers
        num_warps=tile.warps,
        num_stages=tile.stages,
        **ends,
    )
    if total is not None:
        add_kernel[(triton.cdiv(n, ADDED), m)](
            x_scale=x_scale, total=total, parts=parts, BN=ADDED, PIECE=ADDED, num_warps=4, **ends
        )
