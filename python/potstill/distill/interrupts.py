"""Ctrl-C at a moment when the state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Holds SIGINT back while a step runs: half of an optimiser step must not be what a checkpoint saves.

    Inside ``with interrupts.held():`` a first signal waits for the end of the block; a second is delivered at once.
    Python delivers signals to the main thread only, so elsewhere nothing is changed.
    """

    def __init__(self) -> None:
        self._deliver: Callable[[int, FrameType | None], object] | None = None
        self._holding = False
        self._waiting: tuple[int, FrameType | None] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Takes over the handler of SIGINT, and gives it back."""
        previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(previous):
            yield
            return
        self._deliver = previous
        signal.signal(signal.SIGINT, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that a first SIGINT does not cut short."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            waiting, self._waiting = self._waiting, None
        if waiting is not None and self._deliver is not None:
            self._deliver(*waiting)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._holding and self._waiting is None:
            self._waiting = (signum, frame)
        elif self._deliver is not None:
            self._deliver(signum, frame)
