"""The command ``potstill``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import potstill
from potstill.errors import PotstillError
from potstill.ops import OPS, kd_samples, linear_kd_samples
from potstill.ops.op import Sample
from potstill.report import bench, sparse, sparse_view
from potstill.report.machine import backends, machine
from potstill.report.measure import ceilings
from potstill.report.memory import bench_memory
from potstill.report.memory import table as memory_table


class _Commands(TyperGroup):
    """Shows an error that the user can do something about as one line, and exits with code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PotstillError, ValueError, OSError) as error:
            typer.echo(f"potstill: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
bench_app = typer.Typer(no_args_is_help=True, help="Time an op on your shapes against what you would call instead.")
app.add_typer(bench_app, name="bench")

Sizes = list[int]
Memory = Annotated[
    bool, typer.Option("--memory", help="Measure each contestant's peak memory too, in a process of its own (slow).")
]
_TOKENS, _VOCABULARY = [512], [32_000]
_ROWS, _FEATURES, _LOGITS, _CLASSES, _THREADS = [1, 32, 128], [768], [64], [1000, 32_000], [1]
_SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def main() -> None:
    """The entry point."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"potstill {potstill.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make a PyTorch model smaller and faster, and prove it."""


@app.command()
def info() -> None:
    """Show versions, the instruction set and threads in use, and which implementation serves each op."""
    console = Console()
    console.print(_facts(machine()))
    table = Table("op", "device", "dtype", "computed by", "why")
    for row in backends():
        table.add_row(*(Text(row[key]) for key in ("op", "device", "dtype", "backend", "reason")))
    console.print(table)


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Scikit-learn's digits instead of MNIST: under a minute.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("potstill-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Decides initial weights, order and shifts of the images.")] = 0,
) -> None:
    """Train a teacher, distil a student, convert it to int8, save, load and report, on real images.

    Run it again with the same folder to continue after an interruption.
    """
    from potstill.demo import run
    from potstill.report.render import show

    console = Console()
    record = run("digits" if quick else "mnist", out, seed, console)
    show(record, console)
    console.print(Text(f"The report: {out / 'report.html'}"))


@app.command()
def distill(
    recipe: Annotated[
        str, typer.Argument(help="A Python file with a function recipe(), or module:function; it returns a Recipe.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the student and the report.")] = Path(
        "potstill-distill"
    ),
    plan: Annotated[
        str | None, typer.Option(help='How processes share the student, such as "dp=2,tp=2"; by rows unless given.')
    ] = None,
    teacher_plan: Annotated[
        str | None, typer.Option(help='How they share the teacher, such as "tp=4"; each has all of it unless given.')
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of what the recipe says.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint in the folder, if there is one.")] = True,
) -> None:
    """Train a student as a recipe says, also on several processes that torchrun has started.

    Run it again with the same folder to continue after an interruption, with as many processes as you like.
    """
    from potstill.launch import REPORT, launch
    from potstill.parallel import Plan

    plans = [None if text is None else Plan.parse(text) for text in (plan, teacher_plan)]
    record = launch(recipe, out, *plans, steps=steps, resume=resume)
    if record is not None:
        typer.echo(f"{len(record['losses'])} steps; the report: {out / REPORT}")


@bench_app.command("linear")
def bench_linear(
    m: Annotated[Sizes, typer.Option("--m", min=1, help="Rows of the input; repeat for several.")] = _ROWS,
    k: Annotated[Sizes, typer.Option("--k", min=1, help="Input features; repeat for several.")] = _FEATURES,
    n: Annotated[Sizes, typer.Option("--n", min=1, help="Output features; repeat for several.")] = _FEATURES,
    threads: Annotated[Sizes, typer.Option(min=1, help="Threads; repeat for several.")] = _THREADS,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")] = None,
) -> None:
    """Time the int8 linear layer, for every combination of the sizes given."""
    _bench("int8_linear", [_linear(*sizes) for sizes in product(m, k, n)], threads, json)


@bench_app.command("kd-loss")
def bench_kd_loss(
    rows: Annotated[Sizes, typer.Option("--rows", min=1, help="Rows of the logits; repeat for several.")] = _LOGITS,
    classes: Annotated[
        Sizes, typer.Option("--classes", min=2, help="Classes (the vocabulary); repeat for several.")
    ] = _CLASSES,
    temperature: Annotated[float, typer.Option(help="The softmax's temperature, above 0.")] = 2.0,
    threads: Annotated[Sizes, typer.Option(min=1, help="Threads; repeat for several.")] = _THREADS,
    memory: Memory = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")] = None,
) -> None:
    """Time the distillation loss with its gradient, for every combination of the sizes given."""
    samples = [_logits(r, c, temperature) for r, c in product(rows, classes)]
    _bench("kd_loss", samples, threads, json, memory)


@bench_app.command("linear-kd-loss")
def bench_linear_kd_loss(
    rows: Annotated[Sizes, typer.Option("--rows", min=1, help="Rows (tokens); repeat for several.")] = _TOKENS,
    hidden: Annotated[
        Sizes, typer.Option("--hidden", min=1, help="Features of the hidden states; repeat for several.")
    ] = _FEATURES,
    classes: Annotated[
        Sizes, typer.Option("--classes", min=2, help="Classes (the vocabulary); repeat for several.")
    ] = _VOCABULARY,
    temperature: Annotated[float, typer.Option(help="The softmax's temperature, above 0.")] = 2.0,
    threads: Annotated[Sizes, typer.Option(min=1, help="Threads; repeat for several.")] = _THREADS,
    memory: Memory = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")] = None,
) -> None:
    """Time the distillation loss of a linear head, matrix products and all gradients included.

    For every combination of the sizes given. Student and teacher have heads of the same shape.
    """
    samples = [linear_kd_samples.bench_sample(*sizes, temperature) for sizes in product(rows, hidden, classes)]
    _bench("linear_kd_loss", samples, threads, json, memory)


@bench_app.command("sparse")
def bench_sparse(
    m: Annotated[Sizes, typer.Option("--m", min=1, help="Rows of the input; repeat for several.")] = _ROWS,
    k: Annotated[Sizes, typer.Option("--k", min=1, help="Input features; repeat for several.")] = _FEATURES,
    n: Annotated[Sizes, typer.Option("--n", min=1, help="Output features; repeat for several.")] = _FEATURES,
    sparsity: Annotated[
        list[float], typer.Option("--sparsity", min=0.0, max=1.0, help="Share of zeros; repeat for several.")
    ] = _SPARSITIES,
    pattern: Annotated[sparse.Pattern, typer.Option(help="Zeros in blocks of four inputs, or single ones.")] = "1x4",
    weights: Annotated[sparse.Weights, typer.Option(help="What the stored weights are.")] = "int8",
    threads: Annotated[Sizes, typer.Option(min=1, help="Threads; repeat for several.")] = _THREADS,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with curves to this file too.")] = None,
) -> None:
    """Time the sparse linear layer in both orders of its weight, and tell from which sparsity on it pays."""
    name, rival = ("sparse_int8_linear", "int8_linear") if weights == "int8" else ("sparse_linear", bench.EAGER)
    layers = list(product(m, k, n))
    chosen = [s for layer in layers for part in sparsity for s in sparse.samples(*layer, part, pattern, weights)]
    rows = _bench(name, chosen, threads, json)
    each = len(chosen) // len(layers)
    courses = [
        sparse.course(layer, rival, sparsity, rows[i * each : (i + 1) * each])
        for i, (_, layer) in enumerate(product(threads, layers))
    ]
    for c in courses:
        orders = ", ".join(f"{part:g}: {order}" for part, order in zip(c.sparsities, c.orders, strict=True))
        where = f"m={c.m} k={c.k} n={c.n}, threads: {c.threads}"
        typer.echo(f"{where}: {sparse.verdict(c.points, rival)}; faster order at {orders}")
    if html is not None:
        html.write_text(sparse_view.page(f"{name}, zeros: {pattern}", courses), encoding="utf-8")
        typer.echo(f"Written: {html}")


def _bench(
    name: str, samples: list[Sample], threads: Iterable[int], path: Path | None, memory: bool = False
) -> list[bench.BenchRow]:
    console = Console()
    measured, rows, peaks = [], [], []
    for count in threads:
        limits = ceilings(count)
        found = bench.bench_op(OPS[name], samples, count, limits=limits)
        console.print(bench.table(f"{name} in milliseconds ({limits.isa}, threads: {count})", found))
        measured.append(limits)
        rows += found
        if memory:
            needed = bench_memory(OPS[name], samples, count)
            console.print(memory_table(f"peak memory of {name} (threads: {count})", needed))
            peaks += needed
    if path is not None:
        bench.Results(measured, rows, {}, peaks).save(path)
        console.print(Text(f"Written: {path}"))
    return rows


def _linear(m: int, k: int, n: int) -> Sample:
    from potstill.ops.int8_linear import pack, quantize_weight

    def make() -> dict[str, Any]:
        random = torch.Generator().manual_seed(0)
        weight, scale = quantize_weight(torch.randn(n, k, generator=random))
        x, bias = torch.randn(m, k, generator=random), torch.randn(n, generator=random)
        return {"x": x, "weight": pack(weight), "scale": scale, "bias": bias}

    return Sample(f"m={m} k={k} n={n}", make)


def _logits(rows: int, classes: int, temperature: float) -> Sample:
    make = partial(kd_samples.arguments, (rows, classes), temperature=temperature, alpha=0.7, ignored=0.0)
    return Sample(f"rows={rows} classes={classes} T={temperature:g}", make)


def _facts(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    table.add_column(style="dim")
    rows = {
        "potstill, torch, Python": f"{facts['potstill']}, {facts['torch']}, {facts['python']}",
        "system": facts["system"],
        "processor": facts["cpu"],
        "instruction set": f"{facts['isa']} (of {', '.join(facts['isas'])}; POTSTILL_ISA chooses)",
        "threads": f"{facts['threads']} (torch.set_num_threads changes it)",
        "OpenMP": ", ".join(facts["openmp"]) or "none found",
        "transparent huge pages": facts["huge_pages"],
        "GPU": ", ".join(facts["gpus"]) or "none that torch can use",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table
