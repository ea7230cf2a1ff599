"""A training run as one HTML page: its curves, epoch by epoch, and how it was run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from potstill.report import plot
from potstill.report.render import environment

_POINTS = 60  # of a curve: of longer runs the steps next to each other are averaged


def page(record: Mapping[str, Any]) -> str:
    """One HTML document of the ``epochs`` and ``losses`` of a :class:`History`, and of what else the record says.

    >>> epoch = {"epoch": 1, "step": 2, "loss": 0.75, "lr": 0.1, "seconds": 2.0, "validation": {}, "terms": {}}
    >>> facts = {"recipe": "small.py", "processes": 2, "plan": "tp=2", "teacher": "whole", "training": "steps=2"}
    >>> from potstill.report.machine import machine
    >>> "Loss while training" in page({**facts, "machine": machine(), "losses": [1.0, 0.5], "epochs": [epoch]})
    True
    """
    return environment().get_template("training.html.j2").render(record=record, charts=list(_charts(record)))


def _charts(record: Mapping[str, Any]) -> Iterator[Markup]:
    losses, epochs = record["losses"], record["epochs"]
    if losses:
        steps, means = averaged(losses)
        yield plot.lines("Loss while training", "optimiser step", "", [plot.Line("loss", means, 0)], steps)
    terms = _lines(epochs, "terms")
    if len(terms) > 1:
        yield plot.lines("What each strategy contributes to it", "epoch", "", terms)
    for line in _lines(epochs, "validation"):  # each of a unit of its own, and with values that the user computes
        if all(map(math.isfinite, line.values)):
            yield plot.lines(f"Validation: {line.label}", "epoch", "", [line])


def _lines(epochs: Sequence[Mapping[str, Any]], key: str) -> list[plot.Line]:
    names = epochs[0][key] if epochs else []
    return [plot.Line(name, [epoch[key][name] for epoch in epochs], index) for index, name in enumerate(names)]


def averaged(losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """The last steps of equal stretches of a run, and their mean losses; a stretch is one step where there are few.

    >>> averaged([3.0, 1.0, 2.0])
    ([1, 2, 3], [3.0, 1.0, 2.0])
    >>> steps, means = averaged([1.0, 3.0] * 60)
    >>> steps[:2], means[:2], len(means)
    ([2, 4], [2.0, 2.0], 60)
    """
    size = -(-len(losses) // _POINTS)
    ends = [min(first + size, len(losses)) for first in range(0, len(losses), size)]
    return [*ends], [statistics.fmean(losses[max(end - size, 0) : end]) for end in ends]
