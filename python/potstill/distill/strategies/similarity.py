"""The student finds those examples alike that the teacher finds alike (Tung and Mori 2019)."""

from __future__ import annotations

from torch import Tensor

from potstill.distill.batch import Outputs
from potstill.distill.strategies.layers import LayerStrategy, token_mask
from potstill.distill.strategies.shapes import unit, without_padding
from potstill.distill.strategies.strategy import register


@register("similarity")
class Similarity(LayerStrategy):
    """Similarity-preserving: the activations of the examples of a batch, multiplied with each other.

    With A [batch, everything] the flattened output of a layer and G = A Aᵀ, each row over its norm: 1/batch² times the
    sum of (G_student - G_teacher)².

    Layers return features, tokens or maps, not necessarily both the same; no projection is needed. Padded tokens
    (``attention_mask`` 0) count as zeros.
    The examples of a batch are related to each other: with gradient accumulation the term sees micro-batches, and its
    gradient is not that of one large batch.
    Tung and Mori 2019, "Similarity-preserving knowledge distillation", equations 1 to 4.

    >>> import torch
    >>> from torch import nn
    >>> from potstill.distill import Distiller, TrainingPlan
    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
    >>> run = Distiller(teacher, student, Similarity("1"))
    >>> losses = run.fit([batch] * 20, TrainingPlan(epochs=1)).losses
    >>> losses[-1] < losses[0]
    True
    """

    same_rank = False

    def compare(self, student: Tensor, teacher: Tensor, outputs: Outputs, pair: int) -> Tensor:
        """The mean over all pairs of examples."""
        flat = (without_padding(x, token_mask(outputs, x)).flatten(1) for x in (student, teacher))
        own, other = (unit(x @ x.T) for x in flat)
        return (own - other).square().mean()
