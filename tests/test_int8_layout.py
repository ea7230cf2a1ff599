"""The two layouts of int8 weights: packed for CPU kernels, rows for GPU kernels.

Where there is no GPU, a type of device that has memory here stands in for one: the layers then lay out as for it.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.nn import Int8Linear
from potstill.nn.shared import Int8LinearPart, link
from potstill.ops import int8_linear
from potstill.ops.int8_linear import as_rows, integers, laid_out, pack, unpack

OP: Any = sys.modules["potstill.ops.int8_linear"]
SIZES = [(20, 30), (16, 16), (33, 70), (1, 1), (5, 0)]


def as_on_gpu(monkeypatch: pytest.MonkeyPatch, *types: str) -> None:
    """Devices of these types take rows from now on."""
    for module in (OP, sys.modules["potstill.nn.linear"]):
        monkeypatch.setattr(module, "ROW_DEVICES", frozenset(types))


def layer(bias: bool = True) -> Int8Linear:
    return Int8Linear.from_float(nn.Linear(70, 33, bias=bias))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_either_layout_is_made_of_the_other(n: int, k: int) -> None:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    rows, packed = as_rows(weight), pack(weight)
    assert rows.shape == (n, -(-k // 16) * 16)
    assert torch.equal(rows[:, :k], weight)
    assert not rows[:, k:].any()
    assert rows.is_contiguous()
    assert torch.equal(integers(rows, n, k), weight)
    assert torch.equal(integers(packed, n, k), weight)
    assert torch.equal(laid_out(packed, n, k, "cuda"), rows)
    assert torch.equal(laid_out(rows, n, k, "cpu"), packed)
    assert laid_out(rows, n, k, "cuda") is rows
    assert laid_out(packed, n, k, "meta") is packed


def test_the_reference_takes_both_and_the_cpu_kernel_only_its_own() -> None:
    weight = torch.randint(-127, 128, (20, 30), dtype=torch.int8)
    x, scale = torch.randn(3, 30), torch.rand(20)
    expected = int8_linear.reference(x, pack(weight), scale)
    assert torch.equal(int8_linear.reference(x, as_rows(weight), scale), expected)
    assert torch.equal(int8_linear(x.double(), as_rows(weight), scale), int8_linear(x.double(), pack(weight), scale))
    with pytest.raises(ValueError, match=r"layout of GPUs, \[20, 32\], .* laid_out\(weight, n, k, 'cpu'\)"):
        int8_linear(x, as_rows(weight), scale)
    with pytest.raises(ValueError, match=r"need \[2, 9, 64\], .* or on a GPU \[20, 32\]"):
        int8_linear.reference(x, weight, scale)  # its rows are not aligned


def test_the_op_s_arguments_are_laid_out_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randint(-127, 128, (20, 30), dtype=torch.int8)
    arguments = {"x": torch.randn(3, 30), "weight": pack(weight), "scale": torch.rand(20), "activation": "relu"}
    assert int8_linear.on(arguments, torch.device("cpu"))["weight"] is arguments["weight"]
    as_on_gpu(monkeypatch, "cpu")
    moved = int8_linear.on(arguments, torch.device("cpu"))
    assert torch.equal(moved["weight"], as_rows(weight))
    assert moved["activation"] == "relu"


def test_gradients_with_rows() -> None:
    weight = torch.randint(-127, 128, (20, 30), dtype=torch.int8)
    x = torch.randn(3, 30, dtype=torch.float64, requires_grad=True)
    scale, upstream = torch.rand(20), torch.randn(3, 20, dtype=torch.float64)
    int8_linear(x, as_rows(weight), scale).backward(upstream)
    torch.testing.assert_close(x.grad, (upstream * scale) @ weight.double())


def test_without_triton_plain_torch_computes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that a CUDA tensor would be dispatched to."""
    monkeypatch.setattr(OP, "gpu_function", lambda *_: None)
    weight = torch.randint(-127, 128, (20, 30), dtype=torch.int8)
    arguments = torch.randn(3, 30), as_rows(weight), torch.rand(20), torch.randn(20), "gelu"
    assert torch.equal(OP._cuda(*arguments), int8_linear.reference(*arguments))


def test_a_move_changes_the_layout_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = layer()
    state = copy.deepcopy(on_cpu.state_dict())
    parameter = on_cpu.weight
    as_on_gpu(monkeypatch, "cpu")
    moved = on_cpu.to("cpu")
    assert moved.weight is parameter  # an optimiser or a tie that holds it holds the new layout
    assert moved.weight.shape == (33, 80)
    assert_same_state(moved.state_dict(), state)
    assert torch.equal(moved.int8_weight(), state["weight"])
    as_on_gpu(monkeypatch, "cuda")
    back = moved.half()
    assert back.weight.shape == pack(state["weight"]).shape
    assert torch.equal(unpack(back.weight, 33, 70), state["weight"])


def assert_same_state(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype
        assert torch.equal(given[name], tensor)


@pytest.mark.parametrize("assign", [False, True])
def test_state_loads_into_rows(assign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = copy.deepcopy(layer().state_dict())
    as_on_gpu(monkeypatch, "cpu")
    fresh = Int8Linear(70, 33)
    assert fresh.weight.shape == (33, 80)
    fresh.load_state_dict(state, assign=assign)
    assert fresh.weight.shape == (33, 80)
    assert torch.equal(fresh.weight[:, :70], state["weight"])
    assert_same_state(fresh.state_dict(), state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_on_the_meta_device_takes_the_layout_of_where_it_goes(
    assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = copy.deepcopy(layer().state_dict())
    with torch.device("meta"):
        empty = Int8Linear(70, 33)
    as_on_gpu(monkeypatch, "cpu")
    if not assign:
        empty.to_empty(device="cpu")
        assert empty.weight.shape == (33, 80)
    empty.load_state_dict(state, assign=assign)
    assert empty.weight.shape == (33, 80)
    assert_same_state(empty.state_dict(), state)
    empty.to_empty(device="meta")
    assert empty.weight.shape == pack(state["weight"]).shape


def test_layers_made_there_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_gpu(monkeypatch, "cpu")
    linear = nn.Linear(70, 33)
    made = Int8Linear.from_float(linear)
    assert made.weight.shape == (33, 80)
    whole = torch.randint(-127, 128, (33, 80), dtype=torch.int8)
    kept = Int8Linear.from_integers(whole, torch.ones(33))
    whole.zero_()
    assert kept.weight.any()  # nobody else has its memory
    torch.testing.assert_close(made.to_float().weight, linear.weight, rtol=0.0, atol=0.005)
    assert "Parameter" not in type(made.state_dict()["weight"]).__name__


def test_parts_with_one_input_share_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = [nn.Linear(70, 32), nn.Linear(70, 16), nn.Linear(70, 5)]
    model = nn.ModuleList(Int8LinearPart.of(Int8Linear.from_float(linear), group=0) for linear in linears)
    link(model)
    x = torch.randn(3, 70)
    expected = [part(x) for part in model]
    as_on_gpu(monkeypatch, "cpu")
    model.to("cpu")
    calls = []

    def gpu(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return int8_linear.reference(*args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(sys.modules["potstill.nn.shared"], "int8_linear", gpu)
    given = [part(x) for part in model]
    assert len(calls) == 1
    assert calls[0][1].shape == (53, 80)
    for y, same in zip(given, expected, strict=True):
        torch.testing.assert_close(y, same, rtol=1e-5, atol=1e-5)
    start = model[0].weight.data_ptr()
    assert [part.weight.data_ptr() - start for part in model] == [0, 32 * 80, 48 * 80]  # one copy
