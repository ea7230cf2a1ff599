"""The CUDA implementation of ``add_layer_norm``: a program per row, which stays in its registers if they suffice."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from potstill.ops.triton.add_layer_norm_kernel import long_rows_kernel, rows_kernel

LONGEST_ROW = 16384  # features that 512 threads keep, 32 each
BLOCK = 4096  # of rows that are longer
VALUES = 8  # of a thread; 16 bytes of the 16-bit dtypes
LARGEST_WARPS = 16


def launch(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``x + residual``, normalised, as the reference has it."""
    features = x.shape[-1]
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    rows = _rows(x)
    added = None if residual is None else _rows(residual)
    kept = triton.next_power_of_2(features)
    block, kernel = (kept, rows_kernel) if kept <= LONGEST_ROW else (BLOCK, long_rows_kernel)
    with torch.cuda.device_of(x):
        kernel[(rows.shape[0],)](
            x=rows,
            residual=added,
            weight=None if weight is None else weight.contiguous(),
            bias=None if bias is None else bias.contiguous(),
            y=y,
            features=features,
            x_stride=rows.stride(0),
            r_stride=0 if added is None else added.stride(0),
            eps=eps,
            BLOCK=block,
            num_warps=max(1, min(LARGEST_WARPS, block // (32 * VALUES))),
            enable_fp_fusion=True,
        )
    return y


def _rows(x: Tensor) -> Tensor:
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
