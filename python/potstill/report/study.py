"""Repeated experiments: rows of a table over several seeds, their intervals, and one HTML page that shows them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from potstill.errors import PotstillError
from potstill.report import study_view
from potstill.report.intervals import Interval, interval, paired
from potstill.report.machine import machine

_FORMAT = 1
_MACHINE = ("cpu", "gpus", "isa", "threads", "potstill", "torch", "python", "system")
_SAME = ("title", "metric", "unit", "larger_is_better", "settings")  # what a study that is continued must agree in


@dataclass(frozen=True)
class Run:
    """One training: its seed, the metric at its end, and the metric after each epoch."""

    seed: int
    value: float
    curve: list[float]


@dataclass
class Row:
    """One way to train, over some seeds; ``about`` says in words what it sees or does."""

    name: str
    about: str = ""
    parameters: int | None = None
    runs: list[Run] = field(default_factory=list)

    @property
    def values(self) -> dict[int, float]:
        """The metric by seed."""
        return {run.seed: run.value for run in self.runs}


class Study:
    """Compares ways to train: what each reached, over several seeds, and what it gained on a baseline.

    - ``title``, ``metric`` and ``unit`` (such as "test accuracy" and "%") head the table; ``larger_is_better`` orders
      the seeds.
    - ``settings``: what all runs have in common, ready for JSON; the page lists it.
    - ``folder``: results are written there after each :meth:`add`, and those that it already holds are loaded, so that
      an interrupted program goes on where it was: it asks :meth:`done` before each run. Raises
      :class:`PotstillError` if the folder holds a study of this name with another title, metric or settings.

    ``baseline`` is the row to which all are compared: differences are paired by seed, so that what two rows of one seed
    share (initial weights, the choice of the data) falls out. Intervals are Student-t, at 95 %.

    >>> study = Study("Digits", metric="test accuracy", unit="%")
    >>> for seed, (alone, taught) in enumerate([(90.0, 92.0), (91.0, 92.5), (89.0, 91.5)]):
    ...     study.add("student alone", seed=seed, value=alone)
    ...     study.add("distilled", seed=seed, value=taught)
    >>> study.baseline = "student alone"
    >>> gain = study.difference("distilled")
    >>> round(gain.mean, 2), round(gain.half, 2), gain.count
    (2.0, 1.24, 3)
    >>> study.write(Path("out")).name
    'digits.html'
    """

    def __init__(
        self,
        title: str,
        *,
        metric: str,
        unit: str = "",
        larger_is_better: bool = True,
        settings: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.title = title
        self.metric = metric
        self.unit = unit
        self.larger_is_better = larger_is_better
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings or {})))
        self.baseline: str | None = None
        self.rows: dict[str, Row] = {}
        self.notes: list[str] = []
        self.machines: list[dict[str, Any]] = []
        self._name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        if not self._name:
            raise ValueError(f"Study: title is {title!r}; it names the files, so it must have a letter or digit")
        self._folder = folder
        if folder is not None and (path := folder / f"{self._name}.json").exists():
            self._continue(path)

    def add(
        self,
        row: str,
        *,
        seed: int,
        value: float,
        curve: Sequence[float] = (),
        parameters: int | None = None,
        about: str = "",
    ) -> None:
        """Records one run: the metric at its end, and after each epoch in ``curve``.

        Raises :class:`ValueError` if the row has this seed already, or other ``parameters`` or words about it, or if a
        number is not finite.
        """
        run = Run(seed, float(value), [float(x) for x in curve])
        if not all(map(math.isfinite, (run.value, *run.curve))):
            raise ValueError(f"Study.add: {row!r}, seed {seed}: not all of {[run.value, *run.curve]} are finite")
        known = self.rows.get(row, Row(row, about, parameters))
        if (known.about, known.parameters) != (about, parameters):
            raise ValueError(
                f"Study.add: {row!r} has parameters={parameters} and about={about!r}, but before "
                f"{known.parameters} and {known.about!r}; give another row another name"
            )
        if self.done(row, seed):
            raise ValueError(f"Study.add: {row!r} has seed {seed} already; ask done() first")
        self.rows.setdefault(row, known).runs.append(run)
        here = machine()
        if (facts := {key: here[key] for key in _MACHINE}) not in self.machines:
            self.machines.append(facts)
        if self._folder is not None:
            self._save(self._folder)

    def done(self, row: str, seed: int) -> bool:
        """Whether this run is recorded."""
        return row in self.rows and seed in self.rows[row].values

    def note(self, text: str) -> None:
        """A paragraph of the page, above the table; the same text twice is shown once."""
        if text not in self.notes:
            self.notes.append(text)

    def result(self, row: str) -> Interval:
        """The metric's mean over the seeds of a row; raises :class:`ValueError` for a row that is not there."""
        return interval(list(self._row(row).values.values()))

    def difference(self, row: str) -> Interval | None:
        """A row minus the baseline, by seed; None if there is no baseline, or no seed that both have."""
        if self.baseline is None:
            return None
        return paired(self._row(row).values, self._row(self.baseline).values)

    def verdict(self, row: str) -> str:
        """What the difference shows, in a word or two; empty for the baseline itself, or where nothing is compared."""
        difference = self.difference(row)
        if difference is None or row == self.baseline:
            return ""
        if difference.half is None:
            return "no interval"
        if difference.low <= 0.0 <= difference.high:
            return "not told apart"
        return "better" if (difference.mean > 0) == self.larger_is_better else "worse"

    def table(self) -> Table:
        """The results for a terminal."""
        return study_view.table(self)

    def page(self) -> str:
        """One HTML document without outside parts: notes, the table, charts, settings and the machine."""
        return study_view.page(self)

    def write(self, folder: Path | None = None) -> Path:
        """Writes the page and the JSON file into ``folder``, or the study's own, and returns the page's path."""
        folder = folder or self._folder
        if folder is None:
            raise ValueError("Study.write: neither the study nor this call has a folder; give one")
        self._save(folder)
        page = folder / f"{self._name}.html"
        page.write_text(self.page(), encoding="utf-8")
        return page

    @classmethod
    def read(cls, path: Path) -> Self:
        """The study that :meth:`write` left in a JSON file; raises :class:`PotstillError` if it is something else."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != _FORMAT:
                raise PotstillError(f"{path}: its format is {record['format']}; this version reads {_FORMAT}")
            study = cls(**{key: record[key] for key in _SAME})
            study.baseline, study.notes, study.machines = record["baseline"], record["notes"], record["machines"]
            for row in record["rows"]:
                runs = [Run(**run) for run in row.pop("runs")]
                study.rows[row["name"]] = Row(**row, runs=runs)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PotstillError(
                f"{path} is not the JSON file of a study ({error}); name another, or delete it"
            ) from error
        return study

    def _continue(self, path: Path) -> None:
        found = type(self).read(path)
        for name in _SAME:
            if getattr(found, name) != getattr(self, name):
                raise PotstillError(
                    f"Study: {path} has {name} {getattr(found, name)!r}, this one {getattr(self, name)!r}; results of "
                    "different studies don't mix: choose another folder or title, or delete the file"
                )
        self.rows, self.machines = found.rows, found.machines

    def _save(self, folder: Path) -> None:
        names = (*_SAME, "baseline", "notes", "machines")
        record = {"format": _FORMAT, **{name: getattr(self, name) for name in names}}
        record["rows"] = [asdict(row) for row in self.rows.values()]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self._name}.json"
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def _row(self, name: str) -> Row:
        if name not in self.rows:
            raise ValueError(f"Study: there is no row {name!r}, but {', '.join(map(repr, self.rows)) or 'none at all'}")
        return self.rows[name]
