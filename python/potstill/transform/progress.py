"""The progress of work that takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Bar:
    """Says on the standard error what is going on and how much of it is done, if that is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar meanwhile."""
        with self._progress:
            yield

    def track(self, items: Iterable[T], text: str) -> Iterator[T]:
        """The same items, counted."""
        total = len(items) if isinstance(items, Sized) else None
        task = self._progress.add_task(text, total=total)
        for item in items:
            yield item
            self._progress.advance(task)
        self._progress.remove_task(task)
