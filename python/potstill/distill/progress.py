"""The progress bar of a training run."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Bar:
    """Loss, batches per second and time left, on the standard error if that is a terminal; otherwise nothing.

    ``batches`` is the number of batches of the whole run, None if not known; ``done`` those that an earlier run did.
    """

    def __init__(self, batches: int | None, done: int, *, quiet: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=batches, completed=done, loss=float("nan"))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def describe(self, text: str) -> None:
        """Changes the words before the bar."""
        self._progress.update(self._task, description=text)

    def advance(self, batches: int, loss: float | None) -> None:
        """Counts batches, and shows the loss of the step that they made, if they made one."""
        self._progress.advance(self._task, batches)
        if loss is not None:
            self._progress.update(self._task, loss=loss)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} batches/s" if task.speed else "")
