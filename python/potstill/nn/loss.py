"""Distillation losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from potstill.ops.kd_loss import check_options, kd_loss


class KDLoss(nn.Module):
    """``alpha T^2 KL(softmax(teacher/T) || softmax(student/T)) + (1 - alpha) CE(student, target)`` in one fused pass.

    Hinton, Vinyals and Dean 2015. Student and teacher logits are [..., classes], target labels are [...]; rows with the
    label ``ignore_index`` count as absent. The defaults, ``temperature=1`` and ``alpha=1``, are the plain divergence
    from the teacher, which needs no target; ``label_smoothing`` and ``reduction`` are those of
    :class:`torch.nn.CrossEntropyLoss`, and "mean" divides by the rows that count (0 if there are none).

    Everything is computed in float32 also under autocast, and the result is float32. Float32 and bfloat16 logits on the
    CPU run compiled kernels; no temporary of the logits' size is made but the gradient, and none under
    :func:`torch.no_grad`. Float16 logits are widened first, since their gradient could vanish before it is scaled. No
    gradient flows to the teacher.

    Raises :class:`ValueError` for options, shapes or labels out of range.

    >>> loss = KDLoss(temperature=2.0, alpha=0.7)
    >>> loss
    KDLoss(temperature=2.0, alpha=0.7)
    >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> loss(student, teacher, torch.randint(10, (8,))).backward()
    >>> student.grad.shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 1.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_options(temperature, alpha, label_smoothing, reduction)
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """[..., classes], [..., classes], [...] -> [], or [...] without reduction."""
        if student.dtype == torch.float16:
            student = student.float()
        if teacher.dtype == torch.float16:
            teacher = teacher.float()
        need_grad = student.requires_grad and torch.is_grad_enabled()
        loss: Tensor = kd_loss(
            student,
            teacher,
            target,
            self.temperature,
            self.alpha,
            self.ignore_index,
            self.label_smoothing,
            self.reduction,
            need_grad,
        )[0]
        return loss

    def extra_repr(self) -> str:
        """The options that differ from ``ignore_index=-100, label_smoothing=0, reduction="mean"``."""
        text = f"temperature={self.temperature}, alpha={self.alpha}"
        if self.ignore_index != -100:
            text += f", ignore_index={self.ignore_index}"
        if self.label_smoothing:
            text += f", label_smoothing={self.label_smoothing}"
        return text if self.reduction == "mean" else text + f", reduction={self.reduction!r}"
