"""One stage of a model: the model's own code, in which the modules of other stages are stand-ins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from potstill.transform.observe import Sample
from potstill.transform.swap import replace

Stages = Sequence[Sequence[str]]
"""The names of the modules of each stage."""


class _Cut(Exception):  # noqa: N818  # no error: it leaves the model's forward where the stage ends
    def __init__(self, hidden: Tensor) -> None:
        super().__init__("this stage is over")
        self.hidden = hidden


class _Slot:
    """Where a stage finds what the stage before it has sent."""

    received: Tensor | None = None


class StandIn(nn.Module):
    """Takes the place of a module that another stage holds; its plain attributes are those of that module."""

    def __init__(self, absent: nn.Module) -> None:
        super().__init__()
        self.__dict__["_shape"] = _hollow(absent)  # not registered as a part

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_shape"], name)

    def extra_repr(self) -> str:
        """What is missing here."""
        return type(self.__dict__["_shape"]).__name__

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises :class:`RuntimeError`: a part of a model cannot be run alone."""
        raise RuntimeError(
            f"{type(self.__dict__['_shape']).__name__} lies on another rank of the pipeline; run the model by "
            "Pipeline.step, or by calling the Pipeline"
        )


class _Before(StandIn):
    """Of an earlier stage: whatever it is given, it answers with what that stage has sent.

    An embedding answers with zeros of its own shape instead: only shapes and masks can come of them, since all that
    depends on values ends at the next stand-in.
    """

    def __init__(self, absent: nn.Module, slot: _Slot) -> None:
        super().__init__(absent)
        self.__dict__["_slot"] = slot
        self._width: int | None = getattr(absent, "embedding_dim", None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        received: Tensor = self.__dict__["_slot"].received
        x = first_tensor(args, kwargs)
        if self._width is None or x is None or x.is_floating_point():
            return received
        return received.new_zeros(()).expand(*x.shape, self._width)


class _After(StandIn):
    """Of a later stage: the model's code has got to where this stage ends."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = first_tensor(args, kwargs)
        if hidden is None:
            raise TypeError(f"{self.extra_repr()} is the first module of the next stage, but was called with no tensor")
        raise _Cut(hidden)


class Part(nn.Module):
    """One of the stages of a model.

    ``forward(received, inputs)``: the hidden state that the stage before has sent (None for the first stage) and the
    inputs of the whole model, a :data:`Sample`; the result is the hidden state for the next stage, or the model's
    output. The code of the model is run up to where the stage ends. Modules that no stage names are part of all of
    them. Training flags are those of the modules; those of the modules around them are taken from ``whole``.
    """

    def __init__(self, model: nn.Module, stages: Stages, index: int, whole: nn.Module) -> None:
        super().__init__()
        self._slot = slot = _Slot()
        self._options = options(model)

        def stand_in(absent: nn.Module, stage: int) -> nn.Module:
            return _Before(absent, slot) if stage < index else _After(absent)

        self.model = _without(model, stages, {index}, stand_in)
        around = sorted(_around(name for stage in stages for name in stage))
        self._around = [(self.model.get_submodule(name), whole.get_submodule(name)) for name in around]

    def forward(self, received: Tensor | None, inputs: Sample) -> Any:
        """The next hidden state, or the model's output."""
        for own, other in self._around:
            own.training = other.training
        self._slot.received = received
        try:
            return called(self.model, inputs, self._options)
        except _Cut as end:
            return end.hidden
        finally:
            self._slot.received = None


def called(model: nn.Module, inputs: Sample, options: Mapping[str, Any]) -> Any:
    """The output of ``model`` for a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs, **options)
    return model(*inputs, **options) if isinstance(inputs, tuple) else model(**{**options, **inputs})


def held(model: nn.Module, stages: Stages, own: Iterable[int]) -> nn.Module:
    """``model`` with the modules of the stages ``own`` and of none; they keep their names, the others are stand-ins."""
    return _without(model, stages, set(own), lambda absent, _: StandIn(absent))


def _without(
    model: nn.Module, stages: Stages, own: set[int], stand_in: Callable[[nn.Module, int], nn.Module]
) -> nn.Module:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    owners = {model.get_submodule(name): number for number, stage in enumerate(stages) for name in stage}
    part = _outline(model, [name for module in owners for name in names[module]])
    for absent, number in owners.items():
        if number not in own:
            replace(part, names[absent], stand_in(absent, number))
    return part


def first_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first argument that is a tensor: of a layer, the hidden state."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def options(model: nn.Module) -> dict[str, Any]:
    """More keyword arguments of a model: one of transformers would return a cache, of which a stage has a part."""
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}


def _around(names: Iterable[str]) -> set[str]:
    """The dotted names of the modules around those of these names, ``""`` being the model."""
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(name.count(".") + 1)}


def _outline(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A model of which only the modules around those named are copies; the others are the very modules of ``model``."""
    around = _around(names)

    def copied(module: nn.Module, name: str) -> nn.Module:
        new = copy.copy(module)
        new._modules = {
            key: copied(child, path) if child is not None and (path := f"{name}.{key}".lstrip(".")) in around else child
            for key, child in module._modules.items()
        }
        return new

    return copied(model, "")


def _hollow(module: nn.Module) -> nn.Module:
    """A copy whose tensors have no memory, for those who ask a module how it is made."""

    def emptied(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
        return {key: None if x is None else x.detach().to("meta") for key, x in tensors.items()}

    new = copy.copy(module)
    new._parameters, new._buffers = emptied(module._parameters), emptied(module._buffers)
    new._modules = {key: None if child is None else _hollow(child) for key, child in module._modules.items()}
    return new
