"""One run of a model to look at it, and what is in it and comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from potstill.distill.loop import mode


@contextmanager
def calm(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without the encoder layers' fused path, which is one opaque operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mode(model, training=False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested mappings, tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
