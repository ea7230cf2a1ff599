"""How many blocks each layer loses, so that all together are as sparse as was asked for.

Each function returns the number of blocks that each layer loses. The sums are exact but for :func:`uniform`, which
rounds in each layer. A partial block counts as one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.transform.patterns import rounded


def uniform(blocks: Sequence[int], sparsity: float) -> list[int]:
    """The same share of every layer.

    >>> uniform([10, 100], 0.75)
    [8, 75]
    """
    return [rounded(sparsity * count) for count in blocks]


def ranked(scores: Sequence[Tensor], sparsity: float) -> list[int]:
    """The blocks with the lowest ``scores`` of all layers; of equal ones those of the first layer.

    >>> ranked([torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0, 4.0])], 0.6)
    [1, 2]
    """
    together = torch.cat([each.flatten() for each in scores])
    lowest = together.argsort(stable=True)[: rounded(sparsity * len(together))]
    ends = torch.tensor([each.numel() for each in scores], device=lowest.device).cumsum(0)
    places = torch.bucketize(lowest, ends, right=True)
    return [int(count) for count in places.bincount(minlength=len(scores))]


def relative(scores: Tensor) -> Tensor:
    """What each of ``scores``, not negative, is worth beside those of its layer that are not lower: LAMP.

    s^2 / sum of t^2 over the scores t >= s: the share of what is left that its removal takes, if the lower ones are
    gone already. So a layer's scale does not matter, as it should not where layers with ReLU between them may trade
    factors, and the last block of a layer has the highest score there is, 1. Lee et al. 2021, "Layer-adaptive Sparsity
    for the Magnitude-based Pruning". Of equal scores the first counts as lower.

    >>> relative(torch.tensor([3.0, 4.0]))
    tensor([0.3600, 1.0000])
    """
    ordered, order = scores.flatten().square().sort(stable=True)
    left = ordered.flip(0).cumsum(0).flip(0)
    shares = torch.empty_like(ordered)
    shares[order] = torch.where(left > 0, ordered / left, 0.0)
    return shares.view_as(scores)


def erk(shapes: Sequence[Sequence[int]], blocks: Sequence[int], sparsity: float) -> list[int]:
    """Erdos-Renyi-Kernel: the density of a layer is in proportion to the sum of its weight's sizes over their product.

    So the number of weights that stay grows with the sum, (inputs + outputs) of a linear layer, and the larger a layer,
    the sparser. Densities above 1 become 1, and the factor is such that the whole is as sparse as asked. Mocanu et al.
    2018; with the kernel's sizes Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners".

    >>> erk([(100, 100), (10, 100)], [10000, 1000], 0.9)
    [9290, 610]
    """
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    wanted = sum(blocks) - rounded(sparsity * sum(blocks))
    dense: set[int] = set()
    while True:
        others = [i for i in range(len(blocks)) if i not in dense]
        left = wanted - sum(blocks[i] for i in dense)
        factor = left / sum(raw[i] * blocks[i] for i in others) if others else 0.0
        over = {i for i in others if factor * raw[i] > 1.0}
        if not over:
            break
        dense |= over
    return _exact([0.0 if i in dense else (1.0 - factor * raw[i]) * n for i, n in enumerate(blocks)])


def _exact(counts: Sequence[float]) -> list[int]:
    """Whole numbers with the same sum (which is whole), each less than 1 away: the largest remainders go up."""
    floors = [math.floor(count + 1e-9) for count in counts]
    missing = round(math.fsum(counts)) - sum(floors)
    order = sorted(range(len(counts)), key=lambda i: floors[i] - counts[i])
    for i in order[:missing]:
        floors[i] += 1
    return floors


def cheapest(curves: Sequence[Sequence[tuple[int, float]]], pruned: int) -> list[int]:
    """The numbers of blocks, with the sum ``pruned``, for which the sum of the errors is least.

    A curve is the errors of a layer at some numbers of lost blocks, in rising order; between them the error is taken as
    linear, and where the line from one to another lies below those between, the line is. The error at none is 0. On
    such convex curves it is best to spend each block where the slope is least. Raises :class:`ValueError` if the curves
    end before ``pruned``.

    >>> cheapest([[(5, 1.0), (10, 8.0)], [(10, 3.0)]], 8)
    [5, 3]
    """
    slopes = []
    for layer, curve in enumerate(curves):
        hull = _hull([(0, 0.0), *curve])
        for (start, low), (stop, high) in itertools.pairwise(hull):
            slopes.append(((high - low) / (stop - start), layer, stop - start))
    counts, left = [0] * len(curves), pruned
    for _, layer, most in sorted(slopes):
        taken = min(left, most)
        counts[layer] += taken
        left -= taken
    if left:
        raise ValueError(f"cheapest: {pruned} blocks are to go, {left} more than the curves reach")
    return counts


def _hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of points whose first coordinate rises."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull
