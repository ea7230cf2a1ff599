"""The CUDA implementation of ``int8_linear``: chooses and launches the kernels, and never waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from potstill.ops.triton import operands, tiles
from potstill.ops.triton.int8_linear_kernel import add_kernel, fused_kernel, gemm_kernel
from potstill.ops.triton.quantize_rows import quantize_rows

# Up to so many numbers of x each program rounds x for itself: about 100 for each of its threads, which takes less time
# than a launch. Of more, reading them from L2 once for every program takes longer.
FUSED = 16384

AT_ONCE = 4096  # numbers of x that such a program has under way when it looks for the largest: 32 for each thread
ADDED = 512  # outputs whose parts a program adds
PIECE = 64  # outputs that a program finishes at a time


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """The result, as the reference has it; ``weight`` is laid out by :func:`potstill.ops.int8_linear.as_rows`."""
    n, k = weight.shape[0], x.shape[-1]
    operands.check(
        "int8_linear",
        x,
        {
            "weight": (weight, torch.int8, weight.shape),
            "scale": (scale, torch.float32, (n,)),
            "bias": (bias, None, (n,)),
            "factor": (factor, torch.float32, (k,)),
        },
    )
    y = x.new_empty((*x.shape[:-1], n))
    m = math.prod(x.shape[:-1])
    if y.numel() > 0:
        rows = x.reshape(m, k)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        ends = operands.ends(scale, bias, activation, residual, y, m, n)
        ends["PIECE"] = PIECE if n % 16 == 0 else PIECE // 2  # what is not aligned takes more registers
        with torch.cuda.device_of(x):
            _run(rows, factor, weight, ends)
    return y


def _run(x: Tensor, factor: Tensor | None, weight: Tensor, ends: dict[str, Any]) -> None:
    (m, k), (n, width) = x.shape, weight.shape
    chip = tiles.chip(x.device)
    tile = tiles.tile(chip, m)
    parts, span = tiles.split(tile, m, n, width, chip)
    total = None if parts == 1 else x.new_empty((parts, m, n), dtype=torch.int32)
    common: dict[str, Any] = {
        "weight": weight,
        "total": total,
        "span": span,
        "BN": tile.bn,
        "BK": tile.bk,
        "EVEN": width % tile.bk == 0,
        "HALF": tiles.products(chip.capability)[0] == "float16",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": 255,  # left to itself ptxas spills some to fit one program more
    }
    if m <= tiles.ROWS["16"] and m * k <= FUSED:
        padded = triton.next_power_of_2(m)
        common |= {"k": k, "width": width, "stride": x.stride(0), "ROWS": padded, "WIDE": AT_ONCE // padded}
        x_scale = None if total is None else x.new_empty(m, dtype=torch.float32)
        fused_kernel[(triton.cdiv(n, tile.bn), parts)](x=x, factor=factor, x_scale=x_scale, **common, **ends)
    else:
        integers, x_scale = quantize_rows(x, factor, width)
        gemm_kernel[(triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn), parts)](
            x=integers, x_scale=x_scale, k=width, BM=tile.bm, GROUP=tile.group, **common, **ends
        )
    if total is not None:
        add_kernel[(triton.cdiv(n, ADDED), m)](
            x_scale=x_scale, total=total, parts=parts, BN=ADDED, num_warps=4, **ends | {"PIECE": ADDED}
        )
