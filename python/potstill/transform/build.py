"""Makes the new forms of layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from potstill.transform.rounding import recall
from potstill.transform.survey import Layer


def build(groups: Iterable[list[Layer]]) -> None:
    """Gives each layer that is not kept its new form; those with one weight share the new one, as do those with one
    bias.
    """
    biases: dict[int, nn.Parameter] = {}
    for group in groups:
        for layer in group:
            if layer.kept or layer.rule is None or layer.config is None:
                continue
            rounding, layer.note = recall(layer.site.module, layer.config)
            layer.rounding = rounding.method if rounding else "nearest"
            layer.new = new = layer.rule.build(layer.site.module, layer.config, rounding)
            old_bias, new_bias = (getattr(module, "bias", None) for module in (layer.site.module, new))
            if isinstance(new_bias, nn.Parameter):
                new.bias = biases.setdefault(id(old_bias), new_bias)
            if layer is not group[0]:
                layer.rule.share(group[0].new, new)
