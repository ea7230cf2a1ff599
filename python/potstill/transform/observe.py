"""Runs a model on a sample and watches how its layers are called."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Sample = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""The input of a model: its only argument, its positional arguments, or its keyword arguments."""

KEPT_ROWS = 256
"""Input rows that are kept of each layer, to measure its error on."""


@dataclass(frozen=True)
class Call:
    """What the time of a call depends on: rows and dtype of the input, and the dtype of autocast where that is on.

    ``rest`` is whatever else matters for the module at hand; ``device`` the type of the input's device.
    """

    rows: int
    dtype: torch.dtype
    autocast: torch.dtype | None
    rest: Hashable = ()
    device: str = "cpu"

    @property
    def used_dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self.autocast or self.dtype


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast if it is on here."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def usual_calls(dtype: torch.dtype, device: str, rows: Iterable[int]) -> dict[Call, int]:
    """One call each of so many rows on a type of device, where no sample tells."""
    return {Call(count, dtype, autocast_dtype(device), device=device): 1 for count in rows}


@dataclass(eq=False)
class Calls(ABC):
    """How often a module was called in which way; ``nested`` is true if an input was a nested tensor."""

    counts: Counter[Call] = field(default_factory=Counter)
    nested: bool = False

    @abstractmethod
    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts one call; a forward pre-hook."""


@dataclass(eq=False)
class RowCalls(Calls):
    """The calls of a layer whose only input is many rows, and the first :data:`KEPT_ROWS` of these.

    A row has ``row_dims`` dimensions: 1 where it is a vector of features, 0 where it is one index.
    """

    row_dims: int = 1
    inputs: list[Tensor] = field(default_factory=list)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts one call; the rows of a nested tensor are not counted."""
        x: Tensor = next(iter((*args, *kwargs.values())))
        if x.is_nested:
            self.nested = True
            return
        flat = x.detach().reshape(-1, *x.shape[x.dim() - self.row_dims :])
        device = x.device.type
        self.counts[Call(flat.shape[0], x.dtype, autocast_dtype(device), device=device)] += 1
        missing = KEPT_ROWS - sum(len(rows) for rows in self.inputs)
        self.inputs.append(flat[:missing].clone())


@dataclass(eq=False)
class BlockCalls(Calls):
    """The calls of a block with any inputs, and the arguments of the first call of each way.

    The rows of a call are those of its first tensor, whose last dimension is features.
    """

    examples: dict[Call, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts one call; the rows of a nested tensor count as none."""
        x: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.nested |= x.is_nested
        rows = 0 if x.is_nested else math.prod(x.shape[:-1])
        device, signature = x.device.type, (_signature(args), _signature(kwargs))
        call = Call(rows, x.dtype, autocast_dtype(device), signature, device)
        self.counts[call] += 1
        self.examples.setdefault(call, (args, kwargs))


def _signature(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.dtype, () if value.is_nested else value.shape
    if isinstance(value, Mapping):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_signature, value))
    return repr(type(value)) if value.__hash__ is None else (value,)


def observe(model: nn.Module, records: Iterable[tuple[nn.Module, Calls]], sample: Sample) -> None:
    """Runs ``model`` once on ``sample`` and lets each record note the calls of its module."""
    run(model, sample, [(module, record.note) for module, record in records])


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""A forward pre-hook that is given positional and keyword arguments, and changes nothing."""


def run(model: nn.Module, sample: Sample, hooks: Iterable[tuple[nn.Module, Hook]] = ()) -> Any:
    """The outputs of ``model`` for ``sample``, while it is :func:`watching`."""
    if not isinstance(sample, Tensor | tuple | Mapping):
        raise TypeError(
            f"sample_input is a {type(sample).__name__}, expected a tensor, a tuple of positional arguments or a "
            "mapping of keyword arguments"
        )
    with watching(model, hooks):
        if isinstance(sample, Tensor):
            return model(sample)
        return model(*sample) if isinstance(sample, tuple) else model(**sample)


@contextmanager
def watching(model: nn.Module, hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Inside, ``model`` runs in eval mode and without gradients, and the hooks see the calls of their modules.

    Torch's fused paths are off, so that every layer is called. Hooks, training flags and the state of torch's random
    numbers are as before afterwards, also when the model raises.
    """
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=sorted(gpus)), unfused():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` into eval mode, and every module back into the mode it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def unfused() -> Iterator[None]:
    """Makes torch's encoders call their layers one by one, as they must once one of them is converted."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def inputs_of(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model in an item of a loader, as :class:`distill.Distiller` takes items apart.

    A tensor is the only argument and a mapping holds keyword arguments; of a tuple or list ``(input, ..., target)`` the
    target is left out, and an only input that is a tuple, list or mapping is spread.

    >>> inputs_of((torch.zeros(2), torch.tensor(1)))
    ((tensor([0., 0.]),), {})
    """
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), dict(item)
    if not isinstance(item, tuple | list) or not item:
        raise TypeError(
            f"the loader yielded a {type(item).__name__}, expected a tensor, a mapping of keyword arguments, or a "
            "tuple (input, ..., target)"
        )
    inputs = item[:-1] if len(item) > 1 else item
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return (), dict(inputs[0])
    return tuple(inputs[0] if len(inputs) == 1 and isinstance(inputs[0], tuple | list) else inputs), {}
