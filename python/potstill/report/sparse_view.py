"""The page of ``potstill bench sparse``: speed over sparsity, and where it pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from potstill.report import plot
from potstill.report.machine import machine
from potstill.report.render import environment
from potstill.report.sparse import Course, verdict


def page(title: str, courses: Sequence[Course]) -> str:
    """An HTML document that needs no other file; raises :class:`ValueError` if there is nothing to show."""
    if not courses:
        raise ValueError("potstill bench sparse: nothing was measured, so that there is nothing to show")
    return (
        environment()
        .get_template("sparse.html.j2")
        .render(
            title=title, rival=courses[0].rival, charts=list(_charts(courses)), rows=_rows(courses), machine=machine()
        )
    )


def _charts(courses: Sequence[Course]) -> Iterator[Markup]:
    for k, n, threads in dict.fromkeys((c.k, c.n, c.threads) for c in courses):
        here = [c for c in courses if (c.k, c.n, c.threads) == (k, n, threads)]
        data = [plot.Line(f"{c.m} row{'s' if c.m > 1 else ''}", c.speedups, i) for i, c in enumerate(here)]
        title = f"{k} inputs, {n} outputs, threads: {threads}"
        axis = f"times as fast as {here[0].rival}"
        percents = [round(100 * sparsity, 1) for sparsity in here[0].sparsities]
        yield plot.lines(title, "zeros in %", axis, data, percents, reference=1.0)


def _rows(courses: Sequence[Course]) -> list[dict[str, Any]]:
    return [
        {
            "layer": f"m={c.m} k={c.k} n={c.n}, threads: {c.threads}",
            "verdict": verdict(c.points, c.rival),
            "cells": [
                f"{sparsity:.0%}: {speedup:.2f} ({1e3 * seconds:.3g} ms, {order})"
                for sparsity, speedup, order, seconds in zip(c.sparsities, c.speedups, c.orders, c.seconds, strict=True)
            ],
        }
        for c in courses
    ]
