"""The int4 linear op and layer beyond what the registry walk covers."""

import copy
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import potstill
from potstill import _C
from potstill.errors import CheckpointError
from potstill.nn import Int4Linear
from potstill.ops import int4_linear
from potstill.ops.int4_layout import pack, pack_scales, unpack, unpack_scales
from potstill.ops.int4_linear import GROUP_SIZES, dequantize_groups, quantize_groups
from potstill.transform.swap import replace


def integer_sums(x: Tensor, integers: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """The exact sums, read off by unit scales: every row's largest magnitude is 127, so its scale is 1."""
    n, groups = integers.shape[0], -(-integers.shape[1] // group_size)
    ones = pack_scales(torch.ones(n, groups, dtype=torch.bfloat16))
    zeros = None if zero is None else pack_scales(zero)
    return int4_linear(x, pack(integers), ones, n, group_size, zeros)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_sums_are_exact_integers_on_every_isa(isa: str, group_size: int) -> None:
    _C.use_isa(isa)
    for m, n, k in [(1, 16, 32), (5, 33, 770), (13, 17, 1021), (6, 64, 1024)]:
        x = torch.randint(-127, 128, (m, k))
        x[:, 0] = 127
        integers = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        zero = torch.randint(0, 16, (n, -(-k // group_size)), dtype=torch.uint8)
        shift = zero.long().repeat_interleave(group_size, 1)[:, :k]
        exact = x @ (integers.long() - shift).t()
        assert torch.equal(integer_sums(x.float(), integers, zero, group_size).long(), exact)
        assert torch.equal(integer_sums(x.float(), integers, None, group_size).long(), x @ (integers.long() - 8).t())


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("integer", "zero"), [(15, 0), (0, 15), (15, 15)])
def test_extremes_do_not_saturate(isa: str, sign: int, integer: int, zero: int) -> None:
    _C.use_isa(isa)
    integers = torch.full((20, 1024), integer, dtype=torch.uint8)
    zeros = torch.full((20, 8), zero, dtype=torch.uint8)
    sums = integer_sums(torch.full((7, 1024), 127.0 * sign), integers, zeros, 128)
    assert torch.equal(sums, torch.full((7, 20), 127.0 * sign * (integer - zero) * 1024))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    m=st.integers(0, 14), n=st.integers(0, 40), k=st.integers(1, 300), seed=st.integers(0, 2**31), bias=st.booleans(),
    zeros=st.booleans(), group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_every_isa_gives_the_same_bits(
    m: int, n: int, k: int, seed: int, bias: bool, zeros: bool, group_size: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    arguments = {
        "x": torch.randn(m, k, generator=random).to(dtype),
        "weight": pack(torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)),
        "scale": pack_scales(torch.randn(n, groups, generator=random).to(torch.bfloat16)),
        "out_features": n,
        "group_size": group_size,
        "zero": pack_scales(torch.randint(0, 16, (n, groups), generator=random, dtype=torch.uint8)) if zeros else None,
        "bias": torch.randn(n, generator=random) if bias else None,
    }
    results = []
    for isa in _C.isas():
        _C.use_isa(isa)
        results.append(int4_linear(**arguments))
    assert torch.equal(results[0], int4_linear.reference(**arguments))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", _C.isas())
def test_row_with_nan_or_infinity_is_nan_and_others_are_not(isa: str) -> None:
    _C.use_isa(isa)
    layer = Int4Linear.from_float(nn.Linear(40, 20))
    x = torch.randn(12, 40)
    x[3, 39], x[5, 0], x[11, 17] = float("nan"), float("inf"), -float("inf")
    y = layer(x)
    assert y.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 5, 11]
    assert y.isnan().any(dim=1).sum() == 3


def test_pack_round_trips() -> None:
    for n, k in [(1, 1), (16, 32), (17, 33), (40, 127)]:
        integers = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        assert torch.equal(unpack(pack(integers), n, k), integers)
        scale = torch.randn(n, 3)
        assert torch.equal(unpack_scales(pack_scales(scale), n), scale)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_error_is_at_most_half_a_step(group_size: int, symmetric: bool) -> None:
    weight = torch.randn(50, 300)
    integers, scale, zero = quantize_groups(weight, group_size, symmetric)
    error = (dequantize_groups(integers, scale, zero, group_size) - weight).abs()
    step = scale.float().abs().repeat_interleave(group_size, 1)[:, :300]
    # At the far end of a group the integer may be one too few (16 of a symmetric group's 17), and the zero is rounded.
    assert bool((error <= step * 1.05).all())
    assert float((error <= step * 0.501).float().mean()) > 0.97
    assert integers.max() == 15
    assert integers.min() == 0


def test_groups_of_zeros_and_tiny_values_are_zero() -> None:
    for symmetric in (True, False):
        quantised = quantize_groups(torch.full((2, 40), 1e-40), 32, symmetric)
        assert torch.equal(dequantize_groups(*quantised, 32), torch.zeros(2, 40))


def test_quantising_refuses_what_4_bits_cannot_hold() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_groups(torch.tensor([[float("nan")]]), 32)
    with pytest.raises(ValueError, match="group_size is 48, expected one of 32, 64, 128"):
        quantize_groups(torch.ones(1, 1), 48)


def test_bad_arguments_say_what_is_wrong() -> None:
    good = {
        "x": torch.randn(2, 40),
        "weight": pack(torch.zeros(20, 40, dtype=torch.uint8)),
        "scale": pack_scales(torch.ones(20, 2, dtype=torch.bfloat16)),
        "out_features": 20,
        "group_size": 32,
    }
    int4_linear(**good)
    for change, message in [
        ({"x": torch.randn(2, 70)}, r"weight has shape \[2, 2, 256\]; expected \[2, 3, 256\]"),
        ({"group_size": 64}, r"scale has shape \[2, 2, 16\]; expected \[2, 1, 16\]"),
        ({"group_size": 16}, "expected 32, 64 or 128"),
        ({"scale": torch.ones(2, 2, 16)}, "scale has another dtype; expected bfloat16"),
        ({"weight": good["weight"].view(torch.int8)}, "weight has another dtype; expected uint8"),
        ({"zero": torch.ones(2, 2, 15, dtype=torch.uint8)}, r"zero has shape \[2, 2, 15\]"),
        ({"bias": torch.ones(19)}, r"bias has shape \[19\]; expected \[20\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            int4_linear(**(good | change))
        if "dtype" not in message and "bias" not in message:
            with pytest.raises(ValueError, match=r"expected one of|packed"):
                int4_linear.reference(**(good | change))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_dequantised_weight(symmetric: bool) -> None:
    layer = Int4Linear.from_float(nn.Linear(70, 17), symmetric=symmetric)
    assert not any(p.requires_grad for p in layer.parameters())
    layer.bias.requires_grad_()
    x = torch.randn(4, 3, 70, requires_grad=True)
    upstream = torch.randn(4, 3, 17)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.to_float().weight.detach())
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize(("group_size", "symmetric", "bound"), [(32, True, 0.1), (32, False, 0.1), (128, True, 0.13)])
def test_layer_is_close_to_the_float_layer(group_size: int, symmetric: bool, bound: float) -> None:
    linear = nn.Linear(256, 128)
    x = torch.randn(64, 256)
    layer = Int4Linear.from_float(linear, group_size, symmetric)
    assert (layer(x) - linear(x)).norm() < bound * linear(x).norm()
    assert torch.equal(layer.to_float().bias, linear.bias)


def layers() -> list[Int4Linear]:
    return [
        Int4Linear.from_float(nn.Linear(70, 33)),
        Int4Linear.from_float(nn.Linear(71, 33, bias=False), 64, symmetric=False),
    ]


@pytest.mark.parametrize("layer", layers(), ids=["symmetric", "asymmetric"])
def test_state_dict_is_canonical_and_loads(layer: Int4Linear) -> None:
    state = layer.state_dict()
    k, groups = layer.in_features, -(-layer.in_features // layer.group_size)
    assert (state["weight"].shape, state["weight"].dtype) == ((33, -(-k // 2)), torch.uint8)
    assert (state["scale"].shape, state["scale"].dtype) == ((33, groups), torch.bfloat16)
    assert ("zero" in state) == (not layer.symmetric)
    fresh = Int4Linear(**layer.config())
    fresh.load_state_dict(state)
    x = torch.randn(3, k)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    for change, message in [
        ({"weight": state["weight"][:, 1:]}, r"weight is torch.uint8 \[33, .*expected torch.uint8 \[33, "),
        ({"scale": state["scale"].float()}, "scale is torch.float32"),
        ({"scale": state["scale"] * float("nan")}, "scale has values that are not finite"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            fresh.load_state_dict(state | change)
    if not layer.symmetric:
        with pytest.raises(RuntimeError, match="zero has values above 15"):
            fresh.load_state_dict(state | {"zero": state["zero"] + 16})
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_changes_leave_scales_and_integers_alone(dtype: torch.dtype) -> None:
    for layer in layers():
        x = torch.randn(2, layer.in_features)
        expected, scale, weight = layer(x), layer.scale.clone(), layer.weight.clone()
        layer.to(dtype)
        assert torch.equal(layer.scale, scale)
        assert torch.equal(layer.weight, weight)
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
def test_compiles_whole_and_exports() -> None:
    model = nn.Sequential(Int4Linear.from_float(nn.Linear(40, 30)), nn.ReLU(), Int4Linear.from_float(nn.Linear(30, 4)))
    x = torch.randn(5, 40)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.export.export(model.eval(), (x,)).module()(x), model(x))


def test_meta_device_layer_materialises() -> None:
    source = layers()[1]
    with torch.device("meta"):
        layer = Int4Linear(**source.config())
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, source.in_features)
    assert torch.equal(layer(x), source(x))


def test_wrong_sizes_and_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"x has 19 features, expected in_features=20"):
        Int4Linear(20, 30)(torch.randn(2, 19))
    with pytest.raises(ValueError, match="group_size is 31"):
        Int4Linear(20, 30, group_size=31)
    with pytest.raises(TypeError, match="symmetric is 1"):
        Int4Linear(20, 30, symmetric=1)  # type: ignore[arg-type]


def test_save_and_load(tmp_path: Path) -> None:
    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 5))

    model = fresh()
    replace(model, ["0"], Int4Linear.from_float(model[0], 64, symmetric=False))
    replace(model, ["2"], Int4Linear.from_float(model[2]))
    path = tmp_path / "model.safetensors"
    potstill.save(model, path)
    x = torch.randn(3, 70)
    loaded = potstill.load(fresh(), path)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].config() == model[0].config()
    with pytest.raises(CheckpointError, match="build the model with the layers and sizes it was saved with"):
        potstill.load(nn.Sequential(nn.Linear(70, 34), nn.ReLU(), nn.Linear(34, 5)), path)


def test_damaged_values_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(70, 33))
    replace(model, ["0"], Int4Linear.from_float(model[0], symmetric=False))
    path = tmp_path / "model.safetensors"
    potstill.save(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for change, message in [
        ({"0.zero": tensors["0.zero"] + 16}, "0.zero has values above 15"),
        ({"0.scale": tensors["0.scale"] * float("inf")}, "0.scale has values that are not finite"),
    ]:
        save_file(tensors | change, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            potstill.load(nn.Sequential(nn.Linear(70, 33)), path)
    for good, bad in [
        ('"group_size": 32', '"group_size": 48'),
        ('"group_size": 32', '"group_size": 32.0'),
        ('"group_size": 32', '"group_size": "32"'),
        ('"symmetric": false', '"symmetric": 1'),
    ]:
        save_file(tensors, path, {"potstill": metadata["potstill"].replace(good, bad)})
        with pytest.raises(CheckpointError, match="cannot be made"):
            potstill.load(nn.Sequential(nn.Linear(70, 33)), path)
