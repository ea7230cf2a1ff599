"""The state of a whole model from its parts on all ranks, and back."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from potstill.nn import KINDS, SparseLinear
from potstill.parallel.styles import SplitLinear, State, dense, joined, kind_of, share, sizes, stored

_OURS = tuple(KINDS.values())


def fingerprint(model: nn.Module) -> list[tuple[str, str, int]]:
    """The name, form and checksum of each tensor of ``model``'s state."""
    return [
        (name, f"{value.dtype} {list(value.shape)}", zlib.crc32(_bytes(value)))
        for name, value in model.state_dict().items()
    ]


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def settle(model: nn.Module) -> None:
    """Puts away the gathered parameters that FSDP leaves in ``model`` after a forward pass without a backward pass.

    What is written to these would be lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(model: nn.Module) -> State:
    """What the ``state_dict`` of the unsplit model would be, on the CPU; all ranks must call it."""
    settle(model)
    found: State = {}
    for name, module in owners(model):
        own = _whole_split(module) if isinstance(module, SplitLinear) else _own(module)
        found |= {f"{name}.{key}" if name else key: value.to("cpu", copy=True) for key, value in own.items()}
    return found


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with a state of their own; one of ours counts as one, with all that is inside."""
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, (SplitLinear, *_OURS)):
            inside.append(f"{name}." if name else "")
        yield name, module


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they lie on this rank."""
    whole = isinstance(module, (SplitLinear, *_OURS))
    owners = module.named_modules() if whole else [("", module)]
    found: dict[str, Tensor] = {}
    for prefix, owner in owners:
        kept = {k: v for k, v in owner._buffers.items() if k not in owner._non_persistent_buffers_set}
        found |= {
            f"{prefix}.{key}" if prefix else key: value.detach()
            for key, value in (*owner._parameters.items(), *kept.items())
            if value is not None
        }
    return found


def _own(module: nn.Module) -> State:
    raw = {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in tensors(module).items()}
    if not isinstance(module, _OURS):
        return raw
    return {key: value.detach() for key, value in _with(module, raw).state_dict().items()}


def _with(module: nn.Module, raw: Mapping[str, Tensor]) -> nn.Module:
    """A layer of ours like ``module`` whose tensors are ``raw``, in the form in which they lie in memory."""
    fresh = _empty(module)
    for key, value in raw.items():
        owner, _, name = key.rpartition(".")
        part = fresh.get_submodule(owner)
        if name in part._parameters:
            part._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            part._buffers[name] = value
    return fresh


def _empty(module: nn.Module) -> nn.Module:
    """One of the same configuration, of the same dtypes and on the same device, on which the form in memory depends."""
    kind = next(base for base in type(module).__mro__ if base in _OURS)  # FSDP gives modules another class
    with torch.device(next(iter(tensors(module).values())).device):
        fresh: nn.Module = kind(**module.config())  # type: ignore[operator]
    for key, value in tensors(module).items():
        owner, _, name = key.rpartition(".")
        own: Tensor = getattr(fresh.get_submodule(owner), name)
        own.data = own.data.to(value.dtype)
    return fresh


def _whole_split(module: SplitLinear) -> State:
    """Of a split layer, the state of the whole one."""
    raw = {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in tensors(module).items()}
    mine = {key.removeprefix("layer."): value for key, value in raw.items() if key.startswith("layer.")}
    kind = kind_of(module.layer)
    if kind is not nn.Linear:
        mine = dict(_with(module.layer, mine).state_dict())
    mine = _inner(dense(kind, mine, transposed=False), module)
    found = joined(kind, _exchange(mine, module.mesh), module.split)
    if "bias" in raw:
        found["bias"] = raw["bias"]
    return stored(kind, found, module.transposed)


def _inner(found: State, module: SplitLinear) -> State:
    """Without the inputs that only fill up the last byte of a sparse layer's mask."""
    if kind_of(module.layer) is SparseLinear:
        found["weight"] = found["weight"][:, : sizes(module.layer)[0]]
    return found


def _exchange(mine: State, mesh: DeviceMesh) -> list[State]:
    """The states of all ranks of ``mesh``, whose shares may have different sizes."""
    group, ranks = mesh.get_group(), mesh.size()
    shapes: list[Any] = [None] * ranks
    dist.all_gather_object(shapes, {key: value.shape for key, value in mine.items()}, group=group)
    everyone: list[State] = [{} for _ in range(ranks)]
    for key, value in mine.items():
        own = value.contiguous().flatten().view(torch.uint8)
        item = value.element_size()
        padded = own.new_zeros(max(one[key].numel() for one in shapes) * item)
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(gathered, padded, group=group)
        for rank, flat in enumerate(gathered):
            shape = shapes[rank][key]
            everyone[rank][key] = flat[: shape.numel() * item].view(value.dtype).view(shape)
    return everyone


def of_all_stages(mine: State, mesh: DeviceMesh) -> State:
    """The states of all stages of a pipeline in one."""
    group = mesh.get_group()
    kinds: list[Any] = [None] * mesh.size()
    dist.all_gather_object(kinds, {key: (value.shape, value.dtype) for key, value in mine.items()}, group=group)
    found: State = {}
    for stage, names in enumerate(kinds):
        for key, (shape, dtype) in names.items():
            if key not in found:
                own = stage == mesh.get_local_rank()
                found[key] = mine[key].contiguous() if own else torch.empty(shape, dtype=dtype)
                dist.broadcast(found[key].view(torch.uint8) if shape else found[key], group=group, group_src=stage)
    return found


def unused_by_all(mine: set[str], mesh: DeviceMesh) -> set[str]:
    """The names that no stage has a use for."""
    everyone: list[Any] = [None] * mesh.size()
    dist.all_gather_object(everyone, mine, group=mesh.get_group())
    return set.intersection(*everyone)


@torch.no_grad()
def load(model: nn.Module, whole: Mapping[str, Tensor]) -> set[str]:
    """Copies this rank's part of ``whole`` into ``model``; returns the names that it has no use for.

    Raises :class:`ValueError` for what does not fit.
    """
    settle(model)
    left = dict(whole)
    for name, module in owners(model):
        prefix = f"{name}." if name else ""
        if isinstance(module, (SplitLinear, *_OURS)):
            own = {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}
        else:
            own = {key: left.pop(prefix + key) for key in tensors(module) if prefix + key in left}
        _load_one(prefix, module, own)
    return set(left)


def _load_one(prefix: str, module: nn.Module, own: State) -> None:
    raw = own
    if isinstance(module, SplitLinear):
        raw = _share_of(module, own, prefix)
    elif isinstance(module, _OURS):
        raw = tensors(_loaded(_empty(module), own, prefix))
    here = tensors(module)
    if odd := sorted(raw.keys() ^ here.keys()):
        lacks = "model" if odd[0] in raw else "state"
        raise ValueError(f"Plan: the {lacks} lacks {prefix + odd[0]!r}")
    for key, target in here.items():
        _copy(prefix + key, target, raw[key])


def _share_of(module: SplitLinear, own: State, prefix: str) -> State:
    kind, mesh = kind_of(module.layer), module.mesh
    missing = sorted({"mask", "values"} - own.keys()) if kind is SparseLinear else ["weight"][: "weight" not in own]
    if missing:
        raise ValueError(f"Plan: the state lacks {prefix + missing[0]!r}")
    found = dense(kind, own, module.transposed)
    bias = {"bias": found["bias"]} if module.split.how == "row" and "bias" in found else {}
    if kind is SparseLinear:
        inputs = sizes(module.layer)[0] * (mesh.size() if module.split.how == "row" else 1)
        found["weight"] = found["weight"][:, :inputs]
    kept = share(kind, found, module.split, mesh.size(), mesh.get_local_rank())
    if kind is not nn.Linear:
        kept = tensors(_loaded(_empty(module.layer), stored(kind, kept, transposed=False), prefix))
    return {f"layer.{key}": value for key, value in kept.items()} | bias


def _loaded(layer: nn.Module, own: State, name: str) -> nn.Module:
    try:
        layer.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"Plan: the state does not fit {name!r}: {error}") from error
    return layer


def _copy(name: str, target: Tensor, value: Tensor) -> None:
    part = value.to(target.device)
    if isinstance(target, DTensor):
        names = target.device_mesh.mesh_dim_names or ()
        # FSDP divides what this rank of the tensor dimension has: that dimension first.
        for dim in sorted(range(len(names)), key=lambda d: names[d] != "tp"):
            placement = target.placements[dim]
            if not placement.is_replicate():
                part = _chunk(part, placement.dim, target.device_mesh, dim)  # type: ignore[attr-defined]
        target = target.to_local()
    if part.shape != target.shape or part.dtype != target.dtype:
        raise ValueError(
            f"Plan: {name} is {value.dtype} {list(value.shape)} in the state, of which this rank's share is "
            f"{list(part.shape)}; expected {target.dtype} {list(target.shape)}"
        )
    target.copy_(part)


def _chunk(x: Tensor, axis: int, mesh: DeviceMesh, dim: int) -> Tensor:
    chunks = x.chunk(mesh.size(dim), axis)
    rank = mesh.get_local_rank(dim)
    return chunks[rank] if rank < len(chunks) else x.narrow(axis, 0, 0)
