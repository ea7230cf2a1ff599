"""Who won: rows of contestants, as tables for people and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from contest import Entry, steady, versions
from peers import SPARSE
from potstill.report.measure import Ceilings

OURS = "potstill"


@dataclass(frozen=True)
class Row:
    """All contestants on one job with one number of threads.

    ``floor`` is the shortest possible time in seconds, set by the ceiling named ``bound``; 0 where it is not known.
    """

    table: str
    label: str
    threads: int
    entries: tuple[Entry, ...]
    floor: float = 0.0
    bound: str = ""

    def seconds(self, name: str) -> float | None:
        """The median time of a contestant, if it has one."""
        return next((e.timing.median for e in self.entries if e.name == name and e.timing), None)

    @property
    def ours(self) -> str | None:
        """Our fastest contestant; where there are zeros, of those that make use of them."""
        own = f"{OURS} sparse" if self.table == SPARSE else OURS
        return self._fastest(lambda name: name.startswith(own))

    @property
    def peer(self) -> str | None:
        """The fastest of all others, float ones included."""
        return self._fastest(lambda name: not name.startswith(OURS))

    @property
    def ratio(self) -> float | None:
        """How many times faster our fastest is than the fastest peer; below 1 we lose."""
        if self.ours is None or self.peer is None:
            return None
        return (self.seconds(self.peer) or 0.0) / (self.seconds(self.ours) or 1.0)

    @property
    def steady(self) -> bool:
        """Whether the machine was calm."""
        return steady(entry.timing for entry in self.entries if entry.timing)

    def _fastest(self, wanted: Callable[[str], bool]) -> str | None:
        timed = {e.name: e.timing.median for e in self.entries if e.timing and wanted(e.name)}
        return min(timed, key=timed.__getitem__, default=None)


def duels(title: str, rows: Sequence[Row]) -> Table:
    """One line per row: our best against the best peer. ``x`` below 1 is a loss; ``~`` marks an unsteady row."""
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), caption=_mean(rows))
    result.add_column("", no_wrap=True)
    for heading in ("threads", "ours ms", "peer ms", "x", "% of ceiling"):
        result.add_column(heading, justify="right")
    result.add_column("best peer", no_wrap=True)
    for row in rows:
        ours, peer, ratio = row.ours, row.peer, row.ratio
        own = row.seconds(ours) if ours else None
        result.add_row(
            row.label if row.steady else f"{row.label} ~",
            str(row.threads),
            _ms(own),
            _ms(row.seconds(peer) if peer else None),
            "-" if ratio is None else f"{ratio:.2f}" if ratio >= 1 else f"[red]{ratio:.2f}[/red]",
            f"{100 * row.floor / own:.0f} {row.bound}" if own and row.floor else "",
            peer or "none",
        )
    return result


def field(title: str, rows: Sequence[Row]) -> Table:
    """One line per contestant: against our best over all rows, or the reason why it took no part."""
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    result.add_column("contestant", no_wrap=True)
    for heading in ("time / ours", "faster than ours", "relative error"):
        result.add_column(heading, justify="right")
    result.add_column("")
    for name, entries in _by_name(rows).items():
        pairs = [(row.seconds(name), row.seconds(row.ours)) for row in rows if row.ours]
        ratios = [theirs / ours for theirs, ours in pairs if theirs and ours]
        errors = [entry.error for entry in entries if entry.error is not None]
        result.add_row(
            name,
            f"{statistics.geometric_mean(ratios):.2f}" if ratios else "-",
            f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}" if ratios else "-",
            f"{statistics.fmean(errors):.4f}" if errors else "-",
            "; ".join(dict.fromkeys(entry.reason for entry in entries if entry.reason)),
        )
    return result


def columns(row: Row, unit: str = "ms") -> Table:
    """One line per contestant of a model: time (or 1 / time in ``tokens/s``), ratios and accuracy."""
    result = Table(title=f"{row.label}, {row.threads} threads", box=box.SIMPLE_HEAD, padding=(0, 1))
    result.add_column("column", no_wrap=True)
    for heading in (unit, "x fp32", "x best peer", "cosine", "SNR dB"):
        result.add_column(heading, justify="right")
    result.add_column("")
    base, best = row.seconds("torch fp32"), row.seconds(row.peer) if row.peer else None
    for entry in row.entries:
        own = entry.timing.median if entry.timing else None
        note = entry.reason or ("" if entry.timing is None or steady([entry.timing]) else "unsteady")
        result.add_row(
            entry.name,
            "-" if own is None else f"{1 / own:.1f}" if unit == "tokens/s" else _ms(own),
            f"{base / own:.2f}" if base and own else "-",
            f"{best / own:.2f}" if best and own else "-",
            "-" if entry.cosine is None else f"{entry.cosine:.5f}",
            "-" if not entry.error else f"{entry.snr_db:.1f}",
            note,
        )
    return result


def save(
    path: Path, rows: Iterable[Row], missing: Mapping[str, str], limits: Iterable[Ceilings] = (), **more: Any
) -> None:
    """Writes JSON: times in seconds, and the ratios that follow from them, for readers; and ``more`` as it is."""
    record = {
        "versions": versions(),
        "missing": dict(missing),
        "ceilings": [asdict(limit) for limit in limits],
        "rows": [
            asdict(row) | {"ours": row.ours, "peer": row.peer, "ratio": row.ratio, "steady": row.steady} for row in rows
        ],
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _mean(rows: Iterable[Row]) -> str:
    ratios = [row.ratio for row in rows if row.ratio]
    if not ratios:
        return "nothing to compare"
    lost = sum(ratio < 1 for ratio in ratios)
    return f"geometric mean {statistics.geometric_mean(ratios):.2f} x the best peer; slower on {lost} of {len(ratios)}"


def _by_name(rows: Iterable[Row]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for row in rows:
        for entry in row.entries:
            found.setdefault(entry.name, []).append(entry)
    return found


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"
