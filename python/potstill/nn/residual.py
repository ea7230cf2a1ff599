"""The end of a transformer block: a linear layer, the residual and the normalisation of their sum."""

from __future__ import annotations

import inspect
from typing import Self

from torch import Tensor, nn

from potstill.nn.linear import Int8Linear
from potstill.nn.norm import AddLayerNorm

_PARTS = {"dense": Int8Linear, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}


class LinearAddNorm(nn.Module):
    """``LayerNorm(dropout(dense(x)) + residual)`` whose addition costs no pass of its own.

    It stands for the modules of BERT and its relatives in the transformers package that compute this; parts, names and
    ``state_dict`` are theirs. Input [..., in_features], residual and result [..., out_features].

    >>> import torch
    >>> dense, norm = Int8Linear.from_float(nn.Linear(32, 16)), nn.LayerNorm(16)
    >>> x, residual = torch.randn(4, 32), torch.randn(4, 16)
    >>> both = LinearAddNorm(dense, norm, nn.Dropout()).eval()
    >>> torch.allclose(both(x, residual), norm(dense(x) + residual), atol=1e-5)
    True
    """

    def __init__(self, dense: Int8Linear, norm: nn.LayerNorm, dropout: nn.Dropout) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = AddLayerNorm.from_float(norm)
        self.dropout = dropout

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The form of ``module`` that has its parts; None if it is none of those that it can stand for."""
        parts = dict(module.named_children())
        if {name: type(part) for name, part in parts.items()} != _PARTS:
            return None
        known = type(module).__module__.startswith("transformers.")
        if not known or list(inspect.signature(module.forward).parameters) != ["hidden_states", "input_tensor"]:
            return None
        dense, norm, dropout = parts["dense"], parts["LayerNorm"], parts["dropout"]
        assert isinstance(dense, Int8Linear)  # which _PARTS says, but not to mypy
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(dropout, nn.Dropout)
        if norm.normalized_shape != (dense.out_features,):
            return None
        return cls(dense, norm, dropout).train(module.training)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """[..., in_features], [..., out_features] -> [..., out_features]."""
        return self.LayerNorm(self.dropout(self.dense(hidden_states)), input_tensor)  # type: ignore[no-any-return]
