"""The student learns the teacher's logits up to their scale (Sun, Ren, Li, Wang and Cao 2024)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from potstill.distill.batch import Outputs
from potstill.distill.strategies.layers import full_precision
from potstill.distill.strategies.logits import both_logits
from potstill.distill.strategies.strategy import Strategy, register
from potstill.nn import KDLoss

_EPSILON = 1e-7  # the paper's: a row of equal logits has no deviation


@register("logit_standardisation")
class LogitStandardisation(Strategy):
    """Soft targets of standardised logits: a small student need not reach the magnitude of its teacher's.

    alpha T² KL(softmax(z(teacher)/T) || softmax(z(student)/T)) + (1 - alpha) CE(student, target), where z(x) is (x -
    mean(x)) / (std(x) + 1e-7) along the classes; the cross-entropy sees the logits as they are.

    Logits [..., classes] of at least 2 classes, all finite, target [...]; rows whose target is ``ignore_index`` count
    for nothing. The KL is the fused one of :class:`potstill.nn.KDLoss`.
    Sun et al. 2024, "Logit standardization in knowledge distillation", algorithm 1.

    >>> import torch
    >>> from potstill.distill import Batch
    >>> logits = torch.tensor([[1.0, 2.0, 0.0]])
    >>> outputs = Outputs(Batch((), {}, torch.tensor([1])), student=0.1 * logits + 3.0, teacher=logits)
    >>> bool(LogitStandardisation(alpha=1.0)(outputs).abs() < 1e-5)
    True
    """

    def __init__(self, temperature: float = 2.0, alpha: float = 0.9, *, ignore_index: int = -100) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = ignore_index
        KDLoss(temperature, alpha, ignore_index=ignore_index)  # checks them
        self._loss = KDLoss(temperature, ignore_index=ignore_index)

    def forward(self, outputs: Outputs) -> Tensor:
        """The mean over the valid rows."""
        with full_precision(outputs.target):
            student, teacher = both_logits("LogitStandardisation", outputs)
            soft: Tensor = self._loss(_standardised(student), _standardised(teacher), outputs.target)
            if self.alpha == 1.0:
                return soft
            classes = student.shape[-1]
            hard = F.cross_entropy(
                student.reshape(-1, classes), outputs.target.flatten(), ignore_index=self.ignore_index
            )
            return self.alpha * soft + (1.0 - self.alpha) * hard

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"temperature": self.temperature, "alpha": self.alpha, "ignore_index": self.ignore_index}


def _standardised(logits: Tensor) -> Tensor:
    if logits.shape[-1] < 2:
        raise ValueError("LogitStandardisation: the logits have 1 class, which has no deviation; expected at least 2")
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + _EPSILON)
