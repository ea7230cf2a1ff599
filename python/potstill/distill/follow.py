"""Runs a model once and follows each feature through it: which axes of which tensors index the same features.

What is followed are labels, see :mod:`potstill.distill.labels`. The run is watched at the level of torch's own
operators, where every model, whatever its Python looks like, is made of a few dozen kinds: those that only move
numbers are applied to the labels as well; element-wise ones unite the labels of their operands; products unite what
they sum over. Through an operator that is not known here nothing is followed. So what is found may lack a connection,
but :mod:`potstill.distill.symmetry` sees whether it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from potstill.distill.batch import Batch
from potstill.distill.labels import Labels, compressed, merged, varying
from potstill.distill.runs import calm, named_tensors, tensors_in

Axis = tuple[str, int]  # a tensor's name and one of its dimensions
# Called with a weight's name and the operator that uses it; returns what to put in the place of its result.
Each = Callable[[str, str, Sequence[Any], Any, Callable[[], Any]], Any]

WEIGHT = {"mm": 1, "addmm": 2, "convolution": 1, "native_layer_norm": 2}  # the position of the weight
_SAME = {"clone", "_to_copy", "contiguous", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "native_dropout"}
_MOVES = {"_unsafe_view", "index_select", "index", "gather", "repeat", "roll", "flip", "stack"}
_POINTWISE = {"hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "masked_fill"}  # lack torch's tag
_SUMS = {"sum", "mean", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm", "logsumexp"}


@dataclass
class Followed:
    """What one run showed of a model.

    ``axes`` has the labels of each axis asked for; ``blocks`` the block (attention head, group) of the labels that lie
    in one; ``read`` what each feature gives to the weights that read it: the sum over them of the Euclidean norm of its
    values times that of the weight's column; ``paired`` the same for products of two activations (queries and keys);
    ``scales`` the factor of the attention scores, by label; ``grams`` the features read by each weight, times the
    norms of its columns, multiplied with each other: (labels [n], [n, n]); ``positions`` the tables of embeddings that
    were read in order; ``outputs`` the coordinates of each tensor that the model returned.
    """

    axes: dict[Axis, Tensor]
    blocks: dict[int, int]
    read: dict[int, float]
    paired: dict[int, float]
    scales: dict[int, float]
    grams: list[tuple[Tensor, Tensor]]
    positions: set[str]
    outputs: list[list[Tensor]]


def follow(
    model: nn.Module, axes: Iterable[Axis], batch: Batch, *, grams: bool = False, each: Each | None = None
) -> Followed:
    """Runs ``model`` on ``batch`` in evaluation mode, without gradients, and follows the features of ``axes``."""
    watch = _Watch(model, axes, grams, each)
    batch = batch.to(next(model.parameters()).device)
    with calm(model), watch:
        output = batch.feed(model)
    return watch.result(output)


@dataclass
class _Sums:
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, ids: Tensor, values: Tensor) -> None:
        self.parts.append((ids.reshape(-1), values.reshape(-1).cpu()))

    def by(self, labels: Labels) -> dict[int, float]:
        total: dict[int, float] = {}
        for ids, values in self.parts:
            for label, value in zip(labels.root(ids).tolist(), values.tolist(), strict=True):
                total[label] = total.get(label, 0.0) + value
        return total


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module, axes: Iterable[Axis], grams: bool, each: Each | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._labels = Labels()
        self._coordinates = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()  # of weights, and of views of them
        self._axes: dict[Axis, Tensor] = {}
        self._each = each
        self._read, self._paired = _Sums(), _Sums()
        self._scales: list[tuple[Tensor, float]] = []
        self._grams: list[tuple[Tensor, Tensor]] | None = [] if grams else None
        self._positions: set[str] = set()
        tensors = named_tensors(model)
        for name, dim in axes:
            tensor = tensors[name]
            self._axes[name, dim] = self._labels.fresh(tensor.shape[dim])
            shape = [1] * dim + [-1] + [1] * (tensor.dim() - dim - 1)
            self._coordinates.setdefault(tensor, []).append(self._axes[name, dim].view(shape))
            self._names[tensor] = name

    def result(self, output: Any) -> Followed:
        labels = self._labels
        blocks = labels.block_of()  # unites blocks, so it comes first
        return Followed(
            {axis: labels.root(ids) for axis, ids in self._axes.items()},
            blocks,
            self._read.by(labels),
            self._paired.by(labels),
            {label: scale for ids, scale in self._scales for label in labels.root(ids).reshape(-1).tolist()},
            [(labels.root(ids), gram) for ids, gram in self._grams or ()],
            self._positions,
            [[labels.root(c) for c in self._of(leaf)] for leaf in tensors_in(output)],
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        name = name if name.startswith("__") else name.rstrip("_")  # add_ is add
        weight = args[WEIGHT[name]] if name in WEIGHT else None
        if self._each is not None and weight is not None and weight in self._names:
            out = self._each(self._names[weight], name, args, out, lambda: func(*args, **kwargs))
        if any(self._of(tensor) for tensor in tensors_in([*args, *kwargs.values()])):
            self._rule(func, name)(func, name, args, kwargs, out)
        return out

    def _rule(self, func: Any, name: str) -> Callable[..., None]:
        if name in _SAME:
            return self._keep
        if name in ("cat", "constant_pad_nd"):
            return self._cat if name == "cat" else self._pad
        if func.is_view or name in _MOVES:
            return self._move
        if torch.Tag.pointwise in func.tags or name in _POINTWISE:
            return self._pointwise
        if name in _SUMS:
            return self._sum
        if "pool" in name or name.startswith("upsample"):
            return self._pool
        if name.startswith("_scaled_dot_product"):
            return self._attention
        return {
            "mm": self._mm,
            "addmm": self._mm,
            "bmm": self._bmm,
            "baddbmm": self._bmm,
            "convolution": self._convolution,
            "embedding": self._embedding,
            "native_layer_norm": self._layer_norm,
            "_fused_rms_norm": self._layer_norm,
            "native_batch_norm": self._channel_norm,
            "cudnn_batch_norm": self._channel_norm,
            "_native_batch_norm_legit_no_training": self._channel_norm,
            "native_group_norm": self._channel_norm,
        }.get(name, _lose)

    def _of(self, tensor: Tensor | None) -> list[Tensor]:
        return [] if tensor is None else self._coordinates.get(tensor, [])

    def _set(self, tensor: Tensor, coordinates: Iterable[Tensor]) -> None:
        kept = [compressed(self._labels.root(c)) for c in coordinates]
        self._coordinates[tensor] = [c for c in kept if varying(c)]

    def _keep(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        self._set(_first(out), self._of(args[0]))

    def _move(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        x = args[0]
        if isinstance(x, (tuple, list)):  # stack
            per = [self._moved(func, [self._dense(t, i) for t in x], args, kwargs) for i in range(self._most(x))]
        else:
            function = torch.reshape if name in ("view", "_unsafe_view") else func
            per = [self._moved(function, c.expand(x.shape), args, kwargs) for c in self._of(x)]
        pieces = [out] if isinstance(out, Tensor) else out
        for i, piece in enumerate(pieces):
            self._set(piece, [new if piece is out else new[i] for new in per])
            if isinstance(x, Tensor) and x in self._names:
                self._names[piece] = self._names[x]

    @staticmethod
    def _moved(func: Any, coordinate: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        rest = [[t.cpu() if isinstance(t, Tensor) else t for t in a] if isinstance(a, list) else a for a in args[1:]]
        return func(coordinate, *(a.cpu() if isinstance(a, Tensor) else a for a in rest), **kwargs)

    def _most(self, tensors: Sequence[Tensor]) -> int:
        return max(len(self._of(t)) for t in tensors)

    def _dense(self, tensor: Tensor, i: int) -> Tensor:
        found = self._of(tensor)
        return (found[i] if i < len(found) else torch.zeros([1] * tensor.dim(), dtype=torch.int64)).expand(tensor.shape)

    def _cat(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
        tensors = [t for t in args[0] if t.dim() == out.dim()]  # an empty vector goes with anything
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        found = [c for t in tensors for c in self._of(t) if dim not in varying(c)]
        for other in found[1:]:  # one list of tokens after another: the features are the same
            if varying(other) == varying(found[0]):
                self._labels.unite(found[0], other)
        pieces = [[self._dense(t, i) for t in tensors] for i in range(self._most(tensors))]
        self._set(out, [torch.cat(piece, dim) for piece in pieces])

    def _pad(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
        x, widths = args[0], args[1]  # from the last dimension on, two each
        added = {x.dim() - 1 - i // 2 for i, width in enumerate(widths) if width}
        self._set(
            out, [torch.constant_pad_nd(c.expand(x.shape), widths) if varying(c) & added else c for c in self._of(x)]
        )

    def _pointwise(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        rank = out.dim()
        coordinates = [
            c.reshape([1] * (rank - c.dim()) + list(c.shape))
            for tensor in tensors_in([*args, *kwargs.values()])
            for c in self._of(tensor)
        ]
        self._set(out, merged(self._labels, coordinates))

    def _sum(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        x, out = args[0], _first(out)
        position = 2 if name == "linalg_vector_norm" else 1
        dims = args[position] if len(args) > position else kwargs.get("dim")
        dims = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {dim % x.dim() for dim in dims}
        found = []
        for coordinate in self._of(x):
            if varying(coordinate) & gone:
                coordinate = self._blocks(coordinate, gone)
            if out.dim() < x.dim():
                coordinate = coordinate.reshape([n for dim, n in enumerate(coordinate.shape) if dim not in gone])
            found.append(coordinate)
        self._set(out, found)

    def _blocks(self, coordinate: Tensor, gone: Iterable[int]) -> Tensor:
        # The labels of what remains after a sum over the dimensions ``gone``, of size 1 there.
        stays = [dim for dim in range(coordinate.dim()) if dim not in set(gone)]
        shape = [n if dim in stays else 1 for dim, n in enumerate(coordinate.shape)]
        if all(n == 1 for n in shape):
            return torch.zeros(shape, dtype=torch.int64)
        rows = coordinate.permute(*stays, *gone).reshape(torch.Size(shape).numel(), -1)
        return self._labels.blocks(rows).reshape(shape)

    def _pool(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        first = _first(out)
        self._set(first, [c for c in self._of(args[0]) if varying(c) <= {0, 1}])

    def _mm(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
        *bias, x, y = args
        found = self._product(x, y, "nk", "km", "nm")
        self._with(out, found, bias)

    def _bmm(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
        *bias, x, y = args
        found = self._product(x, y, "bnk", "bkm", "bnm")
        self._with(out, found, bias)

    def _with(self, out: Tensor, found: list[Tensor], bias: Iterable[Tensor | None]) -> None:
        for addend in bias:
            for c in self._of(addend):
                found.append(c.reshape([1] * (out.dim() - c.dim()) + list(c.shape)))
        self._set(out, merged(self._labels, found))

    def _convolution(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
        x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        inner, across = "stu"[: x.dim() - 2], "vwx"[: x.dim() - 2]
        if groups == 1:
            letters = "co" if transposed else "oc"
            found = self._product(x, weight, "nc" + inner, letters + across, "no" + "abd"[: x.dim() - 2])
        elif groups == x.shape[1] == out.shape[1]:  # depthwise: a channel stays itself
            each = [c.reshape([1, -1] + [1] * (x.dim() - 2)) for c in self._of(weight) if varying(c) == {0}]
            found = merged(self._labels, [*(c for c in self._of(x) if varying(c) == {1}), *each])
        else:
            return
        found += [c.reshape([1, -1] + [1] * (x.dim() - 2)) for c in self._of(bias)]
        self._set(out, merged(self._labels, found))

    def _embedding(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
        weight, indices = args[0], args[1]
        if indices.dim() and indices.shape[-1] > 1 and bool((indices.diff(dim=-1) == 1).all()):
            self._positions.add(self._names.get(weight, ""))
        shape = [1] * (out.dim() - 1) + [-1]
        self._set(out, [c.reshape(shape) for c in self._of(weight) if varying(c) == {1}])

    def _layer_norm(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        self._pointwise(func, name, [a for a in args if isinstance(a, Tensor)], {}, _first(out))

    def _channel_norm(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        x, first = args[0], _first(out)
        found = list(self._of(x))
        vectors = [c for t in args[1:] if isinstance(t, Tensor) for c in self._of(t)]
        found += [c.reshape([1, -1] + [1] * (x.dim() - 2)) for c in vectors]
        found = merged(self._labels, found)
        if name == "native_group_norm":
            for coordinate in found:
                if varying(coordinate) == {1}:
                    self._labels.blocks(coordinate.reshape(args[6], -1))
        self._set(first, found)

    def _attention(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        q, k, v = args[:3]
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        keys, values = ([_repeated(c, q.shape[1] // t.shape[1]) for c in self._of(t)] for t in (k, v))
        self._scales += [(c, scale) for c in self._of(q)]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = self._summed(q, k, self._of(q), keys, "bhtd", "bhsd", "bhts", self._paired)
        # A bias of the scores per head; a mask has no features.
        bias = [c for t in tensors_in([*args[3:], *kwargs.values()]) for c in self._of(t) if c.dim() == 4]
        self._set(_first(out), merged(self._labels, [*values, *scores, *bias]))

    def _product(self, x: Tensor, y: Tensor, x_letters: str, y_letters: str, out_letters: str) -> list[Tensor]:
        weighs = y in self._names
        sums = self._read if weighs else self._paired
        found = self._summed(x, y, self._of(x), self._of(y), x_letters, y_letters, out_letters, sums)
        if weighs and self._grams is not None:
            self._gram(x, y, x_letters, y_letters, self._grams)
        return merged(self._labels, found)

    def _summed(
        self, x: Tensor, y: Tensor, xs: list[Tensor], ys: list[Tensor], x_in: str, y_in: str, to: str, sums: _Sums
    ) -> list[Tensor]:
        # A product in Einstein's notation: what both operands have and the result has not is summed over.
        letters = "".join(sorted({*x_in, *y_in}))
        gone = {letters.index(letter) for letter in {*x_in} & {*y_in} - {*to}}
        mine, theirs = ([_aligned(c, own, letters) for c in cs] for cs, own in ((xs, x_in), (ys, y_in)))
        found = [c for c in (*mine, *theirs) if not varying(c) & gone]
        for a in (c for c in mine if varying(c) & gone):
            for b in (c for c in theirs if varying(c) & gone):
                self._labels.unite(a, b)
                a = compressed(self._labels.root(a))  # heads that share their keys are one
                norms = [_norms(t, own, letters, varying(a)) for t, own in ((x, x_in), (y, y_in))]
                sums.add(a, (norms[0] * norms[1]).expand(a.shape))
                found.append(self._blocks(a, gone))
        return [_aligned(c, letters, to) for c in found]

    def _gram(self, x: Tensor, y: Tensor, x_in: str, y_in: str, grams: list[tuple[Tensor, Tensor]]) -> None:
        letter = (set(x_in) & set(y_in)).pop()
        dim, row = x_in.index(letter), y_in.index(letter)
        for coordinate in self._of(x):
            ids = self._labels.root(coordinate.reshape(-1))
            if varying(coordinate) == {dim} and len(ids.unique()) == len(ids):
                features = x.movedim(dim, -1).reshape(-1, len(ids)).float()
                features = features * y.movedim(row, 0).reshape(len(ids), -1).float().norm(dim=1)
                grams.append((ids, (features.T @ features).cpu()))


def _lose(func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    """An operator that is not known: nothing is followed through it."""


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else tensors_in(out)[0]


def _repeated(coordinate: Tensor, times: int) -> Tensor:
    return coordinate.repeat_interleave(times, dim=1) if coordinate.shape[1] > 1 else coordinate


def _aligned(x: Tensor, letters: str, target: str) -> Tensor:
    # Drops the dimensions (of size 1) that the target lacks, orders the others, adds those of size 1 that it needs.
    for dim in reversed(range(len(letters))):
        if letters[dim] not in target:
            x = x.select(dim, 0)
    letters = "".join(letter for letter in letters if letter in target)
    x = x.permute([letters.index(letter) for letter in target if letter in letters])
    for dim, letter in enumerate(target):
        if letter not in letters:
            x = x.unsqueeze(dim)
    return x


def _norms(x: Tensor, own: str, letters: str, kept: frozenset[int]) -> Tensor:
    gone = [dim for dim, letter in enumerate(own) if letters.index(letter) not in kept]
    norms = x.float().square()
    if gone:
        norms = norms.sum(gone, keepdim=True)
    return _aligned(norms.sqrt().cpu(), own, letters)
