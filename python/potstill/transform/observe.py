"""Runs a model on a sample and watches how its layers are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Sample = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""The input of a model: its only argument, its positional arguments, or its keyword arguments."""

KEPT_ROWS = 256
"""Input rows that are kept of each layer, to measure its error on."""


@dataclass(frozen=True)
class Call:
    """What the time of a call depends on: rows and dtype of the input, and the dtype of autocast where that is on."""

    rows: int
    dtype: torch.dtype
    autocast: torch.dtype | None

    @property
    def used_dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self.autocast or self.dtype


def autocast_dtype(device: str = "cpu") -> torch.dtype | None:
    """The dtype of autocast if it is on here."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass(eq=False)
class Calls:
    """How often a layer was called in which way, and the first :data:`KEPT_ROWS` rows of its inputs.

    ``nested`` is true if an input was a nested tensor, whose rows are not counted.
    """

    counts: Counter[Call] = field(default_factory=Counter)
    inputs: list[Tensor] = field(default_factory=list)
    nested: bool = False

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts one call of a layer with one input; a forward pre-hook."""
        x: Tensor = args[0] if args else kwargs["input"]
        if x.is_nested:
            self.nested = True
            return
        flat = x.detach().reshape(-1, x.shape[-1])
        self.counts[Call(flat.shape[0], x.dtype, autocast_dtype(x.device.type))] += 1
        missing = KEPT_ROWS - sum(len(rows) for rows in self.inputs)
        self.inputs.append(flat[:missing].clone())


@dataclass(eq=False)
class Runs:
    """How often a block was called, and its first call, ready to be made again."""

    count: int = 0
    first: Callable[[], object] | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts one call of a block with any inputs; a forward pre-hook."""
        self.count += 1
        self.first = self.first or partial(module, *args, **kwargs)


def observe(
    model: nn.Module, layers: Iterable[nn.Module], blocks: Iterable[nn.Module], sample: Sample
) -> tuple[dict[nn.Module, Calls], dict[nn.Module, Runs]]:
    """Runs ``model`` once on ``sample``, in eval mode and without gradients, and returns the calls that it made.

    Torch's fused paths are off, so that every layer is called. Hooks, training flags and the state of torch's random
    numbers are as before afterwards, also when the model raises.
    """
    calls, runs = {layer: Calls() for layer in layers}, {block: Runs() for block in blocks}
    handles = []
    try:
        for layer, call in calls.items():
            handles.append(layer.register_forward_pre_hook(call.note, with_kwargs=True))
        for block, seen in runs.items():
            handles.append(block.register_forward_pre_hook(seen.note, with_kwargs=True))
        run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return calls, runs


def run(model: nn.Module, sample: Sample) -> Any:
    """The outputs of ``model`` for ``sample``, in eval mode and without gradients or torch's fused paths.

    Training flags and the state of torch's random numbers are as before afterwards, also when the model raises.
    """
    if not isinstance(sample, Tensor | tuple | Mapping):
        raise TypeError(
            f"sample_input is a {type(sample).__name__}, expected a tensor, a tuple of positional arguments or a "
            "mapping of keyword arguments"
        )
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=sorted(gpus)), unfused():
        if isinstance(sample, Tensor):
            return model(sample)
        return model(*sample) if isinstance(sample, tuple) else model(**sample)


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
