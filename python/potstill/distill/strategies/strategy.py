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
    needs_sample: ClassVar[bool] = False
    ignore_index: int = -100

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Called once, before training, with the models: finds the layers whose names :meth:`student_layers` gives."""

    def student_layers(self) -> list[str]:
        """Names of the student's modules whose outputs ``forward`` finds in ``outputs.student_features``."""
        return []

    def teacher_layers(self) -> list[str]:
        """The same of the teacher's."""
        return []

    def prepare(self, outputs: Outputs) -> None:
        """Called once, after :meth:`attach`, with the outputs of one batch: makes what depends on their shapes.

        Such as projections where the widths differ. It is called if the Distiller gets a ``sample``, which a strategy
        with ``needs_sample`` cannot do without.
        """

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
