"""How 4-bit weights lie in memory: packed for CPU kernels, in rows for GPU kernels; so do scales and zero points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.ops.int8_linear import PANEL, ROW_DEVICES

BLOCK = 32
"""Inputs in one block of packed weights."""

ROW_BLOCK = 64
"""Inputs in one block of a row, as GPUs take them."""


def pack(integers: Tensor) -> Tensor:
    """Reorders integers [n, k] in 0..15 into the layout that CPU kernels stream: [ceil(n/16), ceil(k/32), 256] uint8.

    A panel holds 16 outputs: per block of 32 inputs four times [16][4] bytes, each for eight inputs. Byte i of an
    output has input i of the eight in its low half and input i + 4 in its high half. Rows and columns beyond n and k
    are zero. It is the same for every instruction set. Undone by :func:`unpack`.

    >>> w = torch.randint(0, 16, (20, 7), dtype=torch.uint8)
    >>> pack(w).shape, torch.equal(unpack(pack(w), 20, 7), w)
    (torch.Size([2, 1, 256]), True)
    """
    n, k = integers.shape
    panels, blocks = -(-n // PANEL), -(-k // BLOCK)
    padded = F.pad(integers, (0, blocks * BLOCK - k, 0, panels * PANEL - n))
    halves = padded.view(panels, PANEL, blocks, 4, 2, 4).permute(0, 2, 3, 4, 1, 5)  # panel block eight half output i
    return (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).reshape(panels, blocks, BLOCK * PANEL // 2)


def unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """The integers [n, k] that :func:`pack` was given."""
    panels, blocks, _ = packed.shape
    bytes_ = packed.view(panels, blocks, 4, PANEL, 4)
    halves = torch.stack([bytes_ & 15, bytes_ >> 4], dim=4)  # panel block eight output half i
    return halves.permute(0, 3, 1, 2, 4, 5).reshape(panels * PANEL, blocks * BLOCK)[:n, :k].contiguous()


def pack_rows(integers: Tensor) -> Tensor:
    """Brings integers [n, k] in 0..15 into the layout that GPU kernels take: [n, 32 ceil(k/64)] uint8.

    A row has 32 bytes for each 64 inputs: byte j has input j of them in its low half and input j + 32 in its high half,
    so that either half of consecutive bytes is consecutive inputs. Columns beyond k are zero. Scales and zero points
    stay [n, groups]. Undone by :func:`unpack_rows`.

    >>> w = torch.randint(0, 16, (20, 70), dtype=torch.uint8)
    >>> pack_rows(w).shape, torch.equal(unpack_rows(pack_rows(w), 70), w)
    (torch.Size([20, 64]), True)
    """
    n, k = integers.shape
    blocks = -(-k // ROW_BLOCK)
    halves = F.pad(integers, (0, blocks * ROW_BLOCK - k)).view(n, blocks, 2, ROW_BLOCK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(n, blocks * ROW_BLOCK // 2)


def unpack_rows(rows: Tensor, k: int) -> Tensor:
    """The integers [n, k] that :func:`pack_rows` was given."""
    n, blocks = rows.shape[0], rows.shape[1] * 2 // ROW_BLOCK
    bytes_ = rows.view(n, blocks, 1, ROW_BLOCK // 2)
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=2).view(n, blocks * ROW_BLOCK)[:, :k].contiguous()


def pack_scales(scale: Tensor) -> Tensor:
    """Reorders scales or zero points [n, groups] into [ceil(n/16), groups, 16]; undone by :func:`unpack_scales`.

    >>> pack_scales(torch.ones(20, 3)).shape
    torch.Size([2, 3, 16])
    """
    n, groups = scale.shape
    panels = -(-n // PANEL)
    padded = F.pad(scale, (0, 0, 0, panels * PANEL - n))
    return padded.view(panels, PANEL, groups).transpose(1, 2).contiguous()


def unpack_scales(packed: Tensor, n: int) -> Tensor:
    """The scales or zero points [n, groups] that :func:`pack_scales` was given."""
    panels, groups, _ = packed.shape
    return packed.transpose(1, 2).reshape(panels * PANEL, groups)[:n].contiguous()


def integers(weight: Tensor, n: int, k: int) -> Tensor:
    """The integers [n, k] of ``weight``, whichever of its layouts it has: :func:`pack`'s or :func:`pack_rows`'s."""
    return unpack(weight, n, k) if weight.dim() == 3 else unpack_rows(weight, k)


def by_output(scale: Tensor, n: int) -> Tensor:
    """Scales or zero points [n, groups], whether they are packed or as GPUs take them."""
    return unpack_scales(scale, n) if scale.dim() == 3 else scale


def laid_out(weight: Tensor, n: int, k: int, device_type: str) -> Tensor:
    """``weight``, in either layout, in the one that the kernels of ``device_type`` take.

    It stays on its device; one that is laid out so already is returned itself.

    >>> w = pack(torch.randint(0, 16, (20, 70), dtype=torch.uint8))
    >>> rows = laid_out(w, 20, 70, "cuda")
    >>> rows.shape, laid_out(rows, 20, 70, "cpu").equal(w), laid_out(w, 20, 70, "cpu") is w
    (torch.Size([20, 64]), True, True)
    """
    dimensions, change = (2, pack_rows) if device_type in ROW_DEVICES else (3, pack)
    return weight if weight.dim() == dimensions else change(integers(weight, n, k))


def scales_laid_out(scale: Tensor, n: int, device_type: str) -> Tensor:
    """Scales or zero points, packed or [n, groups], as the kernels of ``device_type`` take them."""
    if device_type in ROW_DEVICES:
        return by_output(scale, n)
    return scale if scale.dim() == 3 else pack_scales(scale)
