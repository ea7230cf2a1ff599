"""What a pruning criterion is, and the list of them."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from potstill.transform.patterns import NofM, Pattern

Need = Literal["nothing", "norms", "second moments", "gradient", "squared gradient"]
"""What a criterion must know of a layer beside its weight."""

CRITERIA: dict[str, Criterion] = {}


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """What a criterion is told of a layer; weights are [outputs, inputs], all tensors float32 but for the mask.

    - ``weight``: the master weights; ``mask``: those that count now (all of them, unless the layer was masked before).
    - ``gathered``: what the criterion ``needs``; its properties below raise :class:`ValueError` where it does not.
    - ``seed``: that of the config.
    """

    name: str
    weight: Tensor
    mask: Tensor
    gathered: Mapping[Need, Tensor] = field(default_factory=dict)
    seed: int = 0

    @property
    def norms(self) -> Tensor:
        """The Euclidean norm of each input over all rows of the data.

        [1, inputs], or [outputs, inputs] where the outputs of a grouped convolution see different ones.
        """
        return self._gathered("norms")

    @property
    def second_moments(self) -> Tensor:
        """Sum x'x over all rows x of the data, [groups, inputs, inputs]."""
        return self._gathered("second moments")

    @property
    def gradient(self) -> Tensor:
        """The mean over the batches of dL/dw, w as the layer computes with it; also for weights that are masked."""
        return self._gathered("gradient")

    @property
    def squared_gradient(self) -> Tensor:
        """The mean over the batches of (dL/dw)^2, likewise."""
        return self._gathered("squared gradient")

    def _gathered(self, what: Need) -> Tensor:
        if what not in self.gathered:
            raise ValueError(f"the {what} of {self.name} is not known; the criterion has to say needs={what!r}")
        return self.gathered[what]

    def generator(self) -> torch.Generator:
        """A fresh one, seeded by ``seed`` and the layer's name: no other layer has a part in it."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.name}".encode()))


class Criterion(ABC):
    """Says how much each weight matters; :func:`criterion` makes one of a function.

    - ``needs``: what :class:`LayerFacts` must hold, for which ``prune_`` may need ``data`` and ``loss``.
    - ``per_output``: scores are compared within an output only, so that each loses the same number of weights.
    - ``comparable``: scores of different layers are in one unit, so that ``scope="global"`` may rank them together. If
      not, it makes them so, for which they must not be negative; see :mod:`potstill.transform.allocation`.
    """

    name: str
    needs: Need = "nothing"
    per_output: bool = False
    comparable: bool = True

    @abstractmethod
    def scores(self, facts: LayerFacts) -> Tensor:
        """The score of each weight, [outputs, inputs]: the lowest are pruned, of a block that of the lowest mean."""

    def why_not(self, pattern: Pattern) -> str:
        """Why it cannot choose the weights of this pattern."""
        return ""

    def choose(self, facts: LayerFacts, pattern: Pattern, pruned: int, balanced: bool) -> tuple[Tensor, Tensor | None]:
        """The mask [outputs, inputs] without ``pruned`` blocks, and new weights or None for the old ones."""
        scores = self.scores(facts)
        if isinstance(pattern, NofM):
            return pattern.mask(scores), None
        return pattern.mask(scores, pruned, balanced or self.per_output), None

    def __repr__(self) -> str:
        return self.name


class _Function(Criterion):
    """A criterion that is a function of the facts alone."""

    def __init__(self, name: str, function: Callable[[LayerFacts], Tensor]) -> None:
        self.name = name
        self._function = function
        self.__doc__ = function.__doc__

    def scores(self, facts: LayerFacts) -> Tensor:
        """See :class:`Criterion`."""
        scores = self._function(facts)
        if not isinstance(scores, Tensor) or scores.shape != facts.weight.shape:
            given = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"criterion {self.name!r} returned {given} for {facts.name}, expected a score for each weight: a "
                f"tensor {list(facts.weight.shape)}"
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"criterion {self.name!r} gives {facts.name} scores that are NaN or infinite")
        return scores


def register(criterion: Criterion) -> Criterion:
    """Enters a criterion into ``CRITERIA`` under its name; raises :class:`ValueError` if that is taken."""
    if criterion.name in CRITERIA:
        raise ValueError(f"criterion {criterion.name!r} exists already; choose another name")
    CRITERIA[criterion.name] = criterion
    return criterion


def criterion(
    name: str, needs: Need = "nothing", per_output: bool = False, comparable: bool = True
) -> Callable[[Callable[[LayerFacts], Tensor]], Criterion]:
    """A decorator: the function from :class:`LayerFacts` to scores becomes the :class:`Criterion` of this name.

    >>> @criterion("distance from one")
    ... def distance_from_one(facts):
    ...     return (facts.weight - 1).abs()
    >>> _ = CRITERIA.pop("distance from one")
    """

    if needs not in get_args(Need):
        raise ValueError(
            f"criterion {name!r}: needs is {needs!r}, expected one of {', '.join(map(repr, get_args(Need)))}"
        )

    def enter(function: Callable[[LayerFacts], Tensor]) -> Criterion:
        made = _Function(name, function)
        made.needs, made.per_output, made.comparable = needs, per_output, comparable
        return register(made)

    return enter
