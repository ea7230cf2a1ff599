"""Products of 2:4 weights on the sparse units of GPUs, by the libraries that torch has for them: all calls of these.

The units skip the inputs of which the weight has none, so they take half of the dense time at best; their libraries
want sizes in multiples and the rows as columns. What they compress a weight to depends on the GPU and on their version:
it is made where the layer is, and never saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.ops.semi_sparse import rounded_up

Packed = tuple[Tensor, ...]
"""A weight as a library compresses it."""


class Sizes(NamedTuple):
    """Multiples of which the outputs and the inputs of a weight must be, and the rows that it is multiplied with."""

    outputs: int
    inputs: int
    rows: int


class Library(Protocol):
    """The calls of one library; all sizes are multiples of its ``sizes`` for the weight's dtype.

    ``rows`` are contiguous [m, k] of the weight's dtype; the result is [m, n], int32 for int8, else of their dtype.
    """

    sizes: Mapping[torch.dtype, Sizes]

    def compress(self, weight: Tensor) -> Packed:
        """Of a contiguous ``weight`` [n, k] with at most two of each four inputs."""

    def search(self, packed: Packed, rows: Tensor) -> int:
        """The fastest algorithm for so many rows, found by running them."""

    def multiply(self, packed: Packed, rows: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        """``rows @ weight.t() + bias``."""


class CuSparseLt:
    """NVIDIA's library; the sizes are those that torch knows (``SparseSemiStructuredTensorCUSPARSELT``)."""

    sizes: Mapping[torch.dtype, Sizes] = {
        torch.int8: Sizes(32, 32, 16),
        torch.float16: Sizes(16, 16, 8),
        torch.bfloat16: Sizes(16, 16, 8),
    }

    def compress(self, weight: Tensor) -> Packed:
        """See :class:`Library`."""
        return (torch._cslt_compress(weight),)

    def search(self, packed: Packed, rows: Tensor) -> int:
        """See :class:`Library`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wants its C binding called instead, which has no schema
            out = _out_dtype(rows)
            return int(torch._cslt_sparse_mm_search(packed[0], rows.t(), out_dtype=out, transpose_result=True))

    def multiply(self, packed: Packed, rows: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        """See :class:`Library`."""
        return torch._cslt_sparse_mm(
            packed[0], rows.t(), bias=bias, out_dtype=_out_dtype(rows), transpose_result=True, alg_id=algorithm
        )


class Cutlass:
    """The kernels that torch itself has for GPUs of capability 8; it has one algorithm."""

    sizes: Mapping[torch.dtype, Sizes] = dict.fromkeys((torch.float16, torch.bfloat16), Sizes(32, 64, 8))

    def compress(self, weight: Tensor) -> Packed:
        """See :class:`Library`."""
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

        values, places = sparse_semi_structured_from_dense_cutlass(weight)
        return values, places

    def search(self, packed: Packed, rows: Tensor) -> int:
        """See :class:`Library`."""
        return 0

    def multiply(self, packed: Packed, rows: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        """See :class:`Library`."""
        values, places = packed
        if bias is None:
            return torch._sparse_semi_structured_mm(values, places, rows.t()).t()
        return torch._sparse_semi_structured_addmm(bias, values, places, rows.t()).t()


def library(device: torch.device, dtype: torch.dtype) -> Library | None:
    """The library that multiplies weights of ``dtype`` on ``device``; None if torch has none for them.

    >>> library(torch.device("cpu"), torch.int8) is None
    True
    """
    if device.type != "cuda":
        return None
    if torch.backends.cusparselt.is_available():
        return CuSparseLt() if dtype in CuSparseLt.sizes else None
    capability, _ = torch.cuda.get_device_capability(device)
    return Cutlass() if dtype in Cutlass.sizes and capability == 8 else None


def compress(library: Library, weight: Tensor) -> Packed:
    """``weight`` [n, k] as ``library`` has it, with zeros for the outputs and inputs that it lacks."""
    sizes = library.sizes[weight.dtype]
    return library.compress(_padded(weight, sizes.outputs, sizes.inputs))


def search(library: Library, packed: Packed, rows: Tensor) -> int:
    """The fastest algorithm for as many ``rows`` [m, k]."""
    sizes = library.sizes[rows.dtype]
    return library.search(packed, _padded(rows, sizes.rows, sizes.inputs))


def multiply(
    library: Library, packed: Packed, rows: Tensor, n: int, bias: Tensor | None = None, algorithm: int = 0
) -> Tensor:
    """``rows @ weight.t() + bias`` of ``rows`` [m, k] and a weight with ``n`` outputs: contiguous [m, n]."""
    sizes = library.sizes[rows.dtype]
    if bias is not None:
        bias = F.pad(bias.to(rows.dtype), (0, -n % sizes.outputs))
    y = library.multiply(packed, _padded(rows, sizes.rows, sizes.inputs), bias, algorithm)
    return y[: len(rows), :n].contiguous()


def _out_dtype(rows: Tensor) -> torch.dtype | None:
    """int32, which holds every sum of int8 products; of floats torch takes none, and gives theirs."""
    return torch.int32 if rows.dtype == torch.int8 else None


def _padded(matrix: Tensor, down: int, across: int) -> Tensor:
    """With zeros up to multiples of ``down`` rows, at least one, and ``across`` columns."""
    rows, columns = matrix.shape
    missing = rounded_up(max(rows, 1), down) - rows, -columns % across
    return F.pad(matrix, (0, missing[1], 0, missing[0])) if any(missing) else matrix.contiguous()
