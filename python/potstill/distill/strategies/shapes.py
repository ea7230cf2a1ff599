"""What layers return, in a precision and in shapes that can be compared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """In float32, or in float64 if it was: squares and sums of half-precision numbers overflow or lose their digits."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x over its Euclidean norm along ``dim``; zeros, without a gradient, where that norm is 0.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    nothing = norm <= torch.finfo(x.dtype).tiny
    directions: Tensor = x.masked_fill(nothing, 0.0) / norm.masked_fill(nothing, 1.0)
    return directions


def positions(features: Tensor) -> Tensor:
    """[batch, width], [batch, tokens, width] or maps [batch, width, height, breadth] -> [batch, positions, width].

    >>> positions(torch.zeros(2, 5, 4, 3)).shape
    torch.Size([2, 12, 5])
    """
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    return features.unsqueeze(1) if features.dim() == 2 else features


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [..., height, width] of different sizes, both averaged down to the smaller height and the smaller width."""
    if a.dim() != 4 or b.dim() != 4 or a.shape[2:] == b.shape[2:]:
        return a, b
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)


def without_padding(features: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, tokens, ...] with zeros where ``mask`` [batch, tokens] is False."""
    if mask is None:
        return features
    return features.masked_fill(~mask.reshape(*mask.shape, *[1] * (features.dim() - 2)), 0.0)


def mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, tokens, ...] -> [batch, ...]: each example's mean over the tokens that count, 0 if none does.

    Each example counts alike, however long it is, so that micro-batches add up to their batch.

    >>> mean_over_tokens(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([2.])
    """
    if mask is None:
        return values.mean(1)
    count = mask.sum(1).clamp(min=1)
    return without_padding(values, mask).sum(1) / count.reshape(-1, *[1] * (values.dim() - 2))
