"""Lets models of the transformers package call the op :data:`ops.attention`, by the interface they have for that."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from potstill.ops.attention import attention, pays

NAME = "potstill"
"""What the implementation is called in a model's config."""

TORCH = "sdpa"
"""The one that it takes the place of."""


def attention_models(model: nn.Module) -> list[Any]:
    """The outermost models of transformers in ``model`` that call ``F.scaled_dot_product_attention`` in all parts."""
    if not hasattr(sys.modules.get("transformers"), "AttentionMaskInterface"):  # nobody imported it, or it is old
        return []
    found: list[Any] = []
    seen: set[nn.Module] = set()
    for module in model.modules():
        if module in seen or not hasattr(module, "set_attn_implementation"):
            continue
        seen.update(module.modules())
        parts = [part for part in module.modules() if hasattr(part, "set_attn_implementation")]
        if all(getattr(part.config, "_attn_implementation", None) == TORCH for part in parts):
            found.append(module)
    return found


def switch(models: list[Any], name: str) -> None:
    """Makes the models call the implementation of this name."""
    _register()
    for model in models:
        model.set_attn_implementation(name)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    otherwise = any(options.get(name) is not None and options[name] is not False for name in _OTHERWISE)
    if otherwise or dropout > 0.0 or not pays(query, key, value):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return found
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
    y: Tensor = attention(query, key, value, attention_mask, scaling, causal)
    return y.transpose(1, 2), None


_OTHERWISE = ("position_bias", "cache", "softcap", "output_attentions")
"""Options by which attention computes something else."""
