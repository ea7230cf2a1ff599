"""Weights of a strategy that change in the course of training: functions of the optimiser step, from 1."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def linear(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` at step 1 straight to ``end`` at step ``steps``, and ``end`` from then on.

    >>> weight = linear(1.0, 0.0, steps=5)
    >>> [weight(step) for step in (1, 2, 3, 4, 5, 6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check("linear", steps, start=start, end=end)
    return lambda step: _mix(start, end, _progress(step, steps))


def cosine(start: float, end: float, steps: int) -> Schedule:
    """The same along half a wave of a cosine: slowly at both ends.

    >>> weight = cosine(1.0, 0.0, steps=5)
    >>> [round(weight(step), 3) for step in (1, 2, 3, 4, 5, 6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    _check("cosine", steps, start=start, end=end)
    return lambda step: _mix(start, end, 0.5 * (1.0 - math.cos(math.pi * _progress(step, steps))))


def after(step: int, weight: float = 1.0) -> Schedule:
    """0 until ``step`` steps are taken, then ``weight``: a strategy that joins later.

    >>> [after(2)(step) for step in (1, 2, 3, 4)]
    [0.0, 0.0, 1.0, 1.0]
    """
    _check("after", step, weight=weight)
    return lambda now: weight if now > step else 0.0


def until(step: int, weight: float = 1.0) -> Schedule:
    """``weight`` for the first ``step`` steps, then 0: a strategy that only begins, such as hints (Romero et al. 2015).

    >>> [until(2)(step) for step in (1, 2, 3, 4)]
    [1.0, 1.0, 0.0, 0.0]
    """
    _check("until", step, weight=weight)
    return lambda now: weight if now <= step else 0.0


def _progress(step: int, steps: int) -> float:
    return 1.0 if step >= steps else (step - 1) / (steps - 1)


def _mix(start: float, end: float, share: float) -> float:
    # Not start + (end - start) share: both ends are met exactly, and no rounding makes a weight negative.
    return start * (1.0 - share) + end * share


def _check(schedule: str, steps: int, **weights: float) -> None:
    if steps < 1:
        raise ValueError(f"{schedule}: the number of steps is {steps}; expected at least 1")
    for name, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{schedule}: {name} is {weight}; expected a number of at least 0")
