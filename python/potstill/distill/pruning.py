"""Pruning in the course of a training: sparser every few steps, while the student learns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from potstill.distill.callbacks import Callback, Run
from potstill.distill.history import Epoch
from potstill.transform.criteria import Criterion, LayerFacts, movement
from potstill.transform.prune import Prune, prune_
from potstill.transform.prune_facts import Loss
from potstill.transform.prune_layers import candidates
from potstill.transform.prune_report import PruneReport
from potstill.transform.prune_rounds import check_in_steps
from potstill.transform.swap import Pattern

Share = Callable[[float], float]

SCHEDULES: dict[str, Share] = {"cubic": lambda share: 1.0 - (1.0 - share) ** 3, "linear": lambda share: share}


class GradualPruning(Callback):
    """Prunes a student while it trains: a callback for :meth:`Distiller.fit`, one object for one run.

    - ``config``: the :class:`Prune` that the student ends with; ``include``, ``exclude``: as in ``prune_``.
    - ``begin``, ``end``: optimiser steps; below 1 shares of the plan's ``steps``. One step at least must follow.
    - ``every``: so many steps apart, after ``begin`` and up to ``end``, new masks are chosen, and at ``end`` itself.
    - ``schedule``: how the sparsity rises from 0: ``"cubic"``, s (1 - (1 - p)^3) at the share p of the way (Zhu and
      Gupta 2017, "To prune, or not to prune"), ``"linear"``, or a function of p that returns the share of the final
      sparsity s, 1 at 1.
    - ``data``, ``loss``: what ``prune_`` needs for criteria and scopes that look at more than weights, run over each
      time. Without a ``loss`` the distiller's own is taken.

    The layers become masked ones at once, with nothing pruned (masks that were there are lifted), so that optimiser,
    checkpoints and averages know the masks. Each choice is that of :func:`prune_`: it scores all master weights anew,
    so a weight may come back until ``end``; afterwards the masks stand. A choice depends on the student, ``data`` and
    the seed alone, so a run that resumes ends as if it had not been interrupted. ``report`` is that of the last choice.

    Criterion ``"movement"`` without ``data`` sums -w dL/dw over all steps of the run (Sanh et al. 2020, "Movement
    Pruning"), of w as it was before the step and the gradient that the optimiser saw, that is after clipping. A weight
    that is masked has no gradient and keeps its sum: it comes back when others sink below. These sums are not in the
    checkpoint, so such a run cannot be continued from one by another object.

    Raises :class:`ValueError` for arguments that do not exist, do not fit the plan or each other, for a plan with
    ``early_stopping`` (its best epoch may be one before ``end``), and what ``prune_`` raises; :class:`RuntimeError`
    where several processes train, since callbacks run in the first only.

    >>> from potstill.distill import Distiller, HardLabels, TrainingPlan
    >>> data = [(torch.randn(8, 16), torch.randint(3, (8,))) for _ in range(5)]
    >>> student = nn.Sequential(nn.Linear(16, 3))
    >>> pruning = GradualPruning(student, Prune(0.5), every=2)
    >>> _ = Distiller(None, student, HardLabels()).fit(data, TrainingPlan(steps=10), callbacks=[pruning])
    >>> pruning.report.sparsity
    0.5
    """

    def __init__(
        self,
        student: nn.Module,
        config: Prune,
        begin: float = 0.1,
        end: float = 0.7,
        every: int = 20,
        schedule: str | Share = "cubic",
        data: Iterable[Any] | None = None,
        loss: Loss | None = None,
        *,
        include: Pattern | Iterable[Pattern] | None = None,
        exclude: Pattern | Iterable[Pattern] | None = None,
    ) -> None:
        check_in_steps("GradualPruning", config, data)
        self._share = _checked(begin, end, every, schedule)
        _check_alone()
        criterion = config.chosen_criterion
        self._moved = _Movement() if criterion is movement and data is None else None
        if self._moved is None and data is None and (criterion.needs != "nothing" or config.scope == "error"):
            raise ValueError(
                f"GradualPruning: criterion {criterion.name!r} with scope {config.scope!r} looks at more than weights; "
                "pass data, a few batches"
            )
        self.report: PruneReport | None = None
        self._student = student
        self._config = config if self._moved is None else replace(config, criterion=self._moved)
        self._bounds, self._every = (begin, end), every
        self._data, self._loss = data, loss
        self._layers: dict[str, Any] = {"include": include, "exclude": exclude}
        prune_(student, replace(config, sparsity=0.0, criterion="magnitude", scope="layer"), **self._layers)

    def begin(self, run: Run) -> None:
        """Checks that the run is one of this student and long enough."""
        if run.distiller.student is not self._student:
            raise ValueError("GradualPruning: the distiller's student is another model; pass the same one to both")
        if run.plan.early_stopping is not None:
            raise ValueError(
                "GradualPruning: the plan stops early and gives the student its best epoch, which may be one before "
                "the pruning ended; leave early_stopping out"
            )
        self._start, self._stop = (_step(bound, run.plan.steps) for bound in self._bounds)
        if self._stop <= self._start:
            raise ValueError(f"GradualPruning: begins at step {self._start} and ends at {self._stop}; move end away")
        if run.plan.steps is not None:
            self._check_length(run.plan.steps)
        if self._moved is not None:
            self._moved.begin(self._student, run.step, self._layers)

    def step(self, run: Run) -> None:
        """Chooses new masks where it is time."""
        if self._moved is not None:
            self._moved.step(run.step)
        way = run.step - self._start
        if way > 0 and run.step <= self._stop and (way % self._every == 0 or run.step == self._stop):
            now = replace(self._config, sparsity=self.sparsity(way / (self._stop - self._start)))
            loss = run.distiller.loss if self._loss is None else self._loss
            self.report = prune_(self._student, now, self._data, loss=loss, **self._layers)

    def epoch(self, run: Run, record: Epoch) -> None:
        """After the first epoch the length of a run in epochs is known."""
        if run.plan.epochs is not None and record.epoch == 1:
            self._check_length(record.step * run.plan.epochs)

    def sparsity(self, share: float) -> float:
        """The sparsity at this share of the way from ``begin`` to ``end``; raises :class:`ValueError` outside [0, 1]"""
        found = self._share(share)
        if not 0.0 <= found <= 1.0:
            raise ValueError(f"GradualPruning: schedule returned {found} at {share}, expected a share: 0 to 1")
        return self._config.share * found

    def _check_length(self, steps: int) -> None:
        if self._stop >= steps:
            raise ValueError(
                f"GradualPruning: ends at step {self._stop} of a run of {steps}; at least one must follow, in which "
                "the student (and the plan's average) learns with the last masks"
            )


class _Movement(Criterion):
    """The sums of -w dL/dw over the steps of a run, [outputs, inputs] float32 for each layer by name."""

    name = movement.name

    def __init__(self) -> None:
        self._seen = 0

    def scores(self, facts: LayerFacts) -> Tensor:
        """What was summed."""
        return self._sums[facts.name]

    def begin(self, student: nn.Module, step: int, layers: dict[str, Any]) -> None:
        """Starts anew at step 0, and goes on at the step that was seen last."""
        self._chosen = [layer for layer in candidates(student, **layers) if not layer.kept]
        if step == 0:
            self._sums = {layer.name: torch.zeros_like(layer.weight) for layer in self._chosen}
        elif step != self._seen:
            raise ValueError(
                f"GradualPruning: the run continues at step {step}, but the movement of the weights was summed up to "
                f"step {self._seen}, and is not in the checkpoint; start again with resume=False, or pass data"
            )
        frozen = [layer.name for layer in self._chosen if not layer.form.weight.requires_grad]
        if frozen:
            raise ValueError(f"GradualPruning: {frozen[0]} is not trained, so its weights do not move; exclude it")
        self._seen = step
        self._keep()

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Adds what the last step did; a layer that had no part in its loss has not moved."""
        for layer in self._chosen:
            gradient = layer.form.weight.grad
            if gradient is not None:
                self._sums[layer.name] -= self._before[layer.name] * layer.form.matrix(gradient).float()
        self._seen = step
        self._keep()

    def _keep(self) -> None:
        self._before = {layer.name: layer.weight.clone() for layer in self._chosen}


def _checked(begin: float, end: float, every: int, schedule: str | Share) -> Share:
    for name, bound in (("begin", begin), ("end", end)):
        if bound < 0 or (bound >= 1 and bound != int(bound)):
            raise ValueError(f"GradualPruning: {name} is {bound}; expected a share of the run below 1, or a step")
    if every < 1:
        raise ValueError(f"GradualPruning: every is {every}; it must be at least 1 step")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(
                f"GradualPruning: schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}, or a function"
            )
        return SCHEDULES[schedule]
    if schedule(1.0) != 1.0:
        raise ValueError(f"GradualPruning: schedule returns {schedule(1.0)} at 1, where it ends; expected 1")
    return schedule


def _check_alone() -> None:
    ready = dist.is_available() and dist.is_initialized()
    launched = dist.is_available() and dist.is_torchelastic_launched()
    world = dist.get_world_size() if ready else int(os.environ.get("WORLD_SIZE", "1")) if launched else 1
    if world > 1:
        raise RuntimeError(
            f"GradualPruning: {world} processes train, but callbacks run in the first only, and the others would not "
            "see its masks; train in one process, or use prune_iteratively_ around several runs"
        )


def _step(bound: float, steps: int | None) -> int:
    if bound == 0 or bound >= 1:
        return int(bound)
    if steps is None:
        raise ValueError(
            f"GradualPruning: {bound} is a share of the run, but the plan is in epochs; give TrainingPlan(steps=...), "
            "or begin and end as steps"
        )
    return int(bound * steps + 0.5)
