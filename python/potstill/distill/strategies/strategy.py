"""What a distillation strategy is, and the list of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from potstill.distill.batch import Outputs

STRATEGIES: dict[str, type[Strategy]] = {}


class Strategy(nn.Module, ABC):
    """A term of the loss; its parameters, if it has any, are trained together with the student.

    ``forward`` returns a scalar: the mean over the rows that :meth:`rows` counts. With gradient accumulation each
    micro-batch's mean is weighted by its share of the rows, so that the sum is the mean over the whole group.

    >>> class Confidence(Strategy):
    ...     needs_teacher = False
    ...     def forward(self, outputs):
    ...         return -outputs.student_logits.logsumexp(-1).mean()
    >>> Confidence()
    Confidence()
    """

    needs_teacher: ClassVar[bool] = True
    ignore_index: int = -100

    @abstractmethod
    def forward(self, outputs: Outputs) -> Tensor:
        """The term for one batch."""

    def rows(self, target: Tensor) -> int:
        """How many rows the mean is taken over: the target's entries that are not ``ignore_index``."""
        return int((target != self.ignore_index).sum())

    def config(self) -> dict[str, Any]:
        """The arguments that build this strategy anew; a run resumes only with the same."""
        return {}

    def extra_repr(self) -> str:
        """The config as keyword arguments."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items())


S = TypeVar("S", bound=type[Strategy])


def register(name: str) -> Callable[[S], S]:
    """A class decorator that enters a strategy into ``STRATEGIES`` under ``name``."""

    def enter(strategy: S) -> S:
        if name in STRATEGIES:
            raise ValueError(f"register: {name!r} is already the strategy {STRATEGIES[name].__name__}; choose another")
        STRATEGIES[name] = strategy
        return strategy

    return enter
