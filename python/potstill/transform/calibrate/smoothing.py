"""Moves the unevenness of a layer's inputs to its weights: SmoothQuant.

Xiao, Lin, Seznec, Wu, Demouth and Han 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models". Activations have one scale per row, so an input that is always large takes the precision of all the
others. Multiplied by f_j, and its weights divided by it, input j may have any size: with
    1 / f_j = (max |x_j|)^a / (max |w_j|)^(1 - a)
the strength a says how much of the unevenness the weights take over. Which a is best is tried out on rows of the
inputs, with both sides rounded as the kernels round them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from potstill.ops.int8_linear import quantize_rows, quantize_weight
from potstill.transform.calibrate.moments import Moments
from potstill.transform.calibrate.weights import Weight
from potstill.transform.configs import Int8

_STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)
_GAIN = 0.9  # of the squared error that must go at least, for the multiplication by the factors to be worth it
_SPREAD = 1e-3  # inputs and weights that are smaller than this part of the largest count as that
_BLOCKS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # become one module of ours, whose layers have no factors

Smoothing = tuple[float, Tensor]
"""The strength and the factors [k]."""


def smoothing(moments: Mapping[Weight, Moments]) -> dict[Weight, Smoothing]:
    """The best factors for the weights that gain by any; those that read the same inputs get the same.

    So layers with one input can still be computed by one call.
    """
    found: dict[Weight, Smoothing] = {}
    for group in _by_input(moments):
        first = moments[group[0]]
        rows = torch.cat(first.kept)
        best, least = None, _GAIN * _error(group, rows, None)
        for strength in _STRENGTHS:
            factor = _factor(group, first.largest, strength)
            error = _error(group, rows, factor)
            if error < least:
                best, least = (strength, factor), error
        if best is not None:
            found |= dict.fromkeys(group, best)
    return found


def _by_input(moments: Mapping[Weight, Moments]) -> list[list[Weight]]:
    groups: list[list[Weight]] = []
    for weight, seen in moments.items():
        inside = any(isinstance(a, _BLOCKS) for layer in weight.layers for a in layer.site.ancestors)
        usable = seen.kept and 0.0 < float(seen.largest.max()) < torch.inf and bool(weight.tensor.any())
        if inside or not usable or not isinstance(weight.config, Int8):
            continue
        group = next((g for g in groups if _same_inputs(seen, moments[g[0]])), None)
        if group is None:
            groups.append([weight])
        else:
            group.append(weight)
    return groups


def _same_inputs(a: Moments, b: Moments) -> bool:
    return a.rows == b.rows and torch.equal(a.largest, b.largest)


def _factor(group: Sequence[Weight], largest: Tensor, strength: float) -> Tensor:
    weights = torch.stack([weight.tensor.float().abs().amax(dim=0) for weight in group]).amax(dim=0)
    inputs, weights = (each.clamp(min=_SPREAD * float(each.max())) for each in (largest, weights))
    logarithm = (1 - strength) * weights.log() - strength * inputs.log()
    return (logarithm - logarithm.mean()).exp()


def _error(group: Sequence[Weight], rows: Tensor, factor: Tensor | None) -> float:
    """The squared error of the outputs, relative to their squares, summed over the layers."""
    integers, scale = quantize_rows(rows if factor is None else rows * factor)
    rounded = integers.float() * scale
    total = 0.0
    for weight in group:
        tensor = weight.tensor.float()
        y = rows @ tensor.t()
        quantised, steps = quantize_weight(tensor if factor is None else tensor / factor)
        error = y - rounded @ (quantised.float() * steps[:, None]).t()
        total += float(error.square().sum() / y.square().sum().clamp(min=1e-30))
    return total
