"""Checks of the losses' arguments, so that all ranks raise where one would leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from potstill.ops.kd_loss import Options, check_labels
from potstill.ops.topk import check_top_k
from potstill.parallel.shards import VocabShards, agree


def problem_of(check: Callable[[], None]) -> ValueError | None:
    """What ``check`` raises, kept until the other ranks know of it."""
    try:
        check()
    except ValueError as error:
        return error
    return None


def check_local(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises :class:`TypeError` for a DTensor, whose shape is that of all ranks."""
    for x in tensors:
        if hasattr(x, "to_local"):
            raise TypeError(f"{op}: got a DTensor; expected this rank's plain tensor: pass its to_local()")


def find_shards(
    op: str,
    rows: int,
    columns: int,
    teacher_columns: int,
    problem: ValueError | None,
    shards: VocabShards | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> VocabShards:
    """``shards``, or a collective that finds them; raises ``problem``, and :class:`ValueError` for a wrong place."""
    if shards is None:
        return agree(rows, columns, teacher_columns, problem, group, device)
    if problem is not None:
        raise problem
    for name, width, classes in (
        ("student", columns, shards.classes),
        ("teacher", teacher_columns, shards.teacher_classes),
    ):
        if width and not 0 <= shards.start <= classes - width:
            raise ValueError(
                f"{op}: the {name}'s shard has {width} columns from {shards.start} on, but shards says that there are "
                f"{classes} in all"
            )
    return shards


def check_classes(op: str, teacher: Tensor, o: Options, shards: VocabShards) -> None:
    """Raises :class:`ValueError`, on every rank, for labels and top k that are no classes of the student's."""
    if o.teacher_indices is not None:
        check_top_k(op, teacher, o.teacher_indices, shards.classes, o.divergence)
    elif o.divergence == "dkd" and min(shards.classes, shards.teacher_classes) < 2:
        raise ValueError(f"{op}: dkd compares the classes that are not the label; expected at least 2 classes")
    if o.target is not None:
        check_labels(op, o.target, o.target != o.ignore_index, shards.classes, o.ignore_index)
