"""Every test starts from the same seed and leaves threads and instruction set as it found them."""

import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from potstill import _C
from potstill.timing import Timing
from potstill.transform import measure


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    isa, threads = _C.isa(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    _C.use_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _ctrl_c_counts() -> Iterator[None]:
    """Programs that a shell starts in the background ignore it from the start, and so would the tests of it."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.fixture
def one_thread() -> None:
    """For networks so small that they only lose by a second thread."""
    torch.set_num_threads(1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize_ measures as little as it can: for tests that do not look at its decisions."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "_VISITS", 1)


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict], dict[str, float]]], None]:
    """Replaces the clock, so that a decision can be tested whatever the machine is doing."""

    def use(seconds: Callable[[dict], dict[str, float]]) -> None:
        def compare(calls: dict, **_: float) -> dict[str, Timing]:
            return {name: Timing(value, value, value, 3) for name, value in seconds(calls).items()}

        monkeypatch.setattr(measure, "compare", compare)

    return use
