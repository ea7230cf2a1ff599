"""The two layouts of 4-bit weights: packed for CPU kernels, rows for GPU kernels.

Where there is no GPU, a type of device that has memory here stands in for one: the layers then lay out as for it.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.nn import Int4Linear
from potstill.ops import int4_linear
from potstill.ops.int4_layout import (
    by_output,
    integers,
    laid_out,
    pack,
    pack_rows,
    pack_scales,
    scales_laid_out,
    unpack_rows,
)

OP: Any = sys.modules["potstill.ops.int4_linear"]
SIZES = [(20, 70), (16, 64), (33, 129), (1, 1), (5, 0), (0, 40)]


def as_on_gpu(monkeypatch: pytest.MonkeyPatch, *types: str) -> None:
    """Devices of these types take rows from now on."""
    for module in ("potstill.ops.int4_layout", "potstill.nn.int4"):
        monkeypatch.setattr(sys.modules[module], "ROW_DEVICES", frozenset(types))


def layer(symmetric: bool = False) -> Int4Linear:
    return Int4Linear.from_float(nn.Linear(70, 33), symmetric=symmetric)


def arguments(**change: Any) -> dict[str, Any]:
    """Of the op, packed."""
    random = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(3, 70, generator=random),
        "weight": pack(torch.randint(0, 16, (33, 70), generator=random, dtype=torch.uint8)),
        "scale": pack_scales(torch.rand(33, 3, generator=random).to(torch.bfloat16)),
        "out_features": 33,
        "group_size": 32,
        "zero": pack_scales(torch.randint(0, 16, (33, 3), generator=random, dtype=torch.uint8)),
        "bias": torch.randn(33, generator=random),
    } | change


def test_where_each_input_of_a_row_lies() -> None:
    rows = pack_rows(torch.arange(130).remainder(16).to(torch.uint8)[None])
    assert rows.shape == (1, 96)
    for i in range(130):
        block, place = divmod(i, 64)
        byte = int(rows[0, 32 * block + place % 32])
        assert (byte >> 4 if place >= 32 else byte & 15) == i % 16
    assert not rows[0, 66:].any()
    assert not (rows[0, 64:66] >> 4).any()


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_either_layout_is_made_of_the_other(n: int, k: int) -> None:
    numbers = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    rows, packed = pack_rows(numbers), pack(numbers)
    assert rows.shape == (n, -(-k // 64) * 32)
    assert torch.equal(unpack_rows(rows, k), numbers)
    for weight in (rows, packed):
        assert torch.equal(integers(weight, n, k), numbers)
        assert torch.equal(laid_out(weight, n, k, "cuda"), rows)
        assert torch.equal(laid_out(weight, n, k, "cpu"), packed)
    assert laid_out(rows, n, k, "cuda") is rows
    assert laid_out(packed, n, k, "meta") is packed


def test_scales_of_either_layout() -> None:
    scale = torch.rand(33, 3).to(torch.bfloat16)
    packed = pack_scales(scale)
    assert torch.equal(scales_laid_out(packed, 33, "cuda"), scale)
    assert scales_laid_out(packed, 33, "cuda").is_contiguous()
    assert torch.equal(scales_laid_out(scale, 33, "cpu"), packed)
    assert scales_laid_out(scale, 33, "cuda") is scale
    assert scales_laid_out(packed, 33, "cpu") is packed
    assert torch.equal(by_output(packed, 33), scale)


def test_the_reference_takes_both_and_the_cpu_kernel_only_its_own() -> None:
    a = arguments()
    rows = int4_linear.lay_out(a, "cuda")
    assert [rows[name].dim() for name in ("weight", "scale", "zero")] == [2, 2, 2]
    assert torch.equal(int4_linear.reference(**rows), int4_linear.reference(**a))
    with pytest.raises(ValueError, match=r"layout of GPUs, \[33, 64\], .* laid_out\(weight, n, k, 'cpu'\)"):
        int4_linear(**rows)
    with pytest.raises(ValueError, match=r"scale has shape \[33, 3\], but .* need \[3, 3, 16\]; pack and pack_scales"):
        int4_linear.reference(**a | {"scale": rows["scale"]})
    with pytest.raises(ValueError, match=r"zero has shape \[3, 3, 16\], but .* need \[33, 3\]; pack_rows makes"):
        int4_linear.reference(**rows | {"zero": a["zero"]})
    with pytest.raises(ValueError, match=r"weight has shape \[33, 62\], but .* need \[33, 64\]"):
        int4_linear.reference(**rows | {"weight": rows["weight"][:, :62]})


def test_the_op_s_arguments_are_laid_out_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    a = arguments()
    assert int4_linear.on(a, torch.device("cpu"))["weight"] is a["weight"]
    as_on_gpu(monkeypatch, "cpu")
    moved = int4_linear.on(a, torch.device("cpu"))
    assert moved["weight"].shape == (33, 64)
    assert moved["bias"] is a["bias"]
    assert int4_linear.on(arguments(zero=None), torch.device("cpu"))["zero"] is None


@pytest.mark.parametrize("zeros", [False, True])
def test_gradients_with_rows(zeros: bool) -> None:
    a = arguments() if zeros else arguments(zero=None)
    rows = int4_linear.lay_out(a, "cuda")
    upstream = torch.randn(3, 33)
    grads = []
    for given in (a, rows):
        x = given["x"].double().requires_grad_()
        int4_linear(**given | {"x": x}).backward(upstream.double())
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_without_triton_plain_torch_computes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that a CUDA tensor would be dispatched to."""
    monkeypatch.setattr(OP, "gpu_function", lambda *_: None)
    given = int4_linear.positional(**int4_linear.lay_out(arguments(), "cuda"))
    assert torch.equal(OP._cuda(*given), int4_linear.reference(*given))


def assert_same_state(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype
        assert torch.equal(given[name], tensor)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_move_changes_the_layout_and_nothing_else(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = layer(symmetric)
    state = copy.deepcopy(on_cpu.state_dict())
    parameter, packed = on_cpu.weight, on_cpu.weight.detach().clone()
    as_on_gpu(monkeypatch, "cpu")
    moved = on_cpu.to("cpu")
    assert moved.weight is parameter  # an optimiser or a tie that holds it holds the new layout
    assert moved.weight.shape == (33, 64)
    assert moved.scale.shape == (33, 3)
    assert_same_state(moved.state_dict(), state)
    as_on_gpu(monkeypatch, "cuda")
    back = moved.half()
    assert torch.equal(back.weight, packed)
    assert back.scale.dtype == torch.bfloat16
    state["bias"] = state["bias"].half()
    assert_same_state(back.state_dict(), state)


@pytest.mark.parametrize("assign", [False, True])
def test_state_loads_into_rows(assign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = copy.deepcopy(layer().state_dict())
    as_on_gpu(monkeypatch, "cpu")
    fresh = Int4Linear(70, 33, symmetric=False)
    assert fresh.weight.shape == (33, 64)
    fresh.load_state_dict(state, assign=assign)
    assert fresh.weight.shape == (33, 64)
    assert_same_state(fresh.state_dict(), state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_on_the_meta_device_takes_the_layout_of_where_it_goes(
    assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = copy.deepcopy(layer().state_dict())
    with torch.device("meta"):
        empty = Int4Linear(70, 33, symmetric=False)
    as_on_gpu(monkeypatch, "cpu")
    if not assign:
        empty.to_empty(device="cpu")
        assert empty.weight.shape == (33, 64)
    empty.load_state_dict(state, assign=assign)
    assert empty.weight.shape == (33, 64)
    assert_same_state(empty.state_dict(), state)
    empty.to_empty(device="meta")
    assert empty.weight.shape == (3, 3, 256)
    assert empty.zero.shape == (3, 3, 16)


def test_layers_made_there_have_rows_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = nn.Linear(70, 33), torch.randn(4, 70)
    expected = Int4Linear.from_float(linear, symmetric=False)
    y = expected(x)
    as_on_gpu(monkeypatch, "cpu")
    made = Int4Linear.from_float(linear, symmetric=False)
    assert made.weight.shape == (33, 64)
    assert_same_state(made.state_dict(), expected.state_dict())
    assert torch.equal(made.to_float().weight, expected.to_float().weight)
    monkeypatch.setattr(sys.modules["potstill.nn.int4"], "int4_linear", int4_linear.reference)
    torch.testing.assert_close(made(x), y)
