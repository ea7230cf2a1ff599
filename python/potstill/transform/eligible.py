"""Which linear layers may be replaced by a layer of another kind without changing what the model does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from potstill.nn import Int8Linear
from potstill.ops import int8_linear
from potstill.ops.int8_linear import MAX_FEATURES
from potstill.transform.swap import Site


def why_not(site: Site) -> str:
    """Why this layer cannot be converted whatever its speed; empty if it can."""
    module = site.module
    if isinstance(module, Int8Linear):
        return "already int8"
    if any(isinstance(a, nn.MultiheadAttention) and a.out_proj is module for a in site.ancestors):
        return "read by nn.MultiheadAttention, which never calls it"
    if isinstance(module, LazyModuleMixin):
        return "not initialised yet: run the model once, then convert it"
    if parametrize.is_parametrized(module):
        return "is parametrised; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear and may behave differently"
    return _why_not_plain(module) or _why_not_weight(module.weight)


def _why_not_plain(module: nn.Linear) -> str:
    state = vars(module)
    if "forward" in state:
        return "its forward is overridden on the instance"
    hooks = [name.strip("_") for name, value in state.items() if name.endswith("_hooks") and value]
    if hooks:
        return f"has {', '.join(hooks)}, which the int8 layer would lose"
    extra = [*module._parameters.keys() - {"weight", "bias"}, *module._buffers, *module._modules]
    if extra:
        return f"holds more than weight and bias: {', '.join(sorted(extra))}"
    return ""


def _why_not_weight(weight: Tensor) -> str:
    if weight.is_meta:
        return "its weight is on the meta device, without values"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if not weight.numel():
        return "has no weights"
    if weight.shape[1] > MAX_FEATURES:
        return f"has {weight.shape[1]} inputs; int8 sums are exact up to {MAX_FEATURES}"
    backend, why = int8_linear.backend(weight.device.type, weight.dtype)
    if backend != "kernel":
        return why
    if not bool(torch.isfinite(weight.detach()).all()):  # detach: an inference tensor may "require" a gradient
        return "weight has NaN or infinite values"
    return ""
