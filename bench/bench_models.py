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
    device = torch.device(options.device)
    files = (peers.OURS, *(peers.FILES if device.type == "cpu" else peers.ON_GPU))
    contestants, missing = peers.load(MODEL, files)
    contestants = [c for c in contestants if not (options.quick and "compile" in c.name)]
    for name in options.model:
        try:
            with hushed():
                job = build(name).on(device)
        except ImportError as error:  # the package with its weights
            missing[name] = reason(error)
            continue
        entered = [*contestants, *(peers.load(PRUNED, files)[0] if name in WITH_ZEROS else ())]
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--json", type=Path, help="where the numbers go (default: bench/results/models-<isa or gpu>.json)"
    )
    options = parser.parse_args()
    where = _C.isa() if options.device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    options.json = options.json or Path(__file__).parent / "results" / f"models-{where}.json"
    options.model = options.model or list(SUBJECTS)
    options.threads = options.threads or (sorted({1, torch.get_num_threads()}) if options.device == "cpu" else [1])
    return options


def _rows(name: str, job: Job, contestants: list[Contestant], thread_counts: list[int]) -> Iterator[Row]:
    starts, failed = prepared(contestants, job)
    check = checker(job)
    for threads in thread_counts:
        yield Row(MODEL, name, threads, (*contest(starts, check, threads, SECONDS), *failed))


if __name__ == "__main__":
    sys.exit(main())
