"""Drop-in layers of transformer encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from potstill.nn.activation import activation_name
from potstill.nn.attention import Int8MultiheadAttention
from potstill.nn.linear import Int8Linear
from potstill.nn.norm import AddLayerNorm
from potstill.ops.activation import ACTIVATIONS, check_activation

Activation = Callable[[Tensor], Tensor]


class Int8TransformerEncoderLayer(nn.Module):
    """``nn.TransformerEncoderLayer`` with int8 linear layers that apply the activation, and fused residual and norm.

    Arguments, shapes and results are those of ``nn.TransformerEncoderLayer`` outside its fast path, in eval and in
    training mode. See :class:`Int8MultiheadAttention` and :class:`AddLayerNorm`. It works inside an
    ``nn.TransformerEncoder``, which then runs on padded tensors. The linear layers are frozen, the normalisations train
    as before; gradients flow to the input.

    >>> layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    >>> fast = Int8TransformerEncoderLayer.from_float(layer)
    >>> x = torch.randn(2, 10, 64)
    >>> bool((fast(x) - layer(x)).norm() < 0.03 * layer(x).norm())
    True
    """

    kind = "int8_transformer_encoder_layer"

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(activation, str):
            check_activation("Int8TransformerEncoderLayer", activation)
        self.self_attn = Int8MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first)
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.linear1 = Int8Linear(d_model, dim_feedforward, bias, activation_name(self.activation) or "none")
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Int8Linear(dim_feedforward, d_model, bias)
        self.norm_first = norm_first
        self.norm1 = AddLayerNorm(d_model, layer_norm_eps, bias=bias)
        self.norm2 = AddLayerNorm(d_model, layer_norm_eps, bias=bias)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    @staticmethod
    def unsupported(layer: nn.TransformerEncoderLayer) -> str:
        """Why ``layer`` has no int8 form; empty if it has one."""
        expected = {
            "self_attn": nn.MultiheadAttention,
            "linear1": nn.Linear,
            "linear2": nn.Linear,
            **dict.fromkeys(("norm1", "norm2"), nn.LayerNorm),
            **dict.fromkeys(("dropout", "dropout1", "dropout2"), nn.Dropout),
        }
        for name, kind in expected.items():
            module = getattr(layer, name, None)
            if type(module) is not kind:
                return f"its {name} is a {type(module).__name__}, not a plain nn.{kind.__name__}"
        dropouts = [layer.self_attn.dropout, layer.dropout.p, layer.dropout1.p, layer.dropout2.p]
        if len(set(dropouts)) > 1:
            return f"its dropout rates differ: {dropouts}"
        if layer.norm1.eps != layer.norm2.eps:
            return f"the eps of its norms differ: {layer.norm1.eps} and {layer.norm2.eps}"
        return ""

    @classmethod
    def float_config(cls, module: nn.Module) -> dict[str, Any] | None:
        """The :meth:`config` of the int8 form of ``module``, or None if it has none that a file could hold."""
        if type(module) is not nn.TransformerEncoderLayer or cls.unsupported(module):
            return None
        activation = activation_name(module.activation)
        return None if activation is None else _arguments(module, activation)

    @classmethod
    def from_float(cls, layer: nn.TransformerEncoderLayer) -> Self:
        """The int8 form of ``layer``; biases and normalisations are shared with it, not copied.

        Raises :class:`ValueError` if there is none.
        """
        if why := cls.unsupported(layer):
            raise ValueError(f"Int8TransformerEncoderLayer: {why}")
        with torch.device("meta"):
            new = cls(**_arguments(layer, activation_name(layer.activation) or layer.activation))
        new.self_attn = Int8MultiheadAttention.from_float(layer.self_attn)
        new.linear1 = Int8Linear.from_float(layer.linear1, new.linear1.activation)
        new.linear2 = Int8Linear.from_float(layer.linear2)
        new.norm1, new.norm2 = AddLayerNorm.from_float(layer.norm1), AddLayerNorm.from_float(layer.norm2)
        return new.train(layer.training)

    def to_float(self) -> nn.TransformerEncoderLayer:
        """A float32 ``nn.TransformerEncoderLayer`` with the dequantised weights, which shares the normalisations."""
        layer = nn.TransformerEncoderLayer(**_arguments(self, self.activation), device="meta")
        layer.self_attn = self.self_attn.to_float()
        layer.linear1, layer.linear2 = self.linear1.to_float(), self.linear2.to_float()
        layer.norm1, layer.norm2 = self.norm1.to_float(), self.norm2.to_float()
        return layer.train(self.training)

    def config(self) -> dict[str, Any]:
        """The arguments that build an empty layer of this shape.

        Raises :class:`ValueError` if the activation is a function without a name.
        """
        activation = activation_name(self.activation)
        if activation is None:
            raise ValueError(
                f"Int8TransformerEncoderLayer: activation {self.activation!r} has no name that a checkpoint could "
                f"hold; expected one of {', '.join(ACTIVATIONS)}"
            )
        return _arguments(self, activation)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As ``nn.TransformerEncoderLayer.forward``."""
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._attended(self.norm1(src), *masks)
            return self._fed_forward(self.norm2(x), x)
        x = self.norm1(self._attended(src, *masks), src)
        return self.norm2(self._fed_forward(x), x)  # type: ignore[no-any-return]

    def _attended(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        y, _ = self.self_attn(
            x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
        )
        return self.dropout1(y)  # type: ignore[no-any-return]

    def _fed_forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden = self.linear1(x)
        if self.linear1.activation == "none":  # a function that the layer cannot apply itself
            hidden = self.activation(hidden)
        hidden = self.dropout(hidden)
        if not self.training:
            return self.linear2(hidden, residual)  # type: ignore[no-any-return]
        y: Tensor = self.dropout2(self.linear2(hidden))
        return y if residual is None else residual + y


def _arguments(
    layer: nn.TransformerEncoderLayer | Int8TransformerEncoderLayer, activation: str | Activation
) -> dict[str, Any]:
    """The arguments that make a layer like ``layer``; both kinds take the same."""
    return {
        "d_model": layer.self_attn.embed_dim,
        "nhead": layer.self_attn.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "dropout": float(layer.dropout.p),
        "activation": activation,
        "layer_norm_eps": layer.norm1.eps,
        "batch_first": layer.self_attn.batch_first,
        "norm_first": layer.norm_first,
        "bias": layer.linear1.bias is not None,
    }
