"""The CUDA implementation of ``semi_sparse_int8_linear``: launches the kernels, and never waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from potstill.ops import sparse_units
from potstill.ops.semi_sparse import ALIGNED, UNIT
from potstill.ops.triton import operands, tiles
from potstill.ops.triton.int8_linear import ADDED, AT_ONCE, FUSED, PIECE
from potstill.ops.triton.int8_linear_kernel import add_kernel
from potstill.ops.triton.quantize_rows import quantize_rows
from potstill.ops.triton.semi_sparse_int8_linear_kernel import fused_semi_kernel, semi_kernel

TABLE = {
    "16": tiles.Tile(16, 64, 256, 4, 3),
    "64": tiles.Tile(64, 64, 256, 4, 3),
}
"""The tiles for up to 16 rows, and for more. The layer is for few rows, whose time is that of reading the weight, 5/8
of the dense one: at most 1.6 times the speed. A group takes 10 instructions of the integer units: by these an H100
(132 x 64 a cycle, 1.7 GHz) expands 5.7 TB/s of dense bytes, for which it reads 3.6 TB/s, just more than its memory
gives. A program has 2 stages of 10 KB under way, and 3 run at once: more than the 18 KB that the whole bandwidth takes.
Nobody has measured it."""


def launch(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    algorithm: int = 0,
) -> Tensor:
    """The result, as the reference has it; the weight is laid out by :func:`potstill.ops.semi_sparse.laid_out`."""
    n, k = len(values), x.shape[-1]
    operands.check(
        "semi_sparse_int8_linear",
        x,
        {
            "values": (values, torch.int8, values.shape),
            "indices": (indices, torch.uint8, (n, 2 * values.shape[1] // UNIT)),
            "scale": (scale, torch.float32, (n,)),
            "bias": (bias, None, (n,)),
        },
    )
    y = x.new_empty((*x.shape[:-1], n))
    m = math.prod(x.shape[:-1])
    if y.numel() > 0:
        rows = x.reshape(m, k)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        ends = operands.ends(scale, bias, activation, residual, y, m, n)
        with torch.cuda.device_of(x):
            if packed is None:
                _run(rows, values, indices, ends)
            else:
                _by_units(rows, 2 * values.shape[1], packed, algorithm, ends)
    return y


def _run(x: Tensor, values: Tensor, indices: Tensor, ends: dict[str, Any]) -> None:
    (m, k), n, width = x.shape, len(values), 2 * values.shape[1]
    chip = tiles.chip(x.device)
    half = tiles.products(chip.capability)[0] == "float16"
    tile = TABLE["16" if m <= tiles.ROWS["16"] else "64"]
    if half:  # twice the registers for as many inputs
        tile = tile._replace(bk=ALIGNED)
    parts, span = tiles.split(tile, m, n, width, chip)
    total = None if parts == 1 else x.new_empty((parts, m, n), dtype=torch.int32)
    common: dict[str, Any] = {
        "values": values.view(torch.int16),
        "indices": indices.view(torch.int32),
        "total": total,
        "blocks": width // ALIGNED,
        "span": span,
        "BN": tile.bn,
        "BK": tile.bk,
        "EVEN": width % tile.bk == 0,
        "HALF": half,
        "PIECE": PIECE if n % 16 == 0 else PIECE // 2,  # what is not aligned takes more registers
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": 255,  # left to itself ptxas spills some to fit one program more
    }
    if m <= tiles.ROWS["16"] and m * k <= FUSED:
        padded = triton.next_power_of_2(m)
        common |= {"k": k, "stride": x.stride(0), "ROWS": padded, "WIDE": AT_ONCE // padded}
        x_scale = None if total is None else x.new_empty(m, dtype=torch.float32)
        fused_semi_kernel[(triton.cdiv(n, tile.bn), parts)](x=x, x_scale=x_scale, **common, **ends)
    else:
        integers, x_scale = quantize_rows(x, None, width)
        semi_kernel[(triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn), parts)](
            x=integers, x_scale=x_scale, BM=tile.bm, GROUP=tile.group, **common, **ends
        )
    if total is not None:
        _add(x_scale, total, ends)


def _by_units(x: Tensor, width: int, packed: Tensor, algorithm: int, ends: dict[str, Any]) -> None:
    """The sums, exact in int32, by a library; 8 bytes for each, of which products in 16 bits would save half."""
    library = sparse_units.library(x.device, torch.int8)
    if library is None:
        raise ValueError(
            "semi_sparse_int8_linear: packed is given, but torch has no cuSPARSELt here; call it without packed"
        )
    integers, x_scale = quantize_rows(x, None, width)
    sums = sparse_units.multiply(library, (packed,), integers, ends["n"], algorithm=algorithm)
    _add(x_scale, sums[None], ends)


def _add(x_scale: Tensor | None, total: Tensor, ends: dict[str, Any]) -> None:
    add_kernel[(triton.cdiv(ends["n"], ADDED), ends["m"])](
        x_scale=x_scale, total=total, parts=len(total), BN=ADDED, PIECE=ADDED, num_warps=4, **ends
    )
