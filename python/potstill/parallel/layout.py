"""What was decided about each layer of a model, kept with the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from potstill.parallel.parts import Stages
from potstill.parallel.pipeline import Pipeline

if TYPE_CHECKING:
    from potstill.parallel.plan import Plan

How = Literal["column", "row", "vocabulary"]
"""Which side of a layer is divided: its outputs, its inputs, or the rows of an embedding."""

_T = TypeVar("_T")

_ATTRIBUTE = "parallel_layout"


@dataclass(frozen=True)
class Split:
    """How a layer is divided.

    ``parts``: the outputs are so many matrices side by side (as queries, keys and values in one layer), and every rank
    has a share of each. ``group``: columns with the same number read the same input.
    """

    how: How
    parts: int = 1
    group: int = -1


@dataclass(eq=False)
class Layout:
    """The layers that are split, by name; the attributes (module, name) that were divided; why others were not.

    ``stages``: the names of the modules of each stage, if there are several; ``copies``: how many ranks have the same
    numbers of a parameter of this rank.
    """

    plan: Plan
    splits: dict[str, Split] = field(default_factory=dict)
    attributes: list[tuple[str, str]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    stages: Stages = ()
    copies: dict[str, int] = field(default_factory=dict)
    mesh: DeviceMesh | None = None

    def attach(self, model: _T) -> _T:
        """Keeps it as an attribute of ``model``, and returns that."""
        object.__setattr__(model, _ATTRIBUTE, self)
        return model


def layout_of(model: nn.Module | Pipeline) -> Layout:
    """What :meth:`Plan.apply` kept; raises :class:`ValueError` for any other model."""
    found = getattr(model, _ATTRIBUTE, None)
    if not isinstance(found, Layout):
        raise ValueError(f"Plan: this {type(model).__name__} is not what apply returned; pass that")
    return found
