"""The integers that weights are rounded to, and the scale that fits them best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RATIOS = tuple(1 - 0.02 * step for step in range(26))  # 1.00, 0.98, ... 0.50
_SMALLEST = 2.0**-100 / 127  # the scale of rows that ops.int8_linear.quantize_weight takes for zero
_CHUNK = 1 << 15  # weights that are searched at a time: so few that their temporaries stay in the cache


@dataclass(frozen=True)
class Grid:
    """Integers from ``low`` to ``high``; one scale for each ``group`` inputs of an output, or for all if that is None.

    A weight is read as ``(integer - zero) * scale``; a symmetric grid has no zero point (zero is None). If it has one
    integer more below zero than above, the largest weight of a group becomes ``low`` and the scale has the sign for
    that. Scales are such as ``scale_dtype`` can hold.
    """

    low: int
    high: int
    group: int | None
    symmetric: bool
    scale_dtype: torch.dtype = torch.float32

    def stack(self, scales: Sequence[Tensor], zeros: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """The scales and zeros of all groups in one tensor each: [n, groups], or [n] if an output has but one."""
        if self.group is None:
            return scales[0], zeros[0]
        points = [zero for zero in zeros if zero is not None]
        return torch.stack(list(scales), dim=1), torch.stack(points, dim=1) if points else None

    def weight(self, integers: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The float32 weight that integers [n, k] with stacked scales and zeros stand for."""
        group, k = self.group or integers.shape[1], integers.shape[1]

        def spread(each: Tensor) -> Tensor:
            return each.reshape(len(integers), -1).repeat_interleave(group, dim=1)[:, :k]

        return self.read(integers.float(), spread(scale), None if zero is None else spread(zero))

    def nearest(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale [n] and zero [n] of rows [n, g] of which no weight is clipped."""
        return self._span(*self._extent(rows))

    def fit(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale [n] and zero [n] by which rows [n, g] have the least error, weighted by ``importance`` [g].

        A smaller scale clips the largest weights and rounds the others finer; for each row the best of some fractions
        of the widest scale is taken, so that the error is never above that of :meth:`nearest`.
        """
        step = max(1, _CHUNK // max(rows.shape[1], 1))
        ratio = torch.cat([self._best_ratio(part.contiguous(), importance) for part in rows.split(step)])
        low, high = self._extent(rows)
        return self._span(low * ratio, high * ratio)

    def round(self, weights: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The integers, as floats; ``scale`` and ``zero`` broadcast against ``weights``."""
        integers = (weights / scale).round_()
        return (integers if zero is None else integers.add_(zero)).clamp_(self.low, self.high)

    def read(self, integers: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The weights that the integers stand for."""
        return integers * scale if zero is None else (integers - zero) * scale

    def _best_ratio(self, rows: Tensor, importance: Tensor) -> Tensor:
        best, least = rows.new_ones(len(rows)), rows.new_full((len(rows),), torch.inf)
        low, high = self._extent(rows)
        for ratio in _RATIOS:
            scale, zero = self._span(low * ratio, high * ratio)
            scale, zero = scale[:, None], None if zero is None else zero[:, None]
            error = self.read(self.round(rows, scale, zero), scale, zero).sub_(rows).square_() @ importance
            best = torch.where(error < least, ratio, best)
            least = torch.minimum(error, least)
        return best

    def _extent(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """From where to where each row reaches, zero included; on a symmetric grid its largest weight, twice."""
        if self.symmetric:
            largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).squeeze(1)
            return largest, largest
        return rows.amin(dim=1).clamp_(max=0), rows.amax(dim=1).clamp_(min=0)

    def _span(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale and zero whose grid reaches from ``low`` to ``high``."""
        if self.symmetric:
            scale = high.abs() / self.high if self.low == -self.high else high / self.low
        else:
            scale = (high - low) / (self.high - self.low)
        scale = torch.where(scale.abs() < _SMALLEST, 1.0, scale)
        zero = None if self.symmetric else torch.round(self.low - low / scale).clamp_(self.low, self.high)
        return scale.to(self.scale_dtype).float(), zero
