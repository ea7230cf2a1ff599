"""What kernels that see only memory rely on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Expected = tuple[Tensor | None, torch.dtype | None, Sequence[int]]
"""A tensor or None, its dtype (None: any float), its shape."""


def check(op: str, x: Tensor, operands: Mapping[str, Expected]) -> None:
    """Raises :class:`ValueError` for an operand that is not contiguous, on x's device, of its dtype and shape."""
    for name, (given, dtype, shape) in operands.items():
        if given is None:
            continue
        wrong = given.shape != torch.Size(shape) or not given.is_contiguous() or given.device != x.device
        if wrong or (given.dtype != dtype if dtype is not None else not given.dtype.is_floating_point):
            raise ValueError(
                f"{op}: {name} is {given.dtype} {list(given.shape)} on {given.device}, expected contiguous "
                f"{dtype or 'floats'} {list(shape)} on {x.device}"
            )


def ends(
    scale: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, y: Tensor, m: int, n: int
) -> dict[str, Any]:
    """What the end of an int8 layer's kernel takes to make [m, n] results of sums."""
    return {
        "scale": scale,
        "bias": bias,
        "residual": None if residual is None else residual.contiguous(),
        "y": y,
        "m": m,
        "n": n,
        "ACTIVATION": activation,
        "enable_fp_fusion": False,  # so that each way rounds alike, and as the reference
    }
