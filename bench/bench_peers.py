"""Times our linear layers against other libraries'; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import peers
import zeros
from contest import checker, contest, prepared
from peers import GROUP, INT4, INT8, SPARSE, Contestant, Job
from potstill import _C
from potstill.ops.op import Cost
from potstill.report.measure import Ceilings, ceilings
from standings import Row, duels, field, save

LAYERS = ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096))  # in_features, out_features
ROWS = (1, 8, 32, 128, 512)
COLD = (1, 4096, 4096)
COLD_LAYERS = 8
"""In a row and none twice, so that no cache holds their weights: 64 MiB as int4."""
SECONDS = 3.0


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 120)
    limits = {threads: ceilings(threads) for threads in options.threads}
    rows: list[Row] = []
    missing: dict[str, str] = {}
    more: dict[str, list[str]] = {}
    for table in options.table:
        contestants, absent = peers.load(table)
        contestants = [c for c in contestants if not (options.quick and "compile" in c.name)]
        missing |= absent
        found = list(_grid(table, contestants, options, limits))
        rows += found
        for threads in options.threads:
            console.print(duels(f"{table}, {threads} threads", [row for row in found if row.threads == threads]))
        console.print(field(f"{table}: all contestants", found))
        if table == SPARSE:
            more["verdicts"] = _where_it_pays(found, options, console)
    for file, why in missing.items():
        console.print(f"[red]{file} takes no part:[/red] {why}")
    save(options.json, rows, missing, limits.values(), **more)
    console.print(f"written to {options.json}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times linear layers against other libraries.")
    parser.add_argument(
        "--table", action="append", choices=(INT8, INT4, SPARSE), help="default: int8, int4; may be repeated"
    )
    parser.add_argument("--shape", action="append", type=_shape, metavar="MxKxN", help="default: all; may be repeated")
    parser.add_argument("--threads", action="append", type=int, help="default: 1 and all; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a third of the time per shape, and no torch.compile")
    parser.add_argument("--json", type=Path, help="where the numbers go; default: a file in results/")
    parser.add_argument("--html", type=Path, help="a page per pattern of zeros; NAME.html becomes NAME-1x4.html")
    options = parser.parse_args()
    options.table = options.table or [INT8, INT4]
    if options.html and SPARSE not in options.table:
        parser.error(f"--html shows where zeros pay: it needs --table {SPARSE}")
    subject = "peers-sparse" if options.table == [SPARSE] else "peers"
    options.json = options.json or Path(__file__).parent / "results" / f"{subject}-{_C.isa()}.json"
    options.threads = options.threads or sorted({1, torch.get_num_threads()})
    return options


def _shape(text: str) -> tuple[int, int, int]:
    m, k, n = (int(part) for part in text.split("x"))
    return m, k, n


def _grid(
    table: str, contestants: list[Contestant], options: argparse.Namespace, limits: dict[int, Ceilings]
) -> Iterator[Row]:
    """The shapes with the weights in the caches as they fit, and one with weights that no cache holds."""
    if table == SPARSE:
        for layer in zeros.layers(options.shape or zeros.SHAPES):
            job = layer.job()
            yield from _rows(table, contestants, layer.label, job, zeros.cost(job), options, limits)
        return
    for m, k, n in options.shape or [(m, k, n) for k, n in LAYERS for m in ROWS]:
        yield from _rows(table, contestants, *_dense(table, m, k, n, 1), options, limits)
    if options.shape is None:
        chained = [c for c in contestants if "compile" not in c.name]
        yield from _rows(table, chained, *_dense(table, *COLD, COLD_LAYERS), options, limits)


def _rows(
    table: str,
    contestants: Iterable[Contestant],
    label: str,
    job: Job,
    cost: Cost,
    options: argparse.Namespace,
    limits: dict[int, Ceilings],
) -> Iterator[Row]:
    """The job for each number of threads."""
    starts, failed = prepared(contestants, job)
    for threads in options.threads:
        entries = contest(starts, checker(job), threads, SECONDS / 3 if options.quick else SECONDS)
        floor, bound = limits[threads].floor(cost)
        yield Row(table, label, threads, (*entries, *failed), floor, bound)


def _dense(table: str, m: int, k: int, n: int, layers: int) -> tuple[str, Job, Cost]:
    """``layers`` layers in a row: what they are called, and their work."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(k, n) for _ in range(layers))).eval().requires_grad_(False)
    label = f"m={m} k={k} n={n}" + (f" cold ({layers} layers)" if layers > 1 else "")
    return label, Job(module, (torch.randn(m, k),)), _cost(table, m, k, n, layers)


def _cost(table: str, m: int, k: int, n: int, layers: int) -> Cost:
    """Weights are read once, with one fp32 scale per output (int8) or group (int4); x and y are fp32."""
    weights = n * k + 4 * n if table == INT8 else n * k / 2 + 4 * n * k / GROUP
    return Cost(int8_ops=2.0 * m * n * k * layers, bytes=(weights + 4 * m * (n + k)) * layers)


def _where_it_pays(rows: list[Row], options: argparse.Namespace, console: Console) -> list[str]:
    """From which sparsity on, against the best peer and our own dense layer: as tables, pages, and lines for a file."""
    layers = zeros.layers(options.shape or zeros.SHAPES)
    found = {rival: zeros.courses(layers, rows, rival) for rival in (zeros.PEER, zeros.DENSE)}
    for courses in found.values():
        console.print(zeros.table(courses))
    for pattern, page in zeros.pages(found[zeros.PEER]) if options.html else ():
        path = options.html.with_stem(f"{options.html.stem}-{pattern}")
        path.write_text(page, encoding="utf-8")
        console.print(f"written to {path}")
    return [line for courses in found.values() for line in zeros.verdicts(courses)]


if __name__ == "__main__":
    sys.exit(main())
