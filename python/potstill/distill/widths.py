"""A narrower student: which of the teacher's features it keeps, and its tensors made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from potstill.distill.batch import Batch
from potstill.distill.cuts import Cut, cuts
from potstill.distill.follow import Axis, Each, Followed, follow
from potstill.distill.symmetry import faithful, places

WIDTHS = ("importance", "project")
_ORDERED = "exchanging its features changes what the teacher computes: something that is not cut depends on their order"


@dataclass(frozen=True)
class Width:
    """One set of features of which the student has fewer: ``kept`` of ``of``, on ``axes`` (tensor, dimension).

    ``heads``: the student's and the teacher's number of heads or groups, where these were chosen whole; ``share``: what
    the kept features give to the weights that read them, of what all give (in the sum over the features of the product
    of the Euclidean norms, on the sample).
    """

    axes: tuple[Axis, ...]
    kept: int
    of: int
    heads: tuple[int, int] | None
    share: float

    def __str__(self) -> str:
        name, dim = self.axes[0]
        more = f" and {len(self.axes) - 1} more" if len(self.axes) > 1 else ""
        return f"{name}[{dim}]{more}"

    def summary(self) -> str:
        """Sizes and share in words."""
        whole = "" if self.heads is None else f", {self.heads[1]} -> {self.heads[0]} heads or groups"
        return f"{self.of} -> {self.kept}{whole}: {100 * self.share:.1f} % of what all give"


@dataclass(frozen=True)
class Place:
    """Where on a teacher's axis the student's numbers lie, and what they are multiplied by."""

    index: Tensor
    factor: Tensor

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """The part of a teacher's tensor along ``dim``."""
        part = tensor.index_select(dim, self.index.to(tensor.device))
        if bool((self.factor == 1).all()):
            return part
        shape = [-1 if d == dim % tensor.dim() else 1 for d in range(tensor.dim())]
        return part * self.factor.to(part).reshape(shape)


@dataclass(frozen=True)
class Narrowing:
    """How a student's tensors are cut from its teacher's; ``left`` has the axes that cannot be -> why."""

    widths: list[Width] = field(default_factory=list)
    places: dict[Axis, Place] = field(default_factory=dict)
    left: dict[Axis, str] = field(default_factory=dict)

    def part(self, axis: Axis, tensor: Tensor, dim: int) -> Tensor:
        """What the student has along its ``axis``, of a tensor that is the teacher's along ``dim``."""
        return self.places[axis].of(tensor, dim) if axis in self.places else tensor


def narrow(
    student: nn.Module,
    teacher: nn.Module,
    axes: tuple[Sequence[Axis], Sequence[Axis]],
    source: Callable[[str], str],
    batch: Batch,
    widths: str,
    each: Each | None = None,
) -> Narrowing:
    """Finds what the student, smaller on its ``axes`` (the teacher's are the second), keeps of its teacher.

    A *width* is a set of features: the residual stream, the hidden units of one MLP, the heads of one attention, the
    channels of one convolution. Which axes index the same ones is seen in a run of each model on ``batch`` (see
    :mod:`potstill.distill.follow`) and then tested on the teacher (:mod:`potstill.distill.symmetry`). Keeping the same
    subset on all axes of a width is what a smaller model of the same code computes with; a rotation of the residual
    stream would keep more of its energy, but normalisation works feature by feature and does not commute with it.

    Heads are taken whole where the student has fewer of them. What counts is ``read`` and, with "project", the
    largest part of what the readers see that is not yet a linear combination of the features taken (a Cholesky
    factorisation with pivots of their products: column subset selection), so that of two equal features one is taken.
    """
    given = follow(teacher, axes[1], batch, grams=widths == "project", each=each)
    own = follow(student, axes[0], batch)
    chosen: dict[int, int] = {}
    left: dict[Axis, str] = {}
    made, hopeful = [], []
    for cut in cuts(own, given, source):
        if _in_order(cut, own):
            chosen |= _first(cut)
            made.append(_width(cut, chosen, given))
        elif why := cut.unfit(given):
            left |= dict.fromkeys(cut.axes, why)
        else:
            hopeful.append(cut)
    for cut, good in zip(hopeful, faithful(teacher, given, hopeful, batch), strict=True):
        if good:
            chosen |= _choose(cut, given)
            made.append(_width(cut, chosen, given))
        else:
            left |= dict.fromkeys(cut.axes, _ORDERED)
    return Narrowing(made, _places(own, given, source, chosen, left), left)


def _places(
    own: Followed, given: Followed, source: Callable[[str], str], chosen: Mapping[int, int], left: Mapping[Axis, str]
) -> dict[Axis, Place]:
    factors = {label: _factor(label, other, own, given) for label, other in chosen.items()}
    return {
        (name, dim): Place(
            places(ids, given.axes[source(name), dim], chosen),
            torch.tensor([factors[label] for label in ids.tolist()], dtype=torch.float64),
        )
        for (name, dim), ids in own.axes.items()
        if (name, dim) not in left
    }


def _in_order(cut: Cut, own: Followed) -> bool:
    # A table of positions: the student's are the first.
    return all(dim == 0 and name in own.positions for name, dim in cut.axes)


def _first(cut: Cut) -> dict[int, int]:
    ((own, given),) = ((cut.own[0][s], cut.given[0][s]) for s in cut.own[0])
    return dict(zip(own, given, strict=False))


def _width(cut: Cut, chosen: Mapping[int, int], given: Followed) -> Width:
    worth = _worth(cut, given)
    own = {chosen[label] for block in cut.own for labels in block.values() for label in labels}
    total = sum(worth.values())
    share = sum(worth[label] for label in own) / total if total else 1.0
    whole = len(cut.own) < len(cut.given)
    kept, of = cut.sizes
    return Width(tuple(cut.axes), kept, of, (len(cut.own), len(cut.given)) if whole else None, share)


def _worth(cut: Cut, given: Followed) -> dict[int, float]:
    # What weights read counts; only where nothing is read by weights does what activations are multiplied with.
    labels = [label for block in cut.given for some in block.values() for label in some]
    sums = given.read if any(label in given.read for label in labels) else given.paired
    return {label: sums.get(label, 0.0) for label in labels}


def _choose(cut: Cut, given: Followed) -> dict[int, int]:
    worth = _worth(cut, given)
    value = [sum(worth[label] for labels in block.values() for label in labels) for block in cut.given]
    found: dict[int, int] = {}
    for own, i in zip(cut.own, sorted(_largest(value, len(cut.own))), strict=True):
        for signature, labels in own.items():
            candidates = cut.given[i][signature]
            if cut.inner(signature):
                candidates = _best(candidates, len(labels), given)
            found.update(zip(labels, candidates, strict=True))
    return found


def _largest(values: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def _best(labels: list[int], count: int, given: Followed) -> list[int]:
    sums = given.read if any(label in given.read for label in labels) else given.paired
    order = _pivots(_gram(labels, given), count)
    order += [i for i in _largest([sums.get(label, 0.0) for label in labels], len(labels)) if i not in order]
    return [labels[i] for i in sorted(order[:count])]


def _gram(labels: list[int], given: Followed) -> Tensor:
    place = {label: i for i, label in enumerate(labels)}
    gram = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    for ids, part in given.grams:
        here = [i for i, label in enumerate(ids.tolist()) if label in place]
        if here:
            to = torch.tensor([place[int(ids[i])] for i in here])
            gram[to[:, None], to] += part[here][:, here].double()
    return gram


def _pivots(gram: Tensor, count: int) -> list[int]:
    # Cholesky with pivots: ``remains`` is the diagonal of what is left when those taken are projected out of all.
    remains = gram.diagonal().clone()
    floor = remains.max() * len(gram) * torch.finfo(torch.float32).eps  # the products were summed in float32
    factor = gram.new_zeros(len(gram), count)
    found: list[int] = []
    for step in range(count):
        pivot = int(remains.argmax())
        if remains[pivot] <= floor:
            break
        column = (gram[:, pivot] - factor[:, :step] @ factor[pivot, :step]) / remains[pivot].sqrt()
        factor[:, step] = column
        remains -= column.square()
        remains[pivot] = 0.0
        found.append(pivot)
    return found


def _factor(label: int, other: int, own: Followed, given: Followed) -> float:
    # Scores are scale x queries x keys; each of the two takes half of what the student's scale differs by.
    if label in own.scales and other in given.scales:
        return math.sqrt(given.scales[other] / own.scales[label])
    return 1.0
