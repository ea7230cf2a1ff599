"""Runs a model on a sample and watches where the outputs of its int8 layers go, and which layers share an input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from potstill.nn.shared import version
from potstill.transform.observe import Call, Sample, autocast_dtype, run

# What only asks about a tensor, without using its values.
_QUESTIONS = frozenset(
    {"shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_nested", "is_sparse", "size", "dim"}
    | {"ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_quantized", "__len__"}
)


@dataclass(eq=False)
class Output:
    """One output of a layer and what read it: an activation module, or None for anything else."""

    layer: nn.Module
    tensor: Tensor  # held, so that no other tensor gets its identity
    readers: list[nn.Module | None] = field(default_factory=list)


@dataclass(eq=False)
class Trace:
    """One run: the outputs of the watched layers, the calls of each activation, and the layers by input.

    ``inputs`` has, for each tensor (in one state) that was given to watched layers, those layers in order.
    """

    outputs: list[Output] = field(default_factory=list)
    activations: dict[nn.Module, list[Output | None]] = field(default_factory=dict)
    inputs: list[list[nn.Module]] = field(default_factory=list)
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    result: Any = None


class _Watch(TorchFunctionMode):
    """Notes every torch function that takes the output of a watched layer."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.inside: nn.Module | None = None  # the activation that runs now
        self._outputs: dict[int, Output] = {}
        self._inputs: dict[tuple[int, int], list[nn.Module]] = {}
        self._held: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]  # of a property
        if name not in _QUESTIONS:
            self.read(args, kwargs)
        return func(*args, **(kwargs or {}))

    def read(self, *values: Any) -> None:
        for leaf in tree_leaves(values):
            output = self._outputs.get(id(leaf))
            if output is not None:
                output.readers.append(self.inside)

    def layer_starts(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["x"]
        self.read(x)
        key = (id(x), version(x))
        if key not in self._inputs:
            self._held.append(x)
            self._inputs[key] = []
            self.trace.inputs.append(self._inputs[key])
        self._inputs[key].append(layer)
        rows, device = x.numel() // max(x.shape[-1], 1), x.device.type
        self.trace.calls.setdefault(layer, []).append(Call(rows, x.dtype, autocast_dtype(device), device=device))

    def layer_ends(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found = self._outputs[id(output)] = Output(layer, output)
        self.trace.outputs.append(found)

    def activation_starts(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        output = self._outputs.get(id(args[0])) if len(args) == 1 else None
        self.trace.activations.setdefault(module, []).append(output)
        self.inside = module

    def activation_ends(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self.inside = None
        self._outputs.pop(id(result), None)  # activated in place: from here on it is another value


def trace(
    model: nn.Module,
    layers: Iterable[nn.Module],
    activations: Iterable[nn.Module],
    sample: Sample,
) -> Trace:
    """Runs ``model`` once on ``sample``, as :func:`observe.run` does, and returns what was seen.

    Only calls of torch functions and of watched layers count as readers: Python code that keeps a tensor for later
    without touching it is not seen. All outputs of the layers are held in memory during the run.
    """
    found = Trace()
    watch = _Watch(found)
    handles: list[Any] = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(watch.layer_starts, with_kwargs=True))
            handles.append(layer.register_forward_hook(watch.layer_ends))
        for module in activations:
            handles.append(module.register_forward_pre_hook(watch.activation_starts))
            handles.append(module.register_forward_hook(watch.activation_ends))
        with watch:
            found.result = run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    watch.read(found.result)
    return found
