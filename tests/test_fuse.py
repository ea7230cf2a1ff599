"""fuse_: what it joins, what it leaves alone and why, and that the joined model computes the same."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import potstill
from potstill.errors import CheckpointError, ConversionError
from potstill.nn import FusedActivation, Int8Linear, Int8LinearPart
from potstill.nn.activation import activation_name
from potstill.ops.activation import ACTIVATIONS


class Attention(nn.Module):
    """Projects one input three times, as attention does."""

    def __init__(self, sizes: tuple[int, int, int] = (48, 32, 20), bias: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, size, bias) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


class Keeps(nn.Module):
    """Uses a layer's output beside its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(32, 32), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.act(h) + h.t().t()


def int8(model: nn.Module) -> nn.Module:
    potstill.quantize_(model.eval(), only_if_faster=False)
    return model


def fused(model: nn.Module, x: Tensor) -> potstill.FusionReport:
    return potstill.fuse_(model, x, only_if_faster=False)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
    ],
)
def test_activation_is_applied_by_the_layer(module: nn.Module, name: str) -> None:
    model, x = int8(nn.Sequential(nn.Linear(64, 48), module, nn.Linear(48, 8))), torch.randn(9, 64)
    expected = ACTIVATIONS[name](model[0](x))
    [row] = fused(model, x).rows
    assert (row.names, row.what, row.action) == (("0", "1"), "activation", "fused")
    assert isinstance(model[1], FusedActivation)
    assert (model[0](x) - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Identity(), nn.Dropout(), nn.ELU(), nn.Flatten(0), nn.PReLU()])
def test_other_modules_are_no_known_activation(module: nn.Module) -> None:
    assert activation_name(module.eval()) is None


def test_activation_stays_where_the_output_is_read_beside_it() -> None:
    model, x = int8(Keeps()), torch.randn(5, 32)
    before = model(x)
    [row] = fused(model, x).rows
    assert (row.action, row.reason) == ("kept", "the layer's output is also read by others")
    assert torch.equal(model(x), before)


def test_activation_stays_where_it_is_used_elsewhere() -> None:
    act = nn.GELU()
    model = int8(nn.Sequential(nn.Linear(32, 32), act, nn.LayerNorm(32), act))
    [row] = fused(model, torch.randn(5, 32)).rows
    assert (row.action, row.reason) == ("kept", "the activation is also used elsewhere")


def test_float_model_has_nothing_to_fuse() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU()).eval()
    assert fused(model, torch.randn(5, 32)).rows == ()


def test_a_model_whose_outputs_change_is_restored() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act, self.calls = nn.Linear(32, 32), nn.GELU(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.act(self.layer(x)) * self.calls

    model, x = int8(Counts()), torch.randn(5, 32)
    layer, act = model.layer, model.act
    with pytest.raises(ConversionError, match="everything was taken back"):
        fused(model, x)
    assert model.layer is layer
    assert model.act is act
    assert layer.activation == "none"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_one_input_are_one_call(bias: bool, dtype: torch.dtype) -> None:
    model, x = int8(Attention(bias=bias).to(dtype)), torch.randn(2, 7, 64, dtype=dtype)
    before = model(x)
    [row] = fused(model, x).rows
    assert (row.names, row.what, row.action) == (("query", "key", "value"), "shared input", "fused")
    assert torch.equal(model(x), before)
    storage = {part.weight.untyped_storage().data_ptr() for part in (model.query, model.key, model.value)}
    assert len(storage) == 1  # one resident copy
    assert not model.query._shared.waiting  # every result was fetched


def test_parts_need_whole_panels_and_one_input() -> None:
    model = int8(Attention((20, 32, 48)))
    [row] = fused(model, torch.randn(3, 64)).rows
    assert (row.action, row.reason) == ("kept", "out_features is no multiple of 16")

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.b(x * 2)

    model = int8(Sometimes())
    [row] = fused(model, torch.randn(3, 32)).rows
    assert (row.action, row.reason) == ("kept", "they do not always read the same input")


def part_model() -> tuple[nn.Module, Tensor]:
    model, x = int8(Attention()), torch.randn(4, 64)
    fused(model, x)
    assert isinstance(model.query, Int8LinearPart)
    return model, x


def test_results_never_outlive_their_input() -> None:
    model, x = part_model()
    alone = [copy.deepcopy(layer) for layer in (model.query, model.key)]
    for layer in alone:
        layer._shared = None
    model.query(x)  # the others' results wait
    x.mul_(2)
    assert torch.equal(model.key(x), alone[1](x))  # the same tensor with other values
    other = torch.randn(4, 64)
    model.query(x)
    assert torch.equal(model.key(other), alone[1](other))


def test_gradients_flow_after_a_call_without() -> None:
    model, x = part_model()
    x.requires_grad_()
    with torch.no_grad():
        model.query(x)
    y = model.key(x)
    assert y.requires_grad
    y.sum().backward()
    weight = model.key.int8_weight().float() * model.key.scale[:, None]
    assert torch.allclose(x.grad, weight.sum(0).expand(4, 64), atol=1e-5)


def test_parts_survive_moves_copies_and_loading() -> None:
    model, x = part_model()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert twin.query._shared is not model.query._shared
    assert torch.equal(twin(x), expected)
    changed = int8(Attention())
    twin.load_state_dict(changed.state_dict())
    assert torch.equal(twin(x), changed(x))
    assert torch.equal(model(x), expected)  # the copy's new numbers are its own
    half = copy.deepcopy(model).to(torch.bfloat16)
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_in_inference_mode() -> None:
    model, x = int8(nn.Sequential(Attention((48, 32, 48)), nn.Linear(128, 64), nn.GELU())), torch.randn(4, 64)
    with torch.inference_mode():
        before = model(x)
        report = fused(model, x)
        assert [row.action for row in report.rows] == ["fused", "fused"]
        assert (model(x) - before).norm() < 1e-5 * before.norm()
    y = model(x.requires_grad_())  # not bound to that mode
    y.sum().backward()
    assert x.grad is not None


def test_threads_do_not_take_each_others_results() -> None:
    model, _ = part_model()
    inputs = [torch.randn(4, 64) for _ in range(8)]
    expected, wrong = [model(x) for x in inputs], []

    def work(x: Tensor, y: Tensor) -> None:
        for _ in range(50):
            if not torch.equal(model(x), y):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_parts_compute_the_same() -> None:
    model, x = part_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


def test_saved_and_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Attention((48, 32, 48)), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 8)).eval()

    model, x = int8(build()), torch.randn(3, 64)
    report = fused(model, x)
    assert [row.action for row in report.rows] == ["fused", "fused"]
    potstill.save(model, tmp_path / "model")
    same = potstill.load(build(), tmp_path / "model")
    assert torch.equal(same(x), model(x))
    assert isinstance(same[2], FusedActivation)
    assert same[0].query._shared is not None  # one call again
    other = build()
    other[2] = nn.ReLU()  # the file stands for a GELU
    with pytest.raises(CheckpointError, match="the file has fused_activation"):
        potstill.load(other, tmp_path / "model")


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_gradient_through_the_activation(activation: str) -> None:
    layer = Int8Linear.from_float(nn.Linear(40, 24), activation)
    plain = Int8Linear.from_float(layer.to_float())
    x = torch.randn(6, 40)
    grads = []
    for run in (layer, lambda x: ACTIVATIONS[activation](plain(x))):
        leaf = x.clone().requires_grad_()
        F.mse_loss(run(leaf), torch.zeros(6, 24)).backward()
        grads.append(leaf.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


def test_only_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    from potstill.transform import fuse

    times = {"before": 1.0, "after": 1.1, "run": 1.0}
    monkeypatch.setattr(
        fuse, "fastest", lambda calls: {k: {name: times[name] for name in ways} for k, ways in calls.items()}
    )
    model, x = int8(nn.Sequential(nn.Linear(64, 48), nn.ReLU())), torch.randn(9, 64)
    [row] = potstill.fuse_(model, x).rows
    assert (row.action, row.reason) == ("kept", "separate calls are as fast")
    assert isinstance(model[1], nn.ReLU)
    times["after"] = 0.9
    report = potstill.fuse_(model, x)
    assert [row.action for row in report.rows] == ["fused"]
    assert "1 of 1 fused" in str(report)
    assert report.to_dict()["fusions"][0]["ms_after"] == 900.0
