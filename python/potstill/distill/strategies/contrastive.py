"""The student tells apart what the teacher tells apart (Tian, Krishnan and Isola 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distill.batch import Outputs
from potstill.distill.features import Patterns
from potstill.distill.strategies.layers import LayerStrategy, token_mask
from potstill.distill.strategies.logits import check_positive
from potstill.distill.strategies.shapes import mean_over_tokens, positions, unit
from potstill.distill.strategies.strategy import register


@register("contrastive")
class Contrastive(LayerStrategy):
    """Contrastive: an example's embedding by the student is nearer to its own by the teacher than to any other's.

    With s_i and t_i the two layers' outputs for example i, averaged over the positions, mapped linearly to ``width``
    numbers and scaled to length 1: the mean over i of - ln (exp(s_i·t_i/T) / (exp(s_i·t_i/T) + sum over the negatives j
    of i of exp(s_i·t_j/T))). Both maps are trained with the student.

    This is not the paper's estimator. There the negatives are thousands of examples, drawn from a memory buffer of
    embeddings of the whole data set, which needs each example's index, and each is told from the positive on its own.
    Here the negatives are the other examples of the batch and the loss is a cross-entropy over them (InfoNCE):
    nothing to store and no index, but batches should be large. As in the paper, examples of the same label are no
    negatives, where the target is one number [batch] per example; ``ignore_index`` is no label.

    Layers return [batch, features], [batch, tokens, features] (padded tokens, ``attention_mask`` 0, are left out of the
    mean) or [batch, channels, height, width], not necessarily both the same; Distiller's ``sample`` tells their widths.
    The examples of a batch are related to each other: with gradient accumulation the term sees micro-batches, and its
    gradient is not that of one large batch.
    Tian et al. 2020, "Contrastive representation distillation", section 3.

    >>> from potstill.distill import Distiller, TrainingPlan
    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
    >>> run = Distiller(teacher, student, Contrastive("1"), sample=batch)
    >>> losses = run.fit([batch] * 20, TrainingPlan(epochs=1)).losses
    >>> losses[-1] < losses[0]
    True
    """

    needs_sample = True
    same_rank = False

    def __init__(
        self, student: Patterns, teacher: Patterns | None = None, *, width: int = 128, temperature: float = 0.1
    ) -> None:
        super().__init__(student, teacher)
        if width < 1:
            raise ValueError(f"Contrastive: width is {width}; expected at least 1")
        check_positive("Contrastive", temperature=temperature)
        self.width = width
        self.temperature = temperature
        self.student_heads = nn.ModuleList()
        self.teacher_heads = nn.ModuleList()

    def prepare(self, outputs: Outputs) -> None:
        """Makes the projection heads."""
        pairs = [(positions(s), positions(t)) for s, t in self.features(outputs)]
        self.student_heads = nn.ModuleList(self._head(s) for s, _ in pairs)
        self.teacher_heads = nn.ModuleList(self._head(t) for _, t in pairs)

    def compare(self, student: Tensor, teacher: Tensor, outputs: Outputs, pair: int) -> Tensor:
        """The mean over the examples."""
        own = unit(self.student_heads[pair](_pooled(student, outputs)))
        other = unit(self.teacher_heads[pair](_pooled(teacher, outputs)))
        scores = (own @ other.T / self.temperature).masked_fill(self._same_label(outputs.target), -math.inf)
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().config(), "width": self.width, "temperature": self.temperature}

    def _head(self, features: Tensor) -> nn.Module:
        return nn.Linear(features.shape[-1], self.width, device=features.device, dtype=features.dtype)

    def _same_label(self, target: Tensor) -> Tensor:
        """[batch, batch]: True where two different examples have the same label."""
        different = ~torch.eye(len(target), dtype=torch.bool, device=target.device)
        if target.dim() != 1 or target.is_floating_point():
            return torch.zeros_like(different)
        labelled = (target != self.ignore_index).unsqueeze(1)
        return different & labelled & (target.unsqueeze(1) == target)


def _pooled(features: Tensor, outputs: Outputs) -> Tensor:
    """[batch, ...] -> [batch, features], the mean over the positions."""
    found, mask = positions(features), token_mask(outputs, features)
    return found.mean(1) if mask is None else mean_over_tokens(found, mask)
