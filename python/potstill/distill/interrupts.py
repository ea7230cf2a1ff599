"""Ctrl-C, and a polite request to end, at a moment when the state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Holds SIGINT and SIGTERM back while a step runs: half of an optimiser step must not be what a checkpoint saves.

    Inside ``with interrupts.held():`` a first signal waits for the end of the block; a second is delivered at once.
    SIGINT then does what it did before, raising ``KeyboardInterrupt``; SIGTERM, which by default would end the process
    on the spot, raises ``SystemExit`` with the status that a shell reports for it, 143, so that what must be saved is
    saved. Handlers of the caller's own are called instead. Python delivers signals to the main thread only, so
    elsewhere nothing is changed.
    """

    def __init__(self) -> None:
        self._previous: dict[int, object] = {}
        self._holding = False
        self._waiting: tuple[int, FrameType | None] | None = None

    @property
    def waiting(self) -> int:
        """The number of the signal that is held back, 0 if none is."""
        return 0 if self._waiting is None else self._waiting[0]

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Takes over both signals' handlers, and gives them back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in map(int, _SIGNALS):
            found = signal.getsignal(number)
            if callable(found) or (number == signal.SIGTERM and found == signal.SIG_DFL):  # who ignores them means it
                self._previous[number] = found
                signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._previous.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that a first signal does not cut short; inside another such block it is that one's part."""
        if self._holding:
            yield
            return
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self.deliver(*waiting)

    def deliver(self, number: int, frame: FrameType | None = None) -> None:
        """What the signal does when nothing holds it back."""
        handler = self._previous.get(number)
        if callable(handler):
            handler(number, frame)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._holding and self._waiting is None:
            self._waiting = (number, frame)
        else:
            self.deliver(number, frame)
