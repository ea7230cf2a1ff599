"""quantize_: what it converts, what it leaves and why, and that the model still works."""

import copy
import io
import json
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import potstill
from potstill.errors import ConversionError
from potstill.nn import Int8Linear
from potstill.ops.int8_linear import MAX_FEATURES
from potstill.timing import Timing
from potstill.transform import measure, swap


def mlp(width: int = 48, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 16)).to(dtype)


def convert(model: nn.Module, **options: object) -> potstill.Report:
    return potstill.quantize_(model, only_if_faster=False, **options)  # type: ignore[arg-type]


def row(report: potstill.Report, name: str) -> potstill.LayerRow:
    (found,) = [r for r in report.rows if name in r.names]
    return found


def snr(y: Tensor, other: Tensor) -> float:
    y, other = y.detach().double(), other.detach().double()
    return float(10 * torch.log10(y.square().sum() / (y - other).square().sum()))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "_VISITS", 1)


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict], dict[str, float]]], None]:
    """Replaces the clock, so that a decision can be tested whatever the machine is doing."""

    def use(seconds: Callable[[dict], dict[str, float]]) -> None:
        def compare(calls: dict, **_: float) -> dict[str, Timing]:
            return {name: Timing(value, value, value, 3) for name, value in seconds(calls).items()}

        monkeypatch.setattr(measure, "compare", compare)

    return use


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
    assert report.bytes_before - report.bytes_after == row(report, "1").bytes_before - row(report, "1").bytes_after


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


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.named = nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})
        self.chain = nn.Sequential(nn.Sequential(nn.Linear(32, 8)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.several:
            x = layer(x)
        return self.chain(self.named["down"](self.named["up"](x)))


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


def test_weight_tied_to_an_embedding_is_left() -> None:
    model = Tied()
    report = convert(model)
    assert row(report, "head").reason == "weight is tied to embed.weight"
    assert row(report, "body").action == "int8"
    assert model.head.weight is model.embed.weight


def two_with_one_weight() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(32, 16), "b": nn.Linear(32, 16), "c": nn.Linear(32, 16)})
    model["b"].weight = model["a"].weight
    model["c"].bias = model["a"].bias
    return model


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
def test_transformer_encoder_leaves_the_fast_path(mask: str, activation: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, given = torch.randn(3, 10, 32), masks(3, 10)[mask]
    valid = ~given.get("src_key_padding_mask", torch.zeros(3, 10, dtype=torch.bool))
    with torch.no_grad():
        y = model(x, **given)
        report = convert(model, sample_input={"src": x, **given})
        assert {r.names[0] for r in report.converted} == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
        assert snr(y[valid], model(x, **given)[valid]) > 25
    assert row(report, "layers.0.linear1").rows == {30: 1}
    assert "MultiheadAttention" in row(report, "layers.0.self_attn.out_proj").reason
    assert row(report, "layers.1.self_attn.in_proj_weight").shape == (96, 32)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_single_transformer_layer(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind(32, 4, 64, batch_first=True).eval()
    inputs = (torch.randn(2, 6, 32),) * (1 if kind is nn.TransformerEncoderLayer else 2)
    with torch.no_grad():
        y = model(*inputs)
        report = convert(model, sample_input=inputs)
        assert len(report.converted) == 2
        assert snr(y, model(*inputs)) > 25


def test_attention_with_separate_projections_has_a_row_for_each() -> None:
    report = convert(nn.MultiheadAttention(32, 4, kdim=16, vdim=8))
    assert [r.names[0] for r in report.rows] == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]
    assert not report.converted


def test_fast_path_that_is_worth_more_than_int8_is_kept(speed: Callable) -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    )
    cost = {"float": 2e-3, "int8": 1e-3, "fused": 1e-3, "plain": 6e-3}
    speed(lambda calls: {name: cost[name] for name in calls})
    report = potstill.quantize_(model, sample_input=torch.randn(2, 6, 32))
    assert not report.converted
    assert "fused path of the model: costs 5 ms, int8 gains 4" in row(report, "layers.0.linear1").reason
    assert model.layers[0].activation_relu_or_gelu == 1
    cost["plain"] = 4e-3
    assert len(potstill.quantize_(model, sample_input=torch.randn(2, 6, 32)).converted) == 4
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
        with pytest.raises(ConversionError, match=f"^{argument}: .* matches no linear layer") as error:
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


# --- decisions -----------------------------------------------------------------------------------------------------


def test_slower_layers_are_kept(speed: Callable) -> None:
    speed(lambda calls: {"float": 1e-3, "int8": 2e-3})
    model = mlp()
    report = potstill.quantize_(model)
    assert type(model[0]) is nn.Linear
    kept = row(report, "0")
    assert kept.reason == "int8 is slower: 0.50 times the speed"
    assert (kept.ms_before, kept.ms_after) == (pytest.approx(1), pytest.approx(2))
    assert report.ms_before == report.ms_after == pytest.approx(2)
    assert convert(model).converted[0].reason == "as asked, though slower: 0.50 times the speed"


class Twice(nn.Module):
    """A layer that is called with 4 rows twice and with 100 once, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(input=self.used(x)).sum() + self.used(torch.ones(4, 25, 8)).sum()


@pytest.mark.parametrize(("few", "many", "action"), [(0.5, 1.9, "int8"), (0.5, 2.1, "kept"), (1.4, 0.1, "int8")])
def test_decision_sums_over_the_calls(speed: Callable, few: float, many: float, action: str) -> None:
    seen = []

    def seconds(calls: dict) -> dict[str, float]:
        seen.append(calls["int8"]().shape[0])
        return {"float": 1.0, "int8": few if seen[-1] == 4 else many}

    speed(seconds)
    report = potstill.quantize_(Twice(), sample_input=torch.randn(2, 2, 8))
    assert seen == [4, 100]  # each distinct size is timed once
    used = row(report, "used")
    assert used.rows == {4: 2, 100: 1}
    assert used.action == action
    assert used.ms_before == pytest.approx(3000)
    assert used.ms_after == pytest.approx(1000 * (2 * few + many))
    assert row(report, "unused").reason == "the sample never calls it"


@pytest.mark.parametrize("shape", [(0, 32), (32,), (2, 0, 32), (2, 3, 4, 32)])
def test_samples_of_unusual_shape(shape: tuple[int, ...]) -> None:
    model, x = mlp(), torch.randn(shape)
    report = convert(model, sample_input=x)
    assert report.rows[0].rows == {x.numel() // 32: 1}
    assert (report.rows[0].snr_db is None) == (x.numel() == 0)
    assert model(x).shape == (*shape[:-1], 16)


def test_layer_that_is_never_called_is_converted_if_asked() -> None:
    model = Twice()
    report = convert(model, sample_input=torch.randn(4, 8))
    assert type(model.unused) is Int8Linear
    assert row(report, "unused").ms_before is None
    assert row(report, "unused").snr_db > 30


def test_without_a_sample_the_ratio_is_a_geometric_mean(speed: Callable) -> None:
    int8 = {1: 4.0, 32: 0.5, 128: 0.25}
    speed(lambda calls: {"float": 1.0, "int8": int8[calls["int8"]().shape[0]]})
    report = potstill.quantize_(mlp())
    assert report.rows[0].ms_after == pytest.approx(1000 * 0.5 ** (1 / 3))
    assert len(report.converted) == 2
    assert "geometric mean over 1, 32, 128 rows" in str(report)


def test_same_shapes_are_timed_once(speed: Callable) -> None:
    timed = []
    speed(lambda calls: timed.append(1) or {"float": 2.0, "int8": 1.0})
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)), nn.Linear(16, 16, bias=False))
    potstill.quantize_(model, sample_input=torch.randn(3, 16))
    assert len(timed) == 2


def test_tied_layers_are_decided_together(speed: Callable) -> None:
    speed(lambda calls: {"float": 1.0, "int8": 0.5 if calls["int8"]().shape[0] == 3 else 1.6})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = two_with_one_weight()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["a"](x) + self.layers["b"](torch.cat([x, x])).sum()

    model = Model()
    report = potstill.quantize_(model, sample_input=torch.randn(3, 32))
    assert row(report, "layers.a").action == row(report, "layers.b").action == "kept"
    assert row(report, "layers.a").ms_after < row(report, "layers.a").ms_before


class Autocasts(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(8, 8), dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.layer(x.to(self.dtype)) + self.layer(x)


def test_model_that_autocasts_is_measured_so(speed: Callable) -> None:
    timed = []

    def seconds(calls: dict) -> dict[str, float]:
        timed.append((calls["float"]().dtype, calls["int8"]().dtype))
        return {"float": 2.0, "int8": 1.0}

    speed(seconds)
    report = potstill.quantize_(Autocasts(torch.bfloat16), sample_input=torch.randn(3, 8))
    assert report.rows[0].action == "int8"
    assert report.rows[0].rows == {3: 2}
    assert report.rows[0].snr_db > 30
    assert timed == [(torch.bfloat16, torch.bfloat16)] * 2  # from a bfloat16 and from a float32 input


def test_model_that_autocasts_to_a_dtype_without_kernel_is_left() -> None:
    report = convert(Autocasts(torch.float16), sample_input=torch.randn(3, 8))
    assert "float16 is computed by plain torch" in report.rows[0].reason


# --- the sample leaves no trace ------------------------------------------------------------------------------------


def test_sample_leaves_flags_hooks_and_random_state() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.RReLU())
    model.train()
    model[1].eval()
    flags, statistics = [m.training for m in model.modules()], model[2].running_mean.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    convert(model, sample_input=torch.randn(4, 32, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(model[2].running_mean, statistics)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_sample_that_consumes_random_numbers() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    model, x = nn.Sequential(Noisy(8, 8), nn.Linear(8, 8)), torch.ones(2, 8)
    state = torch.get_rng_state()
    convert(model, sample_input=x)
    assert torch.equal(torch.get_rng_state(), state)


def test_model_that_raises_is_left_as_it_was() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = nn.Sequential(nn.Linear(8, 8), Broken()).train()
    with pytest.raises(RuntimeError, match="broken"):
        convert(model, sample_input=torch.randn(2, 8))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert type(model[0]) is nn.Linear
    assert torch.backends.mha.get_fastpath_enabled()


def test_training_mode_is_kept() -> None:
    model = mlp().train()
    model[2].eval()
    convert(model)
    assert [m.training for m in model] == [True, True, False]


def test_inference_mode() -> None:
    with torch.inference_mode():
        born = mlp()
        convert(born, sample_input=torch.randn(2, 32))
        assert born(torch.randn(2, 32)).shape == (2, 16)
        outside = mlp()
    model = mlp()
    with torch.inference_mode():
        convert(model, sample_input=torch.randn(2, 32))
        model(torch.randn(2, 32))
    x = torch.randn(2, 32, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    convert(outside, sample_input=torch.randn(2, 32))
    assert type(outside[0]) is Int8Linear


# --- the converted model as a torch citizen ------------------------------------------------------------------------


def test_other_parameters_train() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32))
    convert(model, exclude="0")
    x = torch.randn(16, 32)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
    frozen = copy.deepcopy(model[2].state_dict())
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert model[0].weight.grad.abs().sum() > 0
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, frozen[key]) for key, value in model[2].state_dict().items())


def test_gradient_is_that_of_the_dequantised_layer() -> None:
    model = nn.Linear(32, 16)
    convert(model)
    x = torch.randn(4, 32, requires_grad=True)
    upstream = torch.randn(4, 16)
    model(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ model.to_float().weight)


def test_autocast() -> None:
    model, x = mlp(), torch.randn(8, 32)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        convert(model, sample_input=x)
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert snr(y, out) > 25


def test_compile_fullgraph() -> None:
    model, x = mlp(), torch.randn(8, 32)
    convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(mlp(), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, 32)
    if how == "torch.save":
        convert(model)
        other = nn.Sequential(mlp(), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
        convert(other)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        convert(model)
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert other[0][0].weight.data_ptr() != model[0][0].weight.data_ptr()


# --- the report ----------------------------------------------------------------------------------------------------


def test_report_as_a_dict_and_as_a_table() -> None:
    model = nn.ModuleDict({"body": Containers(), "attention": nn.MultiheadAttention(32, 4), "lazy": nn.LazyLinear(4)})
    report = convert(model, exclude="body.several.*")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["totals"]["converted"] == len(report.converted) == 3
    assert data["totals"]["kept"] == len(report.kept) == 5
    assert data["layers"][0]["names"] == ["body.several.0"]
    text = str(report)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120
    for line in report.rows:
        assert line.names[0] in text
    assert "3 of 8 layers converted" in text
    assert "excluded by" in text


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    model = nn.ModuleDict({"[bold]": nn.Linear(4, 4)})
    assert "[bold]" in str(convert(model))


def test_snr_of_an_exact_layer_is_undefined() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    report = convert(layer)
    assert report.rows[0].snr_db is None
    json.dumps(report.to_dict(), allow_nan=False)


# --- swap ----------------------------------------------------------------------------------------------------------


def test_replace_can_be_undone() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu"), 1)
    layer = model.layers[0]
    old = layer.linear1
    undo = swap.replace(model, ["layers.0.linear1"], Int8Linear.from_float(old))
    assert (model.use_nested_tensor, layer.activation_relu_or_gelu) == (False, 0)
    undo()
    assert layer.linear1 is old
    assert (model.use_nested_tensor, layer.activation_relu_or_gelu) == (True, 2)


def test_replace_of_the_model_itself_can_be_undone() -> None:
    model = nn.Linear(4, 4)
    weight = model.weight
    undo = swap.replace(model, [""], Int8Linear.from_float(model))
    assert type(model) is Int8Linear
    undo()
    assert type(model) is nn.Linear
    assert model.weight is weight


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "swap_int8.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "excluded by head" in text
    assert "restored model gives the same scores: True" in text
