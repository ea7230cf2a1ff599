"""Drop-in attention."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.nn.linear import Int8Linear
from potstill.ops.attention import attention, pays
from potstill.ops.int8_linear import PANEL, int8_linear

Shapes = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""The shapes that a mask may have, each with the one in which it broadcasts to the scores."""


class _NoFloatWeight:
    """Stands where torch's fused paths look for a float weight. They decline when an argument overrides functions."""

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        return NotImplemented


class Int8MultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` with int8 projections; see :class:`Int8Linear`.

    Arguments, shapes and results are those of ``nn.MultiheadAttention`` outside its fast path: masks, ``is_causal``,
    ``need_weights``, unbatched inputs, ``batch_first``, ``kdim`` and ``vdim``, ``add_bias_kv`` and ``add_zero_attn``.
    The attention itself stays in the float dtype of the input. If query, key and value are one tensor it is projected
    once, by one matrix. The layer is frozen; gradients flow to the inputs.

    Raises :class:`ValueError` for inputs or masks whose shapes do not agree, and for nested tensors.

    >>> attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    >>> fast = Int8MultiheadAttention.from_float(attention)
    >>> x = torch.randn(2, 10, 64)
    >>> y, weights = fast(x, x, x)
    >>> expected, _ = attention(x, x, x)
    >>> bool((y - expected).norm() < 0.03 * expected.norm()), weights.shape
    (True, torch.Size([2, 10, 10]))
    """

    kind = "int8_multihead_attention"
    # What nn.TransformerEncoder and its layers read before they take a fused path over float weights.
    in_proj_weight = _NoFloatWeight()
    in_proj_bias = None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"Int8MultiheadAttention: embed_dim is {embed_dim} and num_heads {num_heads}, expected a "
                "positive multiple of a positive number"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.add_zero_attn, self.batch_first = dropout, add_zero_attn, batch_first
        if self.kdim == self.vdim == embed_dim:
            self.in_proj = Int8Linear(embed_dim, 3 * embed_dim, bias)
        else:
            self.q_proj = Int8Linear(embed_dim, embed_dim, bias)
            self.k_proj = Int8Linear(self.kdim, embed_dim, bias)
            self.v_proj = Int8Linear(self.vdim, embed_dim, bias)
        self.out_proj = Int8Linear(embed_dim, embed_dim, bias)
        for name in ("bias_k", "bias_v"):
            zero = nn.Parameter(torch.zeros(1, 1, embed_dim), requires_grad=False) if add_bias_kv else None
            self.register_parameter(name, zero)

    @staticmethod
    def float_config(module: nn.Module) -> dict[str, Any] | None:
        """The :meth:`config` of the int8 form of ``module``, or None if it is no ``nn.MultiheadAttention``."""
        if type(module) is not nn.MultiheadAttention:
            return None
        return {
            "embed_dim": module.embed_dim,
            "num_heads": module.num_heads,
            "dropout": float(module.dropout),
            "bias": module.in_proj_bias is not None,
            "add_bias_kv": module.bias_k is not None,
            "add_zero_attn": module.add_zero_attn,
            "kdim": module.kdim,
            "vdim": module.vdim,
            "batch_first": module.batch_first,
        }

    @classmethod
    def from_float(cls, attention: nn.MultiheadAttention) -> Self:
        """The int8 form of ``attention``; the biases' memory is shared with it, not copied."""
        config = cls.float_config(attention)
        if config is None:
            raise ValueError(f"Int8MultiheadAttention: {type(attention).__name__} is no plain nn.MultiheadAttention")
        with torch.device("meta"):
            layer = cls(**config)
        bias = attention.in_proj_bias
        if attention.in_proj_weight is not None:
            layer.in_proj = _int8(attention.in_proj_weight, bias)
        else:
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                part = None if bias is None else bias.chunk(3)[i]
                setattr(layer, name, _int8(getattr(attention, f"{name}_weight"), part))
        layer.out_proj = Int8Linear.from_float(attention.out_proj)
        for name in ("bias_k", "bias_v"):
            if getattr(attention, name) is not None:
                setattr(layer, name, nn.Parameter(getattr(attention, name).detach(), requires_grad=False))
        return layer.train(attention.training)

    def to_float(self) -> nn.MultiheadAttention:
        """A float32 ``nn.MultiheadAttention`` with the dequantised weights and copies of the biases."""
        attention = nn.MultiheadAttention(**self.config(), device=self.out_proj.weight.device)
        projections = [p.to_float() for p in self._projections()]
        with torch.no_grad():
            if attention.in_proj_weight is not None:
                attention.in_proj_weight.copy_(projections[0].weight)
            else:
                for name, linear in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), projections, strict=True):
                    getattr(attention, name).copy_(linear.weight)
            if attention.in_proj_bias is not None:
                attention.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
            attention.out_proj.load_state_dict(self.out_proj.to_float().state_dict())
            if self.bias_k is not None:
                attention.bias_k.copy_(self.bias_k)  # type: ignore[union-attr]
                attention.bias_v.copy_(self.bias_v)  # type: ignore[union-attr,arg-type]
        return attention.train(self.training)

    def config(self) -> dict[str, Any]:
        """The arguments that build an empty layer of this shape."""
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "bias": self.out_proj.bias is not None,
            "add_bias_kv": self.bias_k is not None,
            "add_zero_attn": self.add_zero_attn,
            "kdim": self.kdim,
            "vdim": self.vdim,
            "batch_first": self.batch_first,
        }

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``: the attended values, and the weights or None."""
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("Int8MultiheadAttention: is_causal is a hint about attn_mask, which is None; give both")
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        keys = k.shape[2]
        k, v = self._extended(k, v)
        # Torch trusts the hint only where nothing else needs the mask itself.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged(attn_mask, key_padding_mask, (*q.shape[:3], keys), query.dtype)
        if mask is not None and k.shape[2] > keys:
            mask = F.pad(mask, (0, k.shape[2] - keys))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            y, weights = _attention_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        elif dropout == 0.0 and pays(q, k, v):
            y = attention(q, k, v, mask, None, causal)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = y.transpose(1, 2) if self.batch_first or query.dim() == 2 else y.permute(2, 0, 1, 3)
        y = self.out_proj(y.reshape(query.shape))
        return y, weights.squeeze(0) if weights is not None and query.dim() == 2 else weights

    def _projections(self) -> tuple[Int8Linear, ...]:
        if self.kdim == self.vdim == self.embed_dim:
            return (self.in_proj,)
        return self.q_proj, self.k_proj, self.v_proj

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        e = self.embed_dim
        if key is value:
            if query is key:
                return self.in_proj(query).chunk(3, dim=-1)  # type: ignore[no-any-return]
            return _part(self.in_proj, query, 0, e), *_part(self.in_proj, key, e, 3 * e).chunk(2, dim=-1)
        return tuple(_part(self.in_proj, x, i * e, (i + 1) * e) for i, x in enumerate((query, key, value)))

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, embed_dim] in the layout of the inputs -> [batch, num_heads, length, head_dim], a view."""
        x = x.view(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those that every query sees besides: the learnt one, then the zero."""
        if self.bias_k is not None and self.bias_v is not None:
            shape = (len(k), self.num_heads, 1, self.head_dim)
            learnt = [b.view(1, *shape[1:]).expand(shape).to(k.dtype) for b in (self.bias_k, self.bias_v)]
            k, v = torch.cat([k, learnt[0]], dim=2), torch.cat([v, learnt[1]], dim=2)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "Int8MultiheadAttention: got a nested tensor, expected a padded one with a key_padding_mask; "
                "an nn.TransformerEncoder with use_nested_tensor=False passes such"
            )
        shapes = [list(x.shape) for x in (query, key, value)]
        widths = [self.embed_dim, self.kdim, self.vdim]
        if [s[-1] for s in shapes] != widths or query.dim() not in (2, 3) or shapes[1][:-1] != shapes[2][:-1]:
            raise ValueError(
                f"Int8MultiheadAttention: query, key and value have shapes {shapes}, expected two or three dimensions "
                f"ending in {widths}, and the same length of key and value"
            )
        batch = 0 if self.batch_first else 1
        if key.dim() != query.dim() or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            raise ValueError(
                f"Int8MultiheadAttention: query and key have shapes {shapes[0]} and {shapes[1]}, expected the same "
                f"batch in dimension {batch} (batch_first={self.batch_first})"
            )


def _int8(weight: Tensor, bias: Tensor | None) -> Int8Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return Int8Linear.from_float(linear)


def _part(linear: Int8Linear, x: Tensor, first: int, last: int) -> Tensor:
    """The outputs from ``first`` up to ``last``, computed from the panels of packed weights that hold them."""
    step = PANEL if linear.weight.dim() == 3 else 1  # rows, as on GPUs, are single outputs
    low, high = first // step, -(-last // step)
    outputs = slice(low * step, high * step)
    bias = None if linear.bias is None else linear.bias[outputs]
    y: Tensor = int8_linear(x, linear.weight[low:high], linear.scale[outputs], bias)
    return y[..., first - outputs.start : last - outputs.start]


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """The sum of both masks as floats to add to the scores; it broadcasts to ``shape``, theirs."""
    batch, heads, queries, keys = shape
    merged = None
    if attn_mask is not None:
        shapes: Shapes = [((queries, keys), (1, 1, queries, keys)), ((batch * heads, queries, keys), shape)]
        merged = _additive("attn_mask", attn_mask, shapes, dtype)
    if key_padding_mask is not None:
        shapes = [((batch, keys), (batch, 1, 1, keys))]
        if batch == 1:  # of an input without a batch
            shapes.append(((keys,), (1, 1, 1, keys)))
        padding = _additive("key_padding_mask", key_padding_mask, shapes, dtype)
        merged = padding if merged is None else merged + padding
    return merged


def _additive(name: str, mask: Tensor, shapes: Shapes, dtype: torch.dtype) -> Tensor:
    target = next((target for own, target in shapes if mask.shape == own), None)
    if target is None or not (mask.dtype == torch.bool or mask.is_floating_point()):
        expected = " or ".join(str(list(own)) for own, _ in shapes)
        raise ValueError(
            f"Int8MultiheadAttention: {name} is {mask.dtype} {list(mask.shape)}, expected bool or float {expected}"
        )
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.view(target)


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
    return weights @ v, weights
