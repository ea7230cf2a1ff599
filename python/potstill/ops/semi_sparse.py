"""2:4 weights: of each four consecutive inputs of an output two are stored, and where they belong.

A weight [n, k], k rounded up to whole groups of eight by zeros, is two tensors: ``values`` [n, k / 2], the two of each
group in their order, and ``indices`` uint8 [n, k / 8]. Byte j tells of the groups 2 j (low half) and 2 j + 1 (high
half), by ``i0 | i1 << 2``: the inputs of the group, i0 < i1, to which its values belong. 0.625 bytes for a weight in
int8, 0.5625 of the dense size in 16 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.ops.int8_linear import ROW_DEVICES

GROUP = 4
"""Inputs of a group."""

UNIT = 8
"""Inputs that a byte of indices tells of: of a canonical weight the number of inputs is a multiple of it."""

ALIGNED = 128
"""The same on GPUs, where each row of values and of indices begins at an address from which 16 bytes can be loaded."""

_NONE = 255
# By the bits of the inputs that are not zero: the half byte of the group, its places filled up from the lowest.
_HALVES = (4, 4, 4, 4, 8, 8, 9, _NONE, 12, 12, 13, _NONE, 14, _NONE, _NONE, _NONE)


def to_semi(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [n, k] of any dtype as values and indices; raises :class:`ValueError` unless it :func:`is_semi`.

    >>> values, indices = to_semi(torch.tensor([[0, 5, 0, 7, 1, 0, 0, 0]], dtype=torch.int8))
    >>> values.tolist(), [f"{byte:#x}" for byte in indices.flatten().tolist()]
    ([[5, 7, 1, 0]], ['0x4d'])
    """
    halves = _halves(weight)
    if bool((halves == _NONE).any()):
        raise ValueError(
            "to_semi: weight has groups of four inputs of which more than two are not zero, expected at most two; "
            "prune_(model, Prune(pattern='2:4')) makes them so"
        )
    n, groups = halves.shape
    places = torch.stack((halves & 3, halves >> 2), dim=-1).long()
    values = _groups(weight).gather(2, places).view(n, 2 * groups)
    return values, halves[:, 0::2] | halves[:, 1::2] << 4


def from_semi(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """The weight [n, k] that :func:`to_semi` was given.

    >>> weight = torch.tensor([[0, 5, 0, 7, 1, 0]])
    >>> torch.equal(from_semi(*to_semi(weight), 6), weight)
    True
    """
    n, groups = len(values), values.shape[1] // 2
    halves = torch.stack((indices & 15, indices >> 4), dim=-1).view(n, groups)
    places = torch.stack((halves & 3, halves >> 2), dim=-1).long()
    wide = values.new_zeros(n, groups, GROUP).scatter_(2, places, values.view(n, groups, 2))
    return wide.view(n, groups * GROUP)[:, :k].contiguous()


def zeros(n: int, k: int, dtype: torch.dtype, device: str | None = None) -> tuple[Tensor, Tensor]:
    """Values and indices of a weight [n, k] that is all zero.

    >>> torch.equal(zeros(2, 9, torch.int8)[1], to_semi(torch.zeros(2, 9))[1])
    True
    """
    width = rounded_up(k, UNIT)
    values = torch.zeros(n, width // 2, dtype=dtype, device=device)
    return values, torch.full((n, width // UNIT), _HALVES[0] * 17, dtype=torch.uint8, device=device)


def is_semi(weight: Tensor) -> bool:
    """Whether of each four consecutive inputs of ``weight`` [n, k] at least two are zero.

    >>> is_semi(torch.tensor([[1, 0, 0, 1, 1, 1]])), is_semi(torch.tensor([[1, 1, 1, 0]]))
    (True, False)
    """
    return not bool((_halves(weight) == _NONE).any())


def laid_out(values: Tensor, indices: Tensor, k: int, device_type: str) -> tuple[Tensor, Tensor]:
    """Values and indices of ``k`` inputs as kernels of ``device_type`` take them, on GPUs with longer rows.

    What is laid out so already is returned itself; else copies, with zeros for more inputs or without those.

    >>> values, indices = laid_out(*to_semi(torch.eye(4, dtype=torch.int8)[:, :2]), 2, "cuda")
    >>> values.shape, indices.shape, laid_out(values, indices, 2, "cpu")[0].shape
    (torch.Size([4, 64]), torch.Size([4, 16]), torch.Size([4, 4]))
    """
    return _of_width(values, indices, rounded_up(k, ALIGNED if device_type in ROW_DEVICES else UNIT))


def canonical(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of ``k`` inputs as :func:`to_semi` makes them, however they are laid out."""
    return _of_width(values, indices, rounded_up(k, UNIT))


def _of_width(values: Tensor, indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    more = width - 2 * values.shape[1]
    if more == 0:
        return values, indices
    if more < 0:
        return values[:, : width // 2].contiguous(), indices[:, : width // UNIT].contiguous()
    return F.pad(values, (0, more // 2)), F.pad(indices, (0, more // UNIT), value=_HALVES[0] * 17)


def rounded_up(size: int, multiple: int) -> int:
    """The first multiple that is not less than ``size``."""
    return -(-size // multiple) * multiple


def check_semi(op: str, values: Tensor, indices: Tensor, n: int, k: int, multiples: tuple[int, ...]) -> None:
    """Raises :class:`ValueError` unless the sizes are those of k inputs, rounded up to one of the ``multiples``."""
    widths = [rounded_up(k, multiple) for multiple in multiples]
    shapes = [((n, width // 2), (n, width // UNIT)) for width in widths]
    if (tuple(values.shape), tuple(indices.shape)) not in shapes or indices.dtype != torch.uint8:
        expected = " or ".join(f"{list(v)} and uint8 {list(i)}" for v, i in dict.fromkeys(shapes))
        raise ValueError(
            f"{op}: values are {list(values.shape)} and indices {indices.dtype} {list(indices.shape)}, but {n} outputs "
            f"and {k} inputs need {expected}, as to_semi makes them and laid_out(values, indices, k, device type) "
            "lays them out"
        )


def wrong_numbers(values: Tensor, indices: Tensor) -> str:
    """What is wrong with the numbers of a weight whose sizes are right; empty if nothing is."""
    halves = torch.stack((indices & 15, indices >> 4), dim=-1)
    if bool(((halves & 3) >= (halves >> 2)).any()):
        return "indices has groups whose two inputs are not in order, or the same"
    if values.dtype == torch.int8 and bool((values == -128).any()):
        return "values has the value -128; int8 weights lie in [-127, 127]"
    if not bool(torch.isfinite(values).all()):
        return "values has values that are not finite"
    return ""


def wrong_padding(values: Tensor, indices: Tensor, k: int) -> str:
    """Whether there are weights beyond the ``k`` inputs of a layer; empty if there are none."""
    beyond = from_semi(values, indices, 2 * values.shape[1])[:, k:]
    return f"values has values beyond the {k} inputs" if bool((beyond != 0).any()) else ""


def _groups(weight: Tensor) -> Tensor:
    """[n, groups, 4], with zeros up to a whole number of pairs of groups."""
    n, k = weight.shape
    return F.pad(weight, (0, -k % UNIT)).view(n, rounded_up(k, UNIT) // GROUP, GROUP)


def _halves(weight: Tensor) -> Tensor:
    """The half byte of each group, uint8 [n, groups]; :data:`_NONE` where more than two inputs are not zero."""
    bits = (_groups(weight) != 0).to(torch.uint8) << torch.arange(GROUP, dtype=torch.uint8, device=weight.device)
    return torch.tensor(_HALVES, dtype=torch.uint8, device=weight.device)[bits.sum(2, dtype=torch.long)]
