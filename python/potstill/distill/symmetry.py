"""Tests on a run whether features may be exchanged: whether a permutation of them leaves what a model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from potstill.distill.batch import Batch
from potstill.distill.cuts import Cut
from potstill.distill.follow import Followed
from potstill.distill.labels import varying
from potstill.distill.runs import calm, named_tensors, tensors_in

# Between what another order of sums changes, about as much as weights off by up to two roundings do, and what losing
# the order changes, thousands of times more.
_MARGIN = 32.0


def places(wanted: Tensor, present: Tensor, chosen: Mapping[int, int]) -> Tensor:
    """Where on an axis with the labels ``present`` lies what each of the ``wanted`` labels was ``chosen`` to be.

    A label that occurs several times (a channel in a flattened image) takes the places in order. Labels that were not
    chosen stand for themselves.

    >>> places(torch.tensor([1, 1, 2, 2]), torch.tensor([7, 8, 9, 7, 8, 9]), {1: 9, 2: 7})
    tensor([2, 5, 0, 3])
    """
    where: dict[int, list[int]] = {}
    for place, label in enumerate(present.tolist()):
        where.setdefault(label, []).append(place)
    taken: dict[int, int] = {}
    found = []
    for label in wanted.tolist():
        number = taken[label] = taken.get(label, -1) + 1
        found.append(where[chosen.get(label, label)][number])
    return torch.tensor(found, dtype=torch.int64)


def faithful(teacher: nn.Module, followed: Followed, cuts: list[Cut], batch: Batch) -> list[bool]:
    """Which of the ``cuts`` are along a symmetry of the teacher.

    Its features are exchanged at random, blocks with blocks and features with features as the cut would choose them,
    on all axes on which they were seen. If everything that ever uses them was seen, the outputs stay what they were,
    but for rounding; if something else depends on their order, such as rotary positions or a slope per head, they do
    not.
    """
    exchanges = [_exchange(cut) for cut in cuts]
    together = {label: other for exchange in exchanges for label, other in exchange.items()}
    run = _Runs(teacher, followed, batch)
    if run.unchanged(together):
        return [True] * len(cuts)
    return [run.unchanged(exchange) for exchange in exchanges]


class _Runs:
    """Runs of a teacher with its features exchanged, in float32 at least: there rounding is small enough to tell.

    How small depends on the model, so it is measured: what changes if each weight changes by up to two roundings.
    """

    def __init__(self, teacher: nn.Module, followed: Followed, batch: Batch) -> None:
        self._teacher, self._followed = teacher, followed
        batch = batch.to(next(teacher.parameters()).device)
        self._batch = Batch(_wide(batch.args), _wide(batch.kwargs), batch.target)
        self._tensors = {name: _wide(tensor) for name, tensor in named_tensors(teacher).items()}
        self._outputs = self._run(self._tensors)
        self._rounding = self._differences(self._run(self._shaken()), self._outputs)

    def unchanged(self, exchange: Mapping[int, int]) -> bool:
        """Whether the outputs stay."""
        changed = dict(self._tensors)
        for (name, dim), ids in self._followed.axes.items():
            if any(label in exchange for label in ids.tolist()):
                changed[name] = _exchanged(changed[name], dim, ids, exchange)
        differences = self._differences(self._run(changed), self._moved(exchange))
        return all(new <= _MARGIN * old for new, old in zip(differences, self._rounding, strict=True))

    def _shaken(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        changed = dict(self._tensors)
        for name in {name: None for name, _ in self._followed.axes}:
            tensor = changed[name]
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator) - 0.5
                changed[name] = tensor * (1 + noise.to(tensor) * 4 * torch.finfo(tensor.dtype).eps)
        return changed

    @staticmethod
    def _differences(some: Iterable[Tensor], others: Iterable[Tensor]) -> list[float]:
        return [float((a.double() - b.double()).norm()) for a, b in zip(some, others, strict=True)]

    def _run(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        with calm(self._teacher):
            return tensors_in(functional_call(self._teacher, tensors, self._batch.args, self._batch.kwargs))

    def _moved(self, exchange: Mapping[int, int]) -> Iterator[Tensor]:
        # Where the model returns features, they come in the new order.
        for output, coordinates in zip(self._outputs, self._followed.outputs, strict=True):
            for coordinate in coordinates:
                if len(dims := varying(coordinate)) == 1:
                    output = _exchanged(output, min(dims), coordinate.reshape(-1), exchange)
            yield output


def _exchanged(tensor: Tensor, dim: int, ids: Tensor, exchange: Mapping[int, int]) -> Tensor:
    return tensor.index_select(dim, places(ids, ids, exchange).to(tensor.device))


def _exchange(cut: Cut) -> dict[int, int]:
    generator = torch.Generator().manual_seed(0)

    def shuffled(n: int) -> list[int]:
        return torch.randperm(n, generator=generator).tolist()

    order = shuffled(len(cut.given)) if len(cut.own) < len(cut.given) else range(len(cut.given))
    found: dict[int, int] = {}
    for block, i in zip(cut.given, order, strict=True):
        for signature, labels in block.items():
            others = cut.given[i][signature]
            if cut.inner(signature):
                others = [others[j] for j in shuffled(len(others))]
            found.update(zip(labels, others, strict=True))
    return found


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.itemsize < 4 else value
    if isinstance(value, Mapping):
        return {key: _wide(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_wide(item) for item in value)
    return value
