"""Where each rank's columns of the vocabulary lie, and the collectives of the losses that are split by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShards:
    """The columns of one rank: ``start`` is the number of its first one; the others count the columns of all ranks.

    Ranks hold contiguous slices in the order of their numbers, of any sizes, also none. Student and teacher start at
    the same column on each rank that has columns of both; where one vocabulary is larger, its additional columns lie
    at the end of the last slices.

    With equal slices of one size, ``VocabShards(rank * n, n * ranks, n * ranks)``; otherwise :meth:`gather` finds it.
    Nothing checks that the ranks' shards fit each other, so an instance made by hand must be right.

    >>> VocabShards(start=16, classes=50, teacher_classes=48)
    VocabShards(start=16, classes=50, teacher_classes=48)
    """

    start: int
    classes: int
    teacher_classes: int

    @classmethod
    def gather(
        cls,
        columns: int,
        teacher_columns: int | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> VocabShards:
        """From the number of columns on each rank: one collective, through tensors on ``device``.

        All ranks of ``group`` must call it. Raises :class:`ValueError` on all of them for slices that start at
        different columns.

        >>> VocabShards.gather(50, 48)  # one process is the only rank
        VocabShards(start=0, classes=50, teacher_classes=48)
        """
        return agree(0, columns, columns if teacher_columns is None else teacher_columns, None, group, device)


def agree(
    rows: int,
    columns: int,
    teacher_columns: int,
    problem: ValueError | None,
    group: dist.ProcessGroup | None,
    device: torch.device | str,
) -> VocabShards:
    """One collective after which all ranks know that they can go on, or all raise; ``problem`` is this rank's."""
    mine = torch.tensor([rows, columns, teacher_columns, problem is not None], dtype=torch.int64, device=device)
    ranks: list[list[int]] = gather(mine, group).tolist()
    if problem is not None:
        raise problem
    failed = [rank for rank, (_, _, _, bad) in enumerate(ranks) if bad]
    if failed:
        raise ValueError(f"vocab_parallel: rank {failed[0]} of the group has refused its arguments; see its error")
    if len({entry[0] for entry in ranks}) > 1:
        raise ValueError(f"vocab_parallel: the ranks have {[entry[0] for entry in ranks]} rows; they must be equal")
    return layout([(student, teacher) for _, student, teacher, _ in ranks], rank_of(group))


def layout(sizes: list[tuple[int, int]], rank: int) -> VocabShards:
    """From each rank's number of columns of student and teacher; raises :class:`ValueError` if they do not fit."""
    start = teacher_start = common = mine = 0
    for number, (size, teacher_size) in enumerate(sizes):
        if size and teacher_size and start != teacher_start:
            raise ValueError(
                f"vocab_parallel: the student's slice on rank {number} starts at column {start} but the teacher's at "
                f"{teacher_start}; the slices [student, teacher] are {[list(s) for s in sizes]}"
            )
        if number == rank:
            mine = start if size else teacher_start
        start, teacher_start, common = start + size, teacher_start + teacher_size, common + min(size, teacher_size)
    if min(start, teacher_start) == 0:
        raise ValueError(f"vocab_parallel: there are {start} columns of the student and {teacher_start} of the teacher")
    if common != min(start, teacher_start):
        raise ValueError(
            "vocab_parallel: a column that student and teacher both have must be on one rank; the slices "
            f"[student, teacher] are {[list(s) for s in sizes]}"
        )
    return VocabShards(mine, start, teacher_start)


def rank_of(group: dist.ProcessGroup | None) -> int:
    """This process's number in ``group`` (None: all processes); 0 where torch.distributed is not in use."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def ranks_of(group: dist.ProcessGroup | None) -> int:
    """How many processes ``group`` has; 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def gather(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] of one shape on every rank -> [ranks, ...], in the order of the ranks; one collective."""
    ranks = ranks_of(group)
    if ranks == 1 or mine.numel() == 0:
        return mine.new_empty(ranks, *mine.shape).copy_(mine)
    everyone = mine.new_empty(ranks, *mine.shape)
    dist.all_gather(list(everyone.unbind(0)), mine.contiguous(), group=group)
    return everyone


def add_up(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks, in place; one collective."""
    if ranks_of(group) > 1 and mine.numel():
        dist.all_reduce(mine, group=group)
    return mine
