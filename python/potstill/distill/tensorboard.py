"""The course of a run as curves in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.distill.callbacks import Callback, Run
from potstill.distill.history import Epoch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Callback):
    """Writes each optimiser step's ``loss``, ``terms/…`` and ``lr``, and each epoch's ``validation/…``, to ``folder``.

    The horizontal axis is the optimiser step, for validation too. A run that resumes from a checkpoint goes on in the
    same folder: what was written after that checkpoint is purged, so no step appears twice; a run that starts anew
    replaces the curves there. Files are complete after each epoch and at the end.

    Needs the package tensorboard; raises :class:`ModuleNotFoundError` without it.

    >>> import torch
    >>> from potstill.distill import Distiller, HardLabels, TrainingPlan
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
    >>> run = Distiller(None, torch.nn.Linear(4, 3), HardLabels())
    >>> _ = run.fit(data, TrainingPlan(epochs=2), callbacks=[TensorBoard("runs/1")])  # tensorboard --logdir runs
    >>> len(list(Path("runs/1").glob("events.*")))
    1
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("TensorBoard: no package tensorboard; pip install tensorboard") from error
        self.folder = Path(folder)
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def begin(self, run: Run) -> None:
        """Opens a file, and hides what an earlier file has of the steps to come."""
        self._writer = self._open(str(self.folder), purge_step=run.step + 1)

    def step(self, run: Run) -> None:
        """Writes loss, terms and learning rate."""
        terms = {f"terms/{name}": value for name, value in run.terms.items()}
        self._write({"loss": run.loss, "lr": run.lr, **terms}, run.step)

    def epoch(self, run: Run, record: Epoch) -> None:
        """Writes the validation."""
        self._write({f"validation/{name}": value for name, value in record.validation.items()}, record.step).flush()

    def end(self, run: Run) -> None:
        """Closes the file."""
        if self._writer is not None:  # another callback's begin failed before this one's
            self._writer.close()
            self._writer = None

    def _write(self, values: Mapping[str, float], step: int) -> SummaryWriter:
        if self._writer is None:
            raise RuntimeError("TensorBoard: no run has begun; pass it to fit as one of callbacks")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        return self._writer
