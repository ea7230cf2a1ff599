"""quantize_: how it decides by speed, and that looking at a sample leaves no trace."""

from collections.abc import Callable

import pytest
import torch
from tests.quantizing import convert, mlp, row, two_with_one_weight
from torch import Tensor, nn

import potstill
from potstill.nn import Int8Linear

pytestmark = pytest.mark.usefixtures("quick")


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


def test_a_weight_that_other_code_reads_stays() -> None:
    """An embedding that is its model's head too, without a layer for the head."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.layer = nn.Embedding(1000, 64), nn.Linear(64, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.layer(self.tokens(ids)), self.tokens.weight)

    model, ids = Tied().eval(), torch.randint(1000, (4, 16))
    report = potstill.quantize_(model, only_if_faster=False, sample_input=ids)
    assert {row.names[0]: row.action for row in report.rows} == {"tokens": "kept", "layer": "int8"}
    assert "code that does not call it" in report.rows[0].reason
    assert model(ids).shape == (4, 16, 1000)
    assert not model.tokens._forward_hooks
    assert not model.tokens._forward_pre_hooks
