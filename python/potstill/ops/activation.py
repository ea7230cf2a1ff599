"""The activations that linear layers may apply to their outputs before they are stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def _same(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _same,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
"""Each activation's definition by its name; the compiled kernels know the same names."""


def check_activation(op: str, activation: str) -> None:
    """Raises :class:`ValueError` for a name that is not in :data:`ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


def activation_gradient(activation: str, grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` times the derivative of the activation at ``x``, in closed form."""
    aten = torch.ops.aten
    if activation == "relu":
        result: Tensor = aten.threshold_backward(grad, x, 0)
    elif activation == "silu":
        result = aten.silu_backward(grad, x)
    elif activation in ("gelu", "gelu_tanh"):
        result = aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    else:
        result = grad
    return result
