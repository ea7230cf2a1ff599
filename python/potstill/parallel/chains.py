"""The calls of a model's modules in a run, and where one tensor is all that passes from one to the next."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from potstill.nn.shared import version
from potstill.parallel.parts import called, first_tensor, options
from potstill.transform.observe import Sample, watching

_RUNS = 4  # of each call the shortest time counts


@dataclass(eq=False)
class Call:
    """A call of a module: the tensor that it was first given, what it returned if that is a tensor, the calls inside.

    ``overwrites``: it changed the tensor that it was given.
    """

    module: nn.Module
    given: Tensor | None
    returned: Tensor | None = None
    overwrites: bool = False
    seconds: float = 0.0
    inside: list[Call] = field(default_factory=list)

    def all(self) -> Iterator[Call]:
        """This call and those inside, in the order in which they began."""
        yield self
        for call in self.inside:
            yield from call.all()


@dataclass(frozen=True, eq=False)
class Chain:
    """Calls of which each passes one tensor on to the next, and the calls before and after them.

    A cut may lie between two ``units``: a module that overwrites its input is in one unit with that before it.
    """

    units: list[list[Call]]
    before: list[Call]
    after: list[Call]


def watched(model: nn.Module, sample: Sample) -> tuple[Call, Any]:
    """The call of ``model`` in a run on ``sample``, with the shortest times of several runs, and the output."""
    whole, output = _call(model, sample)
    for _ in range(_RUNS - 1):
        again, _ = _call(model, sample)
        for call, other in zip(whole.all(), again.all(), strict=True):
            call.seconds = min(call.seconds, other.seconds)
    return whole, output


def _call(model: nn.Module, sample: Sample) -> tuple[Call, Any]:
    whole = Call(model, None)
    around = [whole]
    begun: list[tuple[float, int]] = []

    def starts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        around[-1].inside.append(call := Call(module, x))
        around.append(call)
        begun.append((_now(x), version(x) if x is not None else 0))

    def ends(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, (begin, before) = around.pop(), begun.pop()
        call.seconds = _now(call.given) - begin
        call.returned = output if isinstance(output, Tensor) else None
        call.overwrites = call.given is not None and version(call.given) != before

    handles: list[Any] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(starts, with_kwargs=True))
            handles.append(module.register_forward_hook(ends, with_kwargs=True))
        with watching(model, ()):
            output = called(model, sample, options(model))
    finally:
        for handle in handles:
            handle.remove()
    return whole.inside[0], output


def _now(x: Tensor | None) -> float:
    if x is not None and x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def chains(whole: Call) -> list[Chain]:
    """All the longest chains of modules that are called once."""
    return list(_chains(whole, Counter(call.module for call in whole.all()), [], []))


def _chains(call: Call, times: Counter[nn.Module], before: list[Call], after: list[Call]) -> Iterator[Chain]:
    inside = call.inside
    links = [(place, link) for place, child in enumerate(inside) for link in _links(child, times)]
    first = 0
    for end in range(1, len(links) + 1):
        if end == len(links) or not _follows(links[end - 1][1], links[end][1], times):
            places = [place for place, _ in links[first:end]]
            outside = before + inside[: places[0]], inside[places[-1] + 1 :] + after
            yield Chain(_units([link for _, link in links[first:end]]), *outside)
            first = end
    for place, child in enumerate(inside):
        yield from _chains(child, times, before + inside[:place], inside[place + 1 :] + after)


def _links(call: Call, times: Counter[nn.Module]) -> list[Call]:
    """The calls inside, where they are a chain from all that ``call`` was given to what it returned; else itself."""
    links = [link for child in call.inside for link in _links(child, times)]
    whole = links and links[0].given is call.given and links[-1].returned is call.returned is not None
    return links if whole and all(_follows(a, b, times) for a, b in pairwise(links)) else [call]


def _follows(a: Call, b: Call, times: Counter[nn.Module]) -> bool:
    return a.returned is not None and a.returned is b.given and times[a.module] == times[b.module] == 1


def _units(links: list[Call]) -> list[list[Call]]:
    units: list[list[Call]] = []
    for link in links:
        if units and link.overwrites:
            units[-1].append(link)
        else:
            units.append([link])
    return units
