"""The distillation loss of logits that are split by vocabulary over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from potstill.ops.kd_loss import (
    Options,
    check_options,
    check_rows,
    divisor,
    is_one,
    weighted,
    wide,
)
from potstill.parallel.checks import check_classes, check_local, find_shards, problem_of
from potstill.parallel.rows import local_gradient, needs_second_round, row_losses, second_statistics
from potstill.parallel.shards import VocabShards, gather
from potstill.parallel.statistics import Rows, Slice, local_statistics, merge

OP = "vocab_parallel_kd_loss"
_CHUNK_ELEMENTS = 1 << 22  # logits in a chunk of rows: 16 MiB in float32 for each of about twenty temporaries

Gather = Callable[[Tensor], Tensor]  # this rank's [...] -> all ranks' [ranks, ...]


def vocab_parallel_kd_loss(
    student_shard: Tensor,
    teacher_shard: Tensor,
    target: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    shards: VocabShards | None = None,
    teacher_indices: Tensor | None = None,
    row_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    rest: str = "tail",
    temperature: float = 1.0,
    alpha: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """:data:`potstill.ops.kd_loss` of logits whose vocabulary is split over ``group``; the same loss on every rank.

    - ``student_shard``, ``teacher_shard``: this rank's columns of the logits, [..., columns]; slices may have any
      sizes, also none (see :class:`VocabShards`).
    - ``target``, ``teacher_indices``, ``row_weight``, ``normalizer``: as for :data:`potstill.ops.kd_loss`, in class
      numbers of the whole vocabulary, and the same on every rank; with ``teacher_indices`` so is ``teacher_shard``,
      all k log-probabilities.
    - ``shards``: where the columns lie. Without it each call begins with an additional small collective that finds
      out, and after which all ranks raise if one of them has wrong arguments; with it an error of one rank leaves the
      others waiting for the group's timeout.

    All ranks send about eight numbers per row in one collective (the jsd and tv need a second one of two): nothing of
    the logits' size is sent or made, but the gradient of ``student_shard``. It is computed in this pass; backward only
    scales it, and a second derivative is not defined. The softmax's sums are merged in float64 in the order of the
    ranks. Without a process group this is the loss of one process.

    Raises :class:`ValueError` for options, shapes or labels out of range.

    >>> student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
    >>> vocab_parallel_kd_loss(student, teacher, torch.arange(4), temperature=2.0, alpha=0.7).backward()
    >>> student.grad.shape
    torch.Size([4, 10])
    """
    check_local(OP, (student_shard, teacher_shard))
    device = student_shard.device
    if student_shard.dtype == torch.float16:
        student_shard = student_shard.float()  # its gradient could vanish before it is scaled
    if normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = torch.tensor(float(normalizer), device=device)
    o = Options(
        target,
        teacher_indices,
        row_weight,
        normalizer,
        divergence,
        beta,
        rest,
        temperature,
        alpha,
        ignore_index,
        label_smoothing,
        reduction,
        student_shard.requires_grad and torch.is_grad_enabled(),
    )
    columns = student_shard.shape[-1] if student_shard.dim() else 0
    teacher_columns = teacher_shard.shape[-1] if teacher_indices is None and teacher_shard.dim() else columns
    problem = problem_of(lambda: _check(student_shard, teacher_shard, o))
    shards = find_shards(OP, student_shard.shape[:-1].numel(), columns, teacher_columns, problem, shards, group, device)
    check_classes(OP, teacher_shard, o, shards)
    return _apply(student_shard, teacher_shard, o, shards, group)


def _check(student: Tensor, teacher: Tensor, o: Options) -> None:
    for name, logits in (("student_shard", student), ("teacher_shard", teacher)):
        if logits.dim() == 0:
            raise ValueError(f"{OP}: {name} has shape []; expected [..., columns]")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{OP}: student_shard has shape {list(student.shape)} but teacher_shard {list(teacher.shape)}; all but the "
            "last dimension must be equal"
        )
    check_options(o, OP)
    check_rows(OP, student.shape[:-1], o)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, o: Options, shards: VocabShards, group: dist.ProcessGroup | None
    ) -> Tensor:
        loss, gradient = _loss_and_gradient(student, teacher, o, shards, group)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return scaled(OP, ctx.saved_tensors[0], upstream.unsqueeze(-1), upstream), None, None, None, None


def scaled(op: str, gradient: Tensor, factor: Tensor, upstream: Tensor) -> Tensor:
    """``gradient`` times ``factor``, which is ``upstream`` in a shape that fits; raises for a second derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: no second derivative is defined; call backward() without create_graph=True")
    return gradient if is_one(upstream) else gradient * factor.to(gradient.dtype)


_apply: Callable[..., Tensor] = _Gradient.apply


def _loss_and_gradient(
    student: Tensor, teacher: Tensor, o: Options, shards: VocabShards, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    flat = flattened(o)
    rows = student.shape[:-1]
    loss, gradient = losses_and_gradient(
        student.reshape(rows.numel(), student.shape[-1]),
        teacher.reshape(rows.numel(), teacher.shape[-1]),
        flat,
        shards,
        lambda mine: gather(mine, group),
        divisor(rows.numel(), flat),
    )
    loss = loss.sum() if o.reduction != "none" else loss.reshape(rows)
    return loss.to(wide(student, teacher)), None if gradient is None else gradient.reshape(student.shape)


def flattened(o: Options) -> Options:
    """The tensors of ``o`` as [rows] and [rows, k], labels and indices as int64."""
    indices = o.teacher_indices
    return o._replace(
        target=None if o.target is None else o.target.reshape(-1).long(),
        row_weight=None if o.row_weight is None else o.row_weight.reshape(-1),
        teacher_indices=None if indices is None else indices.reshape(indices.shape[:-1].numel(), -1).long(),
    )


def rows_of(o: Options, rows: slice) -> Options:
    """A flattened ``o`` for some of its rows."""
    return o._replace(
        target=None if o.target is None else o.target[rows],
        row_weight=None if o.row_weight is None else o.row_weight[rows],
        teacher_indices=None if o.teacher_indices is None else o.teacher_indices[rows],
    )


def losses_and_gradient(
    student: Tensor, teacher: Tensor, o: Options, shards: VocabShards, gather: Gather, by: Tensor | float
) -> tuple[Tensor, Tensor | None]:
    """Each row's loss in float64 and the gradient of their sum, both weighted and divided by ``by``.

    ``student`` [rows, columns], ``teacher`` [rows, columns] or [rows, k], ``o`` flattened.
    """
    dtype = wide(student, teacher)

    def chunks() -> Iterator[tuple[slice, Slice]]:
        step = max(_CHUNK_ELEMENTS // max(student.shape[-1], teacher.shape[-1], 1), 1)
        for first in range(0, max(len(student), 1), step):  # one empty chunk if there are no rows
            rows = slice(first, first + step)
            yield rows, Slice(student[rows].to(dtype), teacher[rows].to(dtype), rows_of(o, rows), shards)

    merged = merge(_exchange([local_statistics(part) for _, part in chunks()], gather), o)
    if needs_second_round(o):
        found = [second_statistics(part, _rows(merged, rows)) for rows, part in chunks()]
        merged |= {name: ranks.sum(0) for name, ranks in _exchange(found, gather).items()}
    loss = weighted(row_losses(merged, o, shards), o) / by
    if not o.need_grad:
        return loss, None
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    for rows, part in chunks():
        gradient[rows] = weighted(local_gradient(part, _rows(merged, rows)), part.options) / by
    return loss, gradient


def _exchange(chunks: list[Rows], gather: Gather) -> Rows:
    mine = torch.stack([torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]])
    return dict(zip(chunks[0], gather(mine).unbind(1), strict=True))


def _rows(merged: Rows, rows: slice) -> Rows:
    return {name: values[rows] for name, values in merged.items()}
