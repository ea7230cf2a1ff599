"""Which modules may be replaced by one of another kind without changing what the model does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from potstill.ops.op import Op


def why_not_plain(
    module: nn.Module, source: type[nn.Module], tensors: tuple[str, ...], parts: tuple[str, ...] = ()
) -> str:
    """Why ``module`` may behave or hold more than a fresh ``source`` with these parameters and submodules does."""
    if isinstance(module, LazyModuleMixin):
        return "not initialised yet: run the model once, then convert it"
    if parametrize.is_parametrized(module):
        return "is parametrised; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    if type(module) is not source:
        return f"{type(module).__name__} is a subclass of nn.{source.__name__} and may behave differently"
    state = vars(module)
    if "forward" in state:
        return "its forward is overridden on the instance"
    hooks = [name.strip("_") for name, value in state.items() if name.endswith("_hooks") and value]
    if hooks:
        return f"has {', '.join(hooks)}, which its replacement would lose"
    extra = [*module._parameters.keys() - set(tensors), *module._buffers, *module._modules.keys() - set(parts)]
    if extra:
        return f"holds more than {' and '.join(tensors + parts)}: {', '.join(sorted(extra))}"
    return ""


def why_not_weight(weight: Tensor, op: Op) -> str:
    """Why ``op`` cannot take the place of what is computed with this weight."""
    if weight.is_meta:
        return "its weight is on the meta device, without values"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if not weight.numel():
        return "has no weights"
    backend, why = op.backend(weight.device.type, weight.dtype)
    if backend != "kernel":
        return why
    if not bool(torch.isfinite(weight.detach()).all()):  # detach: an inference tensor may "require" a gradient
        return "weight has NaN or infinite values"
    return ""
