"""How fast a replacement of a layer is beside the layer itself, and how exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from potstill.timing import compare
from potstill.transform.observe import Call, autocast_dtype

SECONDS = 0.1
"""The time that is spent on one comparison, unless its calls are slow."""

_VISITS = 3

K = TypeVar("K", bound=Hashable)


def fastest(comparisons: Mapping[K, Mapping[str, Callable[[], object]]]) -> dict[K, dict[str, float]]:
    """Seconds per call of each callable: the lowest lower quartile of three visits.

    Between its visits the other comparisons have their turn, so that a slow spell of the machine must outlast all of
    them to mislead; what is slow by itself is slow in every visit.
    """
    best: dict[K, dict[str, float]] = {key: dict.fromkeys(calls, math.inf) for key, calls in comparisons.items()}
    for _ in range(_VISITS):
        for key, calls in comparisons.items():
            for name, timing in compare(calls, seconds=SECONDS / _VISITS).items():
                best[key][name] = min(best[key][name], timing.low)
    return best


def calling(module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], object]:
    """A function that calls ``module`` with these arguments, under autocast if ``call`` was."""

    def run() -> object:
        # Entered per call: on leaving it torch forgets the weights that it cast.
        with autocast(call.autocast, call.device):
            return module(*args, **kwargs)

    return run


def autocast(dtype: torch.dtype | None, device: str) -> AbstractContextManager[object]:
    """Autocast to ``dtype`` inside on a type of device, or none."""
    if dtype == autocast_dtype(device):
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def snr_db(wanted: Tensor, other: Tensor) -> float | None:
    """10 log10(sum y^2 / sum (y - y')^2); None if that is no number."""
    y, changed = wanted.double(), other.double()
    return decibels(float(y.square().sum()), float((y - changed).square().sum()))


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None if that is no number."""
    defined = 0 < signal < math.inf and 0 < noise < math.inf
    return 10 * math.log10(signal / noise) if defined else None


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log(values)))."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
