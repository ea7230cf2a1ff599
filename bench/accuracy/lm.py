"""The language model of bytes of examples/distill_lm.py, smaller."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuracy.grid import Subject
from potstill.distill import Distiller, HardLabels, TrainingPlan

CRITERIA = ("magnitude", "wanda", "sparsegpt")
PERCENTS = (50, 60, 70, 80)
SIZE = (96, 3)  # width and depth
BATCH, LR = 8, 1e-3


def example(name: str) -> ModuleType:
    """A program of the folder examples, as a module."""
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def subject(seed: int, dense_steps: int, steps: int, windows: int, out: Path) -> Subject:
    """The model of a seed, trained or loaded from ``out``; its head is never pruned. Criteria see 8 batches."""
    language = example("distill_lm")
    train, held_out = language.texts()
    places = torch.linspace(0, len(held_out) - language.CONTEXT - 1, windows).long()
    judged = language.window(held_out, places)
    torch.manual_seed(seed)
    dense = language.ByteModel(*SIZE)
    out.mkdir(parents=True, exist_ok=True)
    batches = language.Windows(train, BATCH, dense_steps)
    plan = TrainingPlan(steps=dense_steps, lr=3e-3, warmup=0.05, seed=seed)
    Distiller(None, dense, HardLabels()).fit(
        batches, plan, checkpoint=out / f"lm-{seed}-{dense_steps}.pt", checkpoint_every=200, quiet=True
    )
    starts = torch.randint(len(train) - language.CONTEXT, (8, BATCH), generator=torch.Generator().manual_seed(seed))
    seen = [language.window(train, each) for each in starts]

    def loss(model: nn.Module, item: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(item[0]).flatten(0, 1), item[1].flatten())

    def bits(model: nn.Module) -> float:
        losses = [float(loss(model, (part[:, :-1], part[:, 1:]))) * len(part) for part in judged.split(32)]
        return sum(losses) / len(judged) / math.log(2)

    return Subject(
        dense.eval(),
        [(part[:, :-1], part[:, 1:]) for part in seen],
        language.Windows(train, BATCH, steps),
        loss,
        bits,
        exclude="head",
        steps=steps,
        lr=LR,
        seed=seed,
    )
