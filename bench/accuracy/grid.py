"""Prunes copies of a dense model in many ways, and measures each at once and after a short distillation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill import Prune, prune_
from potstill.distill import Distiller, SoftTargets, TrainingPlan


@dataclass(frozen=True)
class Subject:
    """A trained model, the batches that criteria see, those it learns from again, and how it is judged."""

    dense: nn.Module
    data: Sequence[Any]
    batches: Any
    loss: Callable[[nn.Module, Any], Tensor]
    judge: Callable[[nn.Module], float]
    exclude: str
    steps: int
    lr: float
    seed: int


def configs(criteria: Sequence[str], percents: Sequence[int], seed: int) -> Iterator[Prune]:
    """Every criterion with every pattern at every sparsity, and 2:4."""
    for criterion in criteria:
        for pattern in ("unstructured", "1x4"):
            for percent in percents:
                yield Prune(percent / 100, pattern=pattern, criterion=criterion, seed=seed)
        yield Prune(pattern="2:4", criterion=criterion, seed=seed)


def measure(subject: Subject, config: Prune) -> dict[str, Any]:
    """The row of a config: the metric of the pruned model, and after it has learned from the dense one."""
    model = copy.deepcopy(subject.dense)
    report = prune_(model, config, subject.data, loss=lambda item: subject.loss(model, item), exclude=subject.exclude)
    pruned = judged(subject, model)
    plan = TrainingPlan(steps=subject.steps, lr=subject.lr, warmup=0.05, seed=subject.seed)
    Distiller(subject.dense, model, SoftTargets(1.0, alpha=0.9)).fit(subject.batches, plan, quiet=True)
    return {
        "criterion": config.chosen_criterion.name,
        "pattern": config.pattern,
        "percent": round(100 * config.share),
        "seed": subject.seed,
        "sparsity": report.sparsity,
        "pruned": pruned,
        "distilled": judged(subject, model),
    }


def judged(subject: Subject, model: nn.Module) -> float:
    """The metric of a model in eval mode."""
    model.eval()
    with torch.no_grad():
        return subject.judge(model)
