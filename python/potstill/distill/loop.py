"""The course of a training run: epochs, checkpoints, resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from potstill.distill import state
from potstill.distill.batch import Batch
from potstill.distill.callbacks import Callback, Run
from potstill.distill.chance import Chance
from potstill.distill.history import Epoch, History
from potstill.distill.interrupts import Interrupts
from potstill.distill.plan import TrainingPlan
from potstill.distill.processes import Processes
from potstill.distill.progress import Bar
from potstill.distill.recompute import recomputed
from potstill.distill.training import Training
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

    def __init__(
        self,
        distiller: Distiller,
        loader: Iterable[Any],
        plan: TrainingPlan,
        validate: Validate | None,
        callbacks: Sequence[Callback],
    ) -> None:
        self._distiller = distiller
        self._loader = loader
        self._plan = plan
        self._validate = validate
        self._callbacks = callbacks
        self._chance = Chance(distiller.device, loader)
        self._interrupts = Interrupts()
        self._history = History()
        self._batches = 0
        self._seconds = 0.0
        self._terms = [0.0] * len(distiller.names)
        self._epoch_start: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._whole = True
        self._stopped = False

    def run(self, checkpoint: Path | None, every: int | None, *, resume: bool, quiet: bool) -> History:
        """Trains to the end of the plan."""
        distiller, plan = self._distiller, self._plan
        self._checkpoint, self._every = checkpoint, every
        with ExitStack() as stack:
            self._processes = processes = Processes.joined(
                distiller.device, self._place, lambda: self._interrupts.waiting > 0, distiller.rows_alike
            )
            stack.enter_context(Chance(distiller.device).kept())
            stack.enter_context(mode(distiller.student, training=True))
            stack.enter_context(mode(distiller.strategies, training=True))
            stack.enter_context(recomputed(distiller.student, plan.recompute))
            if distiller.teacher is not None:
                stack.enter_context(mode(distiller.teacher, training=False))
            if distiller.spread is None:
                processes.equalise(distiller.student.state_dict().values())
            processes.equalise(distiller.strategies.state_dict().values())
            self._training = Training(distiller, plan, plan.total(_length(self._loader)), processes)
            if checkpoint is not None and resume and processes.largest(processes.rank == 0 and checkpoint.exists()):
                self._load(checkpoint)
            else:
                self._chance.seed(plan.seed)
                self._epoch_start = self._chance.state()
                self._now = self._epoch_start
            self._report = Run(distiller, plan, self._history, lr=self._training.lr)
            bar = stack.enter_context(self._bar(quiet or processes.rank > 0))
            with self._interruptible(), self._called_back():
                while not self._done():
                    self._epoch(bar)
            self._training.finish()
        return self._history

    def _done(self) -> bool:
        history, plan = self._history, self._plan
        if self._stopped:
            return True
        if plan.epochs is not None:
            return len(history.epochs) >= plan.epochs
        return plan.steps is not None and history.step >= plan.steps and not self._open_steps()

    def _open_steps(self) -> int:
        """Steps of the epoch that has no record yet."""
        return self._history.step - (self._history.epochs[-1].step if self._history.epochs else 0)

    def _epoch(self, bar: Bar) -> None:
        number = len(self._history.epochs) + 1
        bar.describe(f"epoch {number}/{self._plan.epochs}" if self._plan.epochs else f"epoch {number}")
        begin = time.perf_counter() - self._seconds
        first, batches = self._history.step - self._open_steps(), self._iterator()
        while group := self._group(batches):
            with self._interrupts.held():
                if not self._open_steps():
                    self._processes.check_same(group)
                taken = self._step(group, bar)
                self._seconds = time.perf_counter() - begin
                self._after_step(taken)
        if not self._open_steps():
            raise ValueError(self._nothing())
        validation = self._validation()
        with self._interrupts.held():
            self._record(first, validation, time.perf_counter() - begin)

    def _group(self, batches: Iterator[Any]) -> list[Batch]:
        """The micro-batches of the next step; none at the end of the epoch or of the run."""
        if self._report.stopping or (self._plan.steps is not None and self._history.step >= self._plan.steps):
            return []
        return [Batch.of(item) for item in islice(batches, self._plan.accumulate)]

    def _iterator(self) -> Iterator[Any]:
        skip = getattr(self._loader, "skip", None)
        if self._batches and callable(skip):
            batches: Iterator[Any] = iter(skip(self._batches))
            self._chance.restore(self._now)
            return batches
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

    def _step(self, group: list[Batch], bar: Bar) -> bool:
        """Whether the group had rows that count, so that a step was taken."""
        self._whole = False
        taken = self._training.step(group, self._history.step + 1, lambda index: self._where(len(group), index))
        self._batches += len(group)
        if taken is not None:
            self._history.losses.append(taken.loss)
            self._terms = [total + term for total, term in zip(self._terms, taken.terms, strict=True)]
            self._report.loss, self._report.lr = taken.loss, self._training.lr
            self._report.terms = dict(zip(self._distiller.names, taken.terms, strict=True))
        bar.advance(len(group), None if taken is None else taken.loss)
        return taken is not None

    def _where(self, size: int, index: int | None) -> str:
        epoch, first = len(self._history.epochs) + 1, self._batches + 1
        if index is not None:
            which = f"batch {first + index}"
        else:
            which = f"batch {first}" if size == 1 else f"batches {first} to {first + size - 1}"
        kept = f" (the last good checkpoint is {self._checkpoint})" if self._checkpoint is not None else ""
        return f"{which} of epoch {epoch}{kept}"

    def _place(self) -> str:
        return f"Distiller.fit: step {self._history.step + 1}: {self._where(1, None)}"

    def _after_step(self, taken: bool) -> None:
        if self._checkpoint is not None:
            self._now = self._chance.state()
        self._whole = True
        if self._callbacks and taken:
            if self._processes.rank == 0:
                for callback in self._callbacks:
                    callback.step(self._report)
            self._report.stopping = bool(self._processes.largest(self._report.stopping))
        if self._checkpoint is not None and self._every is not None and self._history.step % self._every == 0:
            self._save(self._checkpoint)
        if self._processes.world > 1:  # a signal reaches the processes at different steps; all must leave at the same
            signal = self._processes.largest(self._interrupts.waiting)
            if signal:
                if self._checkpoint is not None and self._distiller.spread is not None:
                    self._save(self._checkpoint)  # here, where all are: they save together
                self._interrupts.deliver(signal)

    def _validation(self) -> dict[str, float]:
        spread = self._distiller.spread
        group = None if spread is None else spread.replicas
        self._processes.equalise(self._training.model.buffers(), group)
        if self._validate is None:
            return {}
        with mode(self._training.model, training=False), torch.no_grad():
            values = self._validate(self._training.model)
        if not isinstance(values, Mapping):
            values = {"value": values}
        return self._processes.first({name: float(value) for name, value in values.items()})

    def _record(self, first: int, validation: dict[str, float], seconds: float) -> None:
        losses = self._history.losses[first:]
        record = Epoch(
            epoch=len(self._history.epochs) + 1,
            step=self._history.step,
            loss=math.fsum(losses) / len(losses),
            lr=self._training.lr,
            seconds=seconds,
            validation=validation,
            terms={n: total / len(losses) for n, total in zip(self._distiller.names, self._terms, strict=True)},
        )
        self._history.epochs.append(record)
        self._stopped = self._training.judge(record) or self._report.stopping
        self._batches, self._seconds, self._terms = 0, 0.0, [0.0] * len(self._terms)
        self._epoch_start = self._chance.state()
        self._now = self._epoch_start
        if self._checkpoint is not None:
            self._save(self._checkpoint)
        if self._processes.rank == 0 and self._callbacks:
            with mode(self._training.model, training=False):
                for callback in self._callbacks:
                    callback.epoch(self._report, record)

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

    def _bar(self, quiet: bool) -> Bar:
        length, plan = _length(self._loader), self._plan
        if plan.steps is not None:
            return Bar(plan.steps * plan.accumulate, self._history.step * plan.accumulate, quiet=quiet)
        if length is None or plan.epochs is None:
            return Bar(None, self._batches, quiet=quiet)
        return Bar(plan.epochs * length, len(self._history.epochs) * length + self._batches, quiet=quiet)

    def _settings(self) -> dict[str, Any]:
        length = _length(self._loader)
        return {
            "loader's length": "unknown" if length is None else length,
            "loader's generators": len(self._chance.generators),
            **self._training.settings,
        }

    @contextmanager
    def _called_back(self) -> Iterator[None]:
        if self._processes.rank > 0:
            yield
            return
        with ExitStack() as stack:
            for callback in self._callbacks:
                callback.begin(self._report)
                stack.callback(callback.end, self._report)
            yield

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Saves on a signal where there is a file to save to."""
        if self._checkpoint is None:
            yield
            return
        with self._interrupts.handled(), ExitStack() as stack:
            if self._processes.world > 1:
                stack.enter_context(self._interrupts.held())
            try:
                yield
            except (KeyboardInterrupt, SystemExit):
                if self._whole and self._distiller.spread is None:
                    self._save(self._checkpoint)
                raise

    def _save(self, path: Path) -> None:
        if self._processes.rank > 0 and self._distiller.spread is None:
            return
        models = self._training.state()
        if self._processes.rank > 0:
            return
        state.write(
            path,
            {
                "settings": self._settings(),
                **models,
                "history": self._history.to_dict(),
                "batches": self._batches,
                "seconds": self._seconds,
                "terms": self._terms,
                "stopped": self._stopped,
                "epoch_start": self._epoch_start,
                "now": self._now,
            },
        )

    def _load(self, path: Path) -> None:
        saved = state.read(path, self._settings())
        self._training.restore(saved)
        self._history = History.from_dict(saved["history"])
        self._batches, self._seconds, self._terms = saved["batches"], saved["seconds"], saved["terms"]
        self._stopped = saved["stopped"]
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
