"""How a student is trained: everything that is a number or a name, in one value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from potstill.distill.features import Patterns

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run whose ``metric`` (a name in what ``validate`` returns) was not better for ``patience`` epochs.

    The student ends with the weights of its best epoch. A single number from ``validate`` has the name "value".
    """

    metric: str = "value"
    patience: int = 3
    larger_is_better: bool = True

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"EarlyStopping: patience is {self.patience}; it must be at least 1 epoch")

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is better than the ``best`` so far; a NaN never is."""
        if best is None or math.isnan(value):
            return not math.isnan(value)
        return value > best if self.larger_is_better else value < best


@dataclass(frozen=True)
class TrainingPlan:
    """How long, with which optimiser, schedule and precision a student is trained.

    - ``epochs`` or ``steps``: passes over the loader, or optimiser steps (the last pass may then be cut short); one of
      both.
    - ``optimizer``: "adamw", "adam" or "sgd" (with momentum 0.9), or a function that makes one from the list of
      parameters; ``lr`` and ``weight_decay`` are then its own affair. Weight decay acts on matrices, kernels and
      embeddings, not on biases and the scales of norms.
    - ``schedule``: the learning rate is "constant", or falls to 0 at the end of the run, "linear" or "cosine" (half a
      wave), after ``warmup`` steps (below 1: that share of the run) in which it rises linearly. Or a function that
      makes a scheduler, which is stepped after every optimiser step.
    - ``clip_grad_norm``: largest Euclidean norm of the gradient of all parameters together; None does not clip.
    - ``accumulate``: micro-batches (items of the loader) per optimiser step. The gradient is that of one large batch:
      each micro-batch counts by its rows whose target is not ignored, and the last group of an epoch may be smaller. A
      group without any such row takes no step. (Strategies that relate the examples of a batch to each other see
      micro-batches; they say so.)
    - ``ema``: decay of a moving average of the student's weights and buffers, which ``validate`` sees and the student
      ends with; in the first steps n the decay is at most (1 + n) / (10 + n).
    - ``early_stopping``: see :class:`EarlyStopping`.
    - ``precision``: "bf16" runs both models under autocast (a teacher with quantised layers runs as it is); parameters,
      gradients and optimiser stay float32.
    - ``recompute``: names of the student's modules, with wildcards, whose activations are not kept but computed again
      in the backward pass: less memory, a third more time.
    - ``seed``: of torch, numpy and ``random`` for the run.

    Raises :class:`ValueError` for what is out of range.

    >>> TrainingPlan(steps=1000, lr=3e-4, warmup=0.1).factor(49, steps=1000)  # of lr: halfway through the warm-up
    0.5
    """

    epochs: int | None = None
    steps: int | None = None
    optimizer: str | MakeOptimizer = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: str | MakeScheduler = "cosine"
    warmup: float = 0.0
    clip_grad_norm: float | None = 1.0
    accumulate: int = 1
    ema: float | None = None
    early_stopping: EarlyStopping | None = None
    precision: str = "float32"
    recompute: Patterns = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"TrainingPlan: epochs is {self.epochs} and steps is {self.steps}; give one of both")
        for name in ("epochs", "steps", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TrainingPlan: {name} is {value}; it must be at least 1")
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in choices and (not callable(value) or choices is PRECISIONS):
                shown = repr(value) if isinstance(value, str) else type(value).__name__
                also = "" if choices is PRECISIONS else ", or a function that makes one"
                raise ValueError(f"TrainingPlan: {name} is {shown}; expected one of {', '.join(choices)}{also}")
        for name in ("lr", "weight_decay", "warmup"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"TrainingPlan: {name} is {value}; expected a number of at least 0")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"TrainingPlan: clip_grad_norm is {self.clip_grad_norm}; it must be positive, or None")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"TrainingPlan: ema is {self.ema}; expected a decay between 0 and 1, such as 0.999")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"TrainingPlan: seed is {self.seed}; it must lie in [0, 2**32)")

    def total(self, batches: int | None) -> int | None:
        """Optimiser steps of the run over a loader of so many batches; None if that is not known."""
        if self.epochs is None or batches is None:
            return self.steps
        return self.epochs * math.ceil(batches / self.accumulate)

    def factor(self, step: int, steps: int | None) -> float:
        """What the learning rate of step ``step``, counted from 0, is multiplied by, in a run of ``steps``."""
        warmup = self.warmup if self.warmup >= 1 or steps is None else self.warmup * steps
        if step < warmup:
            return min((step + 1) / warmup, 1.0)
        if self.schedule == "constant" or steps is None:
            return 1.0
        share = min((step - warmup) / max(steps - warmup, 1.0), 1.0)
        return 1.0 - share if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """The optimiser of these parameters."""
        if callable(self.optimizer):
            return self.optimizer(parameters)
        decayed, free = ([p for p in parameters if (p.dim() > 1) == matrix] for matrix in (True, False))
        groups = [
            {"params": members, "weight_decay": decay}
            for members, decay in ((decayed, self.weight_decay), (free, 0.0))
            if members
        ]
        if self.optimizer == "sgd":
            return SGD(groups, self.lr, momentum=0.9, fused=True)
        return (AdamW if self.optimizer == "adamw" else Adam)(groups, self.lr, fused=True)

    def make_scheduler(self, optimizer: Optimizer, steps: int | None) -> LRScheduler | None:
        """The scheduler of a run of ``steps``; None where the learning rate never changes.

        Raises :class:`ValueError` where the schedule needs the number of steps and it is not known.
        """
        if callable(self.schedule):
            return self._own_scheduler(self.schedule, optimizer)
        if self.schedule == "constant" and not self.warmup:
            return None
        if steps is None and (self.schedule != "constant" or self.warmup < 1):
            raise ValueError(
                f"TrainingPlan: the schedule is {self.schedule!r}, warmup {self.warmup}, but the loader does not say "
                "how long it is; give steps instead of epochs, or schedule='constant'"
            )
        return LambdaLR(optimizer, lambda step: self.factor(step, steps))

    def _own_scheduler(self, make: MakeScheduler, optimizer: Optimizer) -> LRScheduler:
        found = make(optimizer)
        if isinstance(found, ReduceLROnPlateau):
            raise TypeError("TrainingPlan: ReduceLROnPlateau waits for a metric, but is stepped after each step")
        if found.optimizer is not optimizer:
            raise ValueError("TrainingPlan: the scheduler belongs to another optimiser; make it from the argument")
        return found

    def settings(self, steps: int | None) -> dict[str, object]:
        """What a run resumes with only if it is the same; its length counts where the schedule depends on it."""
        free = callable(self.schedule) or (self.schedule == "constant" and (self.warmup >= 1 or not self.warmup))
        return {
            "seed": self.seed,
            "accumulate": self.accumulate,
            "clip_grad_norm": self.clip_grad_norm,
            "precision": self.precision,
            "ema": self.ema,
            "early stopping": repr(self.early_stopping),
            "schedule": "a function" if callable(self.schedule) else self.schedule,
            "warmup": self.warmup,
            "steps of the schedule": "any" if free else steps,
        }
