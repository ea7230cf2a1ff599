"""What linear layers with integer weights share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from potstill.nn.float_linear import as_linear


class QuantizedLinear(nn.Module, ABC):
    """A frozen linear layer with integer weights, and scales that keep their dtype."""

    kind: ClassVar[str]
    _options: ClassVar[tuple[str, ...]] = ()  # what its config has beside the sizes
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    scale: Tensor

    def config(self) -> dict[str, Any]:
        """The arguments that build an empty layer of this shape."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        } | {name: getattr(self, name) for name in self._options}

    @staticmethod
    def float_config(module: nn.Module) -> dict[str, Any] | None:
        """What a float linear layer says of the :meth:`config` of its quantised form; None for any other module."""
        linear = as_linear(module)
        if linear is None:
            return None
        bias = linear.bias is not None
        return {"in_features": linear.in_features, "out_features": linear.out_features, "bias": bias}

    @classmethod
    @abstractmethod
    def wrong_values(cls, state: Mapping[str, Tensor], prefix: str) -> str:
        """What is wrong with the numbers of a ``state_dict`` whose shapes and dtypes are right; empty if nothing is."""

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them, and options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .half() and .to(bfloat16) change float tensors; scales follow the device only.
        before = dict(self._buffers)
        nn.Module._apply(self, fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        """Brings the weight into the layout that the kernels of its device take, where these differ."""
