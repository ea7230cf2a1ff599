"""Large results on huge pages: with the usual ones, the first touch of fresh memory costs more than filling it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`torch.empty`, asking Linux for huge pages where the tensor contains any; a hint that changes no contents.

    >>> empty((3, 1 << 20), torch.float32, torch.device("cpu")).shape
    torch.Size([3, 1048576])
    """
    x = torch.empty(shape, dtype=dtype, device=device)
    if x.is_cpu and x.numel() * x.element_size() >= 2 * _PAGE and sys.platform == "linux":
        begin = (x.data_ptr() + _PAGE - 1) // _PAGE * _PAGE
        end = (x.data_ptr() + x.numel() * x.element_size()) // _PAGE * _PAGE
        _libc().madvise(begin, end - begin, _MADV_HUGEPAGE)
    return x


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
