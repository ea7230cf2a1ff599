"""Small charts as inline SVG: no library, no script; colours come from the page's style sheet.

Every series has a class ``s0``, ``s1``... that the page gives a colour, and in line charts a marker of its own, so that
nothing is told by colour alone. A chart is ``WIDTH`` units wide and scales with the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 440

_LINE = 16  # height of a line of text
_CHARACTER = 6.6  # widest average width of a character at 12 units
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-5l5 8.5h-10z",
    "M0-5l5 5-5 5-5-5z",
    "M0 5l5-8.5h-10z",
    "M-1.5-5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    "M-4.5-4.5h9l-9 9h9z",
    "M-5-2h10v4h-10z",
)
_MARKED = 16  # more points of a curve are not all marked


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length, what is written at its end, and which series colours it."""

    label: str
    value: float
    text: str
    series: int


@dataclass(frozen=True)
class Line:
    """One curve: its label, its values, which series colours it, and (low, high) around each of the values."""

    label: str
    values: Sequence[float]
    series: int
    band: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Dot:
    """One mark of a scale: its label, its value, whiskers from ``low`` to ``high``, what is written beside it, series.

    ``values`` are the single ones behind it, each a thin stroke below.
    """

    label: str
    value: float
    low: float
    high: float
    text: str
    series: int
    values: Sequence[float] = ()


def bars(title: str, axis: str, data: Sequence[Bar]) -> Markup:
    """A horizontal bar chart from zero; raises :class:`ValueError` unless the values, none negative, are finite."""
    row = 30
    left = max(len(bar.label) for bar in data) * _CHARACTER + 10
    right = max(len(bar.text) for bar in data) * _CHARACTER + 10
    top, height = _LINE + 10, row * len(data)
    marks = ticks(0.0, _range([bar.value for bar in data])[1], 4)
    end = marks[-1]
    scale = (WIDTH - left - right) / end if end else 0.0
    parts = []
    for mark in marks:
        x = left + mark * scale
        parts.append(_line(x, top, x, top + height, "grid"))
        parts.append(_text(x, top + height + _LINE, _number(mark), "tick", "middle"))
    for index, bar in enumerate(data):
        y = top + index * row
        width = max(bar.value * scale, 1.0)
        parts.append(_text(left - 8, y + row / 2 + 4, bar.label, "label", "end"))
        parts.append(
            Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" class="s{}"/>').format(
                _round(left), _round(y + 6), _round(width), row - 12, bar.series
            )
        )
        parts.append(_text(left + width + 6, y + row / 2 + 4, bar.text, "value", "start"))
    parts.append(_line(left, top, left, top + height, "axis"))
    parts.append(_text(left, top + height + 2 * _LINE + 2, axis, "tick", "start"))
    described = "; ".join(f"{bar.label}: {bar.text}" for bar in data)
    return _chart(title, described, top + height + 2 * _LINE + 10, parts)


def dots(title: str, axis: str, data: Sequence[Dot], reference: float | None = None) -> Markup:
    """Values with whiskers, one below the other; raises :class:`ValueError` unless all are finite.

    The axis covers what is shown, not zero, and says so by its ticks; ``reference`` is an upright line across all.
    """
    row, left, top = 2 * _LINE + 12, 10, _LINE + 10
    height = row * len(data)
    ends = [value for dot in data for value in (dot.low, dot.high, dot.value, *dot.values)]
    marks = ticks(*_range(ends if reference is None else [*ends, reference]), 6)
    scale = (WIDTH - left - 26) / (marks[-1] - marks[0])

    def at(value: float) -> float:
        return left + (value - marks[0]) * scale

    parts = []
    for mark in marks:
        parts.append(_line(at(mark), top, at(mark), top + height, "grid"))
        parts.append(_text(at(mark), top + height + _LINE, _number(mark), "tick", "middle"))
    if reference is not None:
        parts.append(_line(at(reference), top, at(reference), top + height, "axis"))
    for index, dot in enumerate(data):
        y = top + index * row + _LINE
        parts.append(_text(left, y, dot.label, "label", "start"))
        parts.append(_text(WIDTH - 4, y, dot.text, "value", "end"))
        y += 12
        parts += [_line(at(value), y + 7, at(value), y + 12, "seed") for value in dot.values]
        parts.append(_line(at(dot.low), y, at(dot.high), y, f"line s{dot.series}"))
        parts += [_line(at(x), y - 4, at(x), y + 4, f"line s{dot.series}") for x in (dot.low, dot.high)]
        parts.append(_marker(at(dot.value), y, dot.series))
    parts.append(_text(left, top + height + 2 * _LINE + 2, axis, "tick", "start"))
    described = "; ".join(f"{dot.label}: {dot.text}" for dot in data)
    return _chart(title, described, top + height + 2 * _LINE + 10, parts)


def lines(
    title: str,
    x_axis: str,
    y_axis: str,
    data: Sequence[Line],
    where: Sequence[float] | None = None,
    reference: float | None = None,
) -> Markup:
    """A line chart of curves with their bands; raises :class:`ValueError` unless all is finite.

    Values lie at ``where``, rising numbers, at least as many as the longest curve has; None counts them from 1.
    ``reference`` is a level line across all. The y axis covers the values, not zero, and says so by its ticks.
    """
    values = [value for line in data for value in (*line.values, *(end for ends in line.band for end in ends))]
    longest = max(len(line.values) for line in data)
    xs = range(1, longest + 1) if where is None else where[:longest]
    whole = all(x == int(x) for x in xs)
    y_marks = ticks(*_range(values if reference is None else [*values, reference]), 5)
    x_marks = [mark for mark in ticks(xs[0], xs[-1], 6) if (not whole or mark == int(mark)) and xs[0] <= mark <= xs[-1]]
    low, high = y_marks[0], y_marks[-1]
    left = max(len(_number(mark)) for mark in y_marks) * _CHARACTER + 14
    top, height = 2 * _LINE + 14, 170
    width = WIDTH - left - 14

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0] or 1)
        return left + across * width, top + height - (y - low) / (high - low) * height

    parts = [_text(left, 2 * _LINE + 2, y_axis, "tick", "start")]
    for mark in y_marks:
        y = at(xs[0], mark)[1]
        parts += [_line(left, y, left + width, y, "grid"), _text(left - 7, y + 4, _number(mark), "tick", "end")]
    for mark in x_marks:
        x = at(mark, low)[0]
        parts += [_line(x, top + height, x, top + height + 4, "axis")]
        parts += [_text(x, top + height + _LINE + 2, _number(mark), "tick", "middle")]
    parts.append(_line(left, top + height, left + width, top + height, "axis"))
    if reference is not None:
        level = at(xs[0], reference)[1]
        parts.append(_line(left, level, left + width, level, "axis"))
    parts.append(_text(left + width / 2, top + height + 2 * _LINE + 2, x_axis, "tick", "middle"))
    legend_x, legend_y = left, top + height + 3 * _LINE + 10
    for line in data:
        if line.band:
            upper = [at(x, high) for x, (_, high) in zip(xs, line.band, strict=False)]
            lower = [at(x, low) for x, (low, _) in zip(xs, line.band, strict=False)]
            path = _path([*upper, *reversed(lower)])
            parts.append(Markup('<polygon points="{}" class="band s{}"/>').format(path, line.series))
    for line in data:
        points = [at(x, y) for x, y in zip(xs, line.values, strict=False)]
        parts.append(Markup('<polyline points="{}" class="line s{}"/>').format(_path(points), line.series))
        parts += [_marker(x, y, line.series) for x, y in points[:: -(-len(points) // _MARKED)]]
        wide = len(line.label) * _CHARACTER + 34
        if legend_x + wide > WIDTH and legend_x > left:
            legend_x, legend_y = left, legend_y + _LINE + 4
        parts += [
            _marker(legend_x + 6, legend_y - 4, line.series),
            _text(legend_x + 17, legend_y, line.label, "label", "start"),
        ]
        legend_x += wide
    described = "; ".join(f"{line.label}: from {line.values[0]:.4g} to {line.values[-1]:.4g}" for line in data)
    return _chart(title, described, legend_y + 8, parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers, evenly spaced, whose first and last enclose ``low`` and ``high``.

    >>> ticks(0.0, 9.3, 4)
    [0.0, 2.5, 5.0, 7.5, 10.0]
    """
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if span / (size * power) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"a chart's values are not all finite: {list(values)}")
    return min(values), max(values)


def _chart(title: str, described: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" role="img" viewBox="0 0 {} {}" aria-label="{}: {}">{}{}</svg>').format(
        WIDTH, _round(height), title, described, _text(0, _LINE - 2, title, "title", "start"), Markup("").join(parts)
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(*map(_round, (x1, y1, x2, y2)), kind)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_round(x)},{_round(y)}" for x, y in points)


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> Markup:
    place = Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">').format(_round(x), _round(y), anchor, kind)
    return place + escape(text) + Markup("</text>")


def _marker(x: float, y: float, index: int) -> Markup:
    path = _MARKERS[index % len(_MARKERS)]
    return Markup('<path transform="translate({} {})" d="{}" class="s{}"/>').format(_round(x), _round(y), path, index)


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:g}"
