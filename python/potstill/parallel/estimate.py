"""Memory and communication of the layouts of a model, by formulas, before anything is sent.

Sent, for n ranks and B bytes, by each of them (ring algorithms): all-reduce 2 (n-1)/n B; all-gather of B in all, and
reduce-scatter of B each, (n-1)/n B. So per step

- data: 2 (n-1)/n of the gradients' bytes;
- sharded data: of each block 2 (n-1)/n of its weights (gathered for forward and again for backward) and (n-1)/n of its
  gradients: 3 (n-1)/n where all are trained; of what is in no block the weights are gathered once. The stages of a
  pipeline do this for each micro-batch, and all-reduce the gradients of what is in no block;
- tensor: for each layer split by inputs 2 (n-1)/n of its output's bytes forward, and for each tensor that layers split
  by outputs read 2 (n-1)/n of its bytes backward: so two all-reduces forward and two backward for a block of
  attention and MLP;
- pipeline: the hidden state of a micro-batch to the next stage, and its gradient back: the bytes of the whole batch's
  hidden state, once on the first and last stage and twice between; with several stages on a rank for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from potstill.parallel.data import units
from potstill.parallel.layout import Layout
from potstill.parallel.tensor import find
from potstill.transform.observe import Sample, evaluating, run
from potstill.transform.swap import sites

if TYPE_CHECKING:
    from potstill.parallel.plan import Plan

_MICRO = 4  # micro-batches for each stage, if there are rows enough


@dataclass(frozen=True)
class Estimate:
    """Of one device, in bytes; what is ``sent`` is per step. ``idle`` is the share of time that a pipeline waits."""

    plan: Plan
    weights: float
    gradients: float
    optimizer: float
    activations: float
    sent: float
    idle: float

    @property
    def memory(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Sizes:
    """Bytes of parameters of a block, or of what is in no block: all, and those that are trained."""

    weights: float
    trained: float
    numbers: float


@dataclass(frozen=True)
class Measured:
    """Of a run on the sample, in bytes: what backward needs, and what a block hands to the next."""

    rows: int
    saved: float
    hidden: float


def estimates(model: nn.Module, world: int, batch: int, sample: Sample, optimizer_bytes: int = 8) -> list[Estimate]:
    """One for each layout of ``world`` devices that ``model`` and a ``batch`` of so many rows allow.

    Weights, gradients and optimiser count parameters; a sharding device also has one gathered block. Activations are
    measured on ``sample``, in eval mode, and taken as proportional to rows; that layers split by tensor keep smaller
    ones is not counted, so they are an upper bound there.
    """
    from potstill.parallel.plan import Plan, layouts

    measured = measure(model, sample)
    found: dict[int, Layout] = {}
    rows = []
    for data, tensor, pipeline in layouts(world):
        if batch % data or pipeline > max(len(units(model)), 1):
            continue
        if tensor not in found:
            found[tensor] = find(model, sample, Plan(tensor=tensor))
        if tensor > 1 and not found[tensor].splits:
            continue
        micro = _micro_batches(batch // data, pipeline)
        for shard in (False, True)[: 1 + (data > 1)]:
            plan = Plan(data, tensor, pipeline, shard, micro_batches=micro if pipeline > 1 else None)
            rows.append(estimate(model, plan, found[tensor], measured, batch, sample, optimizer_bytes))
    return rows


def _micro_batches(rows: int, pipeline: int) -> int:
    return max(m for m in range(1, min(rows, _MICRO * pipeline) + 1) if rows % m == 0)


def measure(model: nn.Module, sample: Sample) -> Measured:
    """Runs ``model`` once, with gradients, and counts."""
    kept: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    hidden: list[int] = []

    def save(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return x

    def note(_: nn.Module, __: Any, output: Any) -> None:
        hidden.extend(x.nbytes for x in tree_leaves(output)[:1] if isinstance(x, Tensor))

    held = []
    with ExitStack() as stack:
        for unit in units(model):
            stack.callback(unit.register_forward_hook(note).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(save, lambda x: x))
        held.append(_call(model, sample))
    rows = next((len(x) for x in tree_leaves(sample) if isinstance(x, Tensor) and x.dim()), 1)
    return Measured(rows, float(sum(kept.values())), float(max(hidden, default=0)))


def _call(model: nn.Module, sample: Sample) -> Any:
    if isinstance(sample, Tensor):
        return model(sample)
    return model(*sample) if isinstance(sample, tuple) else model(**sample)


def estimate(
    model: nn.Module,
    plan: Plan,
    layout: Layout,
    measured: Measured,
    batch: int,
    sample: Sample,
    optimizer_bytes: int = 8,
) -> Estimate:
    """Of one plan, whose ``layout`` says which layers are split."""
    n, stages, micro = plan.data * plan.sequence, plan.pipeline, plan.micro_batches or plan.pipeline
    *blocks, rest = _blocks(model, layout)
    if not (plan.shard and stages > 1):  # the stages of a pipeline shard blocks only
        blocks, rest = [*blocks, rest], Sizes(0.0, 0.0, 0.0)
    kept = 1 / n if plan.shard else 1.0
    weights, trained, numbers = (
        (sum(getattr(block, name) for block in blocks) * kept + getattr(rest, name)) / stages
        for name in ("weights", "trained", "numbers")
    )
    gathered = max((block.weights for block in blocks), default=0.0) if plan.shard else 0.0
    scale = batch / n / measured.rows
    over_data = (n - 1) / n * _averaged(blocks, rest, plan) / stages
    over_tensor = 2 * (plan.tensor - 1) / plan.tensor * scale * _reduced(model, layout, sample) / stages
    over_pipeline = _messages(plan) * measured.hidden * scale
    return Estimate(
        plan,
        weights + gathered,
        trained,
        optimizer_bytes * numbers,
        measured.saved * scale / stages,
        over_data + over_tensor + over_pipeline,
        (stages - 1) / (micro + stages - 1),
    )


def _messages(plan: Plan) -> int:
    """How often the rank that sends most passes a batch's hidden state, or its gradient, to another one."""
    if plan.pipeline == 1:
        return 0
    each = 2 * plan.stages_each
    return each - 1 if plan.pipeline == 2 else each  # of two ranks one has the first stage, the other the last


def _averaged(blocks: list[Sizes], rest: Sizes, plan: Plan) -> float:
    """Bytes that a replica gathers, reduces and scatters; each all-reduce counts twice."""
    if not plan.shard:
        return 2 * sum(block.trained for block in blocks)
    if plan.pipeline == 1:
        *blocks, root = blocks
        return sum(2 * block.weights + block.trained for block in blocks) + root.weights + root.trained
    micro = plan.micro_batches or plan.pipeline
    return micro * sum(2 * block.weights + block.trained for block in blocks) + 2 * rest.trained


def _blocks(model: nn.Module, layout: Layout) -> Iterator[Sizes]:
    """Of one rank of the tensor dimension: each block, and then what is in none."""
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    for module in (*units(model), model):
        weights = trained = numbers = 0.0
        for parameter in module.parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            owner, _, own = names[id(parameter)].rpartition(".")
            split = layout.splits.get(owner)
            whole = split is None or (split.how == "row" and own == "bias")
            size = parameter.nbytes / (1 if whole else layout.plan.tensor)
            weights += size
            trained += size * parameter.requires_grad
            numbers += size / parameter.element_size() * parameter.requires_grad
        yield Sizes(weights, trained, numbers)


def _reduced(model: nn.Module, layout: Layout, sample: Sample) -> float:
    """Bytes of what is all-reduced for the sample: outputs of rows, and gradients of what columns read."""
    if layout.plan.tensor == 1:
        return 0.0
    found = 0.0
    read: set[int] = set()

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            nonlocal found
            split = layout.splits[name]
            if split.how != "column":
                found += output.nbytes
            elif split.group not in read:
                read.add(split.group)
                found += args[0].nbytes

        return note

    with ExitStack() as stack:
        for site in sites(model, nn.Module):
            if site.names[0] in layout.splits:
                stack.callback(site.module.register_forward_hook(hook(site.names[0])).remove)
        run(model, sample)
    return found


def table(rows: list[Estimate], memory_per_device: int) -> str:
    """What :func:`estimates` found, for a terminal; in MB (10^6 bytes)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    drawn.add_column("plan")
    for title in ("weights", "gradients", "optimiser", "activations", "MB in all", "fits", "MB sent", "idle"):
        drawn.add_column(title, justify="right")
    for row in rows:
        sizes = (row.weights, row.gradients, row.optimizer, row.activations, row.memory)
        cells = [f"{size / 1e6:.1f}" for size in sizes]
        fits = "yes" if row.memory <= memory_per_device else "no"
        drawn.add_row(str(row.plan), *cells, fits, f"{row.sent / 1e6:.1f}", f"{row.idle:.0%}")
    console = Console(width=120, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
