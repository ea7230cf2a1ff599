"""The student keeps the correlations of the teacher's outputs (Huang, You, Wang, Qian and Xu 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.distill.batch import Outputs
from potstill.distill.strategies.layers import full_precision
from potstill.distill.strategies.logits import both_logits, check_positive, check_weights
from potstill.distill.strategies.strategy import Strategy, register


@register("dist")
class DIST(Strategy):
    """Correlations instead of equality: a student that is much weaker than its teacher can match them.

    With Q = softmax(student/T) and P = softmax(teacher/T), both [rows, classes], and r Pearson's correlation:
    inter T² (1 - mean over rows of r(Q_i, P_i)) + intra T² (1 - mean over classes of r(Q_:c, P_:c)).

    Logits [..., classes], all finite, target [...]; rows whose target is ``ignore_index`` count for nothing. What is
    constant, such as all classes of a batch of one row, has no correlation and adds 0.
    The intra-class term relates the rows of a batch to each other: with gradient accumulation it sees micro-batches,
    and its gradient is not that of one large batch.
    Huang et al. 2022, "Knowledge distillation from a stronger teacher", equations 8 to 10.

    >>> from potstill.distill import Batch
    >>> logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0]])
    >>> outputs = Outputs(Batch((), {}, torch.tensor([1, 0])), student=logits + 5.0, teacher=logits)
    >>> bool(DIST(temperature=4.0)(outputs).abs() < 1e-5)
    True
    """

    def __init__(
        self, temperature: float = 1.0, *, inter: float = 1.0, intra: float = 1.0, ignore_index: int = -100
    ) -> None:
        super().__init__()
        check_positive("DIST", temperature=temperature)
        check_weights("DIST", inter=inter, intra=intra)
        self.temperature = temperature
        self.inter = inter
        self.intra = intra
        self.ignore_index = ignore_index

    def forward(self, outputs: Outputs) -> Tensor:
        """The mean over the valid rows, and over the classes."""
        with full_precision(outputs.target):
            student, teacher = both_logits("DIST", outputs)
            valid = outputs.target != self.ignore_index
            q = (student[valid] / self.temperature).softmax(-1)
            p = (teacher[valid] / self.temperature).softmax(-1)
            inter, intra = _distance(q, p, dim=1).mean(), _distance(q, p, dim=0).mean()
            return self.temperature**2 * (self.inter * inter + self.intra * intra)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "temperature": self.temperature,
            "inter": self.inter,
            "intra": self.intra,
            "ignore_index": self.ignore_index,
        }


def _distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
    (a, a_norm, a_constant), (b, b_norm, b_constant) = _centred(a, dim), _centred(b, dim)
    constant = a_constant | b_constant
    correlation = (a * b).sum(dim) / (a_norm * b_norm)
    return (1.0 - correlation).masked_fill(constant, 0.0)


def _centred(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    centred = x - x.mean(dim, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=dim)
    # Rounding leaves about eps |x| of a constant; dividing by that would make its gradient a large random number.
    constant = norm <= 8 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x.detach(), dim=dim)
    return centred, norm.masked_fill(constant, 1.0), constant
