"""Measures what pruning costs in accuracy; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from accuracy import grid, lm, mnist, view
from potstill.demo.data import Images, digits
from potstill.demo.data import mnist as mnist_images
from potstill.report.machine import machine

METRICS = {"mnist-mlp": "test accuracy %", "mnist-cnn": "test accuracy %", "lm": "bits per held-out byte"}
SEEDS = {"mnist-mlp": 2, "mnist-cnn": 2, "lm": 1}
DENSE_STEPS = {"mnist-mlp": 1400, "mnist-cnn": 800, "lm": 1200}
STEPS = {"mnist-mlp": 60, "mnist-cnn": 25, "lm": 30}
WINDOWS = 128


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(1)  # the models are small
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.task == "minilm":
        from accuracy import minilm  # needs transformers and the weights

        record = minilm.run(options.minutes, options.out)
        console.print(minilm.table(record))
    else:
        record = run(options.task, options.quick, options.seeds or SEEDS[options.task], options.out, console)
        console.print(view.table(record))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.html is not None:
        options.html.write_text(view.page(record))
    return 0


def run(task: str, quick: bool, seeds: int, out: Path, console: Console) -> dict[str, Any]:
    """All rows of a task, with the settings that they share."""
    begin = time.perf_counter()
    criteria, percents = (lm.CRITERIA, lm.PERCENTS) if task == "lm" else (mnist.CRITERIA, mnist.PERCENTS)
    percents = percents[::3] if quick else percents
    settings = {
        "seeds": seeds,
        "dense steps": 20 if quick else DENSE_STEPS[task],
        "distillation steps": 2 if quick else STEPS[task],
        "criteria": criteria,
        "quick": quick,
    }
    make = _subjects(task, quick, settings["dense steps"], settings["distillation steps"], out)
    rows, dense = [], []
    for seed in range(seeds):
        subject = make(seed)
        dense.append(grid.judged(subject, subject.dense))
        console.print(f"{task}, seed {seed}: dense {dense[-1]:.3f} after {time.perf_counter() - begin:.0f} s")
        rows += [grid.measure(subject, config) for config in grid.configs(criteria, percents, seed)]
    return {
        "task": task,
        "metric": METRICS[task],
        "settings": settings,
        "machine": machine(),
        "seconds": time.perf_counter() - begin,
        "dense": dense,
        "rows": rows,
    }


def _subjects(task: str, quick: bool, dense_steps: int, steps: int, out: Path) -> Callable[[int], grid.Subject]:
    if task == "lm":
        windows = 4 if quick else WINDOWS
        return lambda seed: lm.subject(seed, dense_steps, steps, windows, out)
    images = _padded_digits() if quick else mnist_images()
    return lambda seed: mnist.subject(task, images, seed, dense_steps, steps)


def _padded_digits() -> Images:
    """The digits of scikit-learn, 8 x 8, in the middle of MNIST's 28 x 28 pixels."""
    small = digits()
    train, test = (torch.nn.functional.pad(x, (10, 10, 10, 10)) for x in (small.train_x, small.test_x))
    return Images(small.name, small.source, train, small.train_y, test, small.test_y)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures what pruning costs in accuracy.")
    parser.add_argument("--task", choices=(*METRICS, "minilm"), required=True)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that all runs")
    parser.add_argument("--seeds", type=int, help="how many dense models (default: 1 for lm, else 2)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, minilm only (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-accuracy"), help="keeps trained models (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--html", type=Path, help="where the page goes")
    options = parser.parse_args(arguments)
    if options.task == "minilm" and (options.quick or options.seeds or options.html):
        parser.error("minilm has no --quick, --seeds and --html; choose --minutes")
    return options


if __name__ == "__main__":
    sys.exit(main())
