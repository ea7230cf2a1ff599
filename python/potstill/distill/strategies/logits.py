"""Checks of strategies that compare the two models' logits."""

from __future__ import annotations

import math

from torch import Tensor

from potstill.distill.batch import Outputs
from potstill.distill.strategies.shapes import widened


def check_positive(strategy: str, **values: float) -> None:
    """Raises :class:`ValueError` for a value that is not a positive number."""
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{strategy}: {name} is {value}; expected a positive number")


def check_weights(strategy: str, **weights: float) -> None:
    """Raises :class:`ValueError` unless all weights are at least 0 and one is more."""
    if not all(0.0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        given = " and ".join(f"{name} is {weight}" for name, weight in weights.items())
        raise ValueError(f"{strategy}: {given}; expected numbers of at least 0, and one of them positive")


def both_logits(strategy: str, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's logits [..., classes], widened; no gradient flows to the teacher's.

    Raises :class:`ValueError` unless they have one shape, and the target has a number for each row.
    """
    student = widened(outputs.student_logits)
    teacher = widened(outputs.teacher_logits).detach().to(student.dtype)
    if student.shape != teacher.shape or outputs.target.shape != student.shape[:-1]:
        raise ValueError(
            f"{strategy}: the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)} and the "
            f"target is {list(outputs.target.shape)}; expected [..., classes] twice and [...]"
        )
    return student, teacher
