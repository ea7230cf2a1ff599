"""Distillation with a goal: more training, then a larger student, until one is good enough."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from potstill.distill.callbacks import Callback, Run
from potstill.distill.chance import Chance
from potstill.distill.distiller import Distiller, Weighted
from potstill.distill.initialise import initialise
from potstill.distill.loop import Validate, mode
from potstill.distill.plan import TrainingPlan
from potstill.distill.strategies.strategy import Strategy
from potstill.errors import CheckpointError

MakeStudent = Callable[[], nn.Module]
MakeStrategies = Callable[[], Strategy | Sequence[Weighted]]


@dataclass(frozen=True)
class Trial:
    """One round of training of one student.

    ``student`` is its number, from 0, and ``parameters`` its size; ``round`` 0 is what it was right after it was
    initialised; ``steps`` the optimiser steps of this round, ``seconds`` what it took, evaluation included.
    """

    student: int
    parameters: int
    round: int
    steps: int
    seconds: float
    score: float


@dataclass(frozen=True)
class Search:
    """What :func:`distill_until` found: the best ``student``, and all ``trials`` in order."""

    student: nn.Module
    trials: list[Trial]
    best: Trial
    reached: bool
    target: float
    metric: str

    def table(self) -> Table:
        """A line per trial, for people."""
        verdict = "reached" if self.reached else "not reached"
        table = Table(title=f"{self.metric} {self.target:g}: {verdict}")
        for heading in ("student", "parameters", "round", "steps", "seconds", self.metric):
            table.add_column(heading, justify="right")
        for trial in self.trials:
            round_ = str(trial.round) if trial.round else "initialised"
            numbers = (f"{trial.parameters:,}", round_, f"{trial.steps}", f"{trial.seconds:.1f}", f"{trial.score:g}")
            table.add_row(str(trial.student), *numbers, style="bold" if trial == self.best else None)
        return table


def distill_until(
    teacher: nn.Module,
    students: Sequence[MakeStudent],
    strategies: MakeStrategies,
    loader: Iterable[Any],
    plan: TrainingPlan,
    validate: Validate,
    target: float,
    *,
    metric: str = "value",
    larger_is_better: bool = True,
    rounds: int = 2,
    seconds: float | None = None,
    layers: str | Sequence[int] = "even",
    widths: str = "project",
    folder: str | Path | None = None,
    quiet: bool = False,
) -> Search:
    """Initialises a student from its teacher, trains and evaluates it, again and with larger ones, up to a ``target``.

    - ``students``: functions that build the students, from the smallest to the largest. Each starts from the teacher's
      parameters: see :func:`initialise` for ``layers`` and ``widths``; its sample is the loader's first item.
    - ``strategies``: a function that makes them, since they may have parameters of their own.
    - ``validate``: returns a number, or a dictionary of which ``metric`` counts; the ``target`` is its least (or, with
      ``larger_is_better=False``, its largest) value that is good enough.
    - ``rounds``: how often at most a student is trained with the whole ``plan``, each time from where it was, with a
      fresh optimiser and the next seed. A student that got no better than it was in the round before is given up.
    - ``seconds``: when these are spent, counting those of finished trials of earlier calls with this ``folder``, the
      round that runs ends after its step and is the last. The first student is at least initialised.
    - ``folder``: an existing folder for a file per finished trial, and the checkpoint of the one that runs. With it
      the same call continues a search that was interrupted; target, rounds and seconds may be others.

    It ends with the first trial that reaches the target, also a student that needs no training. Returns the student
    with the best score, with the weights it had then, in evaluation mode.

    Raises :class:`ValueError` for arguments that do not fit, and :class:`CheckpointError` for a folder that has files
    of another search.

    >>> from potstill.distill import SoftTargets
    >>> def model(units): return nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 3))
    >>> teacher, x = model(64), torch.randn(256, 4)
    >>> def agreement(student): return float((student(x).argmax(1) == teacher(x).argmax(1)).float().mean())
    >>> search = distill_until(
    ...     teacher, [lambda: model(4), lambda: model(64)], SoftTargets, [(x, teacher(x).argmax(1))],
    ...     TrainingPlan(steps=2), agreement, target=0.999,
    ... )
    >>> search.reached, search.best.student, search.best.round
    (True, 1, 0)
    """
    _check(students, target, rounds, seconds, folder)
    goal = _Goal(validate, target, metric, larger_is_better)
    settings = {"plan": _plain(plan), "metric": metric, "layers": str(layers), "widths": widths}
    work = _Work(loader, plan, goal, _Store(None if folder is None else Path(folder), settings), seconds, quiet)
    for number, make in enumerate(students):
        if number and work.over:
            break
        begin = time.perf_counter()
        with Chance(next(teacher.parameters()).device, loader).kept():
            torch.manual_seed(plan.seed)
            student, sample = make(), next(iter(loader))
            initialise(student, teacher, layers, sample, widths)
            distiller = Distiller(teacher, student, strategies(), sample=sample)
        work.raise_student(distiller, number, rounds, begin)
    return work.result()


@dataclass(frozen=True)
class _Goal:
    """What a score is, and when it is good enough."""

    validate: Validate
    target: float
    metric: str
    larger_is_better: bool

    def score(self, student: nn.Module) -> float:
        with mode(student, training=False), torch.no_grad():
            values = self.validate(student)
        found = values if isinstance(values, Mapping) else {"value": values}
        if self.metric not in found:
            raise ValueError(f"distill_until: validate returned {', '.join(found)}; metric is {self.metric!r}")
        return float(found[self.metric])

    def better(self, score: float, other: float) -> bool:
        if math.isnan(other):
            return not math.isnan(score)
        return score > other if self.larger_is_better else score < other

    def reached(self, score: float) -> bool:
        return score >= self.target if self.larger_is_better else score <= self.target


class _Deadline(Callback):
    """Ends a run after the step in which the time was up."""

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.perf_counter() + seconds

    def step(self, run: Run) -> None:
        if time.perf_counter() >= self._end:
            run.stopping = True


class _Work:
    """The trials so far, and what is done in each."""

    def __init__(
        self, loader: Iterable[Any], plan: TrainingPlan, goal: _Goal, store: _Store, seconds: float | None, quiet: bool
    ) -> None:
        self._loader, self._plan, self._goal, self._store = loader, plan, goal, store
        self._seconds, self._quiet = seconds, quiet
        self._trials: list[Trial] = []
        self._best: tuple[Trial, nn.Module, dict[str, Any]] | None = None

    @property
    def over(self) -> bool:
        """Whether the target is reached or the time is spent."""
        left = self._left()
        return (left is not None and left <= 0) or any(self._goal.reached(trial.score) for trial in self._trials)

    def raise_student(self, distiller: Distiller, number: int, rounds: int, begin: float) -> None:
        """Trains one student until it is good enough, no longer gets better, or has had all its rounds."""
        before: Trial | None = None
        for round_ in range(rounds + 1):
            if before is not None and self.over:
                return
            trial = self._store.finished(number, round_, distiller)
            if trial is None:
                trial = self._trial(distiller, number, round_, begin)
                self._store.finish(trial, distiller)
            self._trials.append(trial)
            if self._best is None or self._goal.better(trial.score, self._best[0].score):
                self._best = trial, distiller.student, copy.deepcopy(distiller.student.state_dict())
            if before is not None and not self._goal.better(trial.score, before.score):
                return
            before, begin = trial, time.perf_counter()

    def result(self) -> Search:
        """The best student, as it was then."""
        assert self._best is not None  # each student has its trial 0
        trial, student, weights = self._best
        student.load_state_dict(weights)
        reached = self._goal.reached(trial.score)
        return Search(student.eval(), self._trials, trial, reached, self._goal.target, self._goal.metric)

    def _trial(self, distiller: Distiller, number: int, round_: int, begin: float) -> Trial:
        steps = 0
        if round_:
            plan = replace(self._plan, seed=(self._plan.seed + round_ - 1) % 2**32)
            steps = distiller.fit(
                self._loader,
                plan,
                self._goal.validate,
                checkpoint=self._store.running(number, round_),
                callbacks=[_Deadline(self._left())],
                quiet=self._quiet,
            ).step
        score = self._goal.score(distiller.student)
        parameters = sum(p.numel() for p in distiller.student.parameters())
        return Trial(number, parameters, round_, steps, time.perf_counter() - begin, score)

    def _left(self) -> float | None:
        return None if self._seconds is None else self._seconds - sum(trial.seconds for trial in self._trials)


@dataclass(frozen=True)
class _Store:
    """The finished trials in a folder, if there is one."""

    folder: Path | None
    settings: dict[str, Any]

    def running(self, number: int, round_: int) -> Path | None:
        """The checkpoint of a trial that runs."""
        return None if self.folder is None else self.folder / f"student{number}-round{round_}.run.pt"

    def finish(self, trial: Trial, distiller: Distiller) -> None:
        """Writes what the trial made: whole, or not at all."""
        if self.folder is None:
            return
        path = self._path(trial.student, trial.round)
        temporary = path.with_name(path.name + ".tmp")
        states = {"student": distiller.student.state_dict(), "strategies": distiller.strategies.state_dict()}
        torch.save({"settings": self.settings, "trial": asdict(trial), **states}, temporary)
        os.replace(temporary, path)
        running = self.running(trial.student, trial.round)
        if running is not None:
            running.unlink(missing_ok=True)

    def finished(self, number: int, round_: int, distiller: Distiller) -> Trial | None:
        """The trial that an earlier call finished, its weights in the student; None if there is none."""
        path = self._path(number, round_)
        if self.folder is None or not path.exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            trial = Trial(**saved["trial"])
            settings = saved["settings"]
        except Exception as error:
            raise CheckpointError(f"{path} is damaged or not a trial ({error}); delete it to run it again") from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise CheckpointError(
                    f"{path} is of another search: {name} was {settings.get(name)}, is {value}; choose another folder"
                )
        try:
            distiller.student.load_state_dict(saved["student"])
            distiller.strategies.load_state_dict(saved["strategies"])
        except RuntimeError as error:
            raise CheckpointError(f"{path} is of another student ({error}); choose another folder") from error
        return trial

    def _path(self, number: int, round_: int) -> Path:
        return (self.folder or Path()) / f"student{number}-round{round_}.pt"


def _check(
    students: Sequence[MakeStudent], target: float, rounds: int, seconds: float | None, folder: str | Path | None
) -> None:
    if not students:
        raise ValueError("distill_until: students is empty; give functions that build students, the smallest first")
    if math.isnan(target):
        raise ValueError("distill_until: target is nan; give the score that is good enough")
    if rounds < 1:
        raise ValueError(f"distill_until: rounds is {rounds}; it must be at least 1")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"distill_until: seconds is {seconds}; it must be positive, or None")
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"distill_until: folder is {folder}, which is not an existing folder")


def _plain(plan: TrainingPlan) -> dict[str, Any]:
    # Functions differ in their names at most: their addresses change from run to run.
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return {name: getattr(v, "__qualname__", "function") if callable(v) else repr(v) for name, v in values.items()}
