"""A grid's rows as a table and as an HTML page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from rich.table import Table

from potstill.report import plot
from potstill.report.render import environment

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>{% include "style.css.j2" %}</style></head><body><main><h1>{{ title }}</h1>
<p>{{ metric }}; dense: {{ dense }}. {{ machine }}.</p>
{% for chart in charts %}<figure>{{ chart }}</figure>{% endfor %}
<table><tr><th>pattern</th><th>criterion</th><th>sparsity %</th><th>pruned</th><th>distilled</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
</main></body></html>
"""
Means = dict[tuple[str, str], dict[int, tuple[float, float]]]


def means(record: Mapping[str, Any]) -> Means:
    """By pattern and criterion, then by sparsity in %: pruned and distilled, each the mean over the seeds."""
    found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    for row in record["rows"]:
        found.setdefault((row["pattern"], row["criterion"]), {}).setdefault(row["percent"], []).append(row)
    return {
        key: {
            percent: (statistics.fmean(r["pruned"] for r in rows), statistics.fmean(r["distilled"] for r in rows))
            for percent, rows in sorted(by.items())
        }
        for key, by in sorted(found.items())
    }


def table(record: Mapping[str, Any]) -> Table:
    """Pruned / distilled for each sparsity."""
    found = means(record)
    percents = sorted({percent for by in found.values() for percent in by})
    shown = Table("pattern", "criterion", *(f"{percent} %" for percent in percents), title=_title(record))
    for (pattern, criterion), by in found.items():
        cells = (" / ".join(f"{value:.2f}" for value in by[percent]) if percent in by else "" for percent in percents)
        shown.add_row(pattern, criterion, *cells)
    return shown


def page(record: Mapping[str, Any]) -> str:
    """A page that needs no other file: a curve per criterion for each pattern, pruned and distilled, then all means."""
    found = means(record)
    rows = [
        (pattern, criterion, percent, f"{pruned:.3f}", f"{distilled:.3f}")
        for (pattern, criterion), by in found.items()
        for percent, (pruned, distilled) in by.items()
    ]
    machine = record["machine"]
    return (
        environment()
        .from_string(_PAGE)
        .render(
            title=f"Pruning: {record['task']}",
            metric=record["metric"],
            dense=_dense(record),
            machine=f"{machine['cpu']}, torch {machine['torch']}, {machine['threads']} thread",
            charts=[_chart(record, found, pattern, at) for pattern in ("unstructured", "1x4") for at in (0, 1)],
            rows=rows,
        )
    )


def _chart(record: Mapping[str, Any], found: Means, pattern: str, at: int) -> Markup:
    curves = {criterion: by for (shape, criterion), by in found.items() if shape == pattern}
    percents = sorted({percent for by in curves.values() for percent in by})
    data = [
        plot.Line(criterion, [by[percent][at] for percent in percents], series)
        for series, (criterion, by) in enumerate(curves.items())
    ]
    title = f"{pattern}, {('pruned', 'distilled')[at]}"
    return plot.lines(title, "sparsity in %", record["metric"], data, percents)


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['task']}: {record['metric']}, pruned / distilled; dense {_dense(record)}"


def _dense(record: Mapping[str, Any]) -> str:
    return f"{statistics.fmean(record['dense']):.3f}"
