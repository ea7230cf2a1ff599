"""Layouts of one model on many devices: whether they are right, what they send, and what large worlds would need.

    python bench/bench_parallel.py                 # two and four processes here; then worlds that are simulated
    python bench/bench_parallel.py --json bench/results/parallel.json

First every layout runs on 2 and on 4 CPU processes with gloo: its loss and gradients against those of one process, and
the bytes that the busiest rank sends in a step, counted, against the formula of ``potstill.parallel.estimate``. Then a
model is laid out over 8 to 1024 ranks of a process group that sends nothing: rank 0's bytes of parameters, counted, and
what the formulas say of memory and bytes sent; and from these an estimate, which nobody has measured, of a step on
nodes of eight H100s. Times of CPU processes that share two cores would say nothing, so none are given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from potstill.parallel import Plan
from potstill.parallel.estimate import Estimate, estimate, measure
from potstill.parallel.pipeline import Pipeline
from potstill.parallel.tensor import find
from wire import Wire

PLANS = {
    2: (
        "dp=2",
        "dp=2,shard",
        "tp=2",
        "pp=2,micro=4",
        "pp=2,micro=4,schedule=gpipe",
        "pp=2,micro=4,schedule=interleaved",
    ),
    4: ("dp=4,shard", "dp=2,tp=2", "dp=2,tp=2,shard", "tp=4", "pp=4,micro=8", "tp=2,pp=2,micro=4", "dp=2,pp=2,micro=4"),
}
SIMULATED = {
    8: ("dp=8", "dp=8,shard", "tp=8"),
    64: ("dp=64,shard", "dp=8,tp=8,shard", "tp=8,pp=8,micro=32"),
    256: ("dp=256,shard", "dp=32,tp=8,shard", "dp=8,tp=8,pp=4,micro=16"),
    1024: ("dp=1024,shard", "dp=128,tp=8,shard", "dp=32,tp=8,pp=4,micro=16"),
}
ROWS, LENGTH = 8, 16
NODE = 8  # devices that NVLink joins

# An H100 SXM by its data sheet: bfloat16 products, of which half are reached; NVLink one way; a 400 Gbit/s port each.
FLOPS, NVLINK, NETWORK = 0.5 * 989e12, 450e9, 50e9


@dataclass(frozen=True)
class Checked:
    """A layout on real processes: relative errors, and the bytes that the busiest rank sends in a step."""

    plan: str
    loss_error: float
    gradient_error: float
    sent: float
    formula: float


def model(hidden: int = 64, layers: int = 4, heads: int = 4) -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels."""
    random = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 1024, (ROWS, LENGTH), generator=random) for _ in range(2))
    return tokens, labels


def loss_of(output: Any, labels: Tensor) -> Tensor:
    """The mean over the tokens."""
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def step(plan: Plan) -> dict[str, Any]:
    """Loss, gradients by name, and the bytes that the busiest rank sends."""
    tokens, labels = batch()
    spread = plan.apply(model(), tokens[: plan.micro_batches or 2])
    x, y = plan.share((tokens, labels))
    parameters = list((spread.module if isinstance(spread, Pipeline) else spread).parameters())
    for _ in range(2):  # in the first step the ranks also tell each other what they will send
        for parameter in parameters:
            parameter.grad = None
        with Wire() as wire:
            if isinstance(spread, Pipeline):
                loss = torch.tensor(spread.step(x, y, loss_of))
            else:
                loss = loss_of(spread(x), y)
                loss.backward()
                loss = loss.detach()
    sent = torch.tensor(wire.sent)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    dist.all_reduce(loss)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    return {"loss": loss / dist.get_world_size(), "sent": float(sent), "gradients": plan.full_state_dict(spread)}


def run_rank(rank: int, world: int, folder: Path) -> None:
    """All layouts of a world, one after the other; the first rank writes what came of them."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / f'meeting {world}'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    found = {text: step(Plan.parse(text)) for text in PLANS[world]}
    if rank == 0:
        torch.save(found, folder / f"{world}.pt")
    dist.destroy_process_group()


def checked(world: int, folder: Path) -> list[Checked]:
    """Runs a world's processes."""
    command = [sys.executable, "-W", "ignore", __file__, "--folder", str(folder), "--world", str(world), "--rank"]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(world)]
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        raise SystemExit(f"bench_parallel: the ranks ended with {codes}; their own output says why")
    whole, (tokens, labels) = model(), batch()
    loss = loss_of(whole(tokens), labels)
    loss.backward()
    exact = {name: p.grad for name, p in whole.named_parameters()}
    found = torch.load(folder / f"{world}.pt")
    return [_compared(text, found[text], loss.detach(), exact) for text in PLANS[world]]


def _compared(text: str, found: dict[str, Any], loss: Tensor, exact: dict[str, Any]) -> Checked:
    norm = torch.stack([g.square().sum() for g in exact.values()]).sum().sqrt()
    errors = [(found["gradients"][name] - g).norm() / g.norm().maximum(1e-3 * norm) for name, g in exact.items()]
    formula = estimated(model(), Plan.parse(text), ROWS, batch()[0]).sent
    return Checked(text, float((found["loss"] / loss - 1).abs()), float(max(errors)), found["sent"], formula)


def estimated(whole: nn.Module, plan: Plan, rows: int, tokens: Tensor) -> Estimate:
    """By the formulas, for a batch of so many rows."""
    sample = tokens[:2]
    return estimate(whole, plan, find(whole, sample, Plan(tensor=plan.tensor)), measure(whole, sample), rows, sample)


def simulated(world: int, rows_each: int) -> list[dict[str, Any]]:
    """The layouts of a world that sends nothing; a replica has ``rows_each`` rows."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    found = []
    for text in SIMULATED[world]:
        plan, whole = Plan.parse(text), model(512, 8, 8)
        rows = rows_each * plan.data * (plan.micro_batches or 1)
        numbers = sum(p.numel() for p in whole.parameters())
        said = estimated(whole, plan, rows, batch()[0])
        spread = plan.apply(whole, batch()[0][: plan.micro_batches or 2].repeat(4, 1)[: plan.micro_batches or 2])
        part = spread.module if isinstance(spread, Pipeline) else spread
        held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in part.parameters())
        found.append(
            {
                "plan": text,
                "held": held,
                "memory": said.memory,
                "sent": said.sent,
                "seconds": h100_seconds(plan, 6.0 * numbers * rows * LENGTH, said),
            }
        )
    dist.destroy_process_group()
    return found


def h100_seconds(plan: Plan, flops: float, said: Estimate) -> float:
    """An estimate, not a measurement: products and messages one after the other, none hidden behind the other.

    All messages go by NVLink where there is one node, else by the network.
    """
    inside = plan.devices <= NODE
    return flops / plan.devices / FLOPS / (1.0 - said.idle) + said.sent / (NVLINK if inside else NETWORK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.world, options.folder)
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    real: dict[int, list[Checked]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in PLANS:
            real[world] = checked(world, Path(folder))
            console.print(_checked_table(world, real[world]))
    worlds = {world: simulated(world, 8) for world in SIMULATED}
    console.print(_simulated_table(worlds))
    if options.json is not None:
        record = {"processes": {w: [vars(c) for c in rows] for w, rows in real.items()}, "simulated": worlds}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    wrong = [c.plan for rows in real.values() for c in rows if c.loss_error > 1e-6 or c.gradient_error > 1e-6]
    wrong += [c.plan for rows in real.values() for c in rows if abs(c.sent / c.formula - 1) > 0.05]
    if wrong:
        raise SystemExit(f"bench_parallel: beyond 1e-6 of one process, or 5 % of the formula: {', '.join(wrong)}")


def _checked_table(world: int, rows: list[Checked]) -> Table:
    drawn = Table("plan", title=f"{world} processes: relative errors, and bytes that the busiest rank sends in a step")
    for heading in ("loss", "gradients", "kB sent", "by the formula", "ratio"):
        drawn.add_column(heading, justify="right")
    for c in rows:
        ratio = f"{c.sent / c.formula:.3f}"
        cells = (
            f"{c.loss_error:.1e}",
            f"{c.gradient_error:.1e}",
            f"{c.sent / 1e3:.1f}",
            f"{c.formula / 1e3:.1f}",
            ratio,
        )
        drawn.add_row(c.plan, *cells)
    return drawn


def _simulated_table(worlds: dict[int, list[dict[str, Any]]]) -> Table:
    drawn = Table("ranks", "plan", title="Simulated; the last column is an estimate that nobody has measured")
    for heading in ("MB of parameters held", "MB of memory", "MB sent", "ms on H100s, estimated"):
        drawn.add_column(heading, justify="right")
    for world, rows in worlds.items():
        for row in rows:
            cells = (f"{row[name] / 1e6:.2f}" for name in ("held", "memory", "sent"))
            drawn.add_row(str(world), row["plan"], *cells, f"{1e3 * row['seconds']:.3f}")
    return drawn


if __name__ == "__main__":
    main()
