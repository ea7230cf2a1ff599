"""SparseLinear: what it computes, what it saves, and what it refuses to load."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import potstill
from potstill.errors import CheckpointError
from potstill.nn import Int8Linear, SparseLinear
from potstill.nn.sparse import Weights
from potstill.ops.sparse import ROWS, Rows

BOTH: tuple[Weights, ...] = ("int8", "float")
FORMS = [(weights, rows) for weights in BOTH for rows in ROWS]


def pruned(k: int, n: int, sparsity: float = 0.7, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias).requires_grad_(False)
    linear.weight *= (torch.rand(n, -(-k // 4)) >= sparsity).repeat_interleave(4, 1)[:, :k]
    return linear


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), [(64, 32), (770, 130), (5, 3), (1030, 17)])
def test_int8_is_bit_for_bit_the_dense_int8_layer(k: int, n: int, rows: Rows) -> None:
    linear, x = pruned(k, n), torch.randn(2, 9, k)
    assert torch.equal(SparseLinear.from_float(linear, "int8", rows)(x), Int8Linear.from_float(linear)(x))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_float_is_the_dense_layer(rows: Rows, bias: bool) -> None:
    linear, x = pruned(770, 130, bias=bias), torch.randn(35, 770)
    torch.testing.assert_close(SparseLinear.from_float(linear, "float", rows)(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weights", "rows"), FORMS)
def test_state_is_the_canonical_form(weights: Weights, rows: Rows) -> None:
    linear = pruned(30, 7)
    layer = SparseLinear.from_float(linear, weights, rows)
    state = layer.state_dict()
    blocks = nn.functional.pad(linear.weight, (0, 2)).view(7, 8, 4)
    kept = (blocks != 0).any(-1)
    bits = [sum(int(b) << i for i, b in enumerate(row)) for row in kept.tolist()]
    assert state["mask"].tolist() == [[value] for value in bits]
    assert layer.blocks == len(state["values"]) == int(kept.sum())
    if weights == "float":
        assert torch.equal(state["values"], blocks[kept])
    else:
        scale = linear.weight.abs().amax(1) / 127
        expected = (blocks / scale[:, None, None].clamp_min(1e-30)).round()[kept]
        assert torch.equal(state["values"].float(), expected)
    assert layer.sparsity == pytest.approx(1 - int(kept.sum()) / 56)


@pytest.mark.parametrize(("weights", "rows"), FORMS)
def test_it_survives_copies_and_files(weights: Weights, rows: Rows, tmp_path: Path) -> None:
    layer, x = SparseLinear.from_float(pruned(50, 20), weights, rows), torch.randn(6, 50)
    expected = layer(x)
    fresh = SparseLinear(**layer.config())
    fresh.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    read = SparseLinear(**layer.config())
    read.load_state_dict(torch.load(buffer, weights_only=True))
    model = nn.Sequential(layer)
    potstill.save(model, tmp_path / "m.safetensors")
    loaded = potstill.load(nn.Sequential(nn.Linear(50, 20)), tmp_path / "m.safetensors")
    for other in (copy.deepcopy(layer), fresh, read, loaded):
        assert torch.equal(other(x), expected)
    assert loaded[0].config() == layer.config()
    assert torch.equal(
        layer.to_float().weight != 0, SparseLinear.from_float(layer.to_float(), "float").to_float().weight != 0
    )


def test_half_and_bf16_leave_the_weights_alone() -> None:
    for weights in BOTH:
        layer, x = SparseLinear.from_float(pruned(64, 32), weights), torch.randn(20, 64)
        expected = layer(x)
        narrow = copy.deepcopy(layer).to(torch.bfloat16)
        assert torch.equal(narrow.weight, layer.weight)
        y = narrow(x.to(torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert float((y.float() - expected).norm() / expected.norm()) < 0.02
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("weights", "rows"), FORMS)
def test_gradient_flows_to_the_input(weights: Weights, rows: Rows) -> None:
    layer = SparseLinear.from_float(pruned(40, 24), weights, rows, "gelu")
    x = torch.randn(5, 40, requires_grad=True)
    residual = torch.randn(5, 24, requires_grad=True)
    layer(x, residual).square().sum().backward()
    plain, again = layer.to_float(), x.detach().clone().requires_grad_()
    other = residual.detach().clone().requires_grad_()
    (nn.functional.gelu(plain(again)) + other).square().sum().backward()
    for given, wanted in ((x.grad, again.grad), (residual.grad, other.grad)):
        assert given is not None
        assert wanted is not None
        assert float((given - wanted).norm() / wanted.norm()) < 0.03


def test_it_compiles_whole() -> None:
    layer, x = SparseLinear.from_float(pruned(64, 32)), torch.randn(20, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def state_of(weights: Weights) -> dict[str, Tensor]:
    return dict(SparseLinear.from_float(pruned(30, 7), weights).state_dict())


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
        ("int8", change("scale", (0,), float("inf")), "not finite"),
        ("int8", change("scale", (0,), -1.0), "negative"),
        ("int8", change("mask", (2, 0), 0), "must agree"),
        ("float", change("values", (1,), 0.0), "all zero"),
        ("int8", lambda s: s.update(values=s["values"][:-1]), "must agree"),
        ("int8", lambda s: s.update(values=s["values"].short()), "expected torch.int8"),
        ("int8", lambda s: s.update(mask=s["mask"][:, :0]), "expected torch.uint8"),
        ("int8", lambda s: s.pop("mask"), "Missing key"),
        ("int8", lambda s: s.pop("values"), "Missing key"),
        ("int8", lambda s: s.update(extra=s["mask"]), "Unexpected key"),
    ],
)
def test_bad_states_are_refused(weights: Weights, damage: Any, message: str) -> None:
    state = state_of(weights)
    layer = SparseLinear.from_float(pruned(30, 7, seed=1), weights)
    x, before = torch.randn(3, 30), layer.weight.clone()
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    if message not in ("Unexpected key",):
        assert torch.equal(layer.weight, before)
    layer(x)


def test_mask_beyond_the_inputs_is_refused() -> None:
    layer = SparseLinear.from_float(pruned(20, 3, 0.0))
    state = dict(layer.state_dict())
    state["mask"] = state["mask"] | 0x80
    with pytest.raises(RuntimeError, match="beyond the 20 inputs"):
        layer.load_state_dict(state)


def test_damaged_file_leaves_the_model(tmp_path: Path) -> None:
    layer = SparseLinear.from_float(pruned(30, 7))
    wrong = SparseLinear(**layer.config() | {"blocks": layer.blocks - 1})
    assert [list(t.shape) for t in wrong.state_dict().values()][-1] == [layer.blocks - 1, 4]
    potstill.save(nn.Sequential(wrong), tmp_path / "m.safetensors")  # zeros: no bit for any of its blocks
    model = nn.Sequential(nn.Linear(30, 7))
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match="must agree"):
        potstill.load(model, tmp_path / "m.safetensors")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int4"}, "weights is 'int4', expected one of int8, float"),
        ({"rows": "some"}, "rows is 'some', expected one of many, few"),
        ({"blocks": 9}, "blocks is 9"),
        ({"activation": "tanh"}, "tanh"),
    ],
)
def test_unknown_options_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear(8, 4, **arguments)


def test_wrong_inputs_are_errors() -> None:
    layer = SparseLinear.from_float(pruned(8, 4))
    with pytest.raises(ValueError, match="x has 9 features, expected in_features=8"):
        layer(torch.randn(2, 9))
    empty = SparseLinear(8, 4)
    with pytest.raises(ValueError, match="no packed sparse weight"):
        empty(torch.randn(2, 8))
    linear = nn.Linear(8, 4).requires_grad_(False)
    linear.weight[0, 0] = float("inf")
    for weights in BOTH:
        with pytest.raises(ValueError, match="infinite"):
            SparseLinear.from_float(linear, weights)
