"""Data parallel training: each process takes its rows of every batch."""

from __future__ import annotations

import atexit
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from potstill.distill.batch import Batch, mapped

if TYPE_CHECKING:
    from potstill.parallel import Plan

_BUCKET = 1 << 23  # numbers that are summed at once: 32 MiB of float32


@dataclass(frozen=True)
class RowsAlike:
    """How many processes next to each other have the same rows of a batch, because they share layers.

    ``student``: of those that it learns from; ``teacher``: of those that the teacher is run on, at least as many.
    """

    student: int = 1
    teacher: int = 1

    @classmethod
    def under(cls, student: Plan | None, teacher: Plan | None) -> RowsAlike:
        """Those of the plans; raises :class:`ValueError` where groups of the one would cross those of the other."""
        own, taught = (1 if plan is None else plan.tensor for plan in (student, teacher))
        if max(own, taught) % min(own, taught):
            raise ValueError(
                f"Distiller: {own} processes share the student's layers and {taught} the teacher's; one number must "
                "divide the other, so that a process's rows are among those that its part of the teacher sees"
            )
        return cls(own, max(own, taught))


class Processes:
    """The processes of torch's default group, or this one alone.

    All of them iterate over the same batches, and each computes the gradient of its contiguous share of the rows; the
    sum over the processes, weighted by the rows that count, is the gradient of the whole batch. So a run gives the same
    result on any number of processes, but for the order of sums; strategies that relate the examples of a batch to each
    other, and batch normalisation, see a process's share. Random numbers inside the models differ from process to
    process.

    Where plans have spread the models (``alike``), processes that share the student's layers have the same rows and the
    same random numbers, and a sum is one over those that have other rows.

    Where a process has died or hangs, the others raise a :class:`RuntimeError` that names it and begins with
    ``where()``; see :func:`potstill.parallel.faults.named`, also for ``leaving``.

    >>> alone = Processes(torch.device("cpu"))
    >>> alone.rank, alone.world
    (0, 1)
    """

    def __init__(
        self,
        device: torch.device,
        where: Callable[[], str] = lambda: "Distiller.fit",
        leaving: Callable[[], bool] = lambda: False,
        alike: RowsAlike | None = None,
    ) -> None:
        self._device = device
        self._where, self._leaving = where, leaving
        alone = not (dist.is_available() and dist.is_initialized())
        self.rank, self.world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        self._alike = alike or RowsAlike()
        self.replicas, self._replica = self.world // self._alike.student, self.rank // self._alike.student

    @classmethod
    def joined(
        cls,
        device: torch.device,
        where: Callable[[], str] = lambda: "Distiller.fit",
        leaving: Callable[[], bool] = lambda: False,
        alike: RowsAlike | None = None,
    ) -> Processes:
        """Under ``torchrun`` the default group is made, if it is not there.

        In it a process waits for another as long as :func:`potstill.parallel.faults.timeout` says. It is ended with the
        process: torchrun's meeting point serves for one group of a program.
        """
        launched = dist.is_available() and dist.is_torchelastic_launched()
        if launched and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from potstill.parallel import meeting  # here: the package imports much of torch that one process needs not

            meeting.join("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        return cls(device, where, leaving, alike)

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch: those of every tensor whose first size is that of the target."""
        if self.world == 1:
            return batch
        if not batch.target.dim():
            raise ValueError("Distiller: the target is a scalar, which cannot be split over processes; make it a row")
        return _cut(batch, self._rows(len(batch.target), self._replica, self._replica + 1))

    def shown(self, batch: Batch) -> tuple[Batch, slice]:
        """The rows that this process's part of the teacher is run on, and where among them its own are.

        There is one at least, also where the process has none of its own: models that processes share need each.
        """
        rows, width = len(batch.target), self._alike.teacher // self._alike.student
        group = self._replica // width * width
        all_, own = self._rows(rows, group, group + width), self._rows(rows, self._replica, self._replica + 1)
        if all_.start == all_.stop:
            return _cut(batch, slice(0, 1)), slice(0, 1)
        place = slice(own.start - all_.start, own.stop - all_.start)
        return _cut(batch, all_), place if place.start < place.stop else slice(0, 1)

    def _rows(self, rows: int, first: int, last: int) -> slice:
        """The rows of the replicas from the ``first`` up to the ``last``."""
        return slice(rows * first // self.replicas, rows * last // self.replicas)

    def check_same(self, group: Sequence[Batch]) -> None:
        """Raises :class:`RuntimeError` on every process if their loaders yielded different targets."""
        if self.world == 1:
            return
        code = 0
        for batch in group:
            code = zlib.crc32(batch.target.detach().cpu().contiguous().numpy().tobytes(), code)
        bounds = torch.tensor([code, -code], dtype=torch.int64, device=self._device)
        self._all_reduce(bounds, largest=True)
        if int(bounds[0]) != -int(bounds[1]):
            raise RuntimeError(
                "Distiller.fit: the loaders of the processes yield different batches. Every process gets the same "
                "loader, seeded alike and without a DistributedSampler; the rows of each batch are split here"
            )

    def random(self, seed: int, step: int) -> Any:
        """A context in which torch's generators differ from process to process, and after which they are as before."""
        return nullcontext() if self.world == 1 else self._forked(seed, step)

    @contextmanager
    def _forked(self, seed: int, step: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed((seed * self.replicas + self._replica) * 1_000_003 + step)
            yield

    def sum_gradients(self, parameters: Iterable[nn.Parameter], times: float = 1.0) -> None:
        """Replaces each gradient by its sum over the processes, ``times`` that; one that is missing counts as 0."""
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                self.sum(flat).mul_(times)
                parts = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes that have other rows, in place."""
        return self.total(values).div_(self._alike.student)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            self._all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.world == 1:
            return value
        found = torch.tensor(value, dtype=torch.int64, device=self._device)
        self._all_reduce(found, largest=True)
        return int(found)

    def first(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values of the first process; the names must be the same on all."""
        if self.world == 1 or not values:
            return dict(values)
        found = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        self._broadcast(found)
        return dict(zip(values, found.tolist(), strict=True))

    def equalise(self, tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Gives all processes, or those of a group, the first one's numbers."""
        if self.world > 1:
            for tensor in tensors:
                self._broadcast(tensor, group)

    def _all_reduce(self, values: Tensor, *, largest: bool = False) -> None:
        with self._named():
            dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)

    def _broadcast(self, values: Tensor, group: dist.ProcessGroup | None = None) -> None:
        with self._named(group):
            dist.broadcast(values, group=group, group_src=0)

    def _named(self, group: dist.ProcessGroup | None = None) -> AbstractContextManager[None]:
        from potstill.parallel import faults

        what_next = (
            "This process ends; start all again, as torchrun --max-restarts does, and the run goes on from its "
            f"checkpoint. Where a process may be as slow as that, set {faults.VARIABLE} to more seconds"
        )
        return faults.named(self._where, what_next, self._leaving, group=group)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _cut(batch: Batch, place: slice) -> Batch:
    rows = len(batch.target)
    mine = mapped(batch, lambda x: x[place] if x.dim() and len(x) == rows else x)
    return mine if batch.index is None else replace(mine, index=batch.index[place])


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(map(Tensor.numel, bucket)) + gradient.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    yield bucket
