"""What a criterion has to know of the layers beside their weights: their inputs, and the gradients of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import PotstillError
from potstill.nn.masked import MaskedConv2d
from potstill.transform.calibrate.moments import Moments
from potstill.transform.criteria import LayerFacts
from potstill.transform.criteria.criterion import Need
from potstill.transform.observe import inputs_of, watching
from potstill.transform.prune_layers import Candidate, computing_with

Loss = Callable[[Any], Tensor]


def gather(
    model: nn.Module, layers: Sequence[Candidate], need: Need, data: Iterable[Any] | None, loss: Loss | None, seed: int
) -> dict[Candidate, LayerFacts]:
    """The facts of each layer; one for which what is needed cannot be found is kept, with the reason, and left out."""
    gathered: list[Tensor | None] = [None] * len(layers)
    if need in ("norms", "second moments") and data is not None:
        gathered = _inputs(model, layers, data, full=need == "second moments")
    elif data is not None and loss is not None and need != "nothing":
        gathered = _gradients(model, layers, data, loss, squared=need == "squared gradient")
    return {
        layer: LayerFacts(layer.name, layer.weight, layer.mask, {} if found is None else {need: found}, seed)
        for layer, found in zip(layers, gathered, strict=True)
        if not layer.kept
    }


class _Inputs:
    """The second moments of a layer's inputs, one for each group of a convolution; of the whole matrix if ``full``."""

    def __init__(self, layer: Candidate, full: bool) -> None:
        self._conv = layer.form if isinstance(layer.form, MaskedConv2d) else None
        outputs, self._inputs = layer.mask.shape
        sizes = (self._inputs, self._inputs) if full else (self._inputs,)
        groups = self._conv.groups if self._conv is not None else 1
        zeros = layer.weight.new_zeros
        self._parts = [Moments(zeros(sizes), zeros(self._inputs)) for _ in range(groups)]
        self._outputs = outputs // groups

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds the rows of one call; a forward pre-hook."""
        x: Tensor = next(iter((*args, *kwargs.values())))
        parts = (x,) if self._conv is None else patches(self._conv, x).split(self._inputs, dim=-1)
        for moments, part in zip(self._parts, parts, strict=True):
            moments.note(module, (part,), {})

    def why_not(self) -> str:
        """Why nothing follows from them."""
        sums = torch.stack([part.sum for part in self._parts])
        if not self._parts[0].rows:
            return "the data never reach it"
        if not bool(torch.isfinite(sums).all()):
            return "its inputs have NaN or infinite values"
        return "" if bool(sums.any()) else "its inputs are all zero"

    def found(self) -> Tensor:
        """The second moments [groups, inputs, inputs], or the norms [1, inputs] or [outputs, inputs]."""
        sums = torch.stack([part.sum for part in self._parts])
        if sums.dim() == 3:
            return sums
        return sums.sqrt() if len(sums) == 1 else sums.sqrt().repeat_interleave(self._outputs, dim=0)


def patches(conv: MaskedConv2d, x: Tensor) -> Tensor:
    """The rows that a convolution multiplies by its matrix: [..., positions, in_channels * height * width] float32."""
    if isinstance(conv.padding, str):
        total = [gap * (size - 1) for gap, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, left) = (each // 2 if conv.padding == "same" else 0 for each in total)
        (bottom, right) = (each - each // 2 if conv.padding == "same" else 0 for each in total)
    else:
        top, left = bottom, right = conv.padding
    padded = F.pad(x.detach().float(), (left, right, top, bottom))
    unfolded = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    return unfolded.transpose(-1, -2)


def _inputs(model: nn.Module, layers: Sequence[Candidate], data: Iterable[Any], full: bool) -> list[Tensor | None]:
    records = [_Inputs(layer, full) for layer in layers]
    hooks = [(layer.site.module, record.note) for layer, record in zip(layers, records, strict=True)]
    batches = 0
    with watching(model, hooks):
        for item in data:
            args, kwargs = inputs_of(item)
            model(*args, **kwargs)
            batches += 1
    _require_batches(batches)
    for layer, record in zip(layers, records, strict=True):
        layer.kept = record.why_not()
    return [None if layer.kept else record.found() for layer, record in zip(layers, records, strict=True)]


def _gradients(
    model: nn.Module, layers: Sequence[Candidate], data: Iterable[Any], loss: Loss, squared: bool
) -> list[Tensor | None]:
    sums = [torch.zeros_like(layer.weight) for layer in layers]
    reached = [False] * len(layers)
    batches = 0
    effective = [layer.weight * layer.mask for layer in layers]
    with watching(model, ()), torch.enable_grad(), computing_with(layers, effective) as weights:
        for item in data:
            batches += 1
            found = torch.autograd.grad(_value(loss, item, batches), weights, allow_unused=True)
            with torch.no_grad():
                for index, gradient in enumerate(found):
                    if gradient is not None:
                        each = layers[index].form.matrix(gradient).float()
                        sums[index] += each.square() if squared else each
                        reached[index] = True
    _require_batches(batches)
    for layer, ever in zip(layers, reached, strict=True):
        layer.kept = "" if ever else "the loss does not depend on it"
    return [each / batches for each in sums]


def _value(loss: Loss, item: Any, number: int) -> Tensor:
    value = loss(item)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        given = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"prune_: loss returned {given} for batch {number}, expected a scalar tensor that depends on the model's "
            "weights: run the model inside loss, with gradients"
        )
    if not bool(torch.isfinite(value)):
        amount = float(value.detach())
        raise PotstillError(f"prune_: the loss of batch {number} is {amount}; look for NaN in data and model")
    return value


def _require_batches(batches: int) -> None:
    if not batches:
        raise PotstillError("prune_: data yielded nothing; it is exhausted, or empty")
