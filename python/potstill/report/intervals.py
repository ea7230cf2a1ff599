"""Means with Student-t intervals, and differences of pairs: what a few repeated runs can show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """``mean`` ± ``half`` of ``count`` values at the level of 95 %; ``half`` is None for one value, which has none."""

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        """Its lower end; the mean where there is no interval."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Its upper end; the mean where there is no interval."""
        return self.mean + (self.half or 0.0)


def interval(values: Sequence[float]) -> Interval:
    """The mean of ``values``, at least one, and the half width of its 95 % Student-t interval.

    It holds for values that are independent and about normally distributed: runs that differ by their seed alone.
    Raises :class:`statistics.StatisticsError` for no values.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half, 3), found.count
    (2.0, 2.484, 3)
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, count)
    return Interval(mean, student_t(count - 1) * statistics.stdev(values, mean) / math.sqrt(count), count)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """The mean of ``values`` - ``others`` over the keys, such as seeds, that both have; None where they share none.

    >>> difference = paired({0: 2.0, 1: 3.0, 2: 9.0}, {0: 1.0, 1: 2.0})
    >>> difference.mean, difference.half, difference.count
    (1.0, 0.0, 2)
    """
    common = [values[key] - others[key] for key in values if key in others]
    return interval(common) if common else None


def student_t(degrees: int) -> float:
    """The t for which |T| <= t with 95 % probability, T having Student's distribution of so many degrees of freedom.

    Raises :class:`ValueError` for less than one degree.

    >>> round(student_t(4), 3)
    2.776
    """
    if degrees < 1:
        raise ValueError(f"student_t: degrees is {degrees}; expected at least 1")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, degrees) < LEVEL:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(middle)


def _within(angle: float, degrees: int) -> float:
    """P(abs(T) <= sqrt(degrees) tan(angle)): a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
