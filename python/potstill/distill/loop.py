"""The course of a training run: epochs, checkpoints, resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from potstill.distill import state
from potstill.distill.batch import Batch
from potstill.distill.chance import Chance
from potstill.distill.history import Epoch, History
from potstill.distill.interrupts import Interrupts
from potstill.distill.progress import Bar
from potstill.errors import CheckpointError

if TYPE_CHECKING:
    from potstill.distill.distiller import Distiller

Validate = Callable[[nn.Module], float | Mapping[str, float]]


class Loop:
    """One call of :meth:`Distiller.fit`: where it is, and how it goes on.

    The position is whole, and may be saved, between two steps: the models, ``history``, the ``batches`` consumed of the
    current epoch and the random state ``now``. An epoch begun again from ``epoch_start``, the random state before its
    iterator was made, yields the same batches in the same order; so resuming skips those consumed, then continues from
    ``now``.
    """

    def __init__(self, distiller: Distiller, loader: Iterable[Any], validate: Validate | None) -> None:
        self._distiller = distiller
        self._loader = loader
        self._validate = validate
        self._chance = Chance(distiller.device, loader)
        self._interrupts = Interrupts()
        self._checkpoint: Path | None = distiller.checkpoint
        self._history = History()
        self._batches = 0
        self._seconds = 0.0
        self._epoch_start: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._whole = True

    def run(self, epochs: int, *, resume: bool, quiet: bool) -> History:
        """Trains until ``epochs`` epochs are complete."""
        distiller, checkpoint = self._distiller, self._checkpoint
        with ExitStack() as stack:
            stack.enter_context(Chance(distiller.device).kept())
            stack.enter_context(mode(distiller.student, training=True))
            stack.enter_context(mode(distiller.strategies, training=True))
            if distiller.teacher is not None:
                stack.enter_context(mode(distiller.teacher, training=False))
            if checkpoint is not None and resume and checkpoint.exists():
                self._load(checkpoint)
            else:
                self._chance.seed(distiller.seed)
                self._epoch_start = self._chance.state()
                self._now = self._epoch_start
            bar = stack.enter_context(self._bar(epochs, quiet))
            if checkpoint is None:
                self._epochs(epochs, bar)
            else:
                with self._interrupts.handled(), self._saved_on_interrupt(checkpoint):
                    self._epochs(epochs, bar)
        return self._history

    def _epochs(self, epochs: int, bar: Bar) -> None:
        while len(self._history.epochs) < epochs:
            bar.describe(f"epoch {len(self._history.epochs) + 1}/{epochs}")
            self._epoch(bar)

    def _epoch(self, bar: Bar) -> None:
        begin = time.perf_counter() - self._seconds
        batches = self._iterator()
        while group := [Batch.of(item) for item in islice(batches, self._distiller.accumulate)]:
            with self._interrupts.held():
                self._step(group, bar)
                self._seconds = time.perf_counter() - begin
                self._after_step()
        first = self._history.epochs[-1].step if self._history.epochs else 0
        losses = self._history.losses[first:]
        if not losses:
            raise ValueError(self._nothing())
        validation = self._validation()
        with self._interrupts.held():
            seconds = time.perf_counter() - begin
            number, loss = len(self._history.epochs) + 1, math.fsum(losses) / len(losses)
            record = Epoch(number, self._history.step, loss, self._distiller.lr, seconds, validation)
            self._history.epochs.append(record)
            self._batches, self._seconds = 0, 0.0
            self._epoch_start = self._chance.state()
            self._now = self._epoch_start
            if self._checkpoint is not None:
                self._save(self._checkpoint)

    def _iterator(self) -> Iterator[Any]:
        batches = iter(self._loader)
        if self._batches:
            skipped = sum(1 for _ in islice(batches, self._batches))
            if skipped < self._batches:
                raise CheckpointError(
                    f"{self._checkpoint} was written after {self._batches} batches of an epoch, but the loader yields "
                    f"only {skipped}; resume with the same data"
                )
            self._chance.restore(self._now)
        return batches

    def _step(self, group: list[Batch], bar: Bar) -> None:
        self._whole = False
        loss = self._distiller.step(group, self._history.step + 1)
        self._batches += len(group)
        if loss is not None:
            self._history.losses.append(loss)
        bar.advance(len(group), loss)

    def _after_step(self) -> None:
        if self._checkpoint is None:
            return
        self._now = self._chance.state()
        self._whole = True
        every = self._distiller.checkpoint_every
        if every is not None and self._history.step % every == 0:
            self._save(self._checkpoint)

    def _validation(self) -> dict[str, float]:
        if self._validate is None:
            return {}
        with mode(self._distiller.student, training=False), torch.no_grad():
            values = self._validate(self._distiller.student)
        if not isinstance(values, Mapping):
            values = {"value": values}
        return {name: float(value) for name, value in values.items()}

    def _nothing(self) -> str:
        epoch = len(self._history.epochs) + 1
        if self._batches:
            return (
                f"Distiller.fit: epoch {epoch} had {self._batches} batches but no target that counts; check the targets"
            )
        return (
            f"Distiller.fit: the loader yielded no batch in epoch {epoch}; it must not be empty, and must be iterable "
            "again for every epoch (a DataLoader or a list, not an iterator)"
        )

    def _bar(self, epochs: int, quiet: bool) -> Bar:
        length = _length(self._loader)
        if length is None:
            return Bar(None, self._batches, quiet=quiet)
        return Bar(epochs * length, len(self._history.epochs) * length + self._batches, quiet=quiet)

    def _settings(self) -> dict[str, Any]:
        length = _length(self._loader)
        return {
            "loader's length": "unknown" if length is None else length,
            "loader's generators": len(self._chance.generators),
            **self._distiller.settings,
        }

    @contextmanager
    def _saved_on_interrupt(self, path: Path) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if self._whole:
                self._save(path)
            raise

    def _save(self, path: Path) -> None:
        state.write(
            path,
            {
                "settings": self._settings(),
                **self._distiller.state(),
                "history": self._history.to_dict(),
                "batches": self._batches,
                "seconds": self._seconds,
                "epoch_start": self._epoch_start,
                "now": self._now,
            },
        )

    def _load(self, path: Path) -> None:
        saved = state.read(path, self._settings())
        self._distiller.restore(saved)
        self._history = History.from_dict(saved["history"])
        self._batches, self._seconds = saved["batches"], saved["seconds"]
        self._epoch_start, self._now = saved["epoch_start"], saved["now"]
        self._chance.restore(self._epoch_start)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts every module of ``model`` into training or evaluation mode, and afterwards back into what it was in."""
    found = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in found:
            module.training = flag


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # also what a DataLoader over an iterable data set raises
        return None
