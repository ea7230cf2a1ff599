"""The student keeps the distances and angles between examples (Park, Kim, Lu and Cho 2019)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.distill.batch import Outputs
from potstill.distill.features import Patterns
from potstill.distill.strategies.layers import LayerStrategy, token_mask
from potstill.distill.strategies.logits import check_weights
from potstill.distill.strategies.shapes import unit, without_padding
from potstill.distill.strategies.strategy import register


@register("relational")
class Relational(LayerStrategy):
    """Relational knowledge: the shape of the cloud of examples, whatever its scale, rotation and width.

    With x_i the flattened output of a layer for example i, d_ij = |x_i - x_j| over the mean of all i ≠ j, a_ijk the
    cosine of the angle at j between x_i and x_k, and h Huber's loss (of threshold 1):
    distance * mean over i ≠ j of h(d_ij of the student, of the teacher) + angle * mean over distinct i, j, k of h(a_ijk
    of the student, of the teacher).

    Layers return features, tokens or maps, not necessarily both the same, best an embedding; no projection is needed.
    Padded tokens (``attention_mask`` 0) count as zeros. The angles take memory for batch² (batch + features) numbers.
    Fewer than 2 examples have no distance and fewer than 3 no angle: they add 0.
    The examples of a batch are related to each other: with gradient accumulation the term sees micro-batches, and its
    gradient is not that of one large batch.
    Park et al. 2019, "Relational knowledge distillation", equations 5 to 10.

    >>> from torch import nn
    >>> from potstill.distill import Distiller, TrainingPlan
    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
    >>> run = Distiller(teacher, student, Relational("1"))
    >>> losses = run.fit([batch] * 20, TrainingPlan(epochs=1)).losses
    >>> losses[-1] < losses[0]
    True
    """

    same_rank = False

    def __init__(
        self, student: Patterns, teacher: Patterns | None = None, *, distance: float = 1.0, angle: float = 2.0
    ) -> None:
        super().__init__(student, teacher)
        check_weights("Relational", distance=distance, angle=angle)
        self.distance = distance
        self.angle = angle

    def compare(self, student: Tensor, teacher: Tensor, outputs: Outputs, pair: int) -> Tensor:
        """The mean over all pairs of examples, and over all triples."""
        own, other = (without_padding(x, token_mask(outputs, x)).flatten(1) for x in (student, teacher))
        n = len(own)
        # The sums are over all i, j, k: where two of them are the same, student and teacher are too.
        term = self.distance * _huber(_distances(own), _distances(other)) / max(n * (n - 1), 1)
        if self.angle:
            term = term + self.angle * _huber(_angles(own), _angles(other)) / max(n * (n - 1) * (n - 2), 1)
        return term

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().config(), "distance": self.distance, "angle": self.angle}


def _huber(student: Tensor, teacher: Tensor) -> Tensor:
    return F.smooth_l1_loss(student, teacher, reduction="sum")


def _distances(x: Tensor) -> Tensor:
    # Not by |x|² + |y|² - 2 x·y, which loses the digits of small distances.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(len(x) * (len(x) - 1), 1)
    return distances / mean.masked_fill(mean == 0.0, 1.0)


def _angles(x: Tensor) -> Tensor:
    """[n, features] -> [j, i, k]."""
    directions = unit(x.unsqueeze(0) - x.unsqueeze(1))
    return directions @ directions.transpose(1, 2)
