"""What a user's own code may do while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from potstill.distill.history import Epoch, History

if TYPE_CHECKING:
    from potstill.distill.distiller import Distiller
    from potstill.distill.plan import TrainingPlan


@dataclass
class Run:
    """Where a run is.

    ``loss`` is the last step's, ``terms`` what each strategy contributed to it, ``lr`` the first parameter group's
    learning rate. A callback that sets ``stopping`` ends the run after this step, as if it had been planned so.
    """

    distiller: Distiller
    plan: TrainingPlan
    history: History
    loss: float = float("nan")
    lr: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    stopping: bool = False

    @property
    def step(self) -> int:
        """How many optimiser steps have been taken."""
        return self.history.step


class Callback:
    """Does nothing at each of the moments of a run; override what you need.

    What a callback remembers is not in the checkpoint: ``begin`` sees how far a resumed run is. An exception in a
    callback ends the run; the checkpoint is then the last one written.

    >>> class Loud(Callback):
    ...     def epoch(self, run, record):
    ...         print(f"epoch {record.epoch}: {run.step} steps")
    >>> import torch
    >>> from potstill.distill import Distiller, HardLabels, TrainingPlan
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
    >>> student = torch.nn.Linear(4, 3)
    >>> _ = Distiller(None, student, HardLabels()).fit(data, TrainingPlan(epochs=2), callbacks=[Loud()])
    epoch 1: 5 steps
    epoch 2: 10 steps
    """

    def begin(self, run: Run) -> None:
        """Before the first step, after a checkpoint was read."""

    def step(self, run: Run) -> None:
        """After each optimiser step."""

    def epoch(self, run: Run, record: Epoch) -> None:
        """After each epoch and its validation; the student is in evaluation mode with the weights validated."""

    def end(self, run: Run) -> None:
        """At the end, also after an exception or an interruption."""
