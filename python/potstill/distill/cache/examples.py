"""A data set whose examples carry their places in it, and what tells one example from another."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from potstill.distill.batch import Batch, Indexed

Collate = Callable[[list[Any]], Any]


class IndexedDataset(Dataset[Indexed]):
    """The items of a map-style data set, each with its place: :class:`Indexed`, which torch's own collate keeps.

    >>> examples = IndexedDataset([(torch.zeros(2), 0), (torch.ones(2), 1)])
    >>> examples[1]
    Indexed(item=(tensor([1., 1.]), 1), index=1)
    >>> next(iter(torch.utils.data.DataLoader(examples, batch_size=2))).index
    tensor([0, 1])
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Indexed:
        return Indexed(self.dataset[index], index % len(self))


class collate_indexed:  # noqa: N801 - used as a function; a class, as a loader's workers must be able to pickle it
    """Makes your ``collate_fn`` one for an :class:`IndexedDataset`: it is given the items, without their places.

    >>> pad = collate_indexed(lambda items: (torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])))
    >>> batch = pad([Indexed((torch.zeros(2), 5), 8), Indexed((torch.ones(2), 6), 3)])
    >>> batch.index, batch.item[1]
    (tensor([8, 3]), tensor([5, 6]))
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Indexed]) -> Indexed:
        """One batch of them."""
        return Indexed(self.collate([item for item, _ in items]), torch.tensor([index for _, index in items]))


def described(batch: Batch, count: int) -> dict[str, str]:
    """dtype and shape of each input tensor of one example; :class:`ValueError` if one is no batch of ``count``."""
    found = {}
    for name, tensor in _tensors(batch):
        if tensor.dim() == 0 or tensor.shape[0] != count:
            raise ValueError(
                f"CachedTeacher: the input {name} has the shape {list(tensor.shape)} in a batch of {count} examples; "
                "its first dimension must be the examples"
            )
        found[name] = f"{tensor.dtype} {list(tensor.shape[1:])}".removeprefix("torch.")
    return found


def checksums(batch: Batch, count: int) -> NDArray[np.uint32]:
    """CRC32 of the bytes of each example's input tensors, [count]."""
    found = np.zeros(count, np.uint32)
    for _, tensor in _tensors(batch):
        if tensor.numel():
            rows = tensor.detach().cpu().contiguous().reshape(count, -1).view(torch.uint8).numpy()
            found[:] = [zlib.crc32(row, int(before)) for row, before in zip(rows, found, strict=True)]
    return found


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for place, value in enumerate(batch.args):
        yield from _named(str(place), value)
    for name in sorted(batch.kwargs):
        yield from _named(name, batch.kwargs[name])


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _named(f"{name}.{key}", value[key])
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from _named(f"{name}.{place}", item)
