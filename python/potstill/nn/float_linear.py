"""The float layers that compute ``x @ weight.t() + bias``, whatever their class keeps the weight as."""

from __future__ import annotations

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the layer of GPT and GPT-2 in the ``transformers`` package, whose weight is [inputs, outputs]."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def as_linear(module: nn.Module) -> nn.Linear | None:
    """The ``nn.Linear`` that computes what ``module`` does, or None; it shares the parameters' memory.

    >>> linear = nn.Linear(3, 2)
    >>> as_linear(linear) is linear, as_linear(nn.ReLU())
    (True, None)
    """
    if type(module) is nn.Linear:
        return module
    if not is_conv1d(module):
        return None
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=False)
    linear.bias = bias
    return linear.train(module.training)
