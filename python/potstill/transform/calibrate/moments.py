"""The second moments of a layer's inputs, summed batch by batch, for as many layers at a time as memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import PotstillError
from potstill.transform.calibrate.gptq import WORKSPACE
from potstill.transform.calibrate.weights import Weight

_ENTRY = 4  # bytes of a float32
_KEPT = 512  # rows


@dataclass(eq=False)
class Moments:
    """X'X over all input rows X of a layer, or its diagonal; ``rows`` counts them.

    ``largest`` is the largest magnitude of each input, ``kept`` the first 512 rows in pieces.

    Float32 is enough for the sum: n batches err by 2^-24 sqrt(n) or so of the largest entries, and GPTQ adds a
    hundredth of the mean to the diagonal anyway. What follows is in double precision where that is not enough.
    """

    sum: Tensor
    largest: Tensor
    rows: int = 0
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, weight: Weight, full: bool) -> Moments:
        """For the inputs of ``weight``: of the whole matrix, or of its diagonal."""
        sizes = (weight.inputs, weight.inputs) if full else (weight.inputs,)
        zeros = weight.tensor.new_zeros(weight.inputs, dtype=torch.float32)
        return cls(weight.tensor.new_zeros(sizes, dtype=torch.float32), zeros)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds the rows of one call; a forward pre-hook."""
        x: Tensor = args[0] if args else kwargs["input"]
        x = x.values() if x.is_nested else x
        with torch.autocast(x.device.type, enabled=False):  # the model may have switched it on
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            if self.sum.dim() == 2:
                self.sum.addmm_(rows.t(), rows)
            else:
                self.sum += rows.square().sum(dim=0)
            if len(rows):
                self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
            if self.rows < _KEPT:
                self.kept.append(rows[: _KEPT - self.rows].clone())
        self.rows += len(rows)

    def smoothed(self, factor: Tensor) -> Moments:
        """The moments of the same inputs, each times its factor."""
        outer = factor[:, None] * factor if self.sum.dim() == 2 else factor.square()
        return Moments(self.sum * outer, self.largest * factor, self.rows)

    def power(self, weight: Tensor) -> float:
        """The sum of squares of the outputs of ``weight`` [n, k], without bias."""
        each = weight @ self.sum * weight if self.sum.dim() == 2 else weight.square() @ self.sum
        return float(each.double().sum())


def chunks(weights: Sequence[Weight], memory: int) -> list[list[Weight]]:
    """Splits the weights, in their order, so that the moments of a part and the work on one of them fit ``memory``.

    Raises :class:`PotstillError` if one layer alone does not fit.
    """
    parts: list[list[Weight]] = []
    held = largest = 0
    for weight in weights:
        entries = weight.inputs**2
        if entries * (_ENTRY + WORKSPACE) > memory:
            raise PotstillError(
                f"calibrate_: {weight.layers[0].name} has {weight.inputs} inputs, whose second moments need "
                f"{entries * (_ENTRY + WORKSPACE):,} bytes, and memory is {memory:,}; allow more memory, keep the "
                "layer with Mixed, or use method='mse'"
            )
        held, largest = held + entries * _ENTRY, max(largest, entries)
        if not parts or held + largest * WORKSPACE > memory:
            parts.append([])
            held, largest = entries * _ENTRY, entries
        parts[-1].append(weight)
    return parts
