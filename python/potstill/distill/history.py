"""The record of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Epoch:
    """One pass over the loader.

    ``epoch`` counts from 1; ``step`` is the number of optimiser steps taken by its end; ``loss`` the mean of its steps'
    losses; ``lr`` the first parameter group's learning rate at its end; ``seconds`` the time it took, validation
    included; ``validation`` what ``validate`` returned (a single number is filed under ``"value"``); ``terms`` what
    each strategy, times its weight, contributed to the loss.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    seconds: float
    validation: dict[str, float]
    terms: dict[str, float] = field(default_factory=dict)


@dataclass
class History:
    """Every epoch's record, and every optimiser step's loss in order; plain numbers throughout, ready for JSON.

    >>> history = History([Epoch(1, 2, 0.75, 0.1, 1.5, {"value": 0.5})], [1.0, 0.5])
    >>> history.step, history.to_dict()["epochs"][0]["validation"]
    (2, {'value': 0.5})
    >>> History.from_dict(history.to_dict()) == history
    True
    """

    epochs: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """How many optimiser steps have been taken."""
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Lists and dictionaries of numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The history that :meth:`to_dict` described."""
        return cls([Epoch(**epoch) for epoch in record["epochs"]], list(record["losses"]))
