"""Measures of a student, made to be passed as ``validate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distill.batch import Batch, logits
from potstill.distill.loop import mode
from potstill.distill.strategies.shapes import widened
from potstill.nn import KDLoss

Metric = Callable[[nn.Module], dict[str, float]]
Rows = Callable[[Batch, Tensor], tuple[Tensor, ...]]  # the batch and the student's logits -> values of its rows


def accuracy(loader: Iterable[Any], *, ignore_index: int = -100) -> Metric:
    """The share of rows, from 0 to 1, in which the largest logit is the target's: ``{"accuracy": 0.97}``.

    What all metrics here have in common: ``loader`` yields what a training loader does, logits are [..., classes] and
    the target [...] of class numbers. Rows are counted over the whole loader, so batches may differ in size; those
    whose target is ``ignore_index`` count for nothing. Batches go to the device of the student's first parameter; the
    student is run in evaluation mode without gradients, and is afterwards as it was. Raises :class:`ValueError` for
    other shapes and where no row counts.

    >>> loader = [(torch.eye(3), torch.tensor([0, 1, 0])), (torch.eye(3)[:1], torch.tensor([0]))]
    >>> accuracy(loader)(nn.Identity())
    {'accuracy': 0.75}
    """

    def rows(batch: Batch, student: Tensor) -> tuple[Tensor, ...]:
        return (student.argmax(-1) == batch.target,)

    def measure(student: nn.Module) -> dict[str, float]:
        (share,) = _means("accuracy", student, loader, ignore_index, rows)
        return {"accuracy": share}

    return measure


def agreement(loader: Iterable[Any], teacher: nn.Module, *, ignore_index: int = -100) -> Metric:
    """How near the student is to its ``teacher``: ``{"agreement": 0.98, "kl": 0.05}``.

    "agreement" is the share of rows in which both have their largest logit at the same class, "kl" the mean of
    KL(teacher || student) in nats, at temperature 1. The labels matter only where they are ``ignore_index``. The
    teacher is on the student's device. Otherwise as :func:`accuracy`.

    >>> loader = [(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))]
    >>> agreement(loader, nn.Identity())(nn.Softmax(-1))["agreement"]
    1.0
    """
    divergence = KDLoss(reduction="none")

    def rows(batch: Batch, student: Tensor) -> tuple[Tensor, ...]:
        with mode(teacher, training=False):
            known = logits(batch.feed(teacher), "teacher")
        if known.shape != student.shape:
            raise ValueError(
                f"agreement: the teacher's logits have shape {list(known.shape)}, the student's {list(student.shape)}; "
                "they must be the same"
            )
        return student.argmax(-1) == known.argmax(-1), divergence(student, known)

    def measure(student: nn.Module) -> dict[str, float]:
        share, kl = _means("agreement", student, loader, ignore_index, rows)
        return {"agreement": share, "kl": kl}

    return measure


def perplexity(loader: Iterable[Any], *, ignore_index: int = -100) -> Metric:
    """The exponential of the mean cross-entropy with the target: ``{"perplexity": 17.3}``; 1 is perfect.

    The target stands at the position that predicts it: a causal model's loader yields tokens as inputs and, as target,
    the tokens moved by one. Otherwise as :func:`accuracy`.

    >>> loader = [(torch.zeros(2, 5, 8), torch.randint(8, (2, 5)))]  # as likely as any of 8 tokens
    >>> round(perplexity(loader)(nn.Identity())["perplexity"], 4)
    8.0
    """

    def measure(student: nn.Module) -> dict[str, float]:
        nats = _cross_entropy("perplexity", student, loader, ignore_index)
        return {"perplexity": float(torch.tensor(nats, dtype=torch.float64).exp())}  # math.exp raises where it is inf

    return measure


def bits_per_token(loader: Iterable[Any], *, ignore_index: int = -100) -> Metric:
    """The mean cross-entropy with the target in bits: ``{"bits_per_token": 4.1}``, the logarithm of the perplexity.

    >>> loader = [(torch.zeros(2, 5, 8), torch.randint(8, (2, 5)))]
    >>> round(bits_per_token(loader)(nn.Identity())["bits_per_token"], 4)
    3.0
    """

    def measure(student: nn.Module) -> dict[str, float]:
        return {"bits_per_token": _cross_entropy("bits_per_token", student, loader, ignore_index) / math.log(2.0)}

    return measure


def _cross_entropy(name: str, student: nn.Module, loader: Iterable[Any], ignore_index: int) -> float:
    def rows(batch: Batch, found: Tensor) -> tuple[Tensor, ...]:
        flat, target = widened(found).reshape(-1, found.shape[-1]), batch.target.flatten()
        values = F.cross_entropy(flat, target, ignore_index=ignore_index, reduction="none")
        return (values.view(batch.target.shape),)

    (nats,) = _means(name, student, loader, ignore_index, rows)
    return nats


def _means(name: str, student: nn.Module, loader: Iterable[Any], ignore_index: int, rows: Rows) -> list[float]:
    # Sums in float64 over all rows, divided once: a mean of the batches' means would give small batches too much.
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    sums: list[float] = []
    counted = 0
    with torch.no_grad(), mode(student, training=False):
        for item in loader:
            batch = Batch.of(item).to(device)
            found = logits(batch.feed(student), "student")
            _check(name, found, batch.target)
            kept = batch.target != ignore_index
            parts = [float(values[kept].cpu().double().sum()) for values in rows(batch, found)]
            sums = [a + b for a, b in zip(sums or [0.0] * len(parts), parts, strict=True)]
            counted += int(kept.sum())
    if not counted:
        raise ValueError(
            f"{name}: the loader yielded no row that counts; it must not be empty, not all targets {ignore_index}, and "
            "iterable again for every measurement (a DataLoader or a list, not an iterator)"
        )
    return [total / counted for total in sums]


def _check(name: str, found: Tensor, target: Tensor) -> None:
    if not found.dim() or found.shape[:-1] != target.shape or target.is_floating_point():
        raise ValueError(
            f"{name}: the student's logits have shape {list(found.shape)} and the target {list(target.shape)} of "
            f"{target.dtype}; expected [..., classes] and [...] of class numbers"
        )
