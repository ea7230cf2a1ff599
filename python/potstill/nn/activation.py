"""What stays in the place of an activation that a layer before it has taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from potstill.ops.activation import ACTIVATIONS, check_activation


class FusedActivation(nn.Module):
    """Returns its input: the linear layer before it applies ``activation`` already.

    Raises :class:`ValueError` for an unknown activation.

    >>> FusedActivation("gelu")
    FusedActivation('gelu')
    """

    kind = "fused_activation"

    def __init__(self, activation: str) -> None:
        super().__init__()
        check_activation("FusedActivation", activation)
        self.activation = activation

    @staticmethod
    def float_config(module: nn.Module) -> dict[str, Any] | None:
        """What an activation says of the :meth:`config` of what stands for it; None for any other module."""
        name = activation_name(module)
        return None if name is None else {"activation": name}

    @classmethod
    def of(cls, module: nn.Module, activation: str) -> Self:
        """In the mode (training or not) of the ``module`` that it replaces."""
        return cls(activation).train(module.training)

    def config(self) -> dict[str, Any]:
        """The arguments that build it again."""
        return {"activation": self.activation}

    def forward(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x

    def extra_repr(self) -> str:
        """The activation's name."""
        return repr(self.activation)


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name in :data:`ops.activation.ACTIVATIONS` of what ``activation`` computes; None if it is none of them.

    Functions and modules are known by what they do to a row of numbers, since every library has its own for the same
    few; of modules only those without parameters, buffers, children and hooks count.

    >>> activation_name(nn.GELU(approximate="tanh")), activation_name(torch.relu), activation_name(nn.Sigmoid())
    ('gelu_tanh', 'relu', None)
    """
    if isinstance(activation, nn.Module) and not _is_plain(activation):
        return None
    probe = torch.linspace(-10.0, 10.0, 201, device="cpu")
    try:
        with torch.no_grad():
            result = activation(probe.clone())
    except Exception:  # whatever something that is no activation makes of one tensor
        return None
    if not isinstance(result, Tensor) or result.shape != probe.shape or result.dtype != probe.dtype:
        return None
    for name, function in ACTIVATIONS.items():
        if name != "none" and torch.allclose(result, function(probe), rtol=1e-6, atol=2e-6):
            return name
    return None


def _is_plain(module: nn.Module) -> bool:
    state = vars(module)
    hooked = any(value for name, value in state.items() if name.endswith("_hooks"))
    return not (module._parameters or module._buffers or module._modules or "forward" in state or hooked)
