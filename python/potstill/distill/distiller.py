"""Teaches a student: models, strategies, and the loss that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from potstill.distill.batch import Batch, Outputs, rows_of
from potstill.distill.cache import CachedTeacher
from potstill.distill.callbacks import Callback
from potstill.distill.features import Features
from potstill.distill.history import History
from potstill.distill.int8_teacher import Int8Teacher, int8_teacher
from potstill.distill.loop import Loop, Validate, mode
from potstill.distill.plan import TrainingPlan
from potstill.distill.processes import Processes, RowsAlike
from potstill.distill.strategies.strategy import Strategy
from potstill.nn.quantized import QuantizedLinear

if TYPE_CHECKING:
    from potstill.distill.spread import Spread
    from potstill.parallel import Plan

Weight = float | Callable[[int], float]
Weighted = Strategy | tuple[Weight, Strategy]


class Distiller:
    """Trains ``student`` with a loss of one or more ``strategies``, reproducibly and resumably.

    - ``teacher``: any module, also a quantised one; it is run in evaluation mode without gradients, never changed and
      never saved. Or a :class:`CachedTeacher`, which is read. None where no strategy needs it.
    - ``strategies``: a strategy, or a list of strategies or (weight, strategy): the loss is their weighted sum. A
      weight is a positive number, or a function of the optimiser step, from 1, that returns one or 0.
    - ``sample``: an item of the loader, from which strategies that train projections learn the widths of the layers
      they connect (needed only if these differ); both models are run on it once, in evaluation mode.
    - ``teacher_error``: learns from an int8 copy of the teacher if that is faster on the ``sample``, and the relative
      error of what it returns, and of its layers that the strategies read, is at most this: see :func:`int8_teacher`,
      whose result is then in the attribute of that name.
    - ``parallel``: how processes share the student, and ``teacher_parallel`` the teacher: by data, shard and tensor.
      Both models are changed in place, at once, and need the ``sample``; ``fit`` then leaves each process its part of
      the student, of which ``parallel.full_state_dict(distiller.student)`` is the whole. None: each has all of it.

    Batches are moved to the device of the student's first parameter; the teacher must be on it too.
    Raises :class:`ValueError` or :class:`TypeError` when an argument does not fit the others.

    >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(10)]
    >>> from potstill.distill import SoftTargets
    >>> history = Distiller(teacher, student, SoftTargets()).fit(data, TrainingPlan(epochs=2, lr=0.01))
    >>> history.step, history.epochs[1].loss < history.epochs[0].loss
    (20, True)
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        strategies: Strategy | Sequence[Weighted],
        *,
        sample: Any = None,
        teacher_error: float | None = None,
        parallel: Plan | None = None,
        teacher_parallel: Plan | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self._terms = _weighted(strategies)
        self.strategies = nn.ModuleList(strategy for _, strategy in self._terms)
        self.names = _names(self.strategies)
        self.spread: Spread | None = None
        self.rows_alike: RowsAlike | None = None
        self._check()
        for _, strategy in self._terms:
            strategy.attach(student, teacher)
        self.int8_teacher = self._quicker(sample, teacher_error)
        self._prepare(sample)
        self.strategies.to(self.device)
        # Integer layers are fast as they are, and what they cost was measured in float32.
        modules = () if self.teacher is None else self.teacher.modules()
        self._quantised = any(isinstance(module, QuantizedLinear) for module in modules)
        self._spread(sample, parallel, teacher_parallel)

    @property
    def device(self) -> torch.device:
        """Where the student is now."""
        return next(self.student.parameters()).device

    def fit(
        self,
        train_loader: Iterable[Any],
        plan: TrainingPlan,
        validate: Validate | None = None,
        *,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = True,
        quiet: bool = False,
    ) -> History:
        """Trains the student as the ``plan`` says, and returns the history.

        The loader yields (input, target) or (input, ..., target); see :class:`Batch`. ``validate`` is called with the
        student after each epoch, in evaluation mode and without gradients, and returns a number or a dictionary of
        them. A progress bar is shown on a terminal unless ``quiet``. The caller's random state is given back at the
        end; a loader's own generator is not seeded.

        ``checkpoint`` is a file that is replaced after every epoch, after every ``checkpoint_every`` optimiser steps,
        and on Ctrl-C or SIGTERM, which wait for the end of the step (a second one does not wait, and saves nothing).
        If it exists, the run it holds is continued, or, if that is complete, its result is loaded and returned;
        ``resume=False`` ignores and replaces the file. The weights are then bit for bit those of a run that was never
        interrupted, provided that the loader yields the same items whenever torch, numpy, ``random`` and its own
        generator start in the same state, and that the operations themselves are deterministic. Batches that were
        consumed are loaded again, and skipped, or a loader with a method ``skip(n)`` returns the iterator behind them.
        (Random augmentation inside ``persistent_workers`` is not repeated.)

        Under ``torchrun``, or where torch's default process group exists, each process trains on its rows of every
        batch: see :class:`Processes`. All give the same loader; the first writes the checkpoint, which all must see.
        Any number of processes, under any plan, may resume it. ``validate`` is called on all of them, the callbacks on
        the first only: those must not run a student that processes share.

        Where another process dies or hangs, :class:`RuntimeError` names it; it is waited for as many seconds as the
        variable ``POTSTILL_TIMEOUT`` says, or 600.

        Raises :class:`CheckpointError` for a checkpoint that is damaged or belongs to another run,
        :class:`FloatingPointError` with the batch when the loss or the gradient is not finite (the weights are then
        those of the step before, and the checkpoint is not touched), and :class:`ValueError` for an empty loader.
        """
        path = None if checkpoint is None else Path(checkpoint)
        if checkpoint_every is not None and (path is None or checkpoint_every < 1):
            raise ValueError(
                f"Distiller.fit: checkpoint_every is {checkpoint_every} and checkpoint is {path}; the one must be at "
                "least 1 and the other a path"
            )
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"Distiller.fit: checkpoint is {path}, but its folder does not exist")
        loop = Loop(self, train_loader, plan, validate, callbacks)
        return loop.run(path, checkpoint_every, resume=resume, quiet=quiet)

    def loss(self, item: Any, step: int = 1, *, student: nn.Module | None = None) -> Tensor:
        """The loss of one item of a loader, a scalar to call ``backward()`` on in a loop of your own.

        ``step`` is the optimiser step, from 1, for weights that are schedules. ``student`` is run in the student's
        place: the same module wrapped, for example by ``DistributedDataParallel``. Its mode is yours to set. The
        optimiser gets :meth:`parameters`. A batch without any row that counts has a loss of 0 that moves nothing.

        >>> from potstill.distill import HardLabels
        >>> distiller = Distiller(None, nn.Linear(4, 3), HardLabels())
        >>> distiller.loss((torch.zeros(2, 4), torch.tensor([0, 1]))).backward()
        """
        batch = Batch.of(item).to(self.device)
        factors = [weight if rows else 0.0 for weight, rows in zip(self.weights(step), self.rows(batch), strict=True)]
        if not any(factors):
            return torch.zeros((), device=self.device, requires_grad=True)
        with nullcontext() if self.teacher is None else mode(self.teacher, training=False):
            return self.contributions(batch, factors, student=student).sum()

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the student and the strategies that require a gradient: of a shared student, the parts."""
        own = self.student.parameters() if self.spread is None else self.spread.parameters
        return [p for p in (*own, *self.strategies.parameters()) if p.requires_grad]

    def rows(self, batch: Batch) -> list[int]:
        """How many rows of a batch count for each strategy."""
        return [strategy.rows(batch.target) for _, strategy in self._terms]

    def weights(self, step: int) -> list[float]:
        """Each strategy's weight at an optimiser step, counted from 1.

        Raises :class:`ValueError` where a schedule returns something negative or not finite, or all return 0.
        """
        weights = [float(weight(step)) if callable(weight) else weight for weight, _ in self._terms]
        if not all(0.0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(
                f"Distiller: at step {step} the strategies' weights are {weights}; a schedule returns a positive "
                "number or 0, and one weight at least must be positive"
            )
        return weights

    def contributions(
        self, batch: Batch, factors: Sequence[float], *, bf16: bool = False, student: nn.Module | None = None
    ) -> Tensor:
        """Each strategy's term times its factor, [strategies]; exactly 0, and not computed, where the factor is 0."""
        return self.terms(self.outputs(batch, bf16=bf16, student=student), factors)

    def terms(self, outputs: Outputs, factors: Sequence[float]) -> Tensor:
        """As :meth:`contributions`, of what the models have returned."""
        terms = [
            factor * _scalar(strategy, strategy(outputs)) if factor else None
            for factor, (_, strategy) in zip(factors, self._terms, strict=True)
        ]
        like = next((term for term in terms if term is not None), torch.zeros((), device=self.device))
        return torch.stack([torch.zeros_like(like) if term is None else term for term in terms])

    def settings(self) -> dict[str, object]:
        """What a run may be resumed with only if it is the same."""
        settings: dict[str, object] = {}
        for index, (weight, strategy) in enumerate(self._terms):
            factor = "schedule" if callable(weight) else weight
            settings[f"strategies[{index}]"] = f"{factor} * {type(strategy).__name__}({strategy.extra_repr()})"
        return settings | (_forms(self.student) if self.spread is None else self.spread.forms)

    def outputs(
        self,
        batch: Batch,
        *,
        bf16: bool = False,
        student: nn.Module | None = None,
        shown: tuple[Batch, slice] | None = None,
    ) -> Outputs:
        """What both models return for a batch; ``shown``: what the teacher is run on, and which rows of it they are."""
        output, features = self._taught(batch if shown is None else shown[0], bf16)
        if shown is not None:
            names = self._layers(teacher=True)
            output, features = rows_of((output, {n: features[n] for n in names}), len(shown[0].target), shown[1])
        with self._autocast(bf16), Features(self.student, self._layers(teacher=False)) as own:
            answer = batch.feed(self.student if student is None else student)
        return Outputs(batch, answer, output, own, features)

    def _taught(self, batch: Batch, bf16: bool) -> tuple[Any, Mapping[str, Tensor] | Features]:
        """The teacher's output, and its layers'."""
        if self.teacher is None or not any(strategy.needs_teacher for _, strategy in self._terms):
            return None, {}
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher.outputs(batch)
        # no_grad, not inference_mode: autograd must be able to keep the result for the gradient
        with (
            torch.no_grad(),
            self._autocast(bf16 and not self._quantised),
            Features(self.teacher, self._layers(teacher=True)) as features,
        ):
            return batch.feed(self.teacher), features

    def _autocast(self, bf16: bool) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def _layers(self, *, teacher: bool) -> set[str]:
        lists = (s.teacher_layers() if teacher else s.student_layers() for _, s in self._terms)
        return {name for names in lists for name in names}

    def _quicker(self, sample: Any, max_error: float | None) -> Int8Teacher | None:
        if max_error is None:
            return None
        if sample is None or self.teacher is None or isinstance(self.teacher, CachedTeacher):
            raise ValueError(
                f"Distiller: teacher_error is {max_error}, which needs a teacher that is run, and sample=next(iter("
                "loader)) to measure it on"
            )
        found = int8_teacher(self.teacher, sample, max_error=max_error, layers=sorted(self._layers(teacher=True)))
        self.teacher = found.model
        return found

    def _prepare(self, sample: Any) -> None:
        if sample is None:
            needy = [type(strategy).__name__ for _, strategy in self._terms if strategy.needs_sample]
            if needy:
                raise ValueError(
                    f"Distiller: {needy[0]} trains projections of layers, whose widths it learns from a batch; pass "
                    "one as sample=next(iter(loader))"
                )
            return
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for model in (self.student, self.teacher):
                if model is not None:
                    stack.enter_context(mode(model, training=False))
            outputs = self.outputs(Batch.of(sample).to(self.device))
        for _, strategy in self._terms:
            strategy.prepare(outputs)

    def _spread(self, sample: Any, own: Plan | None, taught: Plan | None) -> None:
        plans = {"parallel": own, "teacher_parallel": taught}
        if not any(plans.values()):
            return
        if taught is not None and (self.teacher is None or isinstance(self.teacher, CachedTeacher)):
            raise ValueError(f"Distiller: teacher_parallel is {taught}, but there is no teacher to be spread; drop it")
        from potstill.distill.spread import (
            Spread,
            check,
            spread_,
            whole_everywhere,
        )  # here: much of torch comes with it

        processes = Processes.joined(self.device, lambda: "Distiller")
        for name, plan in plans.items():
            if plan is not None:
                check(plan, name, processes.world)
        shared = {name for name, plan in plans.items() if not whole_everywhere(plan)}
        if not shared:
            return
        if sample is None:
            raise ValueError(
                f"Distiller: {min(shared)} is {plans[min(shared)]}, which needs sample=next(iter(loader)), on which it "
                "runs the model to see how it may be cut"
            )
        batch = Batch.of(sample).to(self.device)
        if own is not None and "parallel" in shared:
            processes.equalise(self.student.state_dict().values())
            self.spread = Spread(self.student, own, batch, self._layers(teacher=False), _forms(self.student))
        if taught is not None and self.teacher is not None and "teacher_parallel" in shared:
            spread_(self.teacher, taught, batch, self._layers(teacher=True), "teacher")
        self.rows_alike = RowsAlike.under(own, taught)

    def _check(self) -> None:
        needy = [type(strategy).__name__ for _, strategy in self._terms if strategy.needs_teacher]
        if self.teacher is None and needy:
            raise ValueError(f"Distiller: {', '.join(needy)} learns from a teacher, but teacher is None; pass one")
        if not self.parameters():
            raise ValueError("Distiller: neither the student nor a strategy has a parameter that requires a gradient")


def _weighted(strategies: Strategy | Sequence[Weighted]) -> list[tuple[Weight, Strategy]]:
    terms: list[tuple[Weight, Strategy]] = []
    for item in (strategies,) if isinstance(strategies, Strategy) else strategies:
        match item:
            case Strategy():
                terms.append((1.0, item))
            case (int() | float() as weight, Strategy() as strategy) if 0 < weight < math.inf:
                terms.append((float(weight), strategy))
            case (weight, Strategy() as strategy) if callable(weight):
                terms.append((weight, strategy))
            case _:
                raise TypeError(
                    f"Distiller: strategies holds {item!r}; expected a Strategy, or a tuple of a weight (a positive "
                    "number, or a function of the step) and a Strategy"
                )
    if not terms:
        raise ValueError("Distiller: strategies is empty; pass at least one, such as SoftTargets()")
    return terms


def _forms(student: nn.Module) -> dict[str, object]:
    """The dtype and shape of each tensor of the student's state."""
    return {
        f"student.{name}": f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "other"
        for name, value in student.state_dict().items()
    }


def _names(strategies: Iterable[nn.Module]) -> list[str]:
    """Class names, numbered where one occurs twice."""
    kinds = [type(strategy).__name__ for strategy in strategies]
    return [k if kinds.count(k) == 1 else f"{k} {kinds[:i].count(k) + 1}" for i, k in enumerate(kinds)]


def _scalar(strategy: Strategy, term: Tensor) -> Tensor:
    if term.dim():
        raise ValueError(
            f"Distiller: {type(strategy).__name__} returned a tensor of shape {list(term.shape)}; expected a scalar, "
            "the mean over the rows"
        )
    return term
