"""The end of a transformer block: a linear layer, the residual and the normalisation of their sum."""

from __future__ import annotations

from torch import Tensor, nn

from potstill.nn.linear import Int8Linear
from potstill.nn.norm import AddLayerNorm
from potstill.nn.sparse import SparseLinear


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

    def __init__(self, dense: Int8Linear | SparseLinear, norm: nn.LayerNorm, dropout: nn.Dropout) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = AddLayerNorm.from_float(norm)
        self.dropout = dropout

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """[..., in_features], [..., out_features] -> [..., out_features]."""
        return self.LayerNorm(self.dropout(self.dense(hidden_states)), input_tensor)  # type: ignore[no-any-return]
