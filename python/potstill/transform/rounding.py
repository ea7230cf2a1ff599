"""How the rounding that :func:`calibrate_` finds waits in a layer until :func:`quantize_` takes it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potstill.transform.configs import Config

_ATTRIBUTE = "calibrated_rounding"  # a plain attribute: deepcopy takes it along, state_dict does not


@dataclass(frozen=True, eq=False)
class Rounding:
    """Integers for the weight of a linear layer [n, k], and how to read them.

    - ``config``: what they are for; ``method``: how they were found.
    - ``integers``: int8 [n, k]; ``scale``: float32, [n] for :class:`Int8`, [n, groups] for :class:`Int4`; ``zero``: of
      the scale's shape, or None for a symmetric grid.
    - ``factor``: float32 [k] that the inputs are multiplied by first and the rounded weight was divided by, or None.
    - ``digest``: of the weight that they are a rounding of.
    """

    config: Config
    method: str
    integers: Tensor
    scale: Tensor
    zero: Tensor | None
    digest: bytes
    factor: Tensor | None = None


def digest(weight: Tensor) -> bytes:
    """Equal for equal weights, however they came about: copies and models loaded from a file have the same."""
    flat = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(f"{weight.dtype}{list(weight.shape)}".encode() + flat.numpy().tobytes()).digest()


def remember(layer: nn.Module, rounding: Rounding) -> None:
    """Leaves ``rounding`` with ``layer``, in the place of one that it may have."""
    setattr(layer, _ATTRIBUTE, rounding)


def recall(layer: nn.Module, config: Config) -> tuple[Rounding | None, str]:
    """The rounding that ``layer`` has for ``config``, or why the one it has is of no use; neither if it has none."""
    found: Rounding | None = vars(layer).get(_ATTRIBUTE)
    if found is None:
        return None, ""
    if found.config != config:
        return None, f"its calibration was for {found.config}, so the weight is rounded to nearest"
    if found.digest != digest(layer.get_parameter("weight")):
        return None, "its weight has changed since calibrate_, so it is rounded to nearest"
    return found, ""


def forget(layers: Iterable[nn.Module]) -> None:
    """Removes what :func:`remember` left."""
    for layer in layers:
        vars(layer).pop(_ATTRIBUTE, None)
