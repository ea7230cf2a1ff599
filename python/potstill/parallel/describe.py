"""Draws which layer of a model lives where."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from potstill.parallel.layout import Layout
from potstill.parallel.mesh import place
from potstill.parallel.state import owners, tensors
from potstill.parallel.styles import SplitLinear
from potstill.transform.table import text_table

_HALF = {"column": "outputs", "row": "inputs", "vocabulary": "rows"}


def table(model: nn.Module, layout: Layout) -> str:
    """One line for each layer that has parameters; layers whose names differ only in numbers share one."""
    plan = layout.plan
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, module in owners(model):
        if tensors(module):
            split = layout.splits.get(name)
            kind = module.kind_of_whole if isinstance(module, SplitLinear) else _class(module)
            how = f"1/{plan.tensor} of {_HALF[split.how]}" if split else "whole"
            cells = [kind, *([how] if plan.tensor > 1 else []), layout.reasons.get(name, "")]
            lines.setdefault((re.sub(r"\d+", "*", name), *cells), []).append(name)
    titles = ("times", "kind", f"on each of {plan.tensor}") if plan.tensor > 1 else ("times", "kind")
    rows = (
        ((pattern if len(names) > 1 else names[0]) or "(model)", str(len(names)), *cells)
        for (pattern, *cells), names in lines.items()
    )
    return text_table(titles, rows, _summary(layout))


def _class(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP").removeprefix("Replicate")


def _summary(layout: Layout) -> Iterator[str]:
    plan = layout.plan
    replicas = plan.data * plan.sequence
    if replicas > 1:
        what = "keeps its share of every parameter and gathers a block at a time" if plan.shard else "has all of this"
        yield f"{replicas} replicas, each with its rows of a batch; each {what}"
    for number, names in enumerate(layout.stages):
        yield f"stage {number + 1}: {', '.join(names)}"
    yield "ranks:"
    for rank in range(min(plan.devices, 16)):
        at = place(plan, rank)
        parts = [("stage", at.stage, plan.pipeline), ("rows", at.rows, plan.data)]
        parts += [("positions", at.positions, plan.sequence), ("share of layers", at.shard, plan.tensor)]
        yield f"  {rank}: " + (", ".join(f"{w} {i + 1} of {n}" for w, i, n in parts if n > 1) or "everything")
    if plan.devices > 16:
        yield f"  and so on to {plan.devices - 1}"
