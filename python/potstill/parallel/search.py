"""Finds layers that can be split without changing what the model computes, by trying it in a run on one device.

A split is a candidate because of sizes and the order of calls, and is taken because it holds: for each of the ranks the
model runs once with only that rank's columns of the first layers' outputs. What then reaches the last layer must be
that rank's share of what it reads unsplit, so that partial sums over the shares add up to its output. From there on
the run goes on with what the last layer reads unsplit, and the outputs of the model must not change: nothing else has
read the split tensors. Weights between the layers count, but not those of the last layer, which may all be zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from potstill.parallel.layout import Split
from potstill.parallel.styles import is_linear, sizes, take
from potstill.transform.observe import Sample, run

HEADS = frozenset(
    {"num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "num_key_value_heads", "n_kv_heads"}
)
SIZES = frozenset({"all_head_size", "split_size", "inner_dim", "embed_dim", "attn_dim", "hidden_size", "d_model"})
"""Attributes of attention modules that count heads, or features of all heads: divided where that makes a split hold."""

_PARTS = (1, 2, 3)  # matrices side by side in one layer: keys and values, or queries as well
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of sums in another order; half precision: 3e-2


class MisfitError(Exception):
    """A split of layers that does not hold."""


@dataclass(frozen=True)
class Candidate:
    """Layers split by outputs, the layers split by inputs that they feed, and attributes (module, name) to divide."""

    columns: tuple[tuple[str, Split], ...]
    rows: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass
class Reference:
    """The model's run as it is: linear layers in the order of their first calls, and what they read in each call."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    result: list[Tensor] = field(default_factory=list)

    def group(self, name: str) -> int:
        """A number that layers have in common which read the same tensor."""
        return next(i for i, calls in enumerate(self.inputs.values()) if calls[0] is self.inputs[name][0])


def reference(model: nn.Module, layers: Mapping[str, nn.Module], sample: Sample) -> Reference:
    """Runs ``model`` and keeps the inputs of ``layers``."""
    found = Reference()

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                found.inputs.setdefault(name, []).append(args[0])

        return note

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        found.result = _tensors(run(model, sample))
    return found


def _tensors(result: Any) -> list[Tensor]:
    """The outputs that are compared: not a cache of keys and values, which is rightly divided by heads."""
    if isinstance(result, Mapping):
        result = [value for key, value in result.items() if key != "past_key_values"]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@contextmanager
def divided(model: nn.Module, attributes: Iterable[tuple[str, str]], ranks: int) -> Iterator[None]:
    """Inside, these attributes have a ``ranks``-th of their values."""
    with ExitStack() as stack:
        for name, attribute in attributes:
            module = model.get_submodule(name)
            value = getattr(module, attribute)
            stack.callback(setattr, module, attribute, value)
            setattr(module, attribute, value // ranks)
        yield


def verify(model: nn.Module, sample: Sample, candidate: Candidate, ranks: int, known: Reference) -> None:
    """Raises :class:`MisfitError` if the split does not hold."""
    for rank in range(ranks):
        with ExitStack() as stack:
            stack.enter_context(divided(model, candidate.attributes, ranks))
            for name, split in candidate.columns:
                layer = model.get_submodule(name)
                stack.callback(layer.register_forward_hook(_narrow(split, ranks, rank)).remove)
            for name in candidate.rows:
                layer = model.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(_checked(known.inputs[name], ranks, rank)).remove)
            try:
                result = _tensors(run(model, sample))
            except Exception as error:  # whatever the model raises when its tensors have other sizes
                raise MisfitError(f"{type(error).__name__}: {error}") from error
        if len(result) != len(known.result):
            raise MisfitError("the model gives other outputs")
        for found, expected in zip(result, known.result, strict=True):
            _compare(found, expected, "something else than the next layer reads its outputs")


def _narrow(split: Split, ranks: int, rank: int) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return take(output, -1, split.parts, ranks, rank)

    return hook


def _checked(known: Sequence[Tensor], ranks: int, rank: int) -> Any:
    calls = iter(known)

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        whole = next(calls)
        if len(args) != 1:
            raise MisfitError("it is called with more than its inputs")
        _compare(args[0], whole.chunk(ranks, -1)[rank], "its inputs are not those that were split")
        return (whole,)

    return hook


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape:
        raise MisfitError(f"{what}: {list(found.shape)} instead of {list(expected.shape)}")
    error = (found.double() - expected.double()).norm()
    if not bool(error <= _TOLERANCE.get(expected.dtype, 3e-2) * expected.double().norm()):
        raise MisfitError(what)


@dataclass
class Block:
    """Containers of one kind (same class, same layers, same sizes), by the names of each; ``inner``: of its layers."""

    names: list[str]
    inner: tuple[str, ...]


def blocks(model: nn.Module, free: Sequence[str]) -> list[Block]:
    """The modules around at least two of the layers ``free``, given in the order of their calls; innermost first."""
    found: dict[object, Block] = {}
    containers = sorted((name for name, _ in model.named_modules()), key=lambda name: -_depth(name))
    for name in containers:
        prefix = f"{name}." if name else ""
        inner = tuple(layer.removeprefix(prefix) for layer in free if layer.startswith(prefix) and layer != name)
        if len(inner) < 2:
            continue
        shapes = tuple(sizes(model.get_submodule(prefix + layer)) for layer in inner)
        signature = (_depth(name), type(model.get_submodule(name)), inner, shapes)
        found.setdefault(signature, Block([], inner)).names.append(name)
    return list(found.values())


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def candidates(model: nn.Module, block: Block, known: Reference) -> Iterator[Candidate]:
    """What may be tried in all containers of ``block`` at once: all layers into the last, then one into the next."""
    inner = block.inner
    runs = [(inner[:-1], inner[-1])] + [((first,), last) for first, last in pairwise(inner)]
    for firsts, last in dict.fromkeys(runs):
        columns = [_join(name, first) for name in block.names for first in firsts]
        yield from variants(model, columns, [_join(name, last) for name in block.names], block.names, known)


def variants(
    model: nn.Module, columns: Sequence[str], rows: Sequence[str], containers: Iterable[str], known: Reference
) -> Iterator[Candidate]:
    """These columns and rows, with as many parts side by side as fit, and with attributes of ``containers`` divided."""
    widths = {sizes(model.get_submodule(name))[0] for name in rows}
    outputs = {name: sizes(model.get_submodule(name))[1] for name in columns}
    for parts in _PARTS:
        fitting = {parts * width for width in widths}
        if not fitting.isdisjoint(outputs.values()):
            splits = tuple(
                (name, Split("column", parts if out in fitting else 1, known.group(name)))
                for name, out in outputs.items()
            )
            for kinds in (frozenset[str](), HEADS, HEADS | SIZES):
                attributes = _attributes(model, containers, kinds)
                if attributes or not kinds:
                    yield Candidate(splits, tuple(rows), attributes)


def _attributes(model: nn.Module, names: Iterable[str], kinds: frozenset[str]) -> tuple[tuple[str, str], ...]:
    found: dict[tuple[str, str], None] = {}
    for outer in names:
        for name, module in model.get_submodule(outer).named_modules():
            if not is_linear(module):
                own = (key for key, value in vars(module).items() if key in kinds and type(value) is int)
                found |= {(_join(outer, name), key): None for key in own}
    return tuple(found)


def _join(outer: str, inner: str) -> str:
    return ".".join(part for part in (outer, inner) if part)
