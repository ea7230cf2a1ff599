"""How one layer is divided: torch's styles for its own layers, and smaller layers of the same kind for ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from potstill.nn import Int4Linear, Int8Linear, MaskedLinear, SparseLinear
from potstill.nn.float_linear import is_conv1d
from potstill.ops.sparse import BLOCK, from_blocks, pack_bits, to_blocks, unpack_bits
from potstill.parallel.layout import Split

State = dict[str, Tensor]

# The dimension of each tensor of a layer's state that outputs index, and the one that inputs index.
_AXES: Mapping[str, tuple[int | None, int | None]] = {
    "weight": (0, 1),
    "mask": (0, 1),
    "bias": (0, None),
    "factor": (None, 0),
}
_KINDS = (Int8Linear, Int4Linear, SparseLinear, MaskedLinear)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer that can be divided: torch's, Conv1D of transformers, or one of ours."""
    return type(module) in (nn.Linear, *_KINDS) or is_conv1d(module)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if is_conv1d(layer):
        inputs, outputs = layer.get_parameter("weight").shape
        return inputs, outputs
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def take(x: Tensor, dim: int, parts: int, ranks: int, rank: int) -> Tensor:
    """The share of ``rank``: of each of ``parts`` pieces of dimension ``dim`` the ``rank``-th of ``ranks`` chunks.

    >>> take(torch.arange(8), 0, 2, 2, 1).tolist()
    [2, 3, 6, 7]
    """
    return torch.cat([piece.chunk(ranks, dim)[rank] for piece in x.chunk(parts, dim)], dim)


def join(shares: Sequence[Tensor], dim: int, parts: int) -> Tensor:
    """The tensor whose shares, of all ranks in order, :func:`take` gave.

    >>> join([torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])], 0, 2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    pieces = [share.chunk(parts, dim) for share in shares]
    return torch.cat([piece for part in zip(*pieces, strict=True) for piece in part], dim)


def why_not(layer: nn.Module, split: Split, ranks: int) -> str:
    """Why ``layer`` cannot be divided among ``ranks``; empty if it can."""
    inputs, outputs = sizes(layer)
    if split.how == "column":
        if outputs % (split.parts * ranks):
            return f"{outputs} outputs in {split.parts} parts cannot be divided among {ranks}"
        return ""
    if getattr(layer, "activation", "none") != "none":
        return "it applies an activation to its whole sum"
    step = layer.group_size if isinstance(layer, Int4Linear) else BLOCK if isinstance(layer, SparseLinear) else 1
    if inputs % (step * ranks):
        return f"{inputs} inputs in groups of {step} cannot be divided among {ranks}"
    return ""


class Entry:
    """Where a tensor that all ranks have enters layers that are split by outputs; its gradient is the sum over ranks.

    Layers that read the same tensor share one entry, so that their gradients are summed before they are sent. ``users``
    is their number: when the last of them has been called, nothing is kept.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.users = 0
        self._left = 0
        self._last: tuple[Tensor, tuple[bool, int], DTensor] | None = None

    def __call__(self, x: Tensor) -> DTensor:
        """``x`` as a replicated DTensor, the same one for all users."""
        key = torch.is_grad_enabled(), 0 if x.is_inference() else x._version
        if self._last is None or self._last[0] is not x or self._last[1] != key:
            self._last = x, key, DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
            self._left = self.users
        entered = self._last[2]
        self._left -= 1
        if self._left <= 0:
            self._last = None
        return entered

    def hook(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook."""
        return (self(args[0]), *args[1:])


class SplitLinear(nn.Module):
    """A linear layer of which this rank computes a share: some outputs ("column"), or sums over some inputs ("row").

    ``layer`` is a smaller layer of the kind of the one that was split. Outputs of a column stay divided. A row's
    partial sums are added up over the ranks, and then the bias, once. Each rank of an int8 or int4 row quantises its
    own share of the inputs, with a scale that fits that share.
    """

    bias: nn.Parameter | None

    def __init__(self, whole: nn.Module, split: Split, mesh: DeviceMesh, entry: Entry) -> None:
        super().__init__()
        self.split, self.mesh, self.entry = split, mesh, entry
        self.kind_of_whole = type(whole).__name__
        self.transposed = is_transposed(whole)
        self.layer = _smaller(whole, split, mesh.size(), mesh.get_local_rank())
        bias = whole._parameters.get("bias") if split.how == "row" else None
        self.register_parameter("bias", bias)  # also when it is None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs, or this rank's of them] -> [..., this rank's outputs, or all]."""
        if self.split.how == "column":
            y: Tensor = self.layer(self.entry(x).to_local(grad_placements=[Partial()]))
            return y
        partial = DTensor.from_local(self.layer(x), self.mesh, [Partial()], run_check=False)
        total = partial.redistribute(placements=[Replicate()]).to_local()
        return total if self.bias is None else total + self.bias.to(total.dtype)

    def extra_repr(self) -> str:
        """Which share of what."""
        return f"{self.split.how} {self.mesh.get_local_rank() + 1} of {self.mesh.size()} of {self.kind_of_whole}"


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The class that a linear layer was made of: FSDP gives modules another one. Conv1D counts as torch's."""
    return next((base for base in type(layer).__mro__ if base in _KINDS), nn.Linear)


def is_transposed(layer: nn.Module) -> bool:
    """Whether its weight is [inputs, outputs]."""
    return is_conv1d(layer) or bool(getattr(layer, "transposed", False))


def dense(kind: type[nn.Module], saved: Mapping[str, Tensor], transposed: bool) -> State:
    """The state of a linear layer with its weights as [outputs, inputs]: no bits, no blocks, nothing transposed.

    Of a sparse layer the inputs are as many as its blocks hold. Undone by :func:`stored`.
    """
    found = {key: value.detach() for key, value in saved.items()}
    if kind is SparseLinear:
        mask, values = found.pop("mask"), found.pop("values")
        columns = mask.shape[1] * 8
        found["weight"] = from_blocks(unpack_bits(mask, columns), values, columns * BLOCK)
    if transposed:
        found = {key: value.t() if value.dim() == 2 else value for key, value in found.items()}
    return found


def stored(kind: type[nn.Module], found: Mapping[str, Tensor], transposed: bool) -> State:
    """The state as the layer saves it, from what :func:`dense` gives."""
    saved = dict(found)
    if kind is SparseLinear:
        mask, saved["values"] = to_blocks(saved.pop("weight"))
        saved["mask"] = pack_bits(mask)
    if transposed:
        saved = {key: value.t().contiguous() if value.dim() == 2 else value for key, value in saved.items()}
    return saved


def _axis(kind: type[nn.Module], name: str, how: str) -> int | None:
    if name in ("scale", "zero"):
        axes: tuple[int | None, int | None] = (0, 1) if kind is Int4Linear else (0, None)
    else:
        axes = _AXES[name]
    return axes[0] if how == "column" else axes[1]


def share(kind: type[nn.Module], found: State, split: Split, ranks: int, rank: int) -> State:
    """Of the state of a whole layer, as :func:`dense` gives it, what ``rank`` keeps in its smaller layer."""
    kept = {}
    for name, value in found.items():
        axis = _axis(kind, name, split.how)
        if not (split.how == "row" and name == "bias"):
            kept[name] = value if axis is None else take(value, axis, split.parts, ranks, rank).contiguous()
    return kept


def joined(kind: type[nn.Module], shares: Sequence[State], split: Split) -> State:
    """The state of the whole layer, as :func:`dense` gives it, from those of all ranks, but for a row's bias."""
    found = {}
    for name in shares[0]:
        axis = _axis(kind, name, split.how)
        values = [state[name] for state in shares]
        found[name] = values[0] if axis is None else join(values, axis, split.parts)
    return found


def _smaller(whole: nn.Module, split: Split, ranks: int, rank: int) -> nn.Module:
    """The layer of one rank, of the same kind, but with weights as [outputs, inputs]."""
    kind, inputs = kind_of(whole), sizes(whole)[0]
    found = dense(kind, whole.state_dict(), is_transposed(whole))
    if kind is SparseLinear:
        found["weight"] = found["weight"][:, :inputs]
    kept = share(kind, found, split, ranks, rank)
    weight = whole.get_parameter("weight")
    new = {"in_features": inputs // (ranks if split.how == "row" else 1), "out_features": len(kept["weight"])}
    config: dict[str, Any] = whole.config() if kind is not nn.Linear else {"dtype": weight.dtype}  # type: ignore[operator]
    changes = {"blocks": 0, "transposed": False}
    config |= {key: value for key, value in changes.items() if key in config}
    with torch.device(weight.device):
        layer = kind(**(config | new | {"bias": "bias" in kept}))
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data.to(whole.get_parameter(name).dtype)
    layer.load_state_dict(stored(kind, kept, transposed=False))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(whole.get_parameter(name).requires_grad)
    return layer.train(whole.training)
