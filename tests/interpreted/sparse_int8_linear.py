"""The GPU kernels of ``sparse_int8_linear`` against the float64 reference, by triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.interpreted.common import GUARD, NoWaiting, assert_close, guarded, memory_starts_as_nan, of_numpy
from torch import Tensor

from potstill.ops import sparse_int8_linear
from potstill.ops.sparse import WINDOW, as_windows, to_blocks
from potstill.ops.sparse_int8_linear import laid_out
from potstill.ops.triton import int8_linear as dense
from potstill.ops.triton import sparse_int8_linear as gpu
from potstill.ops.triton import tiles

__all__ = ["memory_starts_as_nan"]  # a fixture of all tests here

pytestmark = of_numpy

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SAMPLES = [sample for sample in sparse_int8_linear.samples("test") if "few" not in sample.label]  # one layout for both
SMALL = {"16": tiles.Tile(16, 16, 128, 4, 2), "64": tiles.Tile(32, 16, 128, 4, 2, 2)}

# GPU, whether tiles are small, multiprocessors (many: inputs are split)
WAYS = {"table": (90, False, 132), "split": (80, True, 1000), "float16 products": (103, True, 1)}


@pytest.fixture(params=WAYS)
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    capability, small, processors = WAYS[request.param]
    monkeypatch.setattr(tiles, "chip", lambda _: tiles.Chip(capability, processors))
    if small:
        monkeypatch.setattr(gpu, "TABLE", SMALL)
        monkeypatch.setattr(tiles, "LEAST_PART", 128)
        monkeypatch.setattr(gpu, "ADDED", 16)
    return str(request.param)


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a GPU gets them, the weight between words that must not be read."""
    k = arguments["x"].shape[-1]
    weight = laid_out(arguments["weight"], k, "many", "cuda")
    memory = weight.new_full((weight.numel() + 2 * GUARD,), 0x7F7F7F7F)
    between = memory[GUARD : GUARD + weight.numel()].view(weight.shape).copy_(weight)
    return arguments | {"x": guarded(arguments["x"])[0], "weight": between}


def launched(arguments: dict[str, Any]) -> Tensor:
    return gpu.launch(*sparse_int8_linear.positional(**arguments))


def exact(arguments: dict[str, Any]) -> Tensor:
    wide = {n: a.double() if n in ("x", "bias", "residual") and a is not None else a for n, a in arguments.items()}
    return sparse_int8_linear.reference(**wide)  # type: ignore[no-any-return]


def made(m: int, n: int, k: int, sparsity: float = 0.7, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    random = torch.Generator().manual_seed(m * n + k)
    integers = torch.randint(-127, 128, (n, -(-k // 4), 4), generator=random, dtype=torch.int8)
    integers[torch.rand(n, -(-k // 4), generator=random) < sparsity] = 0
    return {
        "x": torch.randn(m, k, generator=random).to(dtype),
        "weight": as_windows(*to_blocks(integers.view(n, -1)[:, :k].contiguous()), k),
        "scale": torch.rand(n, generator=random) * 0.01 + 1e-4,
        "bias": torch.randn(n, generator=random).to(dtype),
    }


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_agrees_with_float64_reference(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chip", lambda _: tiles.Chip(90, 132))
    arguments = sample.make()
    if arguments["x"].dim() == 2 and len(arguments["x"]) > 20:  # the interpreter takes 2 ms for each row
        arguments["x"] = arguments["x"][:20]
        arguments["residual"] = None if arguments.get("residual") is None else arguments["residual"][:20]
    y = launched(on_gpu(arguments))
    assert y.dtype == arguments["x"].dtype
    assert_close(y, exact(arguments), TOLERANCE[y.dtype], sample.label)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 128), (4, 33, 300), (17, 20, 513), (2, 40, 5)])
def test_sums_are_exact_integers(m: int, n: int, k: int, sparsity: float, each_way: str) -> None:
    a = made(m, n, k, sparsity)
    a["x"] = torch.randint(-127, 128, (m, k)).float()
    a["x"][:, 0] = 127.0  # so that every scale is 1
    a |= {"scale": torch.ones(n), "bias": None}
    assert torch.equal(launched(a).double(), exact(a).double())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype: torch.dtype, each_way: str) -> None:
    a = made(5, 48, 260, dtype=dtype) | {"activation": "gelu", "residual": torch.randn(5, 48).to(dtype)}
    y = launched(a)
    assert y.dtype == dtype
    assert_close(y, exact(a), TOLERANCE[dtype], each_way)


def test_it_computes_what_the_dense_kernel_does(each_way: str) -> None:
    a = made(6, 32, 384)
    rows = sparse_int8_linear.reference(**a | {"x": torch.eye(384), "scale": torch.ones(32), "bias": None})
    weight = rows.t().mul(127).round().div(127).round().to(torch.int8)  # of the unit vectors, each rounded to 127
    y = dense.launch(a["x"], weight.contiguous(), a["scale"], a["bias"])
    assert torch.equal(launched(a), y)


@pytest.mark.parametrize("seed", range(12))
def test_damaged_words_lead_nowhere(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and places may hold anything: reads stay inside, where the memory around would show as a huge result."""
    monkeypatch.setattr(tiles, "chip", lambda _: tiles.Chip(90, 132))
    random = torch.Generator().manual_seed(seed)
    a = made(3, 24, 300) | {"scale": torch.ones(24), "bias": None}
    weight = a["weight"].clone()
    head = weight[: 2 * -(-300 // (4 * WINDOW))].view(-1)
    places = torch.randint(len(head), (9,), generator=random)
    head[places] = torch.randint(-(2**31), 2**31 - 1, (9,), generator=random).int()
    words = weight.numel() - len(head)
    memory = weight.new_full((weight.numel() + 2 * 4096,), 0x7F7F7F7F)
    memory[4096:-4096].copy_(weight.view(-1))
    memory[4096 + len(head) : 4096 + len(head) + words] = 0  # all that may be read as a weight is zero
    y = launched(a | {"weight": memory[4096:-4096].view(weight.shape)})
    assert (y == 0).all()


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chip", lambda _: tiles.Chip(90, 132))
    for m in (1, 40):
        with NoWaiting():
            launched(made(m, 20, 140))


def test_a_row_with_nan_is_nan(each_way: str) -> None:
    a = made(3, 20, 140)
    a["x"][1, 7] = math.nan
    assert launched(a).isnan().all(1).tolist() == [False, True, False]
