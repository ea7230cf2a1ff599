"""Walks and edits module trees; no other file of potstill does either."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ConversionError

Pattern = str | type[nn.Module]
"""A wildcard for the dotted name of a layer, or a type of it or of a module around it."""

Undo = Callable[[], None]
"""Takes back one edit."""

# Torch's fused encoder kernels read the weights inside a block and never call its layers. These are the attributes by
# which torch itself decides against them; they are plain attributes, so that deepcopy and pickle keep them.
_FAST_PATHS: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoder, "use_nested_tensor", False),
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
)


@dataclass(frozen=True, eq=False)
class Site:
    """A module of a model, every dotted name it has there, and the modules around it, outermost first."""

    module: nn.Module
    names: tuple[str, ...]
    ancestors: tuple[nn.Module, ...]


def sites(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[Site]:
    """The modules of the given kinds in ``model``, itself included, in its order; a shared module comes once.

    >>> layer = nn.Linear(2, 2)
    >>> [site.names for site in sites(nn.Sequential(layer, nn.ReLU(), layer), nn.Linear)]
    [('0', '2')]
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            names.setdefault(module, []).append(name)
    return [Site(module, tuple(own), _around(model, own)) for module, own in names.items()]


def _around(model: nn.Module, names: Iterable[str]) -> tuple[nn.Module, ...]:
    found: dict[nn.Module, None] = {}
    for name in names:
        module = model
        for part in name.split(".") if name else ():
            found[module] = None
            module = module.get_submodule(part)
    return tuple(found)


def replace(model: nn.Module, names: Sequence[str], new: nn.Module) -> Undo:
    """Puts ``new`` in the place of the module that has these names; the name ``""`` is ``model`` itself.

    The fast path of a torch encoder around it is switched off, as its kernels would not call ``new``.
    """
    undos = [_put(model, name, new) if name else _become(model, type(new), vars(new)) for name in names]
    for ancestor in _around(model, names):
        undos += [_set(ancestor, attribute, off) for kind, attribute, off in _FAST_PATHS if isinstance(ancestor, kind)]
    return all_of(undos)


def all_of(undos: Iterable[Undo]) -> Undo:
    """One :data:`Undo` that takes back all of them, the last edit first."""
    order = list(undos)[::-1]

    def undo() -> None:
        for one in order:
            one()

    return undo


def _put(model: nn.Module, name: str, new: nn.Module) -> Undo:
    old = model.get_submodule(name)
    model.set_submodule(name, new)
    return lambda: model.set_submodule(name, old)


def _become(model: nn.Module, kind: type, state: dict[str, Any]) -> Undo:
    # Whoever holds ``model`` must see the change, so it is the object that turns into the other.
    old_kind, old_state = type(model), vars(model)
    model.__class__, model.__dict__ = kind, state

    def undo() -> None:
        model.__class__, model.__dict__ = old_kind, old_state

    return undo


def _set(module: nn.Module, attribute: str, value: object) -> Undo:
    old = getattr(module, attribute)
    setattr(module, attribute, value)
    return lambda: setattr(module, attribute, old)


def fast_path_blocks(model: nn.Module) -> list[Site]:
    """The outermost encoders and encoder layers of torch that may take its fast path."""
    kinds = tuple(kind for kind, _, _ in _FAST_PATHS)
    return [s for s in sites(model, kinds) if not any(isinstance(a, kinds) for a in s.ancestors)]


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The name of each parameter and buffer -> all names under which ``model`` holds the same values, itself included.

    >>> model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    >>> model["b"].weight = model["a"].weight
    >>> shared_names(model)
    {'a.weight': ('a.weight', 'b.weight'), 'b.weight': ('a.weight', 'b.weight')}
    """
    groups: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(("parameter", _place(parameter)), []).append(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        groups.setdefault(("buffer", _place(buffer)), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def _place(tensor: Tensor) -> object:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type != "meta"
    if not plain or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer with this dotted name."""
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), attribute)
    return tensor


def tie(model: nn.Module, name: str, target: str) -> Undo:
    """Makes the parameter or buffer called ``name`` the very object called ``target``."""
    owner, _, attribute = name.rpartition(".")
    module, old = model.get_submodule(owner), tensor_at(model, name)
    setattr(module, attribute, tensor_at(model, target))
    return lambda: setattr(module, attribute, old)


def matching(
    found: Sequence[Site], patterns: Pattern | Iterable[Pattern] | None, argument: str
) -> dict[nn.Module, Pattern]:
    """The modules of ``found`` that a pattern matches -> the first such pattern.

    Raises :class:`ConversionError` for a pattern that matches nothing, and :class:`TypeError` for one that is neither a
    string nor a module type; ``argument`` is what the messages call ``patterns``.
    """
    if patterns is None:
        return {}
    matched: dict[nn.Module, Pattern] = {}
    for pattern in [patterns] if isinstance(patterns, str | type) else patterns:
        if not (isinstance(pattern, str) or (isinstance(pattern, type) and issubclass(pattern, nn.Module))):
            raise TypeError(f"{argument}: expected layer names with wildcards or nn.Module types, got {pattern!r}")
        hits = [site.module for site in found if _matches(site, pattern)]
        if not hits:
            raise ConversionError(_no_match(found, pattern, argument))
        for module in hits:
            matched.setdefault(module, pattern)
    return matched


def _matches(site: Site, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return any(fnmatch.fnmatchcase(name, pattern) for name in site.names)
    return isinstance(site.module, pattern) or any(isinstance(a, pattern) for a in site.ancestors)


def _no_match(found: Sequence[Site], pattern: Pattern, argument: str) -> str:
    if isinstance(pattern, str):
        given, names = repr(pattern), [name for site in found for name in site.names]
        inside = [f"{pattern}.*"] if any(name.startswith(f"{pattern}.") for name in names) else []
        near = inside + difflib.get_close_matches(pattern, names, n=5, cutoff=0.5) or names[:5]
    else:
        given = pattern.__name__
        names = sorted({type(m).__name__ for site in found for m in (site.module, *site.ancestors)})
        near = difflib.get_close_matches(given, names, n=5, cutoff=0.5) or names[:5]
    instead = f"did you mean {', '.join(map(repr, near))}?" if near else "the model has none"
    return f"{argument}: {given} matches no layer that could be converted; {instead}"
