"""The layers of a model that might be pruned, and why some are left alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potstill.nn import KINDS, FusedActivation, Int8Embedding
from potstill.nn.float_linear import is_conv1d
from potstill.nn.masked import Masked, MaskedConv2d, MaskedLinear
from potstill.transform.eligible import why_not_plain
from potstill.transform.swap import Pattern, Site, matching, shared_names, sites

_OURS = tuple(KINDS.values())
_LAYERS = tuple(
    kind for kind in _OURS if kind not in (FusedActivation, Int8Embedding)
)  # that were linear, or hold such


@dataclass(eq=False)
class Candidate:
    """A layer under consideration; ``kept`` says why it stays as it is, once that is known.

    ``masked`` is its masked form, which the model does not hold yet if it is another module than that of the site.
    """

    site: Site
    kept: str = ""
    masked: Masked | None = None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.site.names[0] or "the model"

    @property
    def form(self) -> Masked:
        """Its masked form, which a layer that is not kept has."""
        if self.masked is None:
            raise TypeError(f"{self.name} is kept: {self.kept}")
        return self.masked

    @property
    def sizes(self) -> tuple[int, ...]:
        """(outputs, inputs) of its matrix; empty if it has no weights like that."""
        module = self.site.module
        weight = module._parameters.get("weight")
        ours = isinstance(module, nn.Linear | nn.Conv2d | Masked) or is_conv1d(module)
        if weight is None or not ours or torch.nn.parameter.is_lazy(weight):
            return ()
        turned = is_conv1d(module) or (isinstance(module, MaskedLinear) and module.transposed)
        outputs, *inputs = reversed(weight.shape) if turned else weight.shape
        return outputs, math.prod(inputs)

    @property
    def weight(self) -> Tensor:
        """Its master weights, [outputs, inputs] float32."""
        return self.form.matrix(self.form.weight.detach()).float()

    @property
    def mask(self) -> Tensor:
        """The weights that count now, [outputs, inputs] bool."""
        return self.form.matrix(self.form.mask)


def candidates(
    model: nn.Module,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
) -> list[Candidate]:
    """Every linear layer and convolution of ``model``, and what it has been changed to, in the order of the model."""
    found = [
        site
        for site in sites(model, nn.Module)
        if (isinstance(site.module, (nn.Linear, nn.Conv2d, *_LAYERS)) or is_conv1d(site.module))
        and not any(isinstance(a, _OURS) for a in site.ancestors)
    ]
    included = matching(found, None if include is None else _with_masked(found, include), "include")
    excluded = matching(found, None if exclude is None else _with_masked(found, exclude), "exclude")
    shared = shared_names(model)
    layers = []
    for site in found:
        layer = Candidate(site)
        if include is not None and site.module not in included:
            layer.kept = "not in include"
        elif site.module in excluded:
            pattern = excluded[site.module]
            layer.kept = f"excluded by {pattern if isinstance(pattern, str) else pattern.__name__}"
        else:
            layer.kept = _why_not(site) or _why_not_weight(site.module.get_parameter("weight")) or _tied(site, shared)
        if not layer.kept:
            layer.masked = masked_form(site.module)
        layers.append(layer)
    return layers


def _with_masked(found: Sequence[Site], patterns: Pattern | Iterable[Pattern]) -> Iterator[Pattern]:
    """The patterns; the type of a float layer stands for its masked form too, so that a call can be repeated."""
    forms: dict[Pattern, Pattern] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
    for pattern in [patterns] if isinstance(patterns, str | type) else patterns:
        kinds = [kind for kind in (pattern, forms.get(pattern)) if isinstance(kind, type)]
        present: list[Pattern] = [kind for kind in kinds if any(isinstance(site.module, kind) for site in found)]
        yield from present or [pattern]


def masked_form(module: nn.Module) -> Masked:
    """The module itself if it is masked, or else its masked form, with all weights kept."""
    if isinstance(module, Masked):
        return module
    return MaskedConv2d.from_float(module) if isinstance(module, nn.Conv2d) else MaskedLinear.from_float(module)


def _why_not(site: Site) -> str:
    module = site.module
    if isinstance(module, Masked):
        return ""
    if isinstance(module, _LAYERS):
        return f"is a {type(module).__name__} already; prune the float model first, then quantise it"
    if any(isinstance(a, nn.MultiheadAttention) and a.out_proj is module for a in site.ancestors):
        return "read by nn.MultiheadAttention, which never calls it"
    source = type(module) if is_conv1d(module) else nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    why = why_not_plain(module, source, ("weight", "bias"))
    if not why and isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        why = f"pads with {module.padding_mode!r}, not with zeros"
    return why


def _why_not_weight(weight: Tensor) -> str:
    if weight.is_meta:
        return "its weight is on the meta device, without values"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if not weight.numel():
        return "has no weights"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    return "" if bool(torch.isfinite(weight.detach()).all()) else "weight has NaN or infinite values"


def _tied(site: Site, shared: dict[str, tuple[str, ...]]) -> str:
    own = {f"{name}.weight".removeprefix(".") for name in site.names}
    others = [name for mine in own for name in shared.get(mine, ()) if name not in own]
    return f"weight is tied to {', '.join(dict.fromkeys(others))}" if others else ""


@contextmanager
def computing_with(layers: Sequence[Candidate], weights: Sequence[Tensor]) -> Iterator[list[nn.Parameter]]:
    """Inside, each layer computes with exactly its one of ``weights`` [outputs, inputs], whatever its own and its mask.

    Yields the parameters that stand in, in the layer's dtype and layout. The layers' own come back afterwards.
    """
    with ExitStack() as stack:
        for layer in layers:
            for name in ("weight", "mask") if isinstance(layer.site.module, Masked) else ("weight",):
                stack.callback(setattr, layer.site.module, name, layer.site.module.get_parameter(name))
        standing = []
        for layer, weight in zip(layers, weights, strict=True):
            module, own = layer.site.module, layer.form.weight
            standing.append(nn.Parameter(layer.form.like_weight(weight).to(own.dtype, copy=True)))
            module.weight = standing[-1]
            if isinstance(module, Masked):
                module.mask = nn.Parameter(torch.ones_like(module.mask), requires_grad=False)
        yield standing
