"""The int8 linear op and layer beyond what the registry walk covers."""

import copy
import io
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

from potstill import _C
from potstill.nn import Int8Linear
from potstill.ops import int8_linear
from potstill.ops.int8_linear import MAX_FEATURES, pack, quantize_rows, quantize_weight, unpack


def integer_sums(x: Tensor, weight: Tensor) -> Tensor:
    """The exact int32 sums, read off by unit scales: every row's largest magnitude is 127, so its scale is 1."""
    n = weight.shape[0]
    return int8_linear(x, pack(weight), torch.ones(n), None)


@pytest.mark.parametrize("isa", _C.isas())
def test_sums_are_exact_integers_on_every_isa(isa: str) -> None:
    _C.use_isa(isa)
    random = torch.Generator().manual_seed(3)
    for m, n, k in [(1, 16, 16), (5, 33, 770), (13, 17, 1021), (67, 130, 96), (6, 64, 1024)]:
        x = torch.randint(-127, 128, (m, k), generator=random)
        x[:, 0] = 127
        weight = torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)
        exact = x @ weight.long().t()
        assert exact.abs().max() < 2**24  # so that fp32 holds them
        assert torch.equal(integer_sums(x.float(), weight).long(), exact)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("x_sign", [-1, 1])
@pytest.mark.parametrize("w_sign", [-1, 1])
def test_extremes_do_not_saturate(isa: str, x_sign: int, w_sign: int) -> None:
    _C.use_isa(isa)
    k = 1024
    x = torch.full((7, k), 127.0 * x_sign)
    weight = torch.full((50, k), 127 * w_sign, dtype=torch.int8)
    assert torch.equal(integer_sums(x, weight), torch.full((7, 50), 127.0 * 127 * k * x_sign * w_sign))


@pytest.mark.parametrize("isa", _C.isas())
def test_the_longest_sum_is_exact_and_a_longer_one_raises(isa: str) -> None:
    _C.use_isa(isa)
    for x_sign, w_sign in [(1, 1), (-1, 1), (-1, -1)]:
        x = torch.full((2, MAX_FEATURES), 127.0 * x_sign)
        weight = torch.full((3, MAX_FEATURES), 127 * w_sign, dtype=torch.int8)
        exact = torch.tensor(127.0 * 127 * MAX_FEATURES * x_sign * w_sign)  # fp32 rounds the int32 sum once
        assert torch.equal(integer_sums(x, weight), exact.expand(2, 3))
    x, weight = torch.ones(1, MAX_FEATURES + 1), torch.ones(1, MAX_FEATURES + 1, dtype=torch.int8)
    for function in (int8_linear, int8_linear.reference):
        with pytest.raises(ValueError, match="exact up to 133144"):
            function(x, pack(weight), torch.ones(1), None)
    with pytest.raises(ValueError, match="at most 133144"):
        Int8Linear(MAX_FEATURES + 1, 1)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    m=st.integers(0, 20), n=st.integers(0, 70), k=st.integers(1, 150), seed=st.integers(0, 2**31), bias=st.booleans(),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_every_isa_gives_the_same_bits_as_the_reference(
    m: int, n: int, k: int, seed: int, bias: bool, scale: float, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=random) * scale).to(dtype)
    weight = pack(torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8))
    scales = torch.rand(n, generator=random)
    offset = torch.randn(n, generator=random) if bias else None
    expected = int8_linear.reference(x, weight, scales, offset)
    results = []
    for isa in _C.isas():
        _C.use_isa(isa)
        results.append(int8_linear(x, weight, scales, offset))
    # The reference sums in float64 and rounds once; the kernel rounds the int32 sum first.
    rtol, atol = (2e-7, 1e-6 * scale) if dtype == torch.float32 else (8e-3, 1e-2 * scale)
    torch.testing.assert_close(results[0], expected, rtol=rtol, atol=atol)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_quantised_rows_lie_in_range_and_round_to_even() -> None:
    integers, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -127.0]]))
    assert integers.tolist() == [[127, 0, 2, 2, 0, -127]]
    assert scale.item() == 1.0


@pytest.mark.parametrize("isa", _C.isas())
def test_row_with_nan_or_infinity_is_nan_and_others_are_not(isa: str) -> None:
    _C.use_isa(isa)
    x = torch.randn(12, 40)
    x[3, 39], x[5, 0], x[11, 17] = float("nan"), float("inf"), -float("inf")
    y = int8_linear(x, pack(torch.randint(-127, 128, (20, 40), dtype=torch.int8)), torch.ones(20), None)
    assert y.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 5, 11]
    assert y.isnan().any(dim=1).sum() == 3


def test_pack_round_trip_and_column_sums() -> None:
    for n, k in [(1, 1), (16, 4), (17, 5), (40, 127)]:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        packed = pack(weight)
        assert torch.equal(unpack(packed, n, k), weight)
        sums = packed[:, -1].contiguous().view(torch.int32).flatten()[:n]
        assert torch.equal(sums.long(), weight.long().sum(1))


def test_quantize_weight_is_symmetric_and_refuses_nan() -> None:
    integers, scale = quantize_weight(torch.tensor([[-3.0, 1.5], [0.0, 0.0]]))
    assert integers.tolist() == [[-127, 64], [0, 0]]
    assert torch.allclose(scale, torch.tensor([3 / 127, 1.0]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(torch.tensor([[float("nan")]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 9)}, r"weight has shape \[2, 6, 64\]; expected \[2, 4, 64\]"),
        ({"scale": torch.ones(40)}, r"weight has shape \[2, 6, 64\]; expected \[3, 6, 64\]"),
        ({"scale": torch.ones(20, dtype=torch.float64)}, "scale has another dtype"),
        ({"weight": torch.zeros(2, 6, 64)}, "weight has another dtype"),
        ({"bias": torch.ones(19)}, r"bias has shape \[19\]; expected \[20\]"),
        ({"bias": torch.ones(40)[::2]}, "bias is not contiguous"),
    ],
)
def test_bad_arguments_say_what_is_wrong(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "x": torch.randn(2, 20),
        "weight": pack(torch.zeros(20, 20, dtype=torch.int8)),
        "scale": torch.ones(20),
    }
    with pytest.raises(ValueError, match=message):
        int8_linear(**(arguments | change))


@pytest.mark.parametrize(
    "argument", ["not a tensor", torch.randn(2, 20).to_sparse(), torch.empty(2, 20, device="meta")]
)
def test_the_extension_refuses_what_has_no_memory(argument: object) -> None:
    weight, scale = pack(torch.zeros(20, 20, dtype=torch.int8)), torch.ones(20)
    with pytest.raises((ValueError, TypeError), match="int8_linear: x"):
        _C.int8_linear(argument, weight, scale, None, "none", None, None, torch.empty(2, 20))  # type: ignore[arg-type]


def test_gradient_is_that_of_the_dequantised_weight() -> None:
    linear = nn.Linear(33, 17).double()
    layer = Int8Linear.from_float(linear.float())
    x = torch.randn(4, 3, 33, requires_grad=True)
    upstream = torch.randn(4, 3, 17)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.to_float().weight.detach())


def test_bias_gradient_when_thawed() -> None:
    layer = Int8Linear.from_float(nn.Linear(8, 5))
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.bias is not None
    layer.bias.requires_grad_()
    layer(torch.randn(6, 8)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((5,), 6.0))


def test_layer_without_bias() -> None:
    linear = nn.Linear(40, 30, bias=False)
    layer = Int8Linear.from_float(linear)
    x = torch.randn(3, 40)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    torch.testing.assert_close(layer(x), linear(x), rtol=0.1, atol=0.1)
    assert layer.to_float().bias is None


def test_layer_is_close_to_the_float_layer() -> None:
    linear = nn.Linear(256, 128)
    x = torch.randn(64, 256)
    error = (Int8Linear.from_float(linear)(x) - linear(x)).norm() / linear(x).norm()
    assert error < 0.012  # two roundings to 8 bits of Gaussian rows


def test_to_float_is_the_inverse_up_to_rounding() -> None:
    linear = nn.Linear(64, 32)
    back = Int8Linear.from_float(linear).to_float()
    assert torch.equal(back.bias, linear.bias)
    assert (back.weight - linear.weight).abs().max() <= linear.weight.abs().max() / 254 * 1.001


def test_state_dict_is_canonical_and_loads() -> None:
    layer = Int8Linear.from_float(nn.Linear(70, 33))
    state = layer.state_dict()
    assert state["weight"].shape == (33, 70)
    assert state["weight"].dtype == torch.int8
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = Int8Linear(70, 33)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 70)
    assert torch.equal(fresh(x), layer(x))
    with pytest.raises(RuntimeError, match=r"expected int8 \[34, 70\]"):
        Int8Linear(70, 34).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"-128"):
        fresh.load_state_dict({**state, "weight": torch.full((33, 70), -128, dtype=torch.int8)})


def test_copies_and_pickles() -> None:
    layer = Int8Linear.from_float(nn.Linear(20, 30))
    x = torch.randn(2, 20)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_changes_leave_scales_and_integers_alone(dtype: torch.dtype) -> None:
    layer = Int8Linear.from_float(nn.Linear(20, 30))
    x = torch.randn(2, 20)
    expected = layer(x)
    scale, weight = layer.scale.clone(), layer.weight.clone()
    layer.to(dtype)
    assert torch.equal(layer.scale, scale)
    assert torch.equal(layer.weight, weight)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


def test_autocast_gives_the_autocast_dtype() -> None:
    layer = Int8Linear.from_float(nn.Linear(20, 30))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 20)).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
def test_compiles_whole_and_exports() -> None:
    model = nn.Sequential(Int8Linear.from_float(nn.Linear(20, 30)), nn.ReLU(), Int8Linear.from_float(nn.Linear(30, 4)))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 20, requires_grad=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    gradient, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    exported = torch.export.export(model.eval(), (x.detach(),))
    torch.testing.assert_close(exported.module()(x.detach()), model(x))


def test_meta_device_layer_materialises() -> None:
    with torch.device("meta"):
        layer = Int8Linear(20, 30)
    source = Int8Linear.from_float(nn.Linear(20, 30))
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 20)
    assert torch.equal(layer(x), source(x))


def test_wrong_features_are_named() -> None:
    with pytest.raises(ValueError, match=r"x has 19 features, expected in_features=20"):
        Int8Linear(20, 30)(torch.randn(2, 19))
