"""quantize_: which layers it converts, which it leaves, and why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.quantizing import Containers, convert, mlp, row, snr, two_with_one_weight
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import potstill
from potstill.errors import ConversionError
from potstill.nn import Int8Linear, Int8MultiheadAttention
from potstill.ops.int8_linear import MAX_FEATURES

pytestmark = pytest.mark.usefixtures("quick")


# --- what is converted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converts_and_stays_close(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    x = torch.randn(40, 32).to(dtype)
    y = model(x)
    report = convert(model, sample_input=x)
    assert [type(m) for m in model] == [Int8Linear, nn.ReLU, Int8Linear]
    assert model(x).dtype == dtype
    assert snr(y, model(x)) > 30
    for line in report.rows:
        assert line.action == "int8"
        assert line.kind == "Linear"
        assert line.rows == {40: 1}
        assert 30 < line.snr_db < 60
        assert line.ms_before > 0
        assert line.ms_after > 0
        assert line.bytes_after < line.bytes_before
    assert report.rows[0].shape == (48, 32)


def test_bytes_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Embedding(10, 256), nn.Linear(256, 512), nn.BatchNorm1d(512))

    def size() -> int:
        return sum(t.numel() * t.element_size() for t in model.state_dict().values())

    before = size()
    report = convert(model)
    assert report.bytes_before == before
    # one packed panel has 4 bytes per output more than the canonical weight: its sums
    assert report.bytes_after == size() + 4 * 512
    assert report.bytes_before - report.bytes_after == sum(r.bytes_before - r.bytes_after for r in report.rows)


def test_root_linear_changes_in_place() -> None:
    model = nn.Linear(32, 16)
    alias, x = model, torch.randn(3, 32)
    y = model(x)
    report = convert(model)
    assert type(alias) is Int8Linear
    assert snr(y, alias(x)) > 30
    assert report.rows[0].names == ("",)
    assert "(the model)" in str(report)
    assert alias.state_dict().keys() == {"weight", "scale", "bias"}


def test_containers() -> None:
    model = Containers()
    x = torch.randn(5, 32)
    y = model(x)
    report = convert(model, sample_input=x)
    names = ["several.0", "several.1", "named.up", "named.down", "chain.0.0"]
    assert [r.names for r in report.converted] == [(name,) for name in names]
    assert snr(y, model(x)) > 25


def test_module_under_several_names_is_converted_once() -> None:
    model = mlp()
    model.append(nn.Linear(16, 48))
    model.append(model[2])
    report = convert(model, sample_input=torch.randn(7, 32))
    assert model[2] is model[4]
    assert type(model[2]) is Int8Linear
    assert row(report, "2").names == ("2", "4")
    assert row(report, "2").rows == {7: 2}
    assert "2 = 4" in str(report)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.embed(tokens))))


def test_weight_tied_to_an_embedding_becomes_two_copies() -> None:
    model = Tied()
    tokens = torch.arange(50)
    expected, before = model(tokens), model.embed.weight.clone()
    report = convert(model)
    assert [row(report, name).action for name in ("embed", "head", "body")] == ["int8"] * 3
    assert all("its weight was tied" in row(report, name).reason for name in ("embed", "head"))
    assert snr(before, model.embed(tokens)) > 35
    assert snr(expected, model(tokens)) > 25
    assert report.bytes_after < 0.6 * report.bytes_before


def test_weight_tied_to_an_embedding_that_is_kept_is_left() -> None:
    model = Tied()
    report = convert(model, exclude="embed")
    assert row(report, "head").reason == "weight is tied to embed.weight, which is kept"
    assert model.head.weight is model.embed.weight


def test_two_linears_with_one_weight_share_the_packed_one() -> None:
    model = two_with_one_weight()
    x = torch.randn(9, 32)
    ya, yb = model["a"](x), model["b"](x)
    report = convert(model)
    assert model["a"].weight is model["b"].weight
    assert model["a"].scale is model["b"].scale
    assert model["a"].bias is model["c"].bias
    assert model["a"].bias is not model["b"].bias
    assert snr(ya, model["a"](x)) > 30
    assert snr(yb, model["b"](x)) > 30
    assert report.bytes_after < sum(r.bytes_after for r in report.rows)


def test_weight_tied_to_an_excluded_layer_is_left() -> None:
    model = two_with_one_weight()
    report = convert(model, exclude="b")
    assert row(report, "a").reason == "weight is tied to b.weight, which is kept"
    assert model["a"].weight is model["b"].weight
    assert row(report, "c").action == "int8"


# --- torch's transformers ------------------------------------------------------------------------------------------


def masks(batch: int, length: int) -> dict[str, dict[str, Tensor]]:
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, length // 2 :] = True
    causal = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    return {"none": {}, "padding": {"src_key_padding_mask": padding}, "causal": {"mask": causal}}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("whole", [True, False])
def test_transformer_encoder_leaves_the_fast_path(mask: str, activation: str, whole: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, given = torch.randn(3, 10, 32), masks(3, 10)[mask]
    valid = ~given.get("src_key_padding_mask", torch.zeros(3, 10, dtype=torch.bool))
    with torch.no_grad():
        y = model(x, **given)
        report = convert(model, sample_input={"src": x, **given}, exclude=None if whole else "*.self_attn")
        parts = {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
        assert {r.names[0] for r in report.converted} == ({"layers.0", "layers.1"} if whole else parts)
        assert snr(y[valid], model(x, **given)[valid]) > 25
    assert row(report, "layers.0" if whole else "layers.0.linear1").rows == {30: 1}
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_single_transformer_layer(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind(32, 4, 64, batch_first=True).eval()
    inputs = (torch.randn(2, 6, 32),) * (1 if kind is nn.TransformerEncoderLayer else 2)
    with torch.no_grad():
        y = model(*inputs)
        report = convert(model, sample_input=inputs)
        names = {r.names[0] for r in report.converted}
        assert names == ({""} if len(inputs) == 1 else {"self_attn", "multihead_attn", "linear1", "linear2"})
        assert snr(y, model(*inputs)) > 25


def test_attention_is_replaced_as_a_whole() -> None:
    model = nn.Sequential(nn.MultiheadAttention(32, 4, kdim=16, vdim=8))
    report = convert(model)
    assert [r.names[0] for r in report.rows] == ["0"]
    assert type(model[0]) is Int8MultiheadAttention


def test_fast_path_that_is_worth_more_than_int8_is_kept(speed: Callable) -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    )
    cost = {"float": 2e-3, "int8": 1e-3, "fused": 1e-3, "plain": 6e-3}
    speed(lambda calls: {name: cost[name] for name in calls})
    options: dict[str, Any] = {"sample_input": torch.randn(2, 6, 32), "exclude": "*.self_attn"}
    report = potstill.quantize_(model, **options)
    assert not report.converted
    assert "fused path of the model: costs 5 ms, int8 gains 4" in row(report, "layers.0.linear1").reason
    assert model.layers[0].activation_relu_or_gelu == 1
    cost["plain"] = 4e-3
    assert len(potstill.quantize_(model, **options).converted) == 4
    assert model.layers[0].activation_relu_or_gelu == 0


# --- what is left, and why -----------------------------------------------------------------------------------------


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_hook(kind: str) -> nn.Linear:
    layer = nn.Linear(8, 8)
    getattr(layer, f"register_{kind}_hook")(lambda *_: None)
    return layer


def with_weight(value: float) -> nn.Linear:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[3, 3] = value
    return layer


def with_forward() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def with_child() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.lora = nn.Linear(8, 2)
    return layer


class TaggedWeight(nn.Parameter):
    """As a library of tensor subclasses would put in."""


def with_subclass_weight() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight = TaggedWeight(layer.weight.detach())
    return layer


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.LazyLinear(8), "not initialised"),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "parametrised"),
    "spectral": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "parametrised"),
    "forward hook": (lambda: with_hook("forward"), "has forward_hooks"),
    "pre hook": (lambda: with_hook("forward_pre"), "has forward_pre_hooks"),
    "backward hook": (lambda: with_hook("full_backward"), "has backward_hooks"),
    "own forward": (with_forward, "forward is overridden"),
    "child": (with_child, "holds more than weight and bias: lora"),
    "subclass": (lambda: Doubling(8, 8), "Doubling is a subclass"),
    "nan": (lambda: with_weight(float("nan")), "NaN or infinite"),
    "inf": (lambda: with_weight(float("-inf")), "NaN or infinite"),
    "float64": (lambda: nn.Linear(8, 8).double(), "float64 is computed by plain torch"),
    "float16": (lambda: nn.Linear(8, 8).half(), "float16 is computed by plain torch"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "meta device"),
    "too many inputs": (lambda: nn.Linear(MAX_FEATURES + 1, 2), "int8 sums are exact up to 133144"),
    "no inputs": (lambda: nn.Linear(0, 8), "has no weights"),
    "no outputs": (lambda: nn.Linear(8, 0), "has no weights"),
    "tensor subclass": (with_subclass_weight, "TaggedWeight"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", LEFT)
def test_left_with_a_reason(case: str) -> None:
    make, reason = LEFT[case]
    model = nn.ModuleDict({"odd": make(), "plain": nn.Linear(8, 8)})
    odd = model["odd"]
    report = convert(model)
    assert model["odd"] is odd
    assert row(report, "odd").action == "kept"
    assert reason in row(report, "odd").reason
    assert row(report, "odd").ms_before is None
    assert row(report, "plain").action == "int8"
    assert reason in " ".join(str(report).split()) or len(reason) > 30  # long ones are folded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_layers_are_left() -> None:
    assert "no cuda kernel" in convert(mlp().cuda()).rows[0].reason


def test_already_int8() -> None:
    model = mlp()
    convert(model)
    before = model[0]
    report = convert(model, sample_input=torch.randn(2, 32))
    assert [r.reason for r in report.rows] == ["already int8"] * 2
    assert model[0] is before


def test_model_without_linear_layers() -> None:
    report = potstill.quantize_(nn.Sequential(nn.ReLU()))
    assert report.rows == ()
    assert "0 of 0" in str(report)


# --- include, exclude ----------------------------------------------------------------------------------------------


def converted(**options: object) -> set[str]:
    return {name for r in convert(Containers(), **options).converted for name in r.names}


def test_include_and_exclude() -> None:
    assert converted(include="several.*") == {"several.0", "several.1"}
    assert converted(include=["named.up", "chain.*"]) == {"named.up", "chain.0.0"}
    assert converted(include=nn.ModuleDict) == {"named.up", "named.down"}
    assert converted(include=(nn.ModuleDict, "several.0"), exclude="*.down") == {"named.up", "several.0"}
    assert converted(exclude=[nn.ModuleList, nn.Sequential]) == {"named.up", "named.down"}
    assert converted(exclude=nn.Linear) == set()
    reasons = {r.reason for r in convert(Containers(), include="several.*", exclude="*.1").kept}
    assert reasons == {"not in include", "excluded by *.1"}


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("named.upp", "'named.up'"),
        ("several", "'several.*'"),
        (nn.Conv2d, "'Containers', 'Linear'"),
        ("zzz", "several.0"),
    ],
)
def test_pattern_without_a_match_raises(pattern: object, near: str) -> None:
    model = Containers()
    for argument in ("include", "exclude"):
        with pytest.raises(ConversionError, match=f"^{argument}: .* matches no layer that could be converted") as error:
            convert(model, **{argument: ["*", pattern]})
        assert near in str(error.value)
    assert not any(isinstance(m, Int8Linear) for m in model.modules())


def test_wrong_argument_types() -> None:
    with pytest.raises(TypeError, match="include: expected layer names"):
        convert(mlp(), include=[3])
    with pytest.raises(TypeError, match=r"expected potstill\.Int8\(\)"):
        potstill.quantize_(mlp(), "int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sample_input is a list"):
        convert(mlp(), sample_input=[torch.randn(1, 32)])
