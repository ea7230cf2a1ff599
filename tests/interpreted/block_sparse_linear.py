"""The GPU kernel of ``block_sparse_linear`` against the float64 reference, by triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.interpreted.common import (
    GUARD,
    TOLERANCE,
    NoWaiting,
    assert_close,
    guarded,
    memory_starts_as_nan,
    of_numpy,
    widened,
)
from torch import Tensor

from potstill.ops import block_sparse_linear
from potstill.ops.activation import ACTIVATIONS
from potstill.ops.block_sparse import SIZES, from_block_sparse, longest_first, to_block_sparse
from potstill.ops.triton import block_sparse_linear as gpu
from potstill.ops.triton import tiles

__all__ = ["memory_starts_as_nan"]  # a fixture of all tests here

pytestmark = of_numpy

# Several programs and steps along each dimension.
SMALL = {
    "16": tiles.Tile(16, 16, 32, 4, 2),
    "64": tiles.Tile(16, 16, 32, 4, 2, 2),
    "more": tiles.Tile(32, 32, 64, 4, 2),
}


@pytest.fixture(params=["table", "small tiles"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "table":
        monkeypatch.setattr(gpu, "TABLE", SMALL)
    return str(request.param)


def between(x: Tensor, around: float) -> Tensor:
    """A copy between numbers that must not be read."""
    memory = x.new_full((x.numel() + 2 * GUARD,), around)
    return memory[GUARD : GUARD + x.numel()].view(x.shape).copy_(x)


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments amid values that must neither be read nor written."""
    numbers = {n: between(arguments[n], 2**30) for n in ("columns", "first", "order")}
    floats = {"x": guarded(arguments["x"])[0], "values": between(arguments["values"], math.nan)}
    return arguments | numbers | floats


def launched(arguments: dict[str, Any]) -> Tensor:
    return gpu.launch(*block_sparse_linear.positional(**on_gpu(arguments)))


def exact(arguments: dict[str, Any]) -> Tensor:
    return block_sparse_linear.reference(**widened(arguments))  # type: ignore[no-any-return]


def made(
    m: int, n: int, k: int, size: int = 16, density: float = 0.4, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(m * n + k)
    kept = torch.rand(-(-n // size), -(-k // size), generator=random) < density
    kept[1:2] = False
    weight = torch.randn(n, k, generator=random) * kept.repeat_interleave(size, 0).repeat_interleave(size, 1)[:n, :k]
    values, columns, first = to_block_sparse(weight.to(dtype), size)
    x = torch.randn(m, k, generator=random).to(dtype)
    weights = {"values": values, "columns": columns, "first": first, "order": longest_first(first)}
    return {"x": x, **weights, "out_features": n, "bias": torch.randn(n, generator=random).to(dtype)} | more


@pytest.mark.parametrize("sample", list(block_sparse_linear.samples("test")), ids=lambda s: s.label)
def test_agrees_with_float64_reference(sample: Any, each_way: str) -> None:
    arguments = sample.make()
    y = launched(arguments)
    assert y.dtype == arguments["x"].dtype
    assert_close(y, exact(arguments), TOLERANCE[y.dtype], sample.label)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sizes_and_dtypes(size: int, dtype: torch.dtype, each_way: str) -> None:
    for m, n, k in ((3, 2 * size, 3 * size), (37, size + 9, 4 * size - 7), (130, 2 * size - 1, 2 * size)):
        a = made(m, n, k, size, 0.6, dtype)
        assert_close(launched(a), exact(a), TOLERANCE[dtype], f"{m} {n} {k} {each_way}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float16_with_all_ends(activation: str) -> None:
    a = made(20, 50, 100, dtype=torch.float16, activation=activation, residual=torch.randn(20, 50).half())
    assert_close(launched(a), exact(a), TOLERANCE[torch.float16], activation)


def test_nothing_stored_is_the_bias(each_way: str) -> None:
    a = made(5, 40, 70, density=0.0)
    assert len(a["values"]) == 0
    assert torch.equal(launched(a), a["bias"].expand(5, 40))


def test_nan_and_infinity_meet_only_what_is_stored(each_way: str) -> None:
    a = made(4, 64, 80, density=0.5)
    a["x"][1, 20], a["x"][2, 50] = math.nan, math.inf
    y = launched(a)
    weight = from_block_sparse(a["values"], a["columns"], a["first"], 64, 80)
    for row, column in ((1, 20), (2, 50)):
        met = weight[:, column] != 0
        assert 0 < int(met.sum()) < 64
        assert torch.equal(~torch.isfinite(y[row]), met)
    assert torch.isfinite(y[[0, 3]]).all()


@pytest.mark.parametrize("seed", range(12))
def test_damaged_numbers_lead_nowhere(seed: int, each_way: str) -> None:
    """``columns``, ``first`` and ``order`` may hold anything: reads stay inside, between NaN."""
    random = torch.Generator().manual_seed(seed)
    a = made(3, 70, 90) | {"bias": None}
    for name in ("columns", "first", "order"):
        damaged = a[name].clone()
        places = torch.randint(len(damaged), (2,), generator=random)
        damaged[places] = torch.randint(-(2**31), 2**31 - 1, (2,), generator=random).int()
        a[name] = damaged
    b = on_gpu(a)
    memory = b["x"].new_full((3 * 90 + 2 * GUARD,), math.nan)
    b["x"] = memory[GUARD:-GUARD].view(3, 90).copy_(a["x"])
    y = gpu.launch(*block_sparse_linear.positional(**b))
    rows = a["order"].clamp(0, 4).unique()  # others are not written
    for row in rows.tolist():
        assert torch.isfinite(y[:, row * 16 : row * 16 + 16]).all()


def test_longest_rows_are_begun_first() -> None:
    order = made(3, 160, 200)["order"]
    counts = made(3, 160, 200)["first"].diff()[order.long()]
    assert (counts.diff() <= 0).all()
    assert sorted(order.tolist()) == list(range(10))


def test_nothing_waits_for_the_device() -> None:
    for m in (1, 40, 100):
        a = made(m, 20, 140)
        with NoWaiting():
            gpu.launch(*block_sparse_linear.positional(**a))
