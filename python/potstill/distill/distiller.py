"""Trains a student, with a teacher's help."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from potstill.distill.batch import Batch, Outputs
from potstill.distill.features import Features
from potstill.distill.history import History
from potstill.distill.loop import Loop, Validate, mode
from potstill.distill.strategies.strategy import Strategy

Weight = float | Callable[[int], float]
Weighted = Strategy | tuple[Weight, Strategy]


class Distiller:
    """Trains ``student`` with a loss of one or more ``strategies``, reproducibly and resumably.

    - ``teacher``: any module, also a quantised one; it is run in evaluation mode without gradients, never changed and
      never saved. None where no strategy needs it.
    - ``strategies``: a strategy, or a list of strategies or (weight, strategy): the loss is their weighted sum. A
      weight is a positive number, or a function of the optimiser step, from 1, that returns one or 0.
    - ``optimizer``: an optimiser over the student's parameters, or what makes one from the list of all parameters of
      the student and the strategies that require a gradient.
    - ``scheduler``: a learning-rate scheduler of that optimiser, or what makes one from it; it is stepped after every
      optimiser step.
    - ``seed``: seeds torch, numpy and ``random`` for each run of :meth:`fit`, which gives the caller's random state
      back at its end. A loader's own generator is not seeded.
    - ``accumulate``: micro-batches (items of the loader) per optimiser step. The gradient is that of one large batch:
      each micro-batch counts by its rows whose target is not ignored, and the last group of an epoch may be smaller. A
      group without any such row takes no step. (Strategies that relate the examples of a batch to each other see
      micro-batches; they say so.)
    - ``sample``: an item of the loader, from which strategies that train projections learn the widths of the layers
      they connect (needed only if these differ); both models are run on it once, in evaluation mode.
    - ``clip_grad_norm``: largest Euclidean norm of the gradient of all parameters together.
    - ``checkpoint``: a file that is replaced after every epoch, after every ``checkpoint_every`` optimiser steps and on
      Ctrl-C, which waits for the end of the step (a second Ctrl-C does not wait, and saves nothing).

    Batches are moved to the device of the student's first parameter; the teacher must be on it too.
    Raises :class:`ValueError` or :class:`TypeError` when an argument does not fit the others.

    >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(10)]
    >>> from potstill.distill import SoftTargets
    >>> distiller = Distiller(teacher, student, SoftTargets(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    >>> history = distiller.fit(data, epochs=2)
    >>> history.step, history.epochs[1].loss < history.epochs[0].loss
    (20, True)
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        strategies: Strategy | Sequence[Weighted],
        *,
        optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer],
        scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        seed: int = 0,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        sample: Any = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.terms = _weighted(strategies)
        self.strategies = nn.ModuleList(strategy for _, strategy in self.terms)
        self.seed = seed
        self.accumulate = accumulate
        self.clip_grad_norm = clip_grad_norm
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self._check()
        self.device = next(student.parameters()).device
        self._attach(sample)
        self.strategies.to(self.device)
        self.optimizer = optimizer if isinstance(optimizer, Optimizer) else optimizer(self._trainable())
        self._check_optimizer()
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            scheduler = scheduler(self.optimizer)
        self.scheduler = scheduler
        self._check_scheduler()
        self.settings = self._settings()

    def fit(
        self,
        train_loader: Iterable[Any],
        epochs: int,
        validate: Validate | None = None,
        *,
        resume: bool = True,
        quiet: bool = False,
    ) -> History:
        """Trains until ``epochs`` passes over ``train_loader`` are complete, and returns their history.

        The loader yields (input, target) or (input, ..., target); see :class:`Batch`. ``validate`` is called with the
        student after each epoch, in evaluation mode and without gradients, and returns a number or a dictionary of
        them. A progress bar is shown on a terminal unless ``quiet``.

        If the checkpoint file exists, the run it holds is continued, or, if that is complete, its result is loaded and
        returned; ``resume=False`` ignores and replaces the file. The weights are then bit for bit those of a run that
        was never interrupted, provided that the loader yields the same items whenever torch, numpy, ``random`` and its
        own generator start in the same state, and that the operations themselves are deterministic. Batches that were
        consumed are loaded again, and skipped. (Random augmentation inside ``persistent_workers`` is not repeated.)

        Raises :class:`CheckpointError` for a checkpoint that is damaged or belongs to another run,
        :class:`FloatingPointError` when the loss or the gradient is not finite (the weights are then those of the step
        before, and the checkpoint is not touched), and :class:`ValueError` for an empty loader.
        """
        if epochs < 1:
            raise ValueError(f"Distiller.fit: epochs is {epochs}; it must be at least 1")
        return Loop(self, train_loader, validate).run(epochs, resume=resume, quiet=quiet)

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, group: Sequence[Batch], number: int) -> float | None:
        """Takes optimiser step ``number`` on a group of micro-batches; the loss, or None if no row of theirs counts."""
        rows = [[strategy.rows(batch.target) for batch in group] for _, strategy in self.terms]
        totals = [sum(counts) for counts in rows]
        if not any(totals):
            return None
        self.optimizer.zero_grad()
        losses = []
        weights = self._weights(number)
        for index, batch in enumerate(group):
            # The mean over the rows of the group is the sum of the micro-batches' means, each times its share of rows.
            shares = [counts[index] / max(count, 1) for counts, count in zip(rows, totals, strict=True)]
            factors = [weight * share for weight, share in zip(weights, shares, strict=True)]
            if any(factors):
                loss = self._loss(batch.to(self.device), factors)
                loss.backward()
                losses.append(loss.detach())
        return self._update(reduce(add, losses), number) if losses else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the models and the optimiser; nothing of the teacher."""
        return {
            "student": self.student.state_dict(),
            "strategies": self.strategies.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave to a checkpoint."""
        self.student.load_state_dict(saved["student"])
        self.strategies.load_state_dict(saved["strategies"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])

    def _loss(self, batch: Batch, factors: list[float]) -> Tensor:
        outputs = self._outputs(batch)
        terms = []
        for factor, (_, strategy) in zip(factors, self.terms, strict=True):
            if factor:  # the mean over no rows is NaN
                terms.append(factor * _scalar(strategy, strategy(outputs)))
        return reduce(add, terms)

    def _outputs(self, batch: Batch) -> Outputs:
        output, features = None, None
        if self.teacher is not None and any(strategy.needs_teacher for _, strategy in self.terms):
            # no_grad, not inference_mode: autograd must be able to keep the result for the gradient
            with torch.no_grad(), Features(self.teacher, self._layers(teacher=True)) as features:
                output = batch.feed(self.teacher)
        with Features(self.student, self._layers(teacher=False)) as own:
            student = batch.feed(self.student)
        return Outputs(batch, student, output, own, {} if features is None else features)

    def _weights(self, number: int) -> list[float]:
        weights = [float(weight(number)) if callable(weight) else weight for weight, _ in self.terms]
        if not all(0.0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(
                f"Distiller: at step {number} the strategies' weights are {weights}; a schedule returns a positive "
                "number or 0, and one weight at least must be positive"
            )
        return weights

    def _layers(self, *, teacher: bool) -> set[str]:
        lists = (s.teacher_layers() if teacher else s.student_layers() for _, s in self.terms)
        return {name for names in lists for name in names}

    def _attach(self, sample: Any) -> None:
        for _, strategy in self.terms:
            strategy.attach(self.student, self.teacher)
        if sample is None:
            needy = [type(strategy).__name__ for _, strategy in self.terms if strategy.needs_sample]
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
            outputs = self._outputs(Batch.of(sample).to(self.device))
        for _, strategy in self.terms:
            strategy.prepare(outputs)

    def _update(self, loss: Tensor, number: int) -> float:
        parameters = _parameters(self.optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        norm = torch.nn.utils.get_total_norm(dense)
        values = torch.stack((loss, norm.to(loss))).tolist()
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(
                f"Distiller.fit: step {number}: the loss is {values[0]:g} and the norm of its gradient {values[1]:g}. "
                "The parameters are still those of the step before; lower the learning rate, set clip_grad_norm, or "
                "look for NaN or infinity in the inputs and in the teacher's logits"
            )
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return float(values[0])

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in (*self.student.parameters(), *self.strategies.parameters()) if p.requires_grad]

    def _check(self) -> None:
        needy = [type(strategy).__name__ for _, strategy in self.terms if strategy.needs_teacher]
        if self.teacher is None and needy:
            raise ValueError(f"Distiller: {', '.join(needy)} learns from a teacher, but teacher is None; pass one")
        if not self._trainable():
            raise ValueError("Distiller: neither the student nor a strategy has a parameter that requires a gradient")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Distiller: seed is {self.seed}; it must lie in [0, 2**32)")
        if self.accumulate < 1:
            raise ValueError(f"Distiller: accumulate is {self.accumulate}; it must be at least 1")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"Distiller: clip_grad_norm is {self.clip_grad_norm}; it must be positive, or None")
        if self.checkpoint_every is not None and (self.checkpoint is None or self.checkpoint_every < 1):
            raise ValueError(
                f"Distiller: checkpoint_every is {self.checkpoint_every} and checkpoint is {self.checkpoint}; the one "
                "must be at least 1 and the other a path"
            )
        if self.checkpoint is not None and not self.checkpoint.parent.is_dir():
            raise FileNotFoundError(f"Distiller: checkpoint is {self.checkpoint}, but its folder does not exist")

    def _check_optimizer(self) -> None:
        held = {id(p) for p in _parameters(self.optimizer)}
        teacher = self.teacher.named_parameters() if self.teacher is not None else ()
        taught = [name for name, p in teacher if id(p) in held]
        if taught:
            raise ValueError(
                f"Distiller: the optimiser holds {taught[0]}, a parameter of the teacher ({len(taught)} in all); the "
                "teacher is not trained: give the student its own copy"
            )
        if held.isdisjoint(map(id, self._trainable())):
            raise ValueError("Distiller: the optimiser holds no parameter of the student; make it from this student")
        left = [name for name, p in self.strategies.named_parameters() if p.requires_grad and id(p) not in held]
        if left:
            raise ValueError(
                f"Distiller: the optimiser does not hold the strategies' parameters {', '.join(left)}; pass a callable "
                "such as lambda parameters: torch.optim.AdamW(parameters) instead of an optimiser"
            )

    def _check_scheduler(self) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise TypeError("Distiller: ReduceLROnPlateau waits for a metric, but is stepped after each optimiser step")
        if self.scheduler is not None and self.scheduler.optimizer is not self.optimizer:
            raise ValueError("Distiller: the scheduler belongs to another optimiser; pass a callable that makes it")

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "device": self.device.type,
            "seed": self.seed,
            "accumulate": self.accumulate,
            "clip_grad_norm": self.clip_grad_norm,
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
        }
        for index, (weight, strategy) in enumerate(self.terms):
            factor = "schedule" if callable(weight) else weight
            settings[f"strategies[{index}]"] = f"{factor} * {type(strategy).__name__}({strategy.extra_repr()})"
        for index, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                settings[f"optimizer.{key}[{index}]"] = len(value) if key == "params" else repr(value)
        for name, value in self.student.state_dict().items():
            settings[f"student.{name}"] = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "other"
        return settings


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


def _scalar(strategy: Strategy, term: Tensor) -> Tensor:
    if term.dim():
        raise ValueError(
            f"Distiller: {type(strategy).__name__} returned a tensor of shape {list(term.shape)}; expected a scalar, "
            "the mean over the rows"
        )
    return term


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
