"""The GPU kernels of ``semi_sparse_int8_linear`` against the float64 reference, by triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.interpreted.common import NoWaiting, assert_close, guarded, memory_starts_as_nan, of_numpy
from tests.sparse_unit_calls import Emulated
from torch import Tensor

from potstill.ops import semi_sparse_int8_linear, sparse_units
from potstill.ops.semi_sparse import from_semi, laid_out, to_semi
from potstill.ops.triton import int8_linear as dense
from potstill.ops.triton import semi_sparse_int8_linear as gpu
from potstill.ops.triton import tiles

__all__ = ["memory_starts_as_nan"]  # a fixture of all tests here

pytestmark = of_numpy

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SMALL = {"16": tiles.Tile(16, 16, 128, 4, 2), "64": tiles.Tile(32, 16, 256, 4, 2, 2)}
BEHIND = 64  # bytes around a weight that must not be read

# GPU, whether tiles are small, multiprocessors (many: inputs are split), whether rows are rounded by a kernel before
WAYS = {
    "table": (90, False, 132, False),
    "rounded before": (90, False, 132, True),
    "split": (80, True, 1000, False),
    "split, rounded before": (80, True, 1000, True),
    "float16 products": (103, True, 1, False),
}


@pytest.fixture(params=WAYS)
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    capability, small, processors, before = WAYS[request.param]
    monkeypatch.setattr(tiles, "chip", lambda _: tiles.Chip(capability, processors))
    if small:
        monkeypatch.setattr(gpu, "TABLE", SMALL)
        monkeypatch.setattr(tiles, "LEAST_PART", 128)
        monkeypatch.setattr(gpu, "ADDED", 16)
    if before:
        monkeypatch.setattr(gpu, "FUSED", 0)
    return str(request.param)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chip", lambda _: tiles.Chip(90, 132))


def between(weight: Tensor) -> Tensor:
    """A copy between bytes that would show as huge sums."""
    memory = torch.full((weight.nbytes + 2 * BEHIND,), 0x7F, dtype=torch.uint8)
    return memory[BEHIND:-BEHIND].view(weight.dtype).view(weight.shape).copy_(weight)


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a GPU gets them."""
    k = arguments["x"].shape[-1]
    values, indices = laid_out(arguments["values"], arguments["indices"], k, "cuda")
    return arguments | {"x": guarded(arguments["x"])[0], "values": between(values), "indices": between(indices)}


def launched(arguments: dict[str, Any]) -> Tensor:
    return gpu.launch(*semi_sparse_int8_linear.positional(**arguments))


def exact(arguments: dict[str, Any]) -> Tensor:
    wide = {n: a.double() if n in ("x", "bias", "residual") and a is not None else a for n, a in arguments.items()}
    return semi_sparse_int8_linear.reference(**wide)  # type: ignore[no-any-return]


def made(m: int, n: int, k: int, kept: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    random = torch.Generator().manual_seed(m * n + k)
    integers = torch.randint(-127, 128, (n, -(-k // 4), 4), generator=random, dtype=torch.int8)
    integers[torch.rand(integers.shape, generator=random).argsort(-1) >= kept] = 0
    values, indices = laid_out(*to_semi(integers.view(n, -1)[:, :k]), k, "cuda")
    return {
        "x": torch.randn(m, k, generator=random).to(dtype),
        "values": values,
        "indices": indices,
        "scale": torch.rand(n, generator=random) * 0.01 + 1e-4,
        "bias": torch.randn(n, generator=random).to(dtype),
    }


@pytest.mark.parametrize("sample", list(semi_sparse_int8_linear.samples("test")), ids=lambda s: s.label)
def test_agrees_with_float64_reference(sample: Any, hopper: None) -> None:
    arguments = sample.make()
    if arguments["x"].dim() == 2 and len(arguments["x"]) > 20:  # the interpreter takes 2 ms for each row
        arguments["x"] = arguments["x"][:20]
        arguments["residual"] = None if arguments.get("residual") is None else arguments["residual"][:20]
    y = launched(on_gpu(arguments))
    assert y.dtype == arguments["x"].dtype
    assert_close(y, exact(arguments), TOLERANCE[y.dtype], sample.label)


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 128), (4, 33, 300), (17, 20, 513), (2, 40, 5)])
def test_sums_are_exact_integers(m: int, n: int, k: int, kept: int, each_way: str) -> None:
    a = made(m, n, k, kept)
    a["x"] = torch.randint(-127, 128, (m, k)).float()
    a["x"][:, 0] = 127.0  # so that every scale is 1
    a |= {"scale": torch.ones(n), "bias": None}
    assert torch.equal(launched(on_gpu(a)).double(), exact(a).double())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype: torch.dtype, each_way: str) -> None:
    a = made(5, 48, 260, dtype=dtype) | {"activation": "gelu", "residual": torch.randn(5, 48).to(dtype)}
    y = launched(on_gpu(a))
    assert y.dtype == dtype
    assert_close(y, exact(a), TOLERANCE[dtype], each_way)


@pytest.mark.parametrize("m", [3, 20])
def test_it_computes_what_the_dense_kernel_does(m: int, each_way: str) -> None:
    a = made(m, 32, 384)
    weight = from_semi(a["values"], a["indices"], 384)
    y = dense.launch(a["x"], weight, a["scale"], a["bias"])
    assert torch.equal(launched(on_gpu(a)), y)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_indices_lead_nowhere(seed: int, each_way: str) -> None:
    """Any bytes: two values come out as some bytes of their group, and nothing else."""
    a = made(3, 24, 300) | {"scale": torch.ones(24), "bias": None}
    a["x"] = torch.zeros(3, 300)
    a["x"][:, 0] = 127.0
    a["indices"] = torch.randint(0, 256, a["indices"].shape, generator=torch.Generator().manual_seed(seed)).byte()
    half, (first, second) = a["indices"][:, 0] & 15, a["values"][:, :2].unbind(1)
    at_0 = torch.where(half & 3 == 0, first, 0) | torch.where(half >> 2 == 0, second, 0)
    assert torch.equal(launched(on_gpu(a)), 127.0 * at_0.expand(3, 24))


@pytest.mark.parametrize("m", [1, 40])
def test_nothing_waits_for_the_device(m: int, hopper: None) -> None:
    a = made(m, 20, 140)
    with NoWaiting():
        launched(a)


def test_a_row_with_nan_is_nan(each_way: str) -> None:
    a = made(3, 20, 140)
    a["x"][1, 7] = math.nan
    assert launched(on_gpu(a)).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(("m", "n", "k"), [(80, 64, 256), (65, 33, 300), (3, 20, 5)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sparse_units_compute_the_same(
    m: int, n: int, k: int, dtype: torch.dtype, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Emulated()
    monkeypatch.setattr(sparse_units, "library", lambda *_: library)
    a = made(m, n, k, dtype=dtype) | {"activation": "relu", "residual": torch.randn(m, n).to(dtype)}
    weight = from_semi(a["values"], a["indices"], 2 * a["values"].shape[1])
    [packed] = sparse_units.compress(library, weight)
    y = launched(on_gpu(a) | {"packed": packed, "algorithm": 5})
    assert library.calls == ["compress", "multiply by algorithm 5"]
    assert torch.equal(y, launched(on_gpu(a)))


def test_packed_needs_a_library(hopper: None) -> None:
    with pytest.raises(ValueError, match="no cuSPARSELt here; call it without packed"):
        launched(made(3, 20, 140) | {"packed": torch.zeros(4)})
