"""The GPU kernels of ``int8_linear`` against the float64 reference, by triton's interpreter."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from tests.interpreted.common import GUARD, NoWaiting, assert_close, guarded, memory_starts_as_nan, of_numpy, same
from torch import Tensor

from potstill.ops import int8_linear
from potstill.ops.activation import ACTIVATIONS
from potstill.ops.int8_linear import MAX_FEATURES, as_rows, integers, laid_out
from potstill.ops.int8_linear import quantize_rows as reference_rows
from potstill.ops.triton import int8_linear as gpu
from potstill.ops.triton import int8_linear_kernel as kernels
from potstill.ops.triton import quantize_rows as rows_of
from potstill.ops.triton import tiles

__all__ = ["memory_starts_as_nan"]  # a fixture of all tests here

pytestmark = of_numpy

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SAMPLES = list(int8_linear.samples("test"))

# Several programs and steps along each dimension; those of the table finish most samples in one.
SMALL = {"16": tiles.Tile(16, 16, 32, 4, 2), "64": tiles.Tile(32, 32, 32, 4, 2, 2)}
SMALL |= {"256": tiles.Tile(16, 64, 64, 4, 2, 1), "more": tiles.Tile(32, 128, 32, 4, 2, 3)}
FAMILIES = tuple(tiles.TABLE)

# GPU, whether tiles are small, multiprocessors (many: inputs are split), and what a program may quantise for itself.
WAYS: dict[str, tuple[int, bool, int, int]] = {
    "table": (90, False, 132, gpu.FUSED),
    "small tiles": (90, True, 1, gpu.FUSED),
    "split": (80, True, 1000, gpu.FUSED),
    "quantised first, split": (100, True, 1000, -1),
    "float16 products": (103, True, 1, -1),
    "float16 products, split": (103, True, 1000, gpu.FUSED),
}


@contextmanager
def way(name: str) -> Iterator[None]:
    """Launches go this way."""
    capability, small, processors, fused = WAYS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "chip", lambda _: tiles.Chip(capability, processors))
        patch.setattr(gpu, "FUSED", fused)
        if small:
            patch.setattr(tiles, "table", lambda: dict.fromkeys(FAMILIES, SMALL))
            patch.setattr(tiles, "LEAST_PART", 32)
            patch.setattr(gpu, "ADDED", 16)
        yield


@pytest.fixture(params=WAYS)
def each_way(request: pytest.FixtureRequest) -> Iterator[str]:
    with way(request.param):
        yield request.param


def between(x: Tensor | None, around: float) -> Tensor | None:
    """A copy of a vector or of a weight's rows, between others that must not be read."""
    if x is None:
        return None
    memory = x.new_full((len(x) + 2 * GUARD, *x.shape[1:]), around)
    return memory[GUARD : GUARD + len(x)].copy_(x)


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a GPU gets them, amid values that must neither be read nor written."""
    n, k = arguments["scale"].numel(), arguments["x"].shape[-1]
    weight = laid_out(arguments["weight"], n, k, "cuda")
    return arguments | {
        "x": guarded(arguments["x"])[0],
        "weight": between(weight, 127),
        **{name: between(arguments.get(name), math.nan) for name in ("scale", "bias", "factor")},
    }


def launched(arguments: dict[str, Any]) -> Tensor:
    return gpu.launch(*int8_linear.positional(**arguments))


def exact(arguments: dict[str, Any]) -> Tensor:
    """In float64 but for the rounding of x and the scales, which the definition has in float32."""
    wide = {
        name: a.double() if name in ("x", "bias", "residual") and a is not None else a for name, a in arguments.items()
    }
    return int8_linear.reference(**wide)  # type: ignore[no-any-return]


def made(m: int, n: int, k: int, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(m * n + k)
    return {
        "x": torch.randn(m, k, generator=random).to(dtype),
        "weight": as_rows(torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)),
        "scale": torch.rand(n, generator=random) * 0.01 + 1e-4,
        "bias": torch.randn(n, generator=random).to(dtype),
    } | more


def cases() -> Iterator[Any]:
    """Every sample by the table; the other ways leave out those of hundreds of programs, which are like others."""
    for sample in SAMPLES:
        a = sample.make()
        few = a["scale"].numel() * a["x"].shape[-1] <= 7000
        for name in ("table", "split", "quantised first, split") if few else ("table",):
            yield pytest.param(name, sample, id=f"{sample.label}, {name}")


@pytest.mark.parametrize(("name", "sample"), list(cases()))
def test_agrees_with_float64_reference(name: str, sample: Any) -> None:
    arguments = sample.make()
    x = arguments["x"]
    if x.dim() == 2 and len(x) > 20:  # the interpreter takes 2 ms for each row
        arguments["x"] = x[:20]
    with way(name):
        y = launched(on_gpu(arguments))
    assert y.dtype == x.dtype
    assert_close(y, exact(arguments), TOLERANCE[x.dtype], sample.label)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float16(activation: str) -> None:
    a = made(20, 50, 100, torch.float16, activation=activation, residual=torch.randn(20, 50).half())
    with way("table"):
        y = launched(on_gpu(a))
    assert y.dtype == torch.float16
    assert_close(y, exact(a), TOLERANCE[torch.float16], activation)


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype"),
    [
        (1, 17, 200, torch.float32), (3, 40, 65, torch.bfloat16), (5, 33, 129, torch.float16),
        (19, 40, 70, torch.float32), (65, 20, 40, torch.float32), (257, 140, 33, torch.float32),
    ],
)  # fmt: skip
def test_all_ways_give_the_same_bits(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a = made(m, n, k, dtype, activation="gelu", residual=torch.randn(m, n).to(dtype), factor=torch.rand(k) + 0.5)
    results = {}
    for name in WAYS if m < 100 else ("table", "small tiles"):
        with way(name):
            results[name] = launched(a)
    assert_close(results["table"], exact(a), TOLERANCE[dtype], "table")
    assert all(torch.equal(y, results["table"]) for y in results.values())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (4, 33, 132), (13, 17, 75), (18, 20, 96)])
def test_sums_are_exact_integers(m: int, n: int, k: int, each_way: str) -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (m, k), generator=random)
    x[:, 0] = 127  # so that every scale is 1
    weight = torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)
    expected = x @ weight.long().t()
    assert expected.abs().max() < 2**24  # so that float32 holds them
    given = launched({"x": x.float(), "weight": as_rows(weight), "scale": torch.ones(n)})
    assert torch.equal(given.long(), expected)


@pytest.mark.parametrize("capability", [90, 103])
@pytest.mark.parametrize("signs", [(1, 1), (-1, 1)])
def test_the_longest_sum_is_exact(capability: int, signs: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chip", lambda _: tiles.Chip(capability, 4))
    monkeypatch.setattr(tiles, "tile", lambda *_: tiles.Tile(16, 16, 512, 4, 2))
    x = torch.full((2, MAX_FEATURES), 127.0 * signs[0])
    weight = torch.full((3, MAX_FEATURES), 127 * signs[1], dtype=torch.int8)
    expected = torch.tensor(127.0 * 127 * MAX_FEATURES * signs[0] * signs[1])  # float32 rounds the int32 sum once
    given = launched({"x": x, "weight": as_rows(weight), "scale": torch.ones(3)})
    assert torch.equal(given, expected.expand(2, 3))


@pytest.mark.parametrize("block", [128, rows_of.LARGEST_BLOCK])
@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", [1, 40, 129, 1000])
def test_rows_are_rounded_to_the_reference_s_integers(
    k: int, dtype: torch.dtype, factor: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_of, "LARGEST_BLOCK", block)
    random = torch.Generator().manual_seed(k)
    x = torch.randn(14, k, generator=random) * torch.logspace(-30, 30, 14)[:, None]
    x[8] = torch.randint(-254, 255, (k,), generator=random) / 2  # ties
    x[8, 0] = 127.0
    x[9], x[10] = 0.0, 1e-40
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        x[11 + row, k // 2] = value
    x = x.to(dtype)
    by = torch.rand(k, generator=random) + 0.5 if factor else None
    width = -(-k // 16) * 16
    expected, scale = reference_rows(x if by is None else x.float() * by)
    memory, around = guarded(x)
    before = around.clone()
    q, given = rows_of.quantize_rows(memory, by, width)
    assert torch.equal(q[:, :k].double(), expected)
    assert (q[:, k:] == 0).all()
    assert same(given[:, None], scale)
    assert same(around, before)


@triton.jit
def activations(x, y, count: tl.constexpr, activation: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(y + i, kernels.activate(tl.load(x + i), activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_have_the_errors_that_are_told(activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.logspace(-20, 30, 48), -torch.logspace(-20, 30, 48)])
    y = torch.empty(4096)
    activations[(1,)](x, y, count=4096, activation=activation)
    error = (y.double() - ACTIVATIONS[activation](x.double())).abs() / x.double().abs().clamp_min(1.0)
    assert float(error.max()) < 4e-7
    special = torch.tensor([math.nan, math.inf] * 2048)
    activations[(1,)](special, y, count=4096, activation=activation)
    assert same(y, special)


def test_rows_further_apart_than_int32(each_way: str) -> None:
    a = made(3, 20, 40)
    stride = 2**30 + 8
    torch.use_deterministic_algorithms(False)  # fills no pages that are not used
    memory = torch.empty(2 * stride + 40)
    torch.use_deterministic_algorithms(True)
    x = memory.as_strided((3, 40), (stride, 1)).copy_(a["x"])
    assert torch.equal(launched(a | {"x": x}), launched(a))


def test_nothing_waits_for_the_device(each_way: str) -> None:
    for m in (2, 20):
        with NoWaiting():
            launched(made(m, 20, 40, residual=torch.randn(m, 20), factor=torch.ones(40)))


def test_no_inputs(each_way: str) -> None:
    a = made(2, 5, 0)
    assert torch.equal(launched(a), a["bias"].expand(2, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(20, dtype=torch.float64)}, "scale is torch.float64"),
        ({"scale": torch.ones(40)[::2]}, "scale .* expected contiguous"),
        ({"bias": torch.ones(19)}, r"bias is torch.float32 \[19\]"),
        ({"bias": torch.ones(20, dtype=torch.int32)}, "bias .* expected contiguous floats"),
        ({"factor": torch.ones(41)}, r"factor .* expected contiguous torch.float32 \[40\]"),
        ({"weight": torch.zeros(20, 48)}, "weight is torch.float32"),
        ({"weight": torch.zeros(48, 20, dtype=torch.int8).t()}, "weight .* expected contiguous"),
        ({"bias": torch.ones(20, device="meta")}, "bias .* on meta, expected .* on cpu"),
    ],
)
def test_arguments_that_the_kernels_could_not_read_raise(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launched(made(2, 20, 40) | change)


def test_the_op_refuses_packed_weights_and_takes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that a CUDA tensor would be dispatched to."""
    op: Any = sys.modules["potstill.ops.int8_linear"]
    cuda: Callable[..., Tensor] = op._cuda
    monkeypatch.setattr(tiles, "chip", lambda _: tiles.Chip(90, 132))
    a = made(2, 20, 40)
    assert torch.equal(cuda(**a), launched(a))
    with pytest.raises(ValueError, match="laid_out"):
        cuda(**a | {"weight": op.pack(integers(a["weight"], 20, 40))})
    with pytest.raises(ValueError, match=r"weight has shape \[20, 64\]"):
        cuda(**a | {"weight": torch.zeros(20, 64, dtype=torch.int8)})
    with pytest.raises(ValueError, match="activation"):
        cuda(**a | {"activation": "tanh"})
