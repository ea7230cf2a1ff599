"""Arguments, the exact results and the comparison with them, for the tests of linear_kd_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.nn import LinearKDLoss
from potstill.ops import linear_kd_loss
from potstill.ops.kd_loss import divisor, row_losses
from potstill.ops.linear_kd_chunks import Arguments

LEAVES = ("student", "weight", "bias")
DISTIL: dict[str, Any] = {"temperature": 2.0, "alpha": 0.6}


def exact(a: dict[str, Any]) -> list[Tensor | None]:
    """Loss and gradients by autograd through whole float64 logits."""
    x: dict[str, Any] = {
        n: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in a.items()
    }
    leaves = [x[name].requires_grad_() if x[name] is not None else None for name in LEAVES]
    o = Arguments(**x).options()
    teacher = x["teacher"]
    if x["teacher_weight"] is not None:
        teacher = F.linear(teacher, x["teacher_weight"], x["teacher_bias"])
    rows = row_losses(F.linear(*leaves), teacher, o)
    loss = rows.sum() / divisor(rows.numel(), o)
    loss.backward()
    return [loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def by_autograd(a: dict[str, Any], function: Callable[..., Any] = linear_kd_loss) -> list[Tensor | None]:
    """Loss and gradients as a training step gets them."""
    leaves = {name: a[name].detach().requires_grad_() for name in LEAVES if a[name] is not None}
    result = function(**(a | leaves))
    loss: Tensor = result if isinstance(result, Tensor) else result[0]
    loss.backward()
    return [loss.detach(), *(leaves[name].grad if name in leaves else None for name in LEAVES)]


def check(a: dict[str, Any], given_: list[Tensor | None], rounding: float = 4e-6) -> None:
    """Errors by ``rounding`` of the largest number, and by what float32 leaves of a difference of probabilities.

    A logit's gradient is such a difference times T at most, times the row's factor; the others are products with it.
    """
    expected = exact(a)
    o = Arguments(**a).options()
    row = 1.0 if a["row_weight"] is None or a["row_weight"].numel() == 0 else max(1.0, float(a["row_weight"].max()))
    unit = 4e-6 * max(1.0, a["temperature"]) * row / float(divisor(a["student"][..., 0].numel(), o))
    counted = a["student"][torch.isfinite(a["student"])]
    largest = {"student": float(a["weight"].abs().max()), "bias": 1.0}
    largest["weight"] = float(counted.abs().max()) if counted.numel() else 0.0
    for what, g, e in zip(("loss", *LEAVES), given_, expected, strict=True):
        if e is None or e.numel() == 0:
            assert g is None or g.numel() == 0, what
            continue
        assert g is not None, what
        assert g.shape == e.shape
        assert what == "loss" or g.dtype == a[what].dtype
        if what == "loss":
            limit = 4e-6 * max(float(e.abs()), a["temperature"] ** 2)
        else:
            limit = rounding * float(e.abs().max()) + unit * largest[what]
        error = float((g.double() - e).abs().max())
        assert error <= limit, f"{what}: {error:.1e} > {limit:.1e}"


def head_of(a: dict[str, Any]) -> nn.Linear:
    classes, features = a["teacher_weight"].shape
    head = nn.Linear(features, classes, bias=a["teacher_bias"] is not None)
    with torch.no_grad():
        head.weight.copy_(a["teacher_weight"])
        if a["teacher_bias"] is not None:
            head.bias.copy_(a["teacher_bias"])
    return head


def as_module(loss: LinearKDLoss, head: Tensor | nn.Module) -> Callable[..., Tensor]:
    def call(**a: Any) -> Tensor:
        teacher_bias = a["teacher_bias"] if isinstance(head, Tensor) else None
        value: Tensor = loss(a["student"], a["weight"], a["teacher"], head, a["target"], a["bias"], teacher_bias)
        return value

    return call
