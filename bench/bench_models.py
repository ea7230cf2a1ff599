"""Times whole models in every form that a user could choose; see README.md beside this file."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

import peers
from contest import checker, contest, hushed, prepared
from peers import MODEL, PRUNED, Contestant, Job, reason
from potstill import _C
from standings import Row, columns, save
from subjects import DECODERS, SUBJECTS, WITH_ZEROS, build

SECONDS = 4.0


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows: list[Row] = []
    contestants, missing = peers.load(MODEL)
    contestants = [c for c in contestants if not (options.quick and "compile" in c.name)]
    for name in options.model:
        try:
            with hushed():
                job = build(name)
        except ImportError as error:  # the package with its weights
            missing[name] = reason(error)
            continue
        entered = [*contestants, *(peers.load(PRUNED)[0] if name in WITH_ZEROS else ())]
        for row in _rows(name, job, entered, options.threads):
            rows.append(row)
            console.print(columns(row, "tokens/s" if name in DECODERS else "ms"))
        gc.collect()  # of sessions and copies of the weights
    for file, why in missing.items():
        console.print(f"[red]{file} takes no part:[/red] {why}")
    save(options.json, rows, missing)
    console.print(f"written to {options.json}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times whole models in every form that a user could choose.")
    parser.add_argument("--model", action="append", choices=list(SUBJECTS), help="default: all; may be repeated")
    parser.add_argument("--threads", action="append", type=int, help="default: 1 and all; may be repeated")
    parser.add_argument("--quick", action="store_true", help="without torch.compile, which takes most of the time")
    results = Path(__file__).parent / "results" / f"models-{_C.isa()}.json"
    parser.add_argument("--json", type=Path, default=results, help="where the numbers go (default: %(default)s)")
    options = parser.parse_args()
    options.model = options.model or list(SUBJECTS)
    options.threads = options.threads or sorted({1, torch.get_num_threads()})
    return options


def _rows(name: str, job: Job, contestants: list[Contestant], thread_counts: list[int]) -> Iterator[Row]:
    starts, failed = prepared(contestants, job)
    check = checker(job)
    for threads in thread_counts:
        yield Row(MODEL, name, threads, (*contest(starts, check, threads, SECONDS), *failed))


if __name__ == "__main__":
    sys.exit(main())
