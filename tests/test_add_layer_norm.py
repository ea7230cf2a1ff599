"""The op add_layer_norm and its module beyond what the registry walk covers; torch's layer_norm is the oracle."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import _C
from potstill.nn import AddLayerNorm
from potstill.ops import add_layer_norm


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("features", [1, 2, 15, 64, 65, 770])
def test_numbers_are_those_of_torch(isa: str, features: int) -> None:
    _C.use_isa(isa)
    x, residual = torch.randn(2, 5, features), torch.randn(2, 5, features)
    weight, bias = torch.randn(features), torch.randn(features)
    for w, b in [(weight, bias), (weight, None), (None, None)]:
        wide = [None if p is None else p.double() for p in (w, b)]
        expected = F.layer_norm(x.double() + residual, (features,), *wide)
        torch.testing.assert_close(add_layer_norm(x, residual, w, b, 1e-5).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", _C.isas())
def test_a_mean_far_from_zero_costs_no_accuracy_beyond_that_of_the_input(isa: str) -> None:
    _C.use_isa(isa)
    x = torch.randn(4, 1000) + 3000.0
    exact = F.layer_norm(x.double(), (1000,))
    assert (add_layer_norm(x, None, None, None, 1e-5) - exact).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_all_tensors_are_those_of_torch(dtype: torch.dtype) -> None:
    tensors = [torch.randn(s).to(dtype).requires_grad_() for s in ((3, 4, 40), (3, 4, 40), (40,), (40,))]
    upstream = torch.randn(3, 4, 40).to(dtype)
    add_layer_norm(*tensors, 1e-5).backward(upstream)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    F.layer_norm(exact[0] + exact[1], (40,), exact[2], exact[3]).backward(upstream.double())
    for given, expected in zip(tensors, exact, strict=True):
        assert given.grad is not None
        assert given.grad.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (given.grad - expected.grad).norm() <= tolerance * expected.grad.norm()


def test_gradcheck() -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(add_layer_norm, (double(3, 7), double(3, 7), double(7), double(7), 1e-5))
    assert torch.autograd.gradcheck(add_layer_norm, (double(7), None, None, None, 1e-5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(4, 8)}, r"residual"),
        ({"residual": torch.ones(5, 8, dtype=torch.bfloat16)}, r"residual"),
        ({"weight": torch.ones(7)}, r"weight has shape \[7\].*expected \[8\]"),
        ({"bias": torch.ones(9)}, r"bias has shape \[9\].*expected \[8\]"),
    ],
)
def test_what_does_not_agree_is_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.randn(5, 8), "residual": None, "weight": None, "bias": None, "eps": 1e-5} | change
    for function in (add_layer_norm, add_layer_norm.reference):
        with pytest.raises(ValueError, match=f"add_layer_norm: {message}"):
            function(**arguments)


def test_module_is_a_drop_in() -> None:
    norm = nn.LayerNorm(48, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer, x, residual = AddLayerNorm.from_float(norm), torch.randn(6, 48), torch.randn(6, 48)
    torch.testing.assert_close(layer(x), norm(x))
    torch.testing.assert_close(layer(x, residual), norm(x + residual))
    torch.testing.assert_close(layer(x.bfloat16(), residual), norm(x.bfloat16() + residual))
    assert layer.weight is norm.weight
    assert layer.to_float().weight is norm.weight
    fresh = AddLayerNorm(48, eps=1e-3)
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with pytest.raises(ValueError, match="expected one dimension"):
        AddLayerNorm.from_float(nn.LayerNorm((3, 4)))


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}])
def test_module_without_parameters(options: dict[str, bool]) -> None:
    norm, x = nn.LayerNorm(20, **options), torch.randn(3, 20)
    layer = AddLayerNorm.from_float(norm)
    torch.testing.assert_close(layer(x), norm(x))
    assert layer.state_dict().keys() == norm.state_dict().keys()
    torch.testing.assert_close(layer.to_float()(x), norm(x))


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
def test_module_compiles_whole_and_trains() -> None:
    layer, x, y = AddLayerNorm(24), torch.randn(5, 24, requires_grad=True), torch.randn(5, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), layer(x, y))
    compiled(x, y).square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    layer(x, y).square().sum().backward()
    torch.testing.assert_close(gradient, layer.weight.grad)
