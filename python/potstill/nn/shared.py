"""Linear layers that read the same input, computed by one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from potstill.nn.linear import Int8Linear
from potstill.ops.int8_linear import PANEL, int8_linear


class Int8LinearPart(Int8Linear):
    """One of several int8 layers whose weights lie one behind the other, so that one call computes all of them.

    The first that is called with an input computes for the others as well, which then only fetch their results. What
    they compute and their ``state_dict`` are those of :class:`Int8Linear`. ``group`` is a number that all parts of one
    group have; :func:`link` brings them together. Alone, or under ``torch.compile``, a part computes for itself.
    """

    kind = "int8_linear_part"
    _options = ("group", "smooth")

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, group: int, smooth: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias, smooth=smooth)
        if type(group) is not int:
            raise TypeError(f"Int8LinearPart: group is {group!r}, expected an integer")
        self.group = group
        self._shared: _Shared | None = None

    @classmethod
    def of(cls, layer: Int8Linear, group: int) -> Int8LinearPart:
        """A part with the tensors of ``layer``."""
        part = cls.__new__(cls)
        part.__dict__.update(vars(layer))
        part.group, part._shared = group, None
        part._parameters, part._buffers = dict(layer._parameters), dict(layer._buffers)
        return part

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], plus ``residual`` of that shape if it is given."""
        if self._shared is None or torch.compiler.is_compiling() or x.shape[-1] != self.in_features:
            return super().forward(x, residual)
        y = self._shared.output(self, x)
        return y if residual is None else y + residual


def why_not_shared(layers: Sequence[Int8Linear]) -> str:
    """Why these layers cannot become parts of one; empty if they can."""
    if any(layer.activation != "none" for layer in layers):
        return "one of them applies an activation"
    if any(layer.out_features % PANEL for layer in layers[:-1]):
        return f"out_features is no multiple of {PANEL}"
    if not all(_same_factor(layer, layers[0]) for layer in layers):
        return "they smooth their input differently"
    biases = {None if layer.bias is None else layer.bias.dtype for layer in layers}
    devices = {layer.weight.device for layer in layers}
    return "" if len(biases) == len(devices) == 1 else "they differ in device, or in having a bias or its dtype"


def _same_factor(a: Int8Linear, b: Int8Linear) -> bool:
    if a.factor is None or b.factor is None:
        return a.factor is b.factor
    return torch.equal(a.factor, b.factor)


def version(x: Tensor) -> int:
    """A number that grows when ``x`` is changed in place; torch does not count for inference tensors."""
    return 0 if x.is_inference() else x._version


def link(model: nn.Module) -> None:
    """Brings the parts of each group in ``model`` together; those of a group that is not complete stay alone."""
    groups: dict[int, list[Int8LinearPart]] = {}
    for module in model.modules():
        if isinstance(module, Int8LinearPart):
            groups.setdefault(module.group, []).append(module)
    for parts in groups.values():
        shared = _Shared(parts) if len(parts) > 1 and not why_not_shared(parts) else None
        for part in parts:
            part._shared = shared


@dataclass
class _Waiting:
    """Outputs for ``x`` that have not been fetched yet, by part."""

    x: Tensor
    state: tuple[object, ...]
    outputs: dict[int, Tensor]


class _Shared:
    """The memory that the parts of a group share, and the results that wait to be fetched, by thread."""

    def __init__(self, parts: Sequence[Int8LinearPart]) -> None:
        self.parts = list(parts)
        self.sizes = [part.out_features for part in parts]
        self.waiting: dict[int, _Waiting] = {}
        self.joined: list[Tensor | None] = []  # weight, scale, bias
        self.places: list[int] = []  # the parts' memory when it was joined

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "waiting": {}, "joined": [], "places": []}  # copies have memory of their own

    def output(self, part: Int8LinearPart, x: Tensor) -> Tensor:
        thread = get_ident()
        # A result is good only for the same values, and for a caller who wants the same graph and dtype.
        state = (version(x), torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        waiting = self.waiting.get(thread)
        if waiting is not None and waiting.x is x and waiting.state == state and id(part) in waiting.outputs:
            if len(waiting.outputs) == 1:
                del self.waiting[thread]
            return waiting.outputs.pop(id(part))
        if self.places != self._places():
            self._join()
        weight, scale, bias = self.joined
        outputs = int8_linear(x, weight, scale, bias, factor=self.parts[0].factor).split(self.sizes, -1)
        ready = dict(zip(map(id, self.parts), outputs, strict=True))
        y: Tensor = ready.pop(id(part))
        self.waiting[thread] = _Waiting(x, state, ready)
        return y

    def _places(self) -> list[int]:
        return [t.data_ptr() for part in self.parts for t in (part.weight, part.scale, part.bias) if t is not None]

    def _join(self) -> None:
        # The parts' tensors become views of the joined ones: one resident copy, whatever moved or reloaded them.
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could never take part in training
            self.joined = [self._joined(name) for name in ("weight", "scale", "bias")]
        self.places = self._places()

    def _joined(self, name: str) -> Tensor | None:
        tensors: list[Tensor | None] = [getattr(part, name) for part in self.parts]
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        whole = torch.cat([tensor.detach() for tensor in present])
        for tensor, view in zip(present, whole.split([len(tensor) for tensor in present]), strict=True):
            tensor.data = view
        return whole
