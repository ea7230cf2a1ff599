"""Logits, labels and the comparison with the definition, for the tests of the distillation losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from potstill.nn import KDLoss
from potstill.ops.kd_loss import Options, row_losses


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels(rows: int, classes: int, ignored: int = 0) -> Tensor:
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    target[:ignored] = -100
    return target


def gradient_of(student: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = student.detach().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def options_of(loss: KDLoss, target: Tensor | None, **tensors: Any) -> Options:
    return Options(
        target=target,
        divergence=loss.divergence,
        beta=loss.beta,
        rest=loss.rest,
        temperature=loss.temperature,
        alpha=loss.alpha,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
        **tensors,
    )


def check(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    loss: KDLoss,
    tolerance: float = 2e-6,
    loss_tolerance: float = 2e-6,
    **tensors: Any,
) -> None:
    """Loss and gradient against autograd through the definition in float64."""
    exact = student.double().requires_grad_()
    rows = row_losses(exact, teacher.double(), options_of(loss, target, **tensors))
    expected = rows if loss.reduction == "none" else rows.sum()
    if loss.reduction == "mean":
        expected = expected / max(rows.numel() if target is None else int((target != loss.ignore_index).sum()), 1)
    expected.sum().backward()
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher, target, **tensors)
    value.sum().backward()
    assert value.dtype == torch.float32
    atol = loss_tolerance * loss.temperature**2
    torch.testing.assert_close(value.double(), expected.detach(), rtol=loss_tolerance, atol=atol)
    assert leaf.grad is not None
    assert exact.grad is not None
    assert leaf.grad.dtype == student.dtype
    # A gradient is a difference of probabilities, each at most q, times T at most; it is rounded like them.
    common = student.shape[-1] if "teacher_indices" in tensors else min(student.shape[-1], teacher.shape[-1])
    hottest = exact.detach()[..., :common] / min(loss.temperature, 1.0)
    q = float(hottest.softmax(-1).max()) if hottest.numel() else 0.0
    largest = max([q * max(loss.temperature, 1.0), *exact.grad.abs().flatten().tolist()])
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0.0, atol=tolerance * largest)
