"""Plain training on the labels: the baseline that a distilled student has to beat."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from potstill.distill.batch import Outputs
from potstill.distill.strategies.shapes import widened
from potstill.distill.strategies.strategy import Strategy, register


@register("hard_labels")
class HardLabels(Strategy):
    """Cross-entropy with the target; needs no teacher.

    Logits [..., classes], target [...] of class numbers; rows whose target is ``ignore_index`` count for nothing.

    >>> HardLabels(label_smoothing=0.1)
    HardLabels(ignore_index=-100, label_smoothing=0.1)
    """

    needs_teacher = False

    def __init__(self, *, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Outputs) -> Tensor:
        """The mean over the valid rows."""
        logits = widened(outputs.student_logits)
        return F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            outputs.target.flatten(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
