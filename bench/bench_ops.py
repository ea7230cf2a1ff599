"""Benchmarks every op at its shapes; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from potstill import _C
from potstill.ops import OPS
from potstill.ops.divergence import DIVERGENCES
from potstill.ops.sparse_samples import LAYERS
from potstill.report.bench import BenchRow, Results, bench_call_overhead, bench_op, table
from potstill.report.measure import ceilings


@dataclass(frozen=True)
class Goal:
    """``op`` takes at most 1 / ``factor`` of the time of each rival whose name starts with ``rival``.

    It counts where a sample's label starts with ``label``, and if ``threads`` is given for so many; the first goal that
    fits a rival counts.
    """

    op: str
    rival: str
    factor: float
    label: str = ""
    threads: int | None = None


def _sparse_goals() -> Iterable[Goal]:
    """Of layers with 80 and 90 % zeros on two threads: dense int8 beaten by this factor, and float32."""
    op = "sparse_int8_linear"
    for k, n in LAYERS:
        for m, factors in ((32, (2.2, 3.6)), (128, (2.5, 4.2)), (512, (2.5, 4.2))):
            for sparsity, factor in zip((0.8, 0.9), factors, strict=True):
                label = f"m={m} k={k} n={n} sparsity={sparsity}"
                yield Goal(op, "int8_linear", factor, label, 2)
                yield Goal(op, "torch eager", 14.0, label, 2)
    yield Goal(op, "int8_linear", 2.2, "m=1 k=4096 n=4096 sparsity=0.8", 2)


GOALS = (
    Goal("int8_linear", "quantize_dynamic", 1.0),
    Goal("kd_loss", "torch eager", 10.0, "rows=64 classes=1000", 2),
    Goal("kd_loss", "torch eager", 15.0, "rows=512 classes=128256", 2),
    Goal("kd_loss", "torch.compile", 6.0, "rows=512 classes=128256", 2),
    *(Goal("kd_loss", "torch eager", 6.0, f"rows=256 classes=32000 T=2 {name}", 2) for name in DIVERGENCES[1:]),
    Goal("kd_loss", "torch eager", 7.0, "rows=256 classes=32000", 2),
    *(Goal("kd_loss", "torch.compile", 1.0, f"rows=256 classes=32000 T=2 {name}") for name in DIVERGENCES[1:]),
    Goal("kd_loss", "torch.compile", 3.0, "rows=256 classes=32000", 2),
    Goal("linear_kd_loss", "products alone", 1 / 1.15, "rows=512 hidden", 2),
    *_sparse_goals(),
)
MOST_CALL_OVERHEAD = 1.5  # Int8Linear's time over nn.Linear's where the layer itself costs nothing


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 200)
    results = Results([], [], bench_call_overhead())
    for threads in options.threads:
        limits = ceilings(threads)
        results.ceilings.append(limits)
        memory = ", ".join(f"{level.name} {level.gbytes_per_s:.0f}" for level in limits.memory)
        console.print(
            f"{limits.cpu}, {limits.isa}, {threads} threads: int8 {limits.int8_gops:.0f} GOP/s, "
            f"f32 {limits.f32_gflops:.0f} GFLOP/s, reads of {memory} GB/s"
        )
        for name in options.op:
            rows = bench_op(OPS[name], threads=threads, limits=limits)
            results.rows.extend(rows)
            console.print(table(f"{name}, {threads} threads", rows))
    overhead = ", ".join(f"{mode} {ratio:.2f}" for mode, ratio in results.call_overhead.items())
    console.print(f"a call of Int8Linear on 16 numbers, in calls of nn.Linear: {overhead}")
    results.save(options.json)
    console.print(f"written to {options.json}")
    if not options.check:
        return 0
    missed = [*_missed(results.rows), *_slow_calls(results.call_overhead)]
    console.print("all goals reached" if not missed else "goals missed:\n" + "\n".join(missed))
    return 1 if missed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times each op against its rivals and against the machine's ceilings.")
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="only this op; may be repeated")
    parser.add_argument("--threads", action="append", type=int, help="default: 1 and all; may be repeated")
    results = Path(__file__).parent / "results" / f"cpu-{_C.isa()}.json"
    parser.add_argument("--json", type=Path, default=results, help="where the numbers go (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed, and say where")
    options = parser.parse_args()
    options.op = options.op or list(OPS)
    options.threads = options.threads or sorted({1, torch.get_num_threads()})
    return options


def _missed(rows: Iterable[BenchRow]) -> Iterable[str]:
    for row in rows:
        for goal in _goals_of(row):
            rivals = [name for name in row.rivals if name.startswith(goal.rival)]
            if not rivals:
                yield f"{row.op} {row.label}, {row.threads} threads: no {goal.rival} to compare with"
                continue
            ratio, best = min((row.times_faster_than(name), name) for name in rivals)
            if ratio < goal.factor:
                yield (
                    f"{row.op} {row.label}, {row.threads} threads: {ratio:.2f} times as fast as {best}, "
                    f"the goal is {goal.factor:g}"
                )


def _goals_of(row: BenchRow) -> Iterable[Goal]:
    here = [goal for goal in GOALS if goal.op == row.op and goal.threads in (None, row.threads)]
    fitting = [goal for goal in here if row.label.startswith(goal.label)]
    return {goal.rival: goal for goal in reversed(fitting)}.values()  # the first of a rival counts


def _slow_calls(ratios: dict[str, float]) -> Iterable[str]:
    for mode, ratio in ratios.items():
        if ratio > MOST_CALL_OVERHEAD:
            yield f"call overhead in {mode} mode: {ratio:.2f} times nn.Linear's, the goal is {MOST_CALL_OVERHEAD:g}"


if __name__ == "__main__":
    sys.exit(main())
