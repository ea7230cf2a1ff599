"""The layers of a model that might be changed: what is asked of each, and why some are left alone from the start."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from potstill.transform.configs import Config, Mixed
from potstill.transform.observe import Calls
from potstill.transform.rules import RULES, rule_for
from potstill.transform.rules.rule import Rule
from potstill.transform.swap import Pattern, Site, matching, shared_names, sites


@dataclass(eq=False)
class Layer:
    """A module under consideration; ``kept`` says why it stays as it is, once that is known.

    ``whole`` is the module around it, also under consideration, that is replaced together with all its parts.
    """

    site: Site
    config: Config | None = None
    rule: Rule[Any] | None = None
    kept: str = ""
    whole: Layer | None = None
    calls: Calls | None = None
    new: nn.Module | None = None
    seconds: tuple[float, float] | None = None  # of the old and the new form
    snr_db: float | None = None
    rounding: str = "nearest"
    nearest_snr_db: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.site.names[0] or "the model"

    def inside(self, other: Layer) -> bool:
        """Whether it is a part of ``other``."""
        return other.site.module in self.site.ancestors


def survey(
    model: nn.Module,
    config: Config | Mixed,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
) -> list[Layer]:
    """Every module that a rule exists for or has made, in the order of the model; parts of what a rule made are not."""
    ours = tuple(rule.target for rule in RULES)
    found = [
        site
        for site in sites(model, nn.Module)
        if (isinstance(site.module, ours) or any(rule.replaces(site.module) for rule in RULES))
        and not any(isinstance(a, ours) for a in site.ancestors)
    ]
    included, excluded = matching(found, include, "include"), matching(found, exclude, "exclude")
    chosen = matching(found, config.layers, "Mixed") if isinstance(config, Mixed) else {}
    layers, apart = [], set()  # apart: what is asked for by name
    for site in found:
        layer = Layer(site)
        if include is not None and site.module not in included:
            layer.kept = "not in include"
        elif site.module in excluded:
            layer.kept = f"excluded by {_text(excluded[site.module])}"
            apart.add(layer)
        elif not isinstance(config, Mixed):
            layer.config = config
        elif site.module not in chosen:
            layer.kept = "no pattern of Mixed matches it"
        else:
            layer.config = config.layers[chosen[site.module]]
            layer.kept = f"Mixed asks to keep {_text(chosen[site.module])}" if layer.config is None else ""
            apart.add(layer)
        layer.kept = layer.kept or _find_rule(layer)
        layers.append(layer)
    _split(layers, apart)
    return layers


def _text(pattern: Pattern) -> str:
    return pattern if isinstance(pattern, str) else pattern.__name__


def _find_rule(layer: Layer) -> str:
    module = layer.site.module
    made_by = next((rule for rule in RULES if isinstance(module, rule.target)), None)
    if made_by is not None:
        return f"already {made_by.action}"
    layer.rule = rule_for(module, layer.config) if layer.config is not None else None
    if layer.rule is None:
        return f"there is no form of {type(module).__name__} for {layer.config}"
    return layer.rule.why_not(layer.site)


def _split(layers: Sequence[Layer], apart: Iterable[Layer]) -> None:
    """Keeps a module as a whole if something else is asked for a part of it."""
    for part in apart:
        for whole in layers:
            if not whole.kept and part.inside(whole) and part.config != whole.config:
                whole.kept = f"its part {part.name} is to be {part.config or 'kept'}"


def outermost(layers: Sequence[Layer]) -> list[Layer]:
    """Those that are no part of another one."""
    return [layer for layer in layers if not any(layer.inside(other) for other in layers)]


def innermost(layers: Sequence[Layer]) -> list[Layer]:
    """Those that have no other one as a part."""
    return [layer for layer in layers if not any(other.inside(layer) for other in layers)]


def tied_groups(model: nn.Module, layers: Sequence[Layer], of: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of ``of`` in groups that share weights; a group that cannot change together is kept, all of it.

    ``layers`` are all layers: one that is kept keeps those that share its weight. New forms of one kind share their
    weight again, others get one of their own each.
    """
    shared = shared_names(model)
    others, kept = [x for x in layers if not x.kept], [x for x in layers if x.kept]
    owner = {name: layer for group in (others, kept, of) for layer in group for name in _weights(layer)}
    groups: dict[Layer, list[Layer]] = {layer: [layer] for layer in of}
    for name, layer in owner.items():
        names = shared.get(name, (name,))
        outside = [other for other in names if other not in owner]
        if outside and layer in groups:
            layer.kept = layer.kept or f"weight is tied to {', '.join(outside)}"
        for other in names:
            if other in owner and owner[other] in groups and layer in groups:
                _join(groups, layer, owner[other])
            elif other in owner and owner[other].kept and layer in groups:
                layer.kept = layer.kept or f"weight is tied to {other}, which is kept"
    unique = list({id(group): group for group in groups.values()}.values())
    for group in unique:
        _settle(group)
    return unique


def _weights(layer: Layer) -> list[str]:
    weights = layer.rule.weights(layer.site.module) if layer.rule is not None else ("weight",)
    return [f"{name}.{weight}".removeprefix(".") for name in layer.site.names for weight in weights]


def _join(groups: dict[Layer, list[Layer]], layer: Layer, other: Layer) -> None:
    mine, theirs = groups[layer], groups[other]
    if mine is not theirs:
        mine += theirs
        for member in theirs:
            groups[member] = mine


def _settle(group: list[Layer]) -> None:
    stays = next((layer for layer in group if layer.kept), None)
    if stays is not None:
        keep(group, f"weight is tied to {stays.site.names[0]}.weight, which is kept")
    for first, *others in of_one_kind(group):
        if others and first.rule is not None and not first.rule.shared:
            keep(group, f"weights of {first.name} and {others[0].name} are tied, and their new forms cannot be")


def of_one_kind(group: Iterable[Layer]) -> list[list[Layer]]:
    """The layers of a group in smaller ones whose new forms can share one weight."""
    kinds: dict[Hashable, list[Layer]] = {}
    for layer in group:
        kinds.setdefault((layer.rule, layer.config, type(layer.site.module)), []).append(layer)
    return list(kinds.values())


def keep(group: Iterable[Layer], why: str) -> None:
    """Keeps what is not kept yet, for this reason."""
    for layer in group:
        layer.kept = layer.kept or why
