"""Data parallel training: each process takes its rows of every batch."""

from __future__ import annotations

import atexit
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from potstill.distill.batch import Batch, mapped

_BUCKET = 1 << 23  # numbers that are summed at once: 32 MiB of float32


class Processes:
    """The processes of torch's default group, or this one alone.

    All of them iterate over the same batches, and each computes the gradient of its contiguous share of the rows; the
    sum over the processes, weighted by the rows that count, is the gradient of the whole batch. So a run gives the same
    result on any number of processes, but for the order of sums; strategies that relate the examples of a batch to each
    other, and batch normalisation, see a process's share. Random numbers inside the models differ from process to
    process.

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
    ) -> None:
        self._device = device
        self._where, self._leaving = where, leaving
        alone = not (dist.is_available() and dist.is_initialized())
        self.rank, self.world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    @classmethod
    def joined(
        cls,
        device: torch.device,
        where: Callable[[], str] = lambda: "Distiller.fit",
        leaving: Callable[[], bool] = lambda: False,
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
        return cls(device, where, leaving)

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch: those of every tensor whose first size is that of the target."""
        if self.world == 1:
            return batch
        if not batch.target.dim():
            raise ValueError("Distiller: the target is a scalar, which cannot be split over processes; make it a row")
        rows = len(batch.target)
        first, last = rows * self.rank // self.world, rows * (self.rank + 1) // self.world
        mine = mapped(batch, lambda x: x[first:last] if x.dim() and len(x) == rows else x)
        return mine if batch.index is None else replace(mine, index=batch.index[first:last])

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
            torch.manual_seed((seed * self.world + self.rank) * 1_000_003 + step)
            yield

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its sum over the processes; one that is missing counts as 0."""
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
                self._all_reduce(flat)
                parts = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
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

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's numbers."""
        if self.world > 1:
            for tensor in tensors:
                self._broadcast(tensor)

    def _all_reduce(self, values: Tensor, *, largest: bool = False) -> None:
        with self._named():
            dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)

    def _broadcast(self, values: Tensor) -> None:
        with self._named():
            dist.broadcast(values, 0)

    def _named(self) -> AbstractContextManager[None]:
        from potstill.parallel import faults

        what_next = (
            "This process ends; start all again, as torchrun --max-restarts does, and the run goes on from its "
            f"checkpoint. Where a process may be as slow as that, set {faults.VARIABLE} to more seconds"
        )
        return faults.named(self._where, what_next, self._leaving)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(map(Tensor.numel, bucket)) + gradient.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    yield bucket
