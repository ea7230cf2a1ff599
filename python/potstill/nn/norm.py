"""Layer normalisation that adds a residual on the way."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from potstill.ops.add_layer_norm import add_layer_norm


class AddLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, of ``x + residual`` if a residual is given.

    Input and residual [..., features] of any float dtypes; the result has the wider of the two. Parameters, names and
    numbers are those of ``nn.LayerNorm``, and all train; see :data:`ops.add_layer_norm`. Raises :class:`ValueError` if
    more than one dimension is normalised.

    >>> norm, x, residual = AddLayerNorm(64), torch.randn(8, 64), torch.randn(8, 64)
    >>> torch.allclose(norm(x, residual), nn.LayerNorm(64)(x + residual), atol=1e-6)
    True
    """

    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias)

    @classmethod
    def from_float(cls, norm: nn.LayerNorm) -> Self:
        """The same normalisation; the parameters are shared with ``norm``, not copied."""
        if len(norm.normalized_shape) != 1:
            raise ValueError(f"AddLayerNorm: norm has shape {norm.normalized_shape}, expected one dimension")
        layer = cls(norm.normalized_shape[0], norm.eps, elementwise_affine=False)
        layer.elementwise_affine = norm.elementwise_affine
        layer.weight, layer.bias = norm.weight, norm.bias
        return layer.train(norm.training)

    def to_float(self) -> nn.LayerNorm:
        """An ``nn.LayerNorm`` that shares the parameters."""
        norm = nn.LayerNorm(self.normalized_shape, self.eps, elementwise_affine=False)
        norm.elementwise_affine = self.elementwise_affine
        norm.weight, norm.bias = self.weight, self.bias
        return norm.train(self.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., features], [..., features] -> [..., features]."""
        if residual is not None and residual.dtype != input.dtype:
            dtype = torch.promote_types(input.dtype, residual.dtype)
            input, residual = input.to(dtype), residual.to(dtype)
        y: Tensor = add_layer_norm(input, residual, self.weight, self.bias, self.eps)
        return y
