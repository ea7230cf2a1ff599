"""``int8_embedding`` on GPUs: a gather, whose programs have some rows and a block of their columns each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

LARGEST_BLOCK = 1024  # columns of a program
VALUES = 4096  # of a program: 32 to a thread, so that each has several loads under way
WARPS = 4


def launch(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The rows, as the reference has them; of NaN where an index names none, as raising would wait for the device."""
    dtype = dtype or torch.float32
    columns, rows = weight.shape[1], indices.numel()
    y = weight.new_empty((*indices.shape, columns), dtype=dtype if dtype in DTYPES else torch.float32)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if rows > 0 and columns > 0:
        block = min(LARGEST_BLOCK, max(16, triton.next_power_of_2(columns)))
        group = VALUES // block
        with torch.cuda.device_of(weight):
            gather_kernel[(triton.cdiv(rows, group), triton.cdiv(columns, block))](
                weight, scale.float(), indices.contiguous(), y, rows, columns, weight.shape[0], weight.stride(0),
                ROWS=group, BLOCK=block, VECTOR=16 // y.element_size(), num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return y.to(dtype)


@triton.jit
def gather_kernel(
    weight, scale, indices, y, rows, columns, known, stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """VECTOR: the values that a thread stores at once. It loads as many, and keeps them: no thread needs another's."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.load(indices + row, mask=row < rows, other=-1).to(tl.int64)
    inside = (index >= 0) & (index < known)
    factor = tl.load(scale + index, mask=inside, other=float("nan"))
    column = tl.program_id(1) * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    at = weight + index[:, None] * stride + column[None, :]
    values = tl.load(at, mask=inside[:, None] & (column < columns)[None, :], other=0)
    product = values.to(tl.float32) * factor[:, None]  # where there is no row: 0 times NaN
    out = y + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out, product.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])
