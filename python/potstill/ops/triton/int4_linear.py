"""The CUDA implementation of ``int4_linear``: chooses and launches the kernels, and never waits for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from potstill.ops.triton import operands, tiles
from potstill.ops.triton.int4_linear_kernel import add_kernel, gemm_kernel, row_kernel
from potstill.ops.triton.quantize_rows import quantize_rows
from potstill.ops.triton.tiles import Tile

TABLE: Mapping[str, Mapping[str, Tile]] = {
    "sm_80": {
        "16": Tile(16, 64, 128, 4, 4),
        "64": Tile(64, 64, 128, 4, 4),
        "256": Tile(64, 128, 128, 8, 3),
        "more": Tile(64, 128, 128, 8, 4),
    },
    "sm_86": {
        "16": Tile(16, 32, 128, 2, 4),
        "64": Tile(64, 64, 128, 4, 3),
        "256": Tile(64, 128, 128, 8, 3),
        "more": Tile(64, 128, 128, 8, 3),
    },
    "sm_90": {
        "16": Tile(16, 64, 128, 4, 4),
        "64": Tile(64, 64, 128, 4, 4),
        "256": Tile(64, 128, 128, 8, 4),
        "more": Tile(128, 128, 128, 8, 4),
    },
    "sm_100": {
        "16": Tile(16, 32, 128, 2, 4),
        "64": Tile(64, 64, 128, 4, 4),
        "256": Tile(64, 128, 128, 8, 4),
        "more": Tile(64, 128, 128, 8, 4),
    },
    "sm_103": {
        "16": Tile(16, 32, 128, 2, 4),
        "64": Tile(64, 64, 128, 4, 4),
        "256": Tile(64, 128, 128, 8, 4),
        "more": Tile(64, 128, 128, 8, 4),
    },
}
"""As :data:`potstill.ops.triton.tiles.TABLE`, at sizes at which no kernel spills; ``bk`` is always 128. The bounds:

- "16": weights are read once. For a byte of them a thread has 7.8 instructions (sm_90) to 13; 27 would take as long as
  to read it at 1 TB/s on an H100, whose multiprocessors begin 128 a cycle. 16 bytes for each thread and load.
- "more", in groups of 32: each sum becomes a float for 32 inputs, of which a multiprocessor makes 64 a cycle: 2/3 of
  the time that is left by the int8 products themselves. In groups of 128 it is 1/6.
- sm_100 keeps the sums of four products in tensor memory at once, 512 columns: ``bm`` is at most 64. With 32 outputs
  it has none of it, and multiplies as chips before it did: few rows would wait for its memory.
"""

GROUPS_OF_32 = {("sm_90", "more"): Tile(128, 64, 128, 8, 3)}
"""Tiles instead of those, as with the sums of four groups at once they would need more registers than there are."""

# A single row: 4.7 instructions for a byte of weights. Two programs for each multiprocessor of an H100, with 16 KB of
# weights under way each, or 8 KB for fewer than FEW outputs.
ROW = Tile(1, 32, 512, 4, 3)
FEW = 8192

WIDE = 2048  # numbers of the row that are looked at together
ADDED = 512  # outputs whose parts a program adds


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out_features: int,
    group_size: int,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The result, as the reference has it; ``weight`` as :func:`potstill.ops.int4_linear.pack_rows` makes it."""
    n, k = out_features, x.shape[-1]
    operands.check(
        "int4_linear",
        x,
        {
            "weight": (weight, torch.uint8, weight.shape),
            "scale": (scale, torch.bfloat16, scale.shape),
            "zero": (zero, torch.uint8, scale.shape),
            "bias": (bias, None, (n,)),
        },
    )
    y = x.new_empty((*x.shape[:-1], n))
    m = math.prod(x.shape[:-1])
    if y.numel() > 0:
        rows = x.reshape(m, k)
        weights: dict[str, Any] = {
            "weight": weight,
            "scale": scale,
            "zero": zero,
            "blocks": weight.shape[1] // 32,
            "groups": scale.shape[1],
            "GROUP": group_size,
        }
        with torch.cuda.device_of(x):
            _run(rows if rows.stride(1) == 1 else rows.contiguous(), weights, {"bias": bias, "y": y, "n": n})
    return y


def _run(x: Tensor, weights: dict[str, Any], ends: dict[str, Any]) -> None:
    (m, k), n = x.shape, ends["n"]
    chip = tiles.chip(x.device)
    tile = _tile(chip, m, n, weights["GROUP"])
    count, span = tiles.split(tile, m, n, k, chip)
    parts = None if count == 1 else x.new_empty((count, m, n), dtype=torch.float32)
    common: dict[str, Any] = {
        "parts": parts,
        "span": span // 64,
        "BN": tile.bn,
        "INTERPRETED": bool(triton.knobs.runtime.interpret),
        "num_warps": tile.warps,
        "enable_fp_fusion": False,  # see quantize_rows
    }
    outputs = triton.cdiv(n, tile.bn)
    if m == 1:
        x_scale = None if parts is None else x.new_empty(1, dtype=torch.float32)
        align = math.gcd(weights["groups"], max(1, 64 // weights["GROUP"]))
        row_kernel[(outputs, count)](
            x=x, x_scale=x_scale, k=k, BLOCKS=tile.bk // 64, ALIGN=align, WIDE=WIDE, STAGES=tile.stages,
            **weights, **common, **ends,
        )  # fmt: skip
    else:
        integers, x_scale = quantize_rows(x, width=triton.cdiv(k, 128) * 128)
        gemm_kernel[(triton.cdiv(m, tile.bm) * outputs, count)](
            x=integers, x_scale=x_scale, m=m, BM=tile.bm, ALIGN=math.gcd(weights["groups"], 128 // weights["GROUP"]),
            ORDER=tile.group, EVEN=weights["blocks"] % 2 == 0, HALF=tiles.products(chip.capability)[0] == "float16",
            num_stages=tile.stages, **weights, **common, **ends,
        )  # fmt: skip
    if parts is not None:
        add_kernel[(triton.cdiv(n, ADDED), m)](
            x_scale=x_scale, parts=parts, m=m, count=count, BN=ADDED, num_warps=4, enable_fp_fusion=False, **ends
        )


def _tile(chip: tiles.Chip, m: int, n: int, group_size: int) -> Tile:
    if m == 1:
        return ROW if n >= FEW else ROW._replace(bn=ROW.bn // 2)
    family, rows = tiles.family(chip.capability), tiles.shape_class(m)
    other = GROUPS_OF_32.get((family, rows)) if group_size == 32 else None
    return other or TABLE[family][rows]
