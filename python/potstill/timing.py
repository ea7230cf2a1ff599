"""Timing of callables against each other, on machines that are shared and noisy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of ``repeats`` measurements."""

    median: float
    low: float
    high: float
    repeats: int


def compare(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.2,
    rounds: int = 9,
    block: float = 2e-3,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times the calls interleaved, so that a slow spell of the machine hits all of them alike.

    Each of at most ``rounds`` (at least 2) rounds runs every call for about ``block`` seconds (at least once, after one
    untimed call that brings its data back into the caches), in an order that reverses every round; ``seconds`` bounds
    the whole, except that three rounds always run. ``before`` is called, untimed, before each block. A spell that
    outlasts half of the rounds shows in the medians; only a second comparison at another time can tell. Where
    GPUs are in use, a block's time ends when they are done with it.

    >>> times = compare({"short": lambda: sum(range(10)), "long": lambda: sum(range(10_000))}, seconds=0.05)
    >>> times["short"].median < times["long"].median
    True
    """
    fastest: dict[str, float] = {}
    for name, call in calls.items():
        call()
        fastest[name] = _time(call, 1)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name in order:
            # Sized by the fastest time so far: one interruption does not leave the later blocks too short.
            count = max(1, min(1000, int(block / max(fastest[name], 1e-7))))
            if before is not None:
                before()
            calls[name]()
            sample = _time(calls[name], count)
            samples[name].append(sample)
            fastest[name] = min(fastest[name], sample)
        order.reverse()
    return {name: _summary(values) for name, values in samples.items()}


def _time(call: Callable[[], object], count: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait()
    return (time.perf_counter() - start) / count


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))
