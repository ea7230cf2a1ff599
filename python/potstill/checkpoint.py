"""Saves a model to one safetensors file, and loads it into a freshly built model of the original class.

The file holds the tensors of ``state_dict()`` in their canonical layout, tied ones once. Its metadata has one key,
``"potstill"``, with a JSON object: ``format`` (1), ``version`` (of the library that wrote it), ``modules`` (for each
layer that was changed its ``names``, ``kind`` and ``config``) and ``aliases`` (a tied name -> the name that has the
tensor). Nothing is pickled, and nothing that is read is believed before it was checked.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from potstill.errors import CheckpointError
from potstill.nn import KINDS
from potstill.nn.shared import link
from potstill.transform.swap import Site, Undo, all_of, replace, shared_names, sites, tensor_at, tie

FORMAT = 1
_KEY = "potstill"

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class _Changed:
    """One module that was changed: an entry of the manifest."""

    names: tuple[str, ...]
    kind: str
    config: dict[str, Any]


@dataclass(frozen=True)
class _Manifest:
    modules: tuple[_Changed, ...]
    aliases: dict[str, str]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the parameters and buffers of ``model``, and what was changed in it, to one safetensors file.

    The file appears complete or not at all: an existing one stays until then, and no part of a new one is left behind.
    Raises :class:`CheckpointError` if the state holds something other than plain tensors with values.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/model.safetensors")
    ...     same = load(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), f"{folder}/model.safetensors")
    >>> torch.equal(same[0].weight, model[0].weight)
    True
    """
    path = Path(path)
    tensors, aliases = _distinct(model)
    kinds = tuple(KINDS.values())
    whole = [site for site in sites(model, kinds) if not any(isinstance(a, kinds) for a in site.ancestors)]
    changed = [{"names": site.names, "kind": site.module.kind, "config": _config(site)} for site in whole]
    version = importlib.metadata.version("potstill")
    manifest = json.dumps({"format": FORMAT, "version": version, "modules": changed, "aliases": aliases})
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".potstill-") as folder:
        complete = Path(folder) / "complete"
        try:
            save_file(tensors, complete, metadata={_KEY: manifest})
        except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that the format lacks
            raise CheckpointError(f"save: safetensors cannot hold this model: {error}") from error
        ordinary = Path(folder) / "ordinary"  # safetensors writes files that only their owner may read
        ordinary.touch()
        shutil.copymode(ordinary, complete)
        os.replace(complete, path)


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state with memory of their own, and the names of those that are others under a second name."""
    state = _state(model, "save")
    shared = shared_names(model)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    used: set[int] = set()
    for name, tensor in state.items():
        first = next((n for n in shared.get(name, ()) if n in tensors and _same(tensors[n], tensor)), None)
        if first is not None:
            aliases[name] = first
            continue
        memory = tensor.untyped_storage()
        whole = tensor.is_contiguous() and memory.nbytes() == tensor.nbytes and memory.data_ptr() not in used
        tensors[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        used.add(memory.data_ptr())
    return tensors, aliases


def _config(site: Site) -> dict[str, Any]:
    try:
        config: dict[str, Any] = site.module.config()  # type: ignore[operator]
    except ValueError as error:  # an argument that JSON cannot hold
        raise CheckpointError(f"save: {_some(site.names)} cannot be described: {error}") from error
    return config


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _state(model: nn.Module, action: str) -> dict[str, Tensor]:
    """The state of ``model`` if it is all strided tensors that have values."""
    lazy = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if torch.nn.parameter.is_lazy(t)]
    if lazy:
        raise CheckpointError(f"{action}: {_some(lazy)} not initialised yet; run the model on an input first")
    state: dict[str, Tensor] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{action}: {name} is a {type(value).__name__}; only tensors go without a pickle")
        if value.is_meta:
            raise CheckpointError(
                f"{action}: {name} is on the meta device, without values; model.to_empty(device='cpu') gives it memory"
            )
        if value.layout != torch.strided:
            raise CheckpointError(f"{action}: {name} has layout {value.layout}; expected a dense tensor")
    return state


def load(model: M, path: str | os.PathLike[str]) -> M:
    """Loads a file of :func:`save` into ``model``, a fresh model of the class that was saved, and returns it.

    Layers that were changed are replaced, all tensors copied, and what was tied is tied again. Sizes, dtypes and names
    must agree exactly. Raises :class:`CheckpointError` if the file is damaged, was not written by :func:`save` or does
    not fit; ``model`` is then as it was.
    """
    expected = _state(model, "load")
    manifest, stored = _read(path)
    state = stored | {alias: stored[name] for alias, name in manifest.aliases.items()}
    places = dict(model.named_modules(remove_duplicate=False))
    olds = [_place(places, entry) for entry in manifest.modules]
    _change_expected(expected, manifest.modules, olds)
    _check_fit(expected, state)
    for entry, old in zip(manifest.modules, olds, strict=True):
        _check_values(entry, old, state)
    undos: list[Undo] = []
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for entry, old in zip(manifest.modules, olds, strict=True):
            device = next((p.device for p in old.parameters()), torch.device("cpu"))
            undos.append(replace(model, entry.names, _empty(entry, old, device)))
        _check_ties(model, manifest.aliases, state)
        kept += [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
        model.load_state_dict(state)
        undos += _tie_again(model, manifest.aliases)
        link(model)
    except BaseException as error:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        all_of(undos)()
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(f"load: the model does not accept the tensors of {os.fspath(path)}: {error}") from error
    return model


def _read(path: str | os.PathLike[str]) -> tuple[_Manifest, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            manifest = _manifest(file.metadata() or {}, set(file.keys()))
            return manifest, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, CheckpointError):
        raise
    except Exception as error:  # whatever a damaged file makes the parser raise
        raise CheckpointError(f"load: {os.fspath(path)} is not a complete safetensors file: {error}") from error


def _manifest(metadata: Mapping[str, str], stored: set[str]) -> _Manifest:
    if _KEY not in metadata:
        raise CheckpointError(
            f"load: the file has no {_KEY!r} in its metadata; expected a file written by potstill.save. "
            "safetensors.torch.load_file reads files of others"
        )
    try:
        data = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"load: the manifest in the file's metadata is not valid JSON: {error}") from error
    _require(isinstance(data, dict), "an object", data)
    if type(data.get("format")) is not int or data["format"] != FORMAT:
        raise CheckpointError(
            f"load: the file has format {_short(data.get('format'))} and was written by potstill "
            f"{_short(data.get('version'))}; this version reads format {FORMAT}; use one that reads the file's"
        )
    _require(data.keys() == {"format", "version", "modules", "aliases"}, "keys", list(data))
    modules, aliases = data["modules"], data["aliases"]
    _require(isinstance(modules, list), "modules", modules)
    entries = tuple(_changed(entry) for entry in modules)
    names = [name for entry in entries for name in entry.names]
    _require(len(set(names)) == len(names), "modules (a name comes twice)", names)
    _require(isinstance(aliases, dict), "aliases", aliases)
    for alias, name in aliases.items():
        _require(isinstance(name, str) and name in stored and alias not in stored, "aliases", {alias: name})
    return _Manifest(entries, aliases)


def _changed(entry: object) -> _Changed:
    _require(isinstance(entry, dict) and entry.keys() == {"names", "kind", "config"}, "modules", entry)
    names, kind, config = entry["names"], entry["kind"], entry["config"]  # type: ignore[index]
    _require(isinstance(names, list) and names and all(isinstance(n, str) for n in names), "names", names)
    _require(isinstance(config, dict), "config", config)
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(
            f"load: unknown kind of module {_short(kind)}; this version of potstill knows {sorted(KINDS)}"
        )
    return _Changed(tuple(names), kind, config)


def _require(valid: object, what: str, given: object) -> None:
    if not valid:
        raise CheckpointError(
            f"load: {what} in the manifest: got {_short(given)}; the file is damaged or not by potstill.save"
        )


def _short(value: object) -> str:
    """``repr``, of bounded length and depth whatever a file holds."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 100
    return shortener.repr(value)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(_short(name) for name in names[:10]) + more


def _place(places: Mapping[str, nn.Module], entry: _Changed) -> nn.Module:
    """The module of the model that ``entry`` stands for, once it is sure that they agree."""
    for name in entry.names:
        if name not in places:
            near = difflib.get_close_matches(name, places, n=3)
            raise CheckpointError(
                f"load: the model has no module {_short(name)}, which the file says was changed; "
                f"near it are {near}; build the model as it was before it was saved"
            )
        module, kind = places[name], KINDS[entry.kind]
        expected = module.config() if type(module) is kind else kind.float_config(module)  # type: ignore[operator]
        if expected is None or not _agree(entry.config, expected):
            is_now = type(module).__name__ if expected is None else f"{type(module).__name__} {expected}"
            raise CheckpointError(
                f"load: {name!r} is a {is_now} in the model; the file has {entry.kind} {_short(entry.config)} there; "
                "build the model with the layers and sizes it was saved with"
            )
    return places[entry.names[0]]


def _agree(given: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether the file says of the layer what the model does; what only the file says is for the layer to judge."""
    return all(
        key in given and given[key] == value and type(given[key]) is type(value)  # True == 1
        for key, value in expected.items()
    )


def _empty(entry: _Changed, old: nn.Module, device: torch.device | str) -> nn.Module:
    try:
        with torch.device(device):
            layer: nn.Module = KINDS[entry.kind](**entry.config)
    except (TypeError, ValueError) as error:  # arguments that the kind does not have, or sizes it does not support
        raise CheckpointError(f"load: {_some(entry.names)} cannot be made: {error}") from error
    dtypes = [p.dtype for p in old.parameters() if p.dtype.is_floating_point]
    return layer.to(dtypes[0] if dtypes else None).train(old.training)


def _change_expected(state: dict[str, Tensor], modules: Iterable[_Changed], olds: Iterable[nn.Module]) -> None:
    """Turns the state of the float model into that of the changed one, on the meta device, which costs no memory."""
    for entry, old in zip(modules, olds, strict=True):
        for name in entry.names:
            prefix = f"{name}." if name else ""
            for key in old.state_dict(prefix=prefix):
                del state[key]
            state.update(_empty(entry, old, "meta").state_dict(prefix=prefix))


def _check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := expected.keys() - state.keys():
        problems.append(f"the file lacks {_some(sorted(missing))}")
    if unexpected := state.keys() - expected.keys():
        problems.append(f"the model lacks {_some(sorted(unexpected))}")
    for name in expected.keys() & state.keys():
        given, wanted = _described(state[name]), _described(expected[name])
        if given != wanted:
            problems.append(f"{name!r} is {given} in the file and {wanted} in the model")
    if problems:
        more = f"; and {len(problems) - 10} more such problems" if len(problems) > 10 else ""
        raise CheckpointError(
            f"load: file and model differ: {'; '.join(problems[:10])}{more}; build the model as it was before it was "
            "saved, with the same sizes and dtype (model.to(dtype))"
        )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_values(entry: _Changed, old: nn.Module, state: Mapping[str, Tensor]) -> None:
    for part, module in _empty(entry, old, "meta").named_modules():
        prefix = "".join(f"{name}." for name in (entry.names[0], part) if name)
        wrong_values = getattr(module, "wrong_values", None)  # of our modules with numbers of their own
        if wrong_values is not None and (problem := wrong_values(state, prefix)):
            raise CheckpointError(f"load: {problem}")


def _check_ties(model: nn.Module, aliases: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """One parameter cannot hold two tensors of the file: the last one loaded would win."""
    for first, *others in set(shared_names(model).values()):
        for other in others:
            tied = aliases.get(first, first) == aliases.get(other, other)
            if first in state and other in state and not tied and not _same(state[first], state[other]):
                raise CheckpointError(
                    f"load: {first!r} and {other!r} are one tensor in the model and two in the file; untie them first"
                )


def _tie_again(model: nn.Module, aliases: Mapping[str, str]) -> list[Undo]:
    undos = []
    shared = shared_names(model)
    for alias, name in aliases.items():
        if alias in shared and name in shared and name not in shared[alias]:
            a, b = tensor_at(model, alias), tensor_at(model, name)
            if (type(a), a.dtype, a.shape, a.device) == (type(b), b.dtype, b.shape, b.device):
                undos.append(tie(model, alias, name))
    return undos
