"""Distillation losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from potstill.ops.kd_loss import Options, check_options, kd_loss

_BETA = {"jsd": 0.5, "dkd": 8.0}  # the symmetric one; that of Zhao et al. for most of their pairs


class DistillationLoss(nn.Module):
    """The options that losses from a teacher share, checked; :class:`KDLoss` explains them."""

    _op = "kd_loss"  # speaks in errors

    def __init__(
        self,
        temperature: float,
        alpha: float,
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
        divergence: str,
        beta: float | None,
        rest: str,
    ) -> None:
        super().__init__()
        if beta is not None and divergence not in _BETA:
            name = type(self).__name__
            raise ValueError(f"{name}: beta is {beta}, but {divergence} has none; only {' and '.join(_BETA)} have")
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.divergence = divergence
        self.beta = _BETA.get(divergence, 0.5) if beta is None else beta
        self.rest = rest
        check_options(Options(None, None, None, None, *self._options()), self._op)

    def _options(self) -> tuple[Any, ...]:
        # As the ops take them, after the tensors.
        return (
            self.divergence,
            self.beta,
            self.rest,
            self.temperature,
            self.alpha,
            self.ignore_index,
            self.label_smoothing,
            self.reduction,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults, after temperature and alpha."""
        text = f"temperature={self.temperature}, alpha={self.alpha}"
        if self.divergence != "forward_kl":
            text = f"divergence={self.divergence!r}, " + text
        if self.divergence in _BETA:
            text += f", beta={self.beta}"
        if self.rest != "tail":
            text += f", rest={self.rest!r}"
        if self.ignore_index != -100:
            text += f", ignore_index={self.ignore_index}"
        if self.label_smoothing:
            text += f", label_smoothing={self.label_smoothing}"
        return text if self.reduction == "mean" else text + f", reduction={self.reduction!r}"


def as_tensor(normalizer: Tensor | float | None, device: torch.device) -> Tensor | None:
    """A divisor as the ops take it."""
    if normalizer is None or isinstance(normalizer, Tensor):
        return normalizer
    return torch.tensor(float(normalizer), device=device)


class KDLoss(DistillationLoss):
    """``alpha D(teacher, student) + (1 - alpha) CE(student, target)`` in one fused pass, D at a temperature T.

    ``divergence`` chooses D: "forward_kl" (T^2 KL(teacher || student): Hinton, Vinyals and Dean 2015), "reverse_kl",
    "jsd" (the generalised Jensen-Shannon divergence of Agarwal et al. 2024, with ``beta`` the teacher's share, 0.5
    unless given), "tv" (total variation), "dkd" (decoupled: Zhao et al. 2022; ``beta`` weighs the classes that are not
    the label, 8 unless given), "soft_ce" (the forward KL plus the teacher's entropy) or "mse" (of the logits).
    docs/losses.md has each formula and says when to use it.

    Student and teacher logits are [..., classes], target labels [...]; rows with the label ``ignore_index`` count as
    absent. Where one side has more classes, D excludes the columns that the other lacks. The defaults,
    ``temperature=1`` and ``alpha=1``, are the plain divergence from the teacher, which needs no target (dkd does);
    ``label_smoothing`` and ``reduction`` are those of :class:`torch.nn.CrossEntropyLoss`, and "mean" divides by the
    rows that count (0 if there are none).

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
        divergence: str = "forward_kl",
        beta: float | None = None,
        rest: str = "tail",
    ) -> None:
        super().__init__(temperature, alpha, ignore_index, label_smoothing, reduction, divergence, beta, rest)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        teacher_indices: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """[..., classes], [..., classes], [...] -> [], or [...] without reduction.

        With ``teacher_indices`` [..., k] the teacher is known by its k likeliest classes, and ``teacher`` has their
        log-probabilities at this temperature, as :func:`potstill.ops.top_k` makes them; ``rest`` says what is assumed
        of the other classes ("tail": one class of all; "renormalize"; "partial"; see docs/losses.md).

        ``row_weight`` [...] multiplies each row's loss. ``normalizer`` replaces the number of rows that a mean is
        divided by: with the number of valid rows of the whole batch, over all micro-batches and processes, the parts'
        losses and gradients add up to the whole batch's (where gradients are averaged over processes, as DDP does,
        multiply it by 1 / their number).
        """
        if student.dtype == torch.float16:
            student = student.float()
        if teacher.dtype == torch.float16:
            teacher = teacher.float()
        need_grad = student.requires_grad and torch.is_grad_enabled()
        by = as_tensor(normalizer, student.device)
        tensors = (student, teacher, target, teacher_indices, row_weight, by)
        loss: Tensor = kd_loss(*tensors, *self._options(), need_grad)[0]
        return loss
