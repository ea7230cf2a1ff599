"""Which numbers of a model's tensors belong to the same feature: labels, and what is known about them.

A label is a whole number that stands for a feature: a unit of the residual stream, a channel, a hidden unit of one
MLP, a dimension of one attention head. A *coordinate* is an int64 tensor of labels with the rank of the tensor that it
describes, and size 1 in every dimension along which the label does not vary; 0 stands for no feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Labels:
    """A union-find structure over labels, and which labels lie inside which (a dimension in its attention head).

    >>> labels = Labels()
    >>> a, b = labels.fresh(3), labels.fresh(3)
    >>> labels.unite(a, b.flip(0))
    >>> labels.root(b).tolist()
    [3, 2, 1]
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._inside: list[Tensor] = []
        self._blocks: dict[tuple[int, ...], int] = {}

    def fresh(self, count: int) -> Tensor:
        """``count`` new labels [count]."""
        first = len(self._parent)
        self._parent = np.append(self._parent, np.arange(first, first + count))
        return torch.arange(first, first + count)

    def root(self, coordinate: Tensor) -> Tensor:
        """The coordinate with each label replaced by the smallest that was united with it."""
        found: Tensor = torch.from_numpy(self._parent[coordinate.numpy()])
        return found

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Element by element, the labels of ``a`` and ``b`` (which broadcast) are the same feature."""
        pairs = self._pairs(a, b)
        if not pairs.numel():
            return
        for one, other in pairs.T.tolist():
            first, second = sorted((self._find(one), self._find(other)))
            self._parent[second] = first
        while not np.array_equal(shorter := self._parent[self._parent], self._parent):
            self._parent = shorter

    def put_inside(self, a: Tensor, b: Tensor) -> None:
        """Element by element, the label of ``a`` lies inside that of ``b``."""
        self._inside.append(self._pairs(a, b))

    def blocks(self, members: Tensor) -> Tensor:
        """For members [n, m]: the labels [n] of the blocks that have just these members."""
        rows, inverse = torch.unique(self.root(members), dim=0, return_inverse=True)
        found = torch.tensor([self._block(tuple(sorted(set(row)))) for row in rows.tolist()], dtype=torch.int64)
        self.put_inside(rows, found[:, None])
        return found[inverse]

    def block_of(self) -> dict[int, int]:
        """The block of each label that lies in one; blocks with a member in common are one block."""
        home: dict[int, int] = {}
        for pairs in self._inside:
            home |= {block: block for block in self.root(pairs[1]).tolist()}  # a feature may be a block of its own
            for member, block in torch.unique(self.root(pairs), dim=1).T.tolist():
                if home.setdefault(member, block) != block:
                    self.unite(torch.tensor([home[member]]), torch.tensor([block]))
        return {int(self._parent[member]): int(self._parent[block]) for member, block in home.items()}

    def _block(self, members: tuple[int, ...]) -> int:
        if members not in self._blocks:
            self._blocks[members] = int(self.fresh(1))
        return self._blocks[members]

    def _pairs(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = torch.broadcast_tensors(self.root(a), self.root(b))
        flat = torch.stack([a.reshape(-1), b.reshape(-1)])
        pairs: Tensor = torch.unique(flat[:, (flat[0] != flat[1]) & (flat != 0).all(0)], dim=1)
        return pairs

    def _find(self, label: int) -> int:
        while self._parent[label] != label:
            label = int(self._parent[label])
        return label


def varying(coordinate: Tensor) -> frozenset[int]:
    """The dimensions along which a coordinate's labels differ."""
    return frozenset(dim for dim, size in enumerate(coordinate.shape) if size > 1)


def compressed(coordinate: Tensor) -> Tensor:
    """The coordinate with size 1 in every dimension along which its labels do not vary."""
    for dim, size in enumerate(coordinate.shape):
        first = coordinate.narrow(dim, 0, 1)
        if size > 1 and (coordinate.stride(dim) == 0 or bool((coordinate == first).all())):
            coordinate = first
    return coordinate


def merged(labels: Labels, coordinates: Sequence[Tensor]) -> list[Tensor]:
    """The coordinates of the result of an element-wise operation, given those of its operands, all of one rank.

    What varies along the same dimensions is the same feature; what varies along fewer is a block of it (a score of each
    head times the head's values). Coordinates along other dimensions stand side by side.
    """
    found: list[Tensor] = []
    for new in coordinates:
        dims = varying(new)
        if any(_related(labels, new, dims, old) for old in found):
            continue
        for old in [old for old in found if varying(old) < dims]:
            labels.put_inside(new, old)
        found = [old for old in found if not varying(old) < dims]
        found.append(new)
    return found


def _related(labels: Labels, new: Tensor, dims: frozenset[int], old: Tensor) -> bool:
    if varying(old) == dims:
        labels.unite(new, old)
    elif varying(old) > dims:
        labels.put_inside(old, new)
    else:
        return False
    return True
