"""SemiSparseLinear: what it computes, what it asks of the libraries for sparse units, what it saves and refuses."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sparse_unit_calls import Emulated
from torch import Tensor, nn

import potstill
from potstill import Prune, prune_
from potstill.errors import CheckpointError
from potstill.nn import Int8Linear, SemiSparseLinear
from potstill.nn.semi_sparse import Weights
from potstill.ops import sparse_units

BOTH: tuple[Weights, ...] = ("int8", "float")
SEMI: Any = sys.modules["potstill.ops.semi_sparse"]


def pruned(k: int, n: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(k, n, bias))
    prune_(model, Prune(pattern="2:4"))
    return model[0].to_float().requires_grad_(False)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """In place of cuSPARSELt, for what it takes."""
    emulated = Emulated()
    monkeypatch.setattr(sparse_units, "library", lambda _, dtype: emulated if dtype in emulated.sizes else None)
    return emulated


@pytest.mark.parametrize(("k", "n"), [(64, 32), (770, 130), (5, 3)])
def test_int8_is_bit_for_bit_the_dense_int8_layer(k: int, n: int) -> None:
    linear, x = pruned(k, n), torch.randn(2, 9, k)
    assert torch.equal(SemiSparseLinear.from_float(linear)(x), Int8Linear.from_float(linear)(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_is_the_dense_layer(bias: bool, dtype: torch.dtype) -> None:
    linear, x = pruned(77, 30, bias=bias).to(dtype), torch.randn(35, 77).to(dtype)
    layer = SemiSparseLinear.from_float(linear, "float")
    assert layer.values.dtype == dtype
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize("weights", BOTH)
def test_it_survives_copies_and_files(weights: Weights, tmp_path: Path) -> None:
    layer, x = SemiSparseLinear.from_float(pruned(50, 20), weights), torch.randn(6, 50)
    expected = layer(x)
    fresh = SemiSparseLinear(**layer.config())
    fresh.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    read = SemiSparseLinear(**layer.config())
    read.load_state_dict(torch.load(buffer, weights_only=True))
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    potstill.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    loaded = potstill.load(nn.Sequential(nn.Linear(50, 20)), tmp_path / "m.safetensors")
    for other in (copy.deepcopy(layer), fresh, read, empty, loaded):
        assert torch.equal(other(x), expected)
    assert loaded[0].config() == layer.config()
    again = SemiSparseLinear.from_float(layer.to_float(), weights)
    assert torch.equal(again.indices, layer.indices)


@pytest.mark.parametrize("weights", BOTH)
def test_the_state_is_canonical_on_every_device(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type of device that has memory here stands in for a GPU."""
    layer, x = SemiSparseLinear.from_float(pruned(50, 20), weights), torch.randn(6, 50)
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    assert (state["values"].shape, state["indices"].shape) == ((20, 28), (20, 7))
    monkeypatch.setattr(SEMI, "ROW_DEVICES", frozenset({"cpu"}))
    moved = copy.deepcopy(layer).to(torch.float32)
    assert moved.values.shape == (20, 64)
    assert all(torch.equal(moved.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(moved(x), expected)
    loaded = SemiSparseLinear(**layer.config())
    loaded.load_state_dict(state)
    assert torch.equal(loaded.values, moved.values)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("weights", BOTH)
def test_dtypes_and_autocast(weights: Weights) -> None:
    layer, x = SemiSparseLinear.from_float(pruned(64, 32), weights), torch.randn(20, 64)
    expected = layer(x)
    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    assert narrow.values.dtype == (torch.int8 if weights == "int8" else torch.bfloat16)
    y = narrow(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("weights", BOTH)
def test_gradient_flows_to_the_input(weights: Weights) -> None:
    layer = SemiSparseLinear.from_float(pruned(40, 24), weights, "gelu")
    x, residual = torch.randn(5, 40, requires_grad=True), torch.randn(5, 24, requires_grad=True)
    layer(x, residual).square().sum().backward()
    plain, again, other = layer.to_float(), x.detach().clone().requires_grad_(), residual.detach().clone()
    (nn.functional.gelu(plain(again)) + other).square().sum().backward()
    assert x.grad is not None
    assert again.grad is not None
    assert residual.grad is not None
    assert float((x.grad - again.grad).norm() / again.grad.norm()) < 0.03


@pytest.mark.parametrize("weights", BOTH)
def test_it_compiles_whole(weights: Weights) -> None:
    layer, x = SemiSparseLinear.from_float(pruned(64, 32), weights), torch.randn(20, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k", "n", "m"), [(64, 32, 8), (77, 30, 5), (16, 16, 300)])
def test_float_rows_go_to_the_sparse_units(k: int, n: int, m: int, dtype: torch.dtype, library: Emulated) -> None:
    linear, x = pruned(k, n).to(dtype), torch.randn(m, k).to(dtype)
    layer = SemiSparseLinear.from_float(linear, "float")
    assert torch.equal(layer(x), linear(x))  # not tuned
    assert not library.calls
    assert layer.tune(m)
    calls = ["compress", f"search for {max(8, 1 << (m - 1).bit_length())} rows"]
    assert library.calls == calls
    y = layer(x.view(1, m, k))
    assert library.calls[2:] == [f"multiply by algorithm {3 if m > 256 else 7}"]
    assert y.shape == (1, m, n)
    assert y.is_contiguous()
    torch.testing.assert_close(y[0], linear(x), rtol=2e-2, atol=2e-2)
    layer(x.clone().requires_grad_()).sum().backward()
    assert len(library.calls) == 3
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.float())
    assert len(library.calls) == 3 + (dtype == torch.bfloat16)


def test_int8_takes_them_for_many_rows_only(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    module, layer = sys.modules["potstill.nn.semi_sparse"], SemiSparseLinear.from_float(pruned(96, 32))
    assert not layer.tune(64)
    assert not library.calls
    assert layer.tune(200)
    assert library.calls == ["compress", "search for 256 rows"]
    given: list[tuple[int, ...]] = []
    op = module.semi_sparse_int8_linear
    monkeypatch.setattr(module, "semi_sparse_int8_linear", lambda *args: (given.append(args[8:]), op(*args))[1])
    for rows in (1, 64, 150, 256, 300):
        layer(torch.randn(rows, 96))
    assert given == [(), (), (7,), (7,), (0,)]
    assert layer.tune(250)
    assert len(library.calls) == 2


def test_what_is_packed_follows_the_layer(library: Emulated, tmp_path: Path) -> None:
    linear, x = pruned(64, 32).half(), torch.randn(10, 64).half()
    layer = SemiSparseLinear.from_float(linear, "float")
    layer.tune(10)
    expected = layer(x)
    assert layer.config()["tuned"] == [16]
    assert set(layer.state_dict()) == {"values", "indices", "bias"}
    before = len(library.calls)
    layer.to(torch.float16)
    assert len(library.calls) == before
    other = copy.deepcopy(layer).to(torch.bfloat16)
    assert library.calls[before:] == ["compress", "search for 16 rows"]
    assert other(x.to(torch.bfloat16)).dtype == torch.bfloat16
    potstill.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    loaded = potstill.load(nn.Sequential(nn.Linear(64, 32).half()), tmp_path / "m.safetensors")
    assert loaded[0].tuned == [16]
    before = len(library.calls)
    assert torch.equal(loaded(x), expected)
    assert library.calls[before:] == ["multiply by algorithm 7"]


def test_a_library_that_refuses_changes_nothing(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")

    linear, x = pruned(64, 32).half(), torch.randn(10, 64).half()
    layer = SemiSparseLinear.from_float(linear, "float")
    monkeypatch.setattr(library, "search", refuse)
    assert not layer.tune(10)
    assert layer.tuned == []
    assert torch.equal(layer(x), linear(x))
    assert library.calls == ["compress"]


def test_without_a_library_nothing_is_tuned() -> None:
    for weights in BOTH:
        layer = SemiSparseLinear.from_float(pruned(64, 32), weights)
        assert not layer.tune(1000)


def state_of(weights: Weights) -> dict[str, Tensor]:
    return dict(SemiSparseLinear.from_float(pruned(30, 7), weights).state_dict())


def change(name: str, at: tuple[int, ...], value: float) -> Any:
    def apply(state: dict[str, Tensor]) -> None:
        state[name] = state[name].clone()
        state[name][at] = value

    return apply


@pytest.mark.parametrize(
    ("weights", "damage", "message"),
    [
        ("int8", change("values", (0, 0), -128), "-128"),
        ("float", change("values", (0, 0), float("nan")), "not finite"),
        ("int8", change("indices", (2, 1), 0), "not in order"),
        ("float", change("indices", (2, 1), 0x41), "not in order"),
        ("int8", change("values", (1, 15), 5), "not in order|beyond the 30 inputs"),
        ("int8", change("scale", (0,), float("inf")), "not finite"),
        ("int8", change("scale", (0,), -1.0), "negative"),
        ("int8", lambda s: s.update(values=s["values"].short()), "expected int8"),
        ("float", lambda s: s.update(values=s["values"].char()), "expected floats"),
        ("int8", lambda s: s.update(indices=s["indices"][:, :0]), "expected uint8"),
        ("int8", lambda s: s.update(values=s["values"][:-1]), "expected int8"),
        ("int8", lambda s: s.pop("indices"), "Missing key"),
        ("int8", lambda s: s.pop("values"), "Missing key"),
        ("int8", lambda s: s.update(extra=s["indices"]), "Unexpected key"),
    ],
)
def test_bad_states_are_refused(weights: Weights, damage: Any, message: str) -> None:
    state = state_of(weights)
    state["indices"][1, 3] = 0xE4  # the last group of output 1 is inputs 30 and 31, which are not there
    state["values"][1, 14:] = 0
    layer = SemiSparseLinear.from_float(pruned(30, 7, seed=1), weights)
    before = layer.values.clone()
    layer.load_state_dict(state)
    layer = SemiSparseLinear.from_float(pruned(30, 7, seed=1), weights)
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    if "key" not in message:
        assert torch.equal(layer.values, before)
    layer(torch.randn(3, 30))


def test_damaged_file_leaves_the_model(tmp_path: Path) -> None:
    layer = SemiSparseLinear.from_float(pruned(30, 7))
    layer.indices.data[3, 1] = 0x11
    potstill.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    model = nn.Sequential(nn.Linear(30, 7))
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match="not in order"):
        potstill.load(model, tmp_path / "m.safetensors")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int4"}, "weights is 'int4', expected one of int8, float"),
        ({"activation": "tanh"}, "tanh"),
        ({"tuned": [100]}, r"tuned is \[100\], expected powers of two from 8 to 65536"),
        ({"tuned": [1 << 40]}, "tuned is"),
        ({"tuned": [True]}, "tuned is"),
        ({"tuned": "ab"}, "tuned is"),
    ],
)
def test_unknown_options_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemiSparseLinear(8, 4, **arguments)


def test_wrong_layers_and_inputs_are_errors() -> None:
    layer = SemiSparseLinear.from_float(pruned(8, 4))
    with pytest.raises(ValueError, match="x has 9 features, expected in_features=8"):
        layer(torch.randn(2, 9))
    assert torch.equal(SemiSparseLinear(8, 4)(torch.randn(2, 8)), torch.zeros(2, 4))
    dense = nn.Linear(8, 4)
    for weights in BOTH:
        with pytest.raises(ValueError, match="more than two are not zero"):
            SemiSparseLinear.from_float(dense, weights)
        infinite = pruned(8, 4)
        infinite.weight[infinite.weight != 0] = float("inf")
        with pytest.raises(ValueError, match="infinite"):
            SemiSparseLinear.from_float(infinite, weights)
