"""Finds the modules of transformers whose place :class:`nn.LinearAddNorm` can take."""

from __future__ import annotations

import inspect

from torch import nn

from potstill.nn import Int8Linear, Int8LinearPart, LinearAddNorm, SparseLinear
from potstill.transform.eligible import why_not_plain


def linear_add_norm(module: nn.Module) -> LinearAddNorm | None:
    """The form of ``module`` with its parts; None if it is no ``LayerNorm(dropout(dense(x)) + residual)``.

    Such modules are known by their parts, package and arguments; :func:`fuse_` compares what the model computes.
    """
    parts = ("dense", "LayerNorm", "dropout")
    dense, norm, dropout = (module._modules.get(name) for name in parts)
    if not isinstance(dense, Int8Linear | SparseLinear) or isinstance(dense, Int8LinearPart):
        return None
    if not (type(norm) is nn.LayerNorm and type(dropout) is nn.Dropout):
        return None
    known = type(module).__module__.startswith("transformers.")
    if not known or list(inspect.signature(module.forward).parameters) != ["hidden_states", "input_tensor"]:
        return None
    if why_not_plain(module, type(module), (), parts) or why_not_plain(norm, nn.LayerNorm, ("weight", "bias")):
        return None
    if norm.normalized_shape != (dense.out_features,):
        return None
    return LinearAddNorm(dense, norm, dropout).train(module.training)
