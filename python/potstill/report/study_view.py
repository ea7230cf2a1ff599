"""What a study shows: a table for a terminal, and the HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from potstill.report import plot
from potstill.report.intervals import Interval
from potstill.report.render import environment

if TYPE_CHECKING:
    from potstill.report.study import Row, Run, Study


@dataclass(frozen=True)
class _Line:
    """What the tables say of a row."""

    name: str
    about: str
    parameters: str
    result: str
    seeds: str
    difference: str
    verdict: str
    best: str
    worst: str


def table(study: Study) -> Table:
    """The results for a terminal."""
    compared = study.baseline is not None
    found = Table("", title=f"{study.title}: {_axis(study)}")
    for heading in ("parameters", "mean ± 95 % interval", *([_gain(study)] if compared else []), "best, worst seed"):
        found.add_column(heading, justify="right")
    for line in _lines(study):
        name = Text(line.name) if not line.about else Text(line.name).append(f"\n{line.about}", "dim")
        difference = [f"{line.difference}\n{line.verdict}".lstrip()] if compared else []
        cells = line.parameters, f"{line.result}\n{line.seeds}", *difference, f"{line.best}\n{line.worst}"
        found.add_row(name, *map(Text, cells))
    return found


def page(study: Study) -> str:
    """The HTML document; raises :class:`ValueError` for a study without any run."""
    if not study.rows:
        raise ValueError("Study: there is nothing to show; add() a run first")
    return (
        environment()
        .get_template("study.html.j2")
        .render(
            study=study,
            axis=_axis(study),
            gain=None if study.baseline is None else _gain(study),
            lines=list(_lines(study)),
            charts=list(_charts(study)),
        )
    )


def _lines(study: Study) -> Iterator[_Line]:
    decimals = _decimals(study)
    for name, row in study.rows.items():
        difference = None if name == study.baseline else study.difference(name)
        ranked = sorted(row.runs, key=lambda run: run.value, reverse=study.larger_is_better)
        yield _Line(
            name,
            row.about,
            "" if row.parameters is None else f"{row.parameters:,}",
            _plus_minus(study.result(name), decimals),
            _seeds(row),
            "" if difference is None else _plus_minus(difference, decimals, sign="+"),
            "baseline" if name == study.baseline else study.verdict(name),
            *(_run(run, decimals) if len(ranked) > 1 else "" for run in (ranked[0], ranked[-1])),
        )


def _charts(study: Study) -> Iterator[Markup]:
    decimals = _decimals(study)
    series = {name: index for index, name in enumerate(study.rows)}

    def dot(name: str, found: Interval, values: list[float], sign: str = "") -> plot.Dot:
        text = _plus_minus(found, decimals, sign)
        return plot.Dot(name, found.mean, found.low, found.high, text, series[name], values)

    results = [dot(name, study.result(name), [run.value for run in row.runs]) for name, row in study.rows.items()]
    yield plot.dots(study.metric[:1].upper() + study.metric[1:], _axis(study), results)
    compared = [name for name in study.rows if name != study.baseline and study.difference(name) is not None]
    if compared and study.baseline is not None:
        base, gains = study.rows[study.baseline].values, []
        for name in compared:
            found, values = study.difference(name), study.rows[name].values
            if found is not None:
                gains.append(dot(name, found, [values[seed] - base[seed] for seed in values if seed in base], "+"))
        unit = "points" if study.unit == "%" else study.unit
        yield plot.dots(f"Difference to {study.baseline}", unit, gains, reference=0.0)
    curves = [_curve(name, row, series[name]) for name, row in study.rows.items() if all(run.curve for run in row.runs)]
    if curves:
        yield plot.lines("While training", "epoch", _axis(study), curves)
        longest = max(len(curve.values) for curve in curves)
        half = longest // 2
        late = [_from(half, curve) for curve in curves if len(curve.values) > half]
        if half > 1:
            yield plot.lines("The second half of it", "epoch", _axis(study), late, range(half + 1, longest + 1))


def _curve(name: str, row: Row, series: int) -> plot.Line:
    """The mean over the seeds, and from the least to the greatest of them, of as many epochs as all have."""
    epochs = list(zip(*(run.curve for run in row.runs), strict=False))
    band = [(min(values), max(values)) for values in epochs] if len(row.runs) > 1 else []
    return plot.Line(name, [statistics.fmean(values) for values in epochs], series, band)


def _from(epoch: int, curve: plot.Line) -> plot.Line:
    return replace(curve, values=curve.values[epoch:], band=curve.band[epoch:])


def _axis(study: Study) -> str:
    unit = f", {study.unit}" if study.unit else ""
    return f"{study.metric}{unit}, {'more' if study.larger_is_better else 'less'} is better"


def _gain(study: Study) -> str:
    unit = "points" if study.unit == "%" else study.unit
    return f"difference to {study.baseline}{f', {unit}' if unit else ''}"


def _seeds(row: Row) -> str:
    """In words; not every one where none is left out.

    >>> from potstill.report.study import Row, Run
    >>> [_seeds(Row("a", runs=[Run(seed, 1.0, []) for seed in seeds])) for seeds in ([3], [0, 2, 1], [0, 1, 5])]
    ['seed 3', 'seeds 0 to 2', 'seeds 0, 1, 5']
    """
    seeds = sorted(row.values)
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _run(run: Run, decimals: int) -> str:
    return f"{run.value:.{decimals}f} (seed {run.seed})"


def _plus_minus(found: Interval, decimals: int, sign: str = "") -> str:
    mean = f"{found.mean:{sign}.{decimals}f}"
    return f"{mean} (one seed)" if found.half is None else f"{mean} ± {found.half:.{decimals}f}"


def _decimals(study: Study) -> int:
    """So many that the median interval has two significant digits; without intervals, the largest value four."""
    found = [study.result(name) for name in study.rows]
    found += [difference for name in study.rows if (difference := study.difference(name)) is not None]
    halves = [one.half for one in found if one.half]
    digits, size = (2, statistics.median(halves)) if halves else (4, max((abs(one.mean) for one in found), default=1.0))
    return min(max(digits - 1 - math.floor(math.log10(size or 1.0)), 0), 6)
