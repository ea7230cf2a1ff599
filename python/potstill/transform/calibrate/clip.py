"""Rounds every weight to nearest, on the scales that fit best or on the widest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.transform.grid import Grid


def round_by_groups(weight: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rounds ``weight`` [n, k]; returns int8 [n, k] and the scale and zero of :class:`Grid`.

    With the ``importance`` [k] of each input the scales may clip, so that the weighted sum of squared errors is least.
    With the sum of squares of each input that is the error of the outputs, but for correlations between inputs.
    """
    columns = weight.detach().float()
    step = grid.group or columns.shape[1]
    integers, scales, zeros = [], [], []
    for start in range(0, columns.shape[1], step):
        part = columns[:, start : start + step]
        scale, zero = grid.nearest(part) if importance is None else grid.fit(part, importance[start : start + step])
        each = scale[:, None], None if zero is None else zero[:, None]
        integers.append(grid.round(part, *each).to(torch.int8))
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(integers, dim=1), *grid.stack(scales, zeros)
