"""What passes between the loader, the models and the strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.distill.features import Features


class Indexed(NamedTuple):
    """An item of a data set, or of a loader, and its place in that data set: an integer, or a tensor of them."""

    item: Any
    index: Any


class TopK(NamedTuple):
    """What is known of a teacher by its k likeliest classes, as :func:`potstill.ops.top_k` makes it.

    Log-probabilities at ``temperature``, float32, and the numbers of their classes, int64: [..., k] each.
    """

    log_probs: Tensor
    indices: Tensor
    temperature: float


@dataclass(frozen=True)
class Batch:
    """One item of a loader: the models' arguments, and the target.

    ``(x, target)`` calls ``model(x)``, ``(a, b, target)`` calls ``model(a, b)``; an only input that is a tuple or list
    is spread over the positional arguments, one that is a mapping over the keyword arguments. Of an :class:`Indexed`
    item ``index`` has the examples' places in their data set, on the CPU; otherwise it is None.

    >>> batch = Batch.of(({"ids": torch.zeros(2, 3), "mask": torch.ones(2, 3)}, torch.tensor([0, 1])))
    >>> sorted(batch.kwargs), batch.target
    (['ids', 'mask'], tensor([0, 1]))
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    index: Tensor | None = None

    @classmethod
    def of(cls, item: Any) -> Batch:
        """Takes a loader's item apart; raises :class:`TypeError` if it is not a sequence that ends in a target."""
        if isinstance(item, Indexed):
            return replace(cls.of(item.item), index=item.index)
        if not isinstance(item, (tuple, list)) or len(item) < 2 or not isinstance(item[-1], Tensor):
            raise TypeError(
                f"Distiller: the loader yielded {_describe(item)}; it must yield (input, target) or "
                "(input, ..., target) with a tensor as the target"
            )
        *inputs, target = item
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return cls((), dict(inputs[0]), target)
        if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
            inputs = list(inputs[0])
        return cls(tuple(inputs), {}, target)

    def to(self, device: torch.device) -> Batch:
        """The same with the arguments' tensors and the target on ``device``, also those inside containers."""
        return mapped(self, lambda x: x.to(device, non_blocking=True))

    def feed(self, model: nn.Module) -> Any:
        """The model's output for these inputs."""
        return model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Outputs:
    """What a strategy computes its term from.

    ``student`` and ``teacher`` are the models' outputs as they are; ``teacher`` is None where no strategy needs it.
    ``student_features`` and ``teacher_features`` have what the layers returned that a strategy asked for, by name.
    """

    batch: Batch
    student: Any
    teacher: Any
    student_features: Mapping[str, Tensor] | Features = field(default_factory=dict)
    teacher_features: Mapping[str, Tensor] | Features = field(default_factory=dict)

    @property
    def target(self) -> Tensor:
        """The batch's target."""
        return self.batch.target

    @property
    def student_logits(self) -> Tensor:
        """The logits in the student's output; see :func:`logits`."""
        return logits(self.student, "student")

    @property
    def teacher_logits(self) -> Tensor:
        """The logits in the teacher's output; see :func:`logits`."""
        return logits(self.teacher, "teacher")


def logits(output: Any, model: str) -> Tensor:
    """The logits in a model's output: a tensor, something with ``logits``, or a tuple whose first element they are.

    Raises :class:`TypeError`, naming the ``model``, where there are none.

    >>> logits({"loss": None, "logits": torch.tensor([1.0, 2.0])}, "student")
    tensor([1., 2.])
    """
    if isinstance(output, TopK):
        raise TypeError(
            f"Distiller: only the {output.indices.shape[-1]} likeliest classes of the {model} were cached, but a "
            "strategy needs all logits; SoftTargets and strategies on layers do not. Cache with top_k=None for others"
        )
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"Distiller: the {model} returned {_describe(output)}; expected a tensor of logits, an object or mapping "
            "with 'logits', or a tuple whose first element is the logits"
        )
    return found


def mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with ``function`` applied to every tensor, also those inside tuples, lists and dictionaries."""
    args, kwargs = _map(batch.args, function), _map(batch.kwargs, function)
    return replace(batch, args=args, kwargs=kwargs, target=function(batch.target))


def rows_of(values: Any, rows: int, place: slice) -> Any:
    """Of every tensor with that many ``rows``, also those inside tuples, lists and dictionaries, the ones at ``place``.

    >>> rows_of({"x": torch.arange(4), "scale": torch.ones(())}, 4, slice(1, 3))
    {'x': tensor([1, 2]), 'scale': tensor(1.)}
    """
    return _map(values, lambda x: x[place] if x.dim() and len(x) == rows else x)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_map(item, function) for item in value]
        make = getattr(type(value), "_make", type(value))  # a named tuple takes its fields one by one
        return make(items)
    return value


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(type(item).__name__ for item in value)})"
    return f"a {type(value).__name__}"
