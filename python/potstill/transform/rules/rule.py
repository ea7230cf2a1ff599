"""What it takes to replace modules of one type by modules of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from potstill.transform.configs import Config
from potstill.transform.grid import Grid
from potstill.transform.observe import Call, Calls
from potstill.transform.rounding import Rounding
from potstill.transform.swap import Site

C = TypeVar("C", bound=Calls)

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments."""


class Rule(ABC, Generic[C]):
    """One way in which :func:`quantize_` may replace a module; the list of them is :data:`rules.RULES`.

    - ``source``: the type that is replaced, ``target``: the type that it becomes.
    - ``config``: the type of the config that asks for it, ``action``: what reports call the result.
    - ``shared``: the tensors of ``target`` that modules with one weight have in common; if there are none, modules with
      one weight are left alone.

    The object has no state: what is seen of a module is kept in the ``calls`` that :meth:`watch` makes.
    """

    source: ClassVar[type[nn.Module]]
    target: ClassVar[type[nn.Module]]
    config: ClassVar[type[Config]]
    action: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()

    def replaces(self, module: nn.Module) -> bool:
        """Whether it is for modules of this class."""
        return isinstance(module, self.source)

    @abstractmethod
    def why_not(self, site: Site) -> str:
        """Why this module cannot be replaced whatever its speed; empty if it can."""

    @abstractmethod
    def why_not_call(self, call: Call) -> str:
        """Why the replacement cannot be called like this at its full speed; empty if it can."""

    @abstractmethod
    def watch(self) -> C:
        """An empty record for the calls of one module."""

    @abstractmethod
    def usual(self, module: nn.Module) -> Mapping[Call, int]:
        """The calls that are timed when there is no sample."""

    @abstractmethod
    def build(self, module: Any, config: Any, rounding: Rounding | None) -> nn.Module:
        """The replacement; ``rounding`` is what :func:`calibrate_` found for this module and config."""

    @abstractmethod
    def arguments(self, module: Any, call: Call, calls: C | None) -> Arguments:
        """What to call ``module`` and its replacement with, to time them in the way of ``call``.

        ``calls`` is None if there was no sample; then ``call`` is one of :meth:`usual`.
        """

    @abstractmethod
    def example(self, module: Any, calls: C) -> Arguments:
        """What to call ``module`` and its replacement with, to compare their outputs: inputs seen, else random ones."""

    @abstractmethod
    def shape(self, module: Any) -> tuple[int, ...]:
        """(outputs, inputs), or whatever sizes tell of the module most."""

    def grid(self, config: Any) -> Grid | None:
        """What its weight is rounded to, if :func:`calibrate_` can do that; then ``build`` is given the result."""
        return None

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight that is rounded on the grid, [outputs, inputs]."""
        return module.get_parameter("weight").detach()

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the parameters that are quantised; what is tied to them matters."""
        return ("weight",)

    def share(self, first: Any, other: Any) -> None:
        """Makes ``other`` use the weight of ``first``, as their modules did."""
        for name in self.shared:
            setattr(other, name, getattr(first, name))

    def alike(self, module: Any) -> Hashable:
        """Equal for modules that take the same time for the same call; by default no two of them."""
        return id(module)
