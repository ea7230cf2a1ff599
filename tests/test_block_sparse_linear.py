"""Block-sparse layers: how blocks are stored, what BlockSparseLinear computes and saves, what it refuses to load."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import potstill
from potstill.errors import CheckpointError
from potstill.nn import BlockSparseLinear
from potstill.ops import block_sparse_linear
from potstill.ops.block_sparse import SIZES, from_block_sparse, longest_first, to_block_sparse, wrong_blocks


def pruned(k: int, n: int, size: int = 16, density: float = 0.4, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias).requires_grad_(False)
    kept = torch.rand(-(-n // size), -(-k // size)) < density
    linear.weight *= kept.repeat_interleave(size, 0).repeat_interleave(size, 1)[:n, :k]
    return linear


@settings(deadline=None)
@given(
    n=st.integers(0, 200),
    k=st.integers(1, 200),
    size=st.sampled_from(SIZES),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_block_is_kept(n: int, k: int, size: int, density: float) -> None:
    weight = torch.zeros(n, k) if n == 0 else pruned(k, n, size, density).weight.detach()
    values, columns, first = to_block_sparse(weight, size)
    assert torch.equal(from_block_sparse(values, columns, first, n, k), weight)
    assert wrong_blocks(values, columns, first, n, k, size) == ""
    assert (values != 0).flatten(1).any(1).all()
    assert sorted(longest_first(first).tolist()) == list(range(-(-n // size)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("k", "n"), [(256, 384), (130, 70), (5, 3)])
def test_it_is_the_dense_layer(k: int, n: int, size: int) -> None:
    linear, x = pruned(k, n, size), torch.randn(2, 9, k)
    layer = BlockSparseLinear.from_float(linear, size)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.to_float().weight, linear.weight)
    assert layer.sparsity == 1 - layer.blocks / (-(-n // size) * -(-k // size))


def test_many_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = pruned(100, 50), torch.randn(33, 100)
    layer = BlockSparseLinear.from_float(linear, 16)
    expected = layer(x)
    monkeypatch.setattr(sys.modules["potstill.ops.block_sparse_linear"], "_AT_ONCE", 7 * 16 * layer.blocks)
    torch.testing.assert_close(layer(x), expected)


def test_nan_meets_only_what_is_stored() -> None:
    linear = pruned(64, 64, density=0.5)
    x = torch.zeros(1, 64)
    x[0, 20] = math.nan
    y = BlockSparseLinear.from_float(linear, 16)(x)
    assert torch.equal(y[0].isnan(), linear.weight[:, 20] != 0)


def test_gradients_are_those_of_the_dense_layer() -> None:
    layer = BlockSparseLinear.from_float(pruned(40, 24), 16, "gelu").double()
    layer.bias.requires_grad_()
    x, residual = (torch.randn(5, size, requires_grad=True, dtype=torch.float64) for size in (40, 24))
    assert torch.autograd.gradcheck(lambda x, r: layer(x, r), (x, residual))
    plain = layer.to_float()
    layer(x).sum().backward()
    nn.functional.gelu(plain(x.detach())).sum().backward()
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    assert all(p.grad is None for p in (layer.values, layer.columns, layer.first))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_survives_copies_and_files(bias: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    layer = BlockSparseLinear.from_float(pruned(50, 40, bias=bias).to(dtype), 16, "relu")
    x = torch.randn(6, 50, dtype=dtype)
    expected = layer(x)
    assert expected.dtype == dtype
    fresh, assigned = (BlockSparseLinear(**layer.config()).to(dtype) for _ in range(2))
    assert torch.equal(fresh(x), torch.zeros_like(expected))
    fresh.load_state_dict(layer.state_dict())
    assigned.to("meta").load_state_dict(layer.state_dict(), assign=True)
    assert list(layer.state_dict()) == ["values", "columns", "first", *["bias"][: int(bias)]]
    potstill.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    loaded = potstill.load(nn.Sequential(nn.Linear(50, 40, bias)).to(dtype), tmp_path / "m.safetensors")
    for other in (copy.deepcopy(layer), fresh, assigned, loaded):
        assert torch.equal(other(x), expected)
    assert loaded[0].config() == layer.config()
    for other in (fresh, assigned, loaded[0]):
        assert torch.equal(other.order, layer.order)


def test_dtypes_and_autocast() -> None:
    layer, x = BlockSparseLinear.from_float(pruned(64, 32), 32), torch.randn(20, 64)
    expected = layer(x)
    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    assert narrow.values.dtype == torch.bfloat16
    assert narrow.columns.dtype == narrow.first.dtype == narrow.order.dtype == torch.int32
    for y in (narrow(x.to(torch.bfloat16)), layer(x.to(torch.bfloat16))):
        assert y.dtype == torch.bfloat16
        assert float((y.float() - expected).norm() / expected.norm()) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_it_compiles_whole() -> None:
    layer, x = BlockSparseLinear.from_float(pruned(64, 32), 16), torch.randn(20, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def change(name: str, at: Any, value: float) -> Any:
    def apply(state: dict[str, Tensor]) -> None:
        state[name] = state[name].clone()
        state[name][at] = value

    return apply


DAMAGE = [
    (change("columns", 0, -1), "outside 0 to 3"),
    (change("columns", -1, 4), "outside 0 to 3"),
    (change("columns", 1, 0), "does not rise within"),
    (change("first", 0, 1), "from 0 to the number"),
    (change("first", -1, 2**30), "from 0 to the number"),
    (change("first", 1, 12), "from 0 to the number"),
    (change("first", 1, -5), "from 0 to the number"),
    (change("values", (0, 0, 0), math.nan), "not finite"),
    (lambda s: s.update(first=s["first"][:-1]), "expected int32 \\[4\\]"),
    (lambda s: s.update(columns=s["columns"].long()), "expected int32"),
    (lambda s: s.update(columns=s["columns"][0]), "expected"),
    (lambda s: s.update(values=s["values"][:, :8]), "expected floats"),
    (lambda s: s.update(values=s["values"].int()), "expected floats"),
    (lambda s: s.update(values=s["values"][1:]), "expected floats"),
    (lambda s: s.pop("columns"), "Missing key"),
    (lambda s: s.update(extra=s["first"]), "Unexpected key"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_bad_states_are_refused(damage: Any, message: str) -> None:
    layer = BlockSparseLinear.from_float(pruned(60, 48, density=1.0), 16)
    state = dict(BlockSparseLinear.from_float(pruned(60, 48, density=1.0, seed=1), 16).state_dict())
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.isfinite(layer(torch.randn(3, 60))).all()


def test_first_that_goes_round_all_integers_is_seen() -> None:
    values, columns, _ = to_block_sparse(pruned(40, 90).weight, 16)
    around = torch.tensor([0, 2**31 - 1, -(2**31), -1, 0, 0, len(values)], dtype=torch.int32)
    assert (around.diff() >= 0).all()  # in 32 bits
    assert "does not rise" in wrong_blocks(values, columns, around, 90, 40, 16)


@pytest.mark.parametrize(
    ("name", "at", "value"), [("columns", 0, 4), ("first", 1, 12), ("values", (0, 0, 0), math.inf)]
)
def test_damaged_files_leave_the_model(name: str, at: Any, value: float, tmp_path: Path) -> None:
    layer = BlockSparseLinear.from_float(pruned(60, 48, density=1.0), 16)
    getattr(layer, name).data[at] = value
    potstill.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    model = nn.Sequential(nn.Linear(60, 48))
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match=name):
        potstill.load(model, tmp_path / "m.safetensors")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 8}, "block is 8, expected one of 128, 64, 32, 16"),
        ({"block": 16, "blocks": 3}, "blocks is 3"),
        ({"activation": "tanh"}, "tanh"),
    ],
)
def test_unknown_options_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSparseLinear(32, 16, **arguments)


def test_wrong_inputs_are_errors() -> None:
    linear = pruned(40, 20)
    layer = BlockSparseLinear.from_float(linear, 16)
    with pytest.raises(ValueError, match="x has 9 features, expected in_features=40"):
        layer(torch.randn(2, 9))
    with pytest.raises(ValueError, match="residual is"):
        layer(torch.randn(2, 40), torch.randn(2, 40))
    weight = {"values": layer.values, "columns": layer.columns, "first": layer.first, "order": layer.order}
    for name, wrong in (
        ("values", layer.values[:, :8, :8]),
        ("columns", layer.columns.long()),
        ("first", layer.first[1:]),
        ("order", layer.order[1:]),
    ):
        with pytest.raises(ValueError, match=f"{name} is|values is"):
            block_sparse_linear(torch.randn(2, 40), **weight | {name: wrong}, out_features=20)
    linear.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="infinite"):
        BlockSparseLinear.from_float(linear, 16)
