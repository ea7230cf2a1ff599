"""Look-up in a table of int8 rows, each with a float32 scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import _C
from potstill.ops.op import Cost, Kernel, Op, Sample, gpu_function

_WRITTEN = (torch.float32, torch.bfloat16)  # the dtypes that the kernel writes


def _check(weight: Tensor, scale: Tensor, indices: Tensor) -> None:
    if weight.dim() != 2 or weight.dtype != torch.int8 or scale.shape != weight.shape[:1]:
        raise ValueError(
            f"int8_embedding: weight is {weight.dtype} {list(weight.shape)} and scale {list(scale.shape)}, expected "
            "int8 [num_embeddings, embedding_dim] and [num_embeddings]"
        )
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"int8_embedding: indices is {indices.dtype}, expected int64 or int32; call .long() on it")


def _reference(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    _check(weight, scale, indices)
    inside = (indices >= 0) & (indices < weight.shape[0])
    if indices.device.type == "cpu" and not bool(inside.all()):  # elsewhere looking would wait for the device
        raise ValueError(
            f"int8_embedding: indices has the value {int(indices[~inside][0])}; expected rows of the table, from 0 to "
            f"{weight.shape[0] - 1}"
        )
    known = torch.where(inside, indices, 0).long()
    factor = torch.where(inside, scale.float()[known], torch.nan)
    return (weight[known].float() * factor.unsqueeze(-1)).to(dtype or torch.float32)


def _fake(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype or torch.float32)


def _cpu(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or torch.float32
    if dtype not in _WRITTEN:
        return _reference(weight, scale, indices, dtype)
    if indices.dtype == torch.int32:
        indices = indices.long()
    y = weight.new_empty((*indices.shape, weight.shape[-1]), dtype=dtype)
    _C.int8_embedding(weight.contiguous(), scale.float(), indices.contiguous(), y)
    return y


def _cuda(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    _check(weight, scale, indices)
    launch = gpu_function("int8_embedding", "launch")
    y: Tensor = (_reference if launch is None else launch)(weight, scale, indices, dtype)
    return y


def _arguments(
    table: int, dim: int, shape: tuple[int, ...], dtype: torch.dtype | None = None, index: torch.dtype = torch.int64
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(table * 7919 + dim)
    return {
        "weight": torch.randint(-127, 128, (table, dim), generator=random, dtype=torch.int8),
        "scale": torch.rand(table, generator=random) * 0.01 + 1e-4,
        "indices": torch.randint(0, max(table, 1), shape, generator=random).to(index),
        "dtype": dtype,
    }


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        for table, dim in ((30522, 768), (50257, 768), (128000, 2048), (1000, 64)):
            for rows in (1024, 128, 1):
                label = f"{rows} of {table} x {dim}"
                yield Sample(label, lambda t=table, d=dim, r=rows: _arguments(t, d, (r,)))  # type: ignore[misc]
        return
    tables: list[tuple[int, int, tuple[int, ...]]] = [
        (10, 16, (4,)), (1, 1, (1,)), (7, 33, (2, 3)), (50, 770, ()), (5, 0, (3,)), (9, 8, (0,)), (0, 8, (0,)),
        (101, 127, (13, 5)), (300, 96, (700,)), (1021, 5, (3, 1, 2)),
    ]  # fmt: skip
    for dtype in (None, torch.bfloat16, torch.float16):
        for table, dim, shape in tables:
            label = f"{list(shape)} of {table} x {dim} {str(dtype).removeprefix('torch.')}"
            yield Sample(label, lambda t=table, d=dim, s=shape, o=dtype: _arguments(t, d, s, o))  # type: ignore[misc]
    yield Sample("int32 indices", lambda: _arguments(40, 24, (9,), index=torch.int32))
    yield Sample("strided", lambda: _strided(_arguments(40, 24, (9, 7))))


def _strided(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"weight": arguments["weight"][:, ::2], "indices": arguments["indices"].t()[::2]}


def _cost(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype | None = None) -> Cost:
    values = indices.numel() * weight.shape[1]
    return Cost(f32_ops=float(values), bytes=float(values * (1 + (dtype or torch.float32).itemsize)))


def _rivals(
    weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype | None = None
) -> dict[str, Callable[[], Any]]:
    table = weight.to(dtype or torch.float32) * scale[:, None]
    return {"torch eager": lambda: F.embedding(indices, table)}


int8_embedding = Op(
    "int8_embedding(Tensor weight, Tensor scale, Tensor indices, ScalarType? dtype=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": Kernel(_cpu, frozenset({torch.int8})), "cuda": Kernel(_cuda, frozenset({torch.int8}), "triton")},
    samples=_samples,
    tolerance={torch.int8: 0.0},
    cost=_cost,
    rivals=_rivals,
)
"""``(weight[indices] * scale[indices, None]).to(dtype)``, without the temporaries.

- ``weight``: [num_embeddings, embedding_dim] int8; ``scale``: [num_embeddings] float32.
- ``indices``: [...], int64 or int32.
- ``dtype``: of the result, float32 if None; the kernels write float32 and bfloat16, on GPUs float16 too, the reference
  any float dtype.

Returns [..., embedding_dim]. The products are float32, so that every backend gives the same bits. Raises
:class:`ValueError` for an index that names no row; on a GPU, where looking would wait for the device, such an index
gives a row of NaN. There is no gradient: the table is frozen.

>>> weight, scale = torch.tensor([[10, -20], [30, 40]], dtype=torch.int8), torch.tensor([0.5, 0.25])
>>> int8_embedding(weight, scale, torch.tensor([1, 0, 1]))
tensor([[  7.5000,  10.0000],
        [  5.0000, -10.0000],
        [  7.5000,  10.0000]])
"""
