"""Plain torch in place of the libraries for sparse units, which checks what it is given as they would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from potstill.ops.semi_sparse import is_semi
from potstill.ops.sparse_units import CuSparseLt, Packed


@dataclass
class Emulated(CuSparseLt):
    """cuSPARSELt with torch's three calls of it replaced; ``calls`` says which were made.

    It finds algorithm 7 for up to 256 rows, and 3 for more.
    """

    calls: list[str] = field(default_factory=list)
    weights: dict[int, Tensor] = field(default_factory=dict)

    def compress(self, weight: Tensor) -> Packed:
        return self._in_place_of("_cslt_compress", self._compress, super().compress, weight)  # type: ignore[no-any-return]

    def search(self, packed: Packed, rows: Tensor) -> int:
        return self._in_place_of("_cslt_sparse_mm_search", self._search, super().search, packed, rows)  # type: ignore[no-any-return]

    def multiply(self, packed: Packed, rows: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        return self._in_place_of("_cslt_sparse_mm", self._multiply, super().multiply, packed, rows, bias, algorithm)  # type: ignore[no-any-return]

    def _in_place_of(self, name: str, own: Callable[..., Any], call: Callable[..., Any], *args: Any) -> Any:
        torchs = getattr(torch, name)
        setattr(torch, name, own)
        try:
            return call(*args)
        finally:
            setattr(torch, name, torchs)

    def _compress(self, weight: Tensor) -> Tensor:
        self.calls.append("compress")
        sizes = self.sizes[weight.dtype]
        assert weight.is_contiguous()
        assert not any(size % multiple for size, multiple in zip(weight.shape, sizes, strict=False))
        assert is_semi(weight)
        sixteenths = 10 if weight.dtype == torch.int8 else 9
        blob = weight.new_zeros(len(weight), weight.shape[1] * sixteenths // 16)
        self.weights[blob.data_ptr()] = weight
        return blob

    def _search(self, packed: Tensor, dense: Tensor, *, out_dtype: torch.dtype | None, transpose_result: bool) -> int:
        self.calls.append(f"search for {dense.shape[1]} rows")
        self._check(packed, dense, None, out_dtype, transpose_result)
        return 7 if dense.shape[1] <= 256 else 3

    def _multiply(
        self,
        packed: Tensor,
        dense: Tensor,
        *,
        bias: Tensor | None,
        out_dtype: torch.dtype | None,
        transpose_result: bool,
        alg_id: int,
    ) -> Tensor:
        self.calls.append(f"multiply by algorithm {alg_id}")
        weight = self._check(packed, dense, bias, out_dtype, transpose_result)
        if dense.dtype == torch.int8:
            return (weight.double() @ dense.double()).t().contiguous().int()
        y = (weight.float() @ dense.float()).t() + (0.0 if bias is None else bias.float())
        return y.to(dense.dtype).contiguous()

    def _check(
        self, packed: Tensor, dense: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, transpose: bool
    ) -> Tensor:
        weight = self.weights[packed.data_ptr()]
        sizes, (k, m) = self.sizes[dense.dtype], dense.shape
        assert dense.dtype == weight.dtype
        assert k == weight.shape[1]
        assert m > 0
        assert m % sizes.rows == 0
        assert dense.stride() == (1, k)  # columns: the only form that int8 has
        assert not dense.is_contiguous()
        assert out_dtype == (torch.int32 if dense.dtype == torch.int8 else None)
        assert transpose
        if bias is not None:
            assert bias.dtype == dense.dtype != torch.int8
            assert bias.shape == weight.shape[:1]
        return weight
