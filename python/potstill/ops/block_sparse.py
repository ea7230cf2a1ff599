"""Weights stored as square blocks that are not all zero: block rows one after the other, columns in order.

``values`` [blocks, size, size] are the blocks, each as it lies in the weight (outputs by inputs); ``columns`` int32
[blocks] the block column of each; ``first`` int32 [block rows + 1] where each block row begins among them. Where the
weight's sizes are no multiples of the block's, the last blocks are filled up with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = (128, 64, 32, 16)
"""Rows and columns that a block may have."""


def to_block_sparse(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``values``, ``columns`` and ``first`` of a weight [n, k]; undone by :func:`from_block_sparse`.

    >>> values, columns, first = to_block_sparse(torch.eye(40), 16)
    >>> values.shape, columns.tolist(), first.tolist()
    (torch.Size([3, 16, 16]), [0, 1, 2], [0, 1, 2, 3])
    """
    blocks = as_blocks(weight, size)
    kept = (blocks != 0).flatten(2).any(-1)
    first = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return blocks[kept], kept.nonzero()[:, 1].to(torch.int32), first.to(torch.int32)


def from_block_sparse(values: Tensor, columns: Tensor, first: Tensor, n: int, k: int) -> Tensor:
    """The weight [n, k] that :func:`to_block_sparse` was given."""
    size, rows = values.shape[-1], len(first) - 1
    blocks = values.new_zeros((rows, -(-k // size), size, size))
    blocks[block_rows(first, len(values)), columns.long()] = values
    return blocks.transpose(1, 2).reshape(rows * size, -(-k // size) * size)[:n, :k].contiguous()


def as_blocks(weight: Tensor, size: int) -> Tensor:
    """All blocks of a weight [n, k], those of zeros too: [block rows, block columns, size, size]."""
    n, k = weight.shape
    whole = F.pad(weight, (0, -k % size, 0, -n % size))
    return whole.view(-(-n // size), size, -(-k // size), size).transpose(1, 2)


def block_rows(first: Tensor, blocks: int) -> Tensor:
    """The block row of each block; asks the device for nothing."""
    rows = torch.arange(len(first) - 1, device=first.device)
    return rows.repeat_interleave(first.diff(), output_size=blocks)


def longest_first(first: Tensor) -> Tensor:
    """The block rows, those of most blocks first: int32. What is begun last is then over soon.

    >>> longest_first(torch.tensor([0, 1, 4, 4])).tolist()
    [1, 0, 2]
    """
    return first.diff().argsort(descending=True, stable=True).to(torch.int32)


def check_block_sparse(op: str, values: Tensor, columns: Tensor, first: Tensor, order: Tensor, n: int, k: int) -> None:
    """Raises :class:`ValueError` for shapes and dtypes that no weight [n, k] has; looks at no number on the device."""
    size = values.shape[-1] if values.dim() else 0
    blocks, rows = len(columns) if columns.dim() else 0, -(-n // size) if size in SIZES else 0
    wanted = {"values": (values, [blocks, size, size]), "columns": (columns, [blocks])}
    wanted |= {"first": (first, [rows + 1]), "order": (order, [rows])}
    for name, (given, shape) in wanted.items():
        right = given.is_floating_point() if name == "values" else given.dtype == torch.int32
        if size not in SIZES or list(given.shape) != shape or not right:
            raise ValueError(
                f"{op}: {name} is {given.dtype} {list(given.shape)}, expected what "
                f"potstill.ops.block_sparse.to_block_sparse(weight, size) makes of a weight [{n}, {k}] with size one "
                f"of {', '.join(map(str, SIZES))}, and longest_first(first) as order"
            )


def wrong_blocks(values: Tensor, columns: Tensor, first: Tensor, n: int, k: int, size: int) -> str:
    """What is wrong with blocks from a file as those of a weight [n, k]; empty if nothing is.

    >>> wrong_blocks(*to_block_sparse(torch.eye(40), 16), 40, 40, 16)
    ''
    >>> wrong_blocks(*to_block_sparse(torch.eye(40), 16), 40, 32, 16)
    'columns has values outside 0 to 1'
    """
    rows, last, blocks = -(-n // size), -(-k // size) - 1, columns.numel()
    for name, given, shape in (
        ("values", values, [blocks, size, size]),
        ("columns", columns, [blocks]),
        ("first", first, [rows + 1]),
    ):
        right = given.is_floating_point() if name == "values" else given.dtype == torch.int32
        if list(given.shape) != shape or not right:
            kind = "floats" if name == "values" else "int32"
            return f"{name} is {given.dtype} {list(given.shape)}, expected {kind} {shape}"
    if int(first[0]) != 0 or int(first[-1]) != blocks or bool((first[1:] < first[:-1]).any()):
        return f"first does not rise from 0 to the number of blocks, {blocks}"
    if bool(((columns < 0) | (columns > last)).any()):
        return f"columns has values outside 0 to {last}"
    same_row = block_rows(first, blocks).diff() == 0
    if bool((columns.diff()[same_row] <= 0).any()):
        return "columns does not rise within each block row"
    return ""
