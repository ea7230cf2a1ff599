"""Makes the new forms of layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from potstill.transform.configs import Config
from potstill.transform.rounding import recall
from potstill.transform.rules import rule_for
from potstill.transform.survey import Layer, of_one_kind


def build(groups: Iterable[list[Layer]]) -> None:
    """Gives each layer that is not kept its new form; what one kind of them shares, the new ones share."""
    biases: dict[int, nn.Parameter] = {}
    for group in groups:
        kinds = of_one_kind(group)
        for layer, first in ((layer, kind[0]) for kind in kinds for layer in kind):
            if layer.kept or layer.rule is None or layer.config is None:
                continue
            rounding, layer.note = recall(layer.site.module, layer.config)
            layer.new = new = layer.rule.build(layer.site.module, layer.config, rounding)
            layer.rounding = rounding.method if rounding is not None else _round_parts(layer, new, layer.config)
            old_bias, new_bias = (getattr(module, "bias", None) for module in (layer.site.module, new))
            if isinstance(new_bias, nn.Parameter):
                new.bias = biases.setdefault(id(old_bias), new_bias)
            if layer is not first:
                layer.rule.share(first.new, new)
            elif len(kinds) > 1:
                layer.note = layer.note or "its weight was tied, and is a copy of its own now"


def _round_parts(layer: Layer, new: nn.Module, config: Config) -> str:
    """Rounds the layers inside ``new`` as :func:`calibrate_` found best for those of the same names; says how.

    As layers they have the form that their own rule makes, so they can take the weight of one.
    """
    used = "nearest"
    for name, part in layer.site.module.named_modules():
        rule = rule_for(part, config)
        rounding, note = recall(part, config)
        layer.note = layer.note or (f"{name}: {note}" if note and name else "")
        if name and rule is not None and rounding is not None:
            rule.share(rule.build(part, config, rounding), new.get_submodule(name))
            used = rounding.method
    return used
