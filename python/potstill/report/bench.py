"""Benchmarks of every op against what a user would call instead, and against the machine's ceilings."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

import potstill
from potstill.nn import Int8Linear
from potstill.ops.op import Op, Sample
from potstill.report.measure import Ceilings, ceilings, torch_threads
from potstill.timing import Timing, compare

EAGER = "torch eager"
_VISITS = 2  # of every sample, and up to _MOST_VISITS while its timings are unsteady
_MOST_VISITS = 4
_STEADY = 1.5


@dataclass(frozen=True)
class BenchRow:
    """One op at one shape: its time and its rivals', measured together, and the floor in seconds that ``bound`` sets.

    ``bound`` names the ceiling that the op meets first: ``int8``, ``f32`` or a memory level.
    """

    op: str
    label: str
    threads: int
    ours: Timing
    rivals: dict[str, Timing]
    floor: float
    bound: str

    def times_faster_than(self, rival: str) -> float:
        """The rival's median time over ours: above 1 we are faster."""
        return self.rivals[rival].median / self.ours.median

    @property
    def best_rival(self) -> str | None:
        """The fastest rival other than plain eager torch, if there is one."""
        others = [name for name in self.rivals if name != EAGER]
        return min(others, key=lambda name: self.rivals[name].median, default=None)

    @property
    def steady(self) -> bool:
        """Whether the machine was calm: no timing's quartiles lie more than a factor of 1.5 apart."""
        return _steady([self.ours, *self.rivals.values()])

    @property
    def percent_of_ceiling(self) -> float:
        """How much of the binding ceiling's rate is reached; what the call itself costs counts against it."""
        return 100 * self.floor / self.ours.median


@dataclass(frozen=True)
class Results:
    """What one run of the benchmarks found: ceilings per thread count, rows, cost of a call, peaks of memory."""

    ceilings: list[Ceilings]
    rows: list[BenchRow]
    call_overhead: dict[str, float]
    memory: Sequence[Any] = ()  # of potstill.report.memory.Peaks

    def save(self, path: Path) -> None:
        """Writes JSON: times in seconds; the ratios that follow from them are written too, for readers."""
        rows = [
            asdict(row)
            | {"times_faster": {name: row.times_faster_than(name) for name in row.rivals}}
            | {"percent_of_ceiling": row.percent_of_ceiling, "steady": row.steady}
            for row in self.rows
        ]
        record = {
            "versions": {"potstill": potstill.__version__, "torch": torch.__version__}
            | {"python": platform.python_version(), "system": platform.platform()},
            "ceilings": [asdict(c) for c in self.ceilings],
            "call_overhead": self.call_overhead,
            "rows": rows,
            "memory": [asdict(peaks) for peaks in self.memory],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def bench_op(
    op: Op,
    samples: Iterable[Sample] | None = None,
    threads: int = 1,
    *,
    seconds: float = 0.4,
    limits: Ceilings | None = None,
) -> list[BenchRow]:
    """Times ``op`` and its rivals, interleaved, on each of ``samples`` (``op.samples("bench")`` if not given).

    Torch uses ``threads`` threads meanwhile. Each sample is visited twice, with the others between, for about
    ``seconds`` each time (more where eight calls of each contestant take longer), and up to twice more while its
    timings are not steady; the visit with the shorter times counts. So a slow spell of the machine that covers one
    visit does not count. ``limits`` are the machine's ceilings for ``threads`` threads, measured if not given.
    """
    chosen = list(op.samples("bench") if samples is None else samples)
    if limits is None:
        limits = ceilings(threads)
    quietest: dict[int, dict[str, Timing]] = {}
    with torch_threads(threads):
        for visit in range(_MOST_VISITS):
            for i, sample in enumerate(chosen):
                if visit < _VISITS or not _steady(quietest[i].values()):
                    times = _visit(op, sample, seconds)
                    quietest[i] = min(times, quietest.get(i, times), key=_typical)
        return [_row(op, sample, threads, quietest[i], limits) for i, sample in enumerate(chosen)]


def bench_call_overhead(seconds: float = 0.4) -> dict[str, float]:
    """What a call costs: the time of ``Int8Linear`` over ``nn.Linear``'s on 16 numbers (16 -> 16), per grad mode.

    Both layers are frozen, so that neither records a graph.

    >>> sorted(bench_call_overhead(seconds=0.01))
    ['grad', 'inference_mode', 'no_grad']
    """
    linear = torch.nn.Linear(16, 16).requires_grad_(False)
    layer = Int8Linear.from_float(linear)
    modes: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "grad": nullcontext,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    ratios = {}
    with torch_threads(1):
        for name, mode in modes.items():
            with mode():
                x = torch.randn(1, 16)
                visits = [
                    compare({"ours": partial(layer, x), EAGER: partial(linear, x)}, seconds=seconds, rounds=101)
                    for _ in range(_VISITS)
                ]
            times = min(visits, key=_typical)
            ratios[name] = times["ours"].median / times[EAGER].median
    return ratios


def table(title: str, rows: Sequence[BenchRow]) -> Table:
    """Rows of one op as a table for people.

    Times are in milliseconds; ``x eager`` and ``x best`` tell how many times faster ours is than eager torch and than
    the fastest other rival. A shape marked ``~`` was measured while the machine was unsteady. Fits a terminal of 80
    columns: a rival's heading is the last word of its name, and the caption has the names.
    """
    rivals = list(dict.fromkeys(name for row in rows for name in row.rivals))
    result = Table(title=title, caption=f"against {', '.join(rivals)}", box=box.SIMPLE_HEAD, padding=0)
    result.add_column("shape", no_wrap=True)
    for heading in ("ours", *(name.split()[-1] for name in rivals), "x eager", "x best"):
        result.add_column(heading, justify="right")
    result.add_column("%", justify="right")
    result.add_column("of ceiling")
    for row in rows:
        best = row.best_rival
        result.add_row(
            row.label if row.steady else f"{row.label} ~",
            _milliseconds(row.ours),
            *(_milliseconds(row.rivals[name]) if name in row.rivals else "" for name in rivals),
            f"{row.times_faster_than(EAGER):.2f}",
            "" if best is None else f"{row.times_faster_than(best):.2f}",
            f"{row.percent_of_ceiling:.0f}",
            row.bound,
        )
    return result


def contestants(op: Op, arguments: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """``op`` as "ours", called as layers call it, and its rivals, on the same arguments."""
    ours = partial(op, *op.shortest(**arguments)) if op.run is None else op.run(**arguments)
    return {"ours": ours} | op.rivals(**arguments)


def _visit(op: Op, sample: Sample, seconds: float) -> dict[str, Timing]:
    return compare(contestants(op, sample.make()), seconds=seconds, rounds=25)


def _typical(times: dict[str, Timing]) -> float:
    return statistics.geometric_mean(timing.median for timing in times.values())


def _steady(timings: Iterable[Timing]) -> bool:
    return all(timing.high <= _STEADY * timing.low for timing in timings)


def _row(op: Op, sample: Sample, threads: int, times: dict[str, Timing], limits: Ceilings) -> BenchRow:
    floor, bound = limits.floor(op.cost(**sample.make()))
    rivals = {name: timing for name, timing in times.items() if name != "ours"}
    return BenchRow(op.name, sample.label, threads, times["ours"], rivals, floor, bound)


def _milliseconds(timing: Timing) -> str:
    return f"{1e3 * timing.median:.3g}"
