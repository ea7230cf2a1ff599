"""Chooses a config for each layer by what it does to the output of the model."""

from __future__ import annotations

import glob
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.errors import PotstillError
from potstill.transform.build import build
from potstill.transform.configs import Config, Mixed
from potstill.transform.observe import inputs_of, watching
from potstill.transform.progress import Bar
from potstill.transform.survey import Layer, innermost, survey, tied_groups
from potstill.transform.swap import all_of, replace


@dataclass(eq=False)
class Option:
    """One config for the layers that share a weight: how many bits it takes, and the error that it makes."""

    group: Sequence[Layer]
    config: Config | None
    bits: int
    error: float = 0.0


def choose(
    model: nn.Module, loader: Iterable[Any], average_bits: float, candidates: Iterable[Config | None], quiet: bool
) -> Mixed:
    """See :meth:`Mixed.auto`."""
    with torch.inference_mode(False), torch.no_grad():
        options = _options(model, dict.fromkeys(candidates))
        budget = int(average_bits * sum(_size(choices[0].group) for choices in options))
        spend(options, budget)  # raises at once if it is too small
        _measure(model, loader, options, quiet)
        chosen = spend(options, budget)
    order = {module: place for place, module in enumerate(model.modules())}
    layers = sorted(
        ((layer, option) for option in chosen for layer in option.group), key=lambda pair: order[pair[0].site.module]
    )
    notes = {id(option): _note(choices) for choices, option in zip(options, chosen, strict=True)}
    named = [(glob.escape(name), option) for layer, option in layers for name in layer.site.names]
    return Mixed({name: option.config for name, option in named}, {name: notes[id(option)] for name, option in named})


def spend(options: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One of each options, so that their bits are at most ``budget`` and the sum of their errors is least.

    The multiple-choice knapsack problem, by dynamic programming over the bits beyond the fewest. They count in units
    that divide all of them, or in 1/65536 of what there is to spend, rounded up, if that is more. Of equal errors the
    one with the fewest bits is taken.
    """
    sorts = [sorted(choices, key=lambda option: option.bits) for choices in options]
    fewest = sum(choices[0].bits for choices in sorts)
    if fewest > budget:
        weights = sum(_size(choices[0].group) for choices in sorts)
        raise PotstillError(
            f"Mixed.auto: average_bits is {budget / weights:.4g}, but the candidates with the fewest bits have "
            f"{fewest / weights:.4g} on average; give candidates with fewer bits"
        )
    extra = [[option.bits - choices[0].bits for option in choices] for choices in sorts]
    budget = min(budget - fewest, sum(map(max, extra)))
    unit = max(math.gcd(*itertools.chain(*extra)), -(-budget // 65536), 1)
    units = [[-(-bits // unit) for bits in own] for own in extra]
    least = np.zeros(budget // unit + 1)  # least[u]: the least error of the layers so far for u units at most
    picks = []
    for choices, costs in zip(sorts, units, strict=True):
        sums = np.full((len(choices), len(least)), np.inf)
        for row, option, cost in zip(sums, choices, costs, strict=True):
            row[cost:] = least[: max(len(least) - cost, 0)] + option.error
        picks.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
    chosen, left = [], len(least) - 1
    for choices, costs, pick in zip(sorts[::-1], units[::-1], picks[::-1], strict=True):
        chosen.append(choices[pick[left]])
        left -= costs[pick[left]]
    return chosen[::-1]


def _options(model: nn.Module, candidates: Mapping[Config | None, None]) -> list[list[Option]]:
    found: dict[tuple[nn.Module, ...], list[Option]] = {}
    for config in candidates:
        if config is None:
            continue
        layers = survey(model, config)
        groups = tied_groups(model, layers, innermost([layer for layer in layers if not layer.kept]))
        build(groups)
        for group in groups:
            if not group[0].kept:
                modules = tuple(layer.site.module for layer in group)
                found.setdefault(modules, []).append(Option(group, config, config.bits * _size(group)))
    for choices in found.values():
        if None in candidates:
            bits = 8 * sum(weight.nbytes for weight in _weights(choices[0].group))
            choices.append(Option(choices[0].group, None, bits))
    if not found:
        raise PotstillError(
            "Mixed.auto: no layer of the model can get one of the candidates; quantize_'s report says why"
        )
    return list(found.values())


def _weights(group: Sequence[Layer]) -> Iterator[Tensor]:
    first = group[0]
    for name in first.rule.weights(first.site.module) if first.rule is not None else ():
        yield first.site.module.get_parameter(name)


def _size(group: Sequence[Layer]) -> int:
    return sum(weight.numel() for weight in _weights(group))


def _measure(model: nn.Module, loader: Iterable[Any], options: list[list[Option]], quiet: bool) -> None:
    changed = [option for choices in options for option in choices if option.config is not None]
    bar, batches = Bar(quiet=quiet), 0
    with bar.shown():
        for item in bar.track(loader, "batches"):
            wanted = outputs_of(model, item)
            batches += 1
            for option in bar.track(changed, "layers"):
                # A layer that is replaced under several names, or two with one weight: all at once.
                pairs = [(layer.site.names, layer.new) for layer in option.group if layer.new is not None]
                undo = all_of([replace(model, names, new) for names, new in pairs])
                try:
                    option.error += relative_error(wanted, outputs_of(model, item))
                finally:
                    undo()
    if not batches:
        raise PotstillError("Mixed.auto: the loader yielded nothing; it is exhausted, or empty")
    for option in changed:
        option.error /= batches


def outputs_of(model: nn.Module, item: Any) -> list[Tensor]:
    """The floating-point tensors that ``model`` returns for an item of a loader."""
    args, kwargs = inputs_of(item)
    with watching(model, ()):  # random numbers too are the same in each run
        found = list(_tensors(model(*args, **kwargs)))
    if not found:
        raise PotstillError("the model returns no floating-point tensor to measure an error of")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def relative_error(wanted: list[Tensor], got: list[Tensor]) -> float:
    """sum (y - y')^2 / sum y^2, on average over the tensors of the output."""
    ratios = [
        float((y.double() - other.double()).square().sum() / y.double().square().sum().clamp_min(1e-300))
        for y, other in zip(wanted, got, strict=True)
    ]
    return sum(ratios) / len(ratios)


def _note(choices: Sequence[Option]) -> str:
    errors = (f"{o.error:.1e} as {o.config!r}" for o in choices if o.config is not None)
    return f"error {', '.join(errors)}"
