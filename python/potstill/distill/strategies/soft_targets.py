"""The student learns the teacher's softened output distribution (Hinton, Vinyals and Dean 2015)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from potstill.distill.batch import Outputs, TopK
from potstill.distill.strategies.strategy import Strategy, register
from potstill.nn import KDLoss


@register("soft_targets")
class SoftTargets(Strategy):
    """alpha T² KL(teacher || student) at temperature T, plus (1 - alpha) times the cross-entropy with the target.

    Logits [..., classes] of both models, target [...] of class numbers; rows whose target is ``ignore_index`` count for
    nothing. The loss is :class:`potstill.nn.KDLoss`: fused, forward and gradient in one; ``divergence`` and ``beta``
    put another divergence in the KL's place, as it explains.

    A teacher whose k likeliest classes were cached (:class:`TopK`) serves as well; ``rest`` says what is assumed of the
    others ("tail", "renormalize" or "partial": see docs/losses.md). It has to be cached at this temperature, except for
    "renormalize", which needs only the differences of its log-probabilities; otherwise :class:`ValueError` is raised.
    Hinton, Vinyals and Dean 2015, section 2.

    >>> import torch
    >>> from potstill.distill import Batch
    >>> same = torch.tensor([[1.0, 2.0]])
    >>> outputs = Outputs(Batch((), {}, torch.tensor([0])), student=same, teacher=same)
    >>> bool(SoftTargets(temperature=2.0, alpha=1.0)(outputs).abs() < 1e-6)
    True
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.9,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        divergence: str = "forward_kl",
        beta: float | None = None,
        rest: str = "tail",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.divergence = divergence
        self.beta = beta
        self.rest = rest
        self._loss = KDLoss(
            temperature,
            alpha,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            divergence=divergence,
            beta=beta,
            rest=rest,
        )

    def forward(self, outputs: Outputs) -> Tensor:
        """The mean over the valid rows."""
        teacher, indices = outputs.teacher, None
        if isinstance(teacher, TopK):
            teacher, indices = self._log_probs(teacher), teacher.indices
        else:
            teacher = outputs.teacher_logits
        loss: Tensor = self._loss(outputs.student_logits, teacher, outputs.target, teacher_indices=indices)
        return loss

    def _log_probs(self, teacher: TopK) -> Tensor:
        if teacher.temperature == self.temperature:
            return teacher.log_probs
        if self.rest != "renormalize":
            raise ValueError(
                f"SoftTargets: temperature is {self.temperature}, but the teacher's likeliest classes were cached at "
                f"{teacher.temperature}, from which the share of all others cannot be told. Cache with "
                f"temperature={self.temperature}, or use rest='renormalize'"
            )
        # ln p_i is z_i / T but for a constant, which renormalising takes away.
        return (teacher.log_probs * (teacher.temperature / self.temperature)).log_softmax(-1)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        found: dict[str, Any] = {
            "temperature": self.temperature,
            "alpha": self.alpha,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }
        # Only where it is chosen: checkpoints of runs that could not choose must resume.
        if self.divergence != "forward_kl":
            found |= {"divergence": self.divergence, "beta": self.beta}
        if self.rest != "tail":
            found["rest"] = self.rest
        return found
