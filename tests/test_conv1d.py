"""GPT-2's linear layers, whose class is in the transformers package and keeps weights as [inputs, outputs]."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from potstill import Int4, Int8, calibrate_, load, quantize_, save
from potstill.nn import Int4Linear, Int8Linear
from potstill.transform.configs import Config


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(96, 32), nn.GELU(), Conv1D(48, 96)).eval().requires_grad_(False)


def _error(y: Tensor, expected: Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("config", "kind", "bound"), [(Int8(), Int8Linear, 0.02), (Int4(), Int4Linear, 0.2)], ids=["int8", "int4"]
)
@pytest.mark.parametrize("calibrated", [False, True], ids=["nearest", "calibrated"])
def test_is_quantised_like_the_linear_layer_it_is(
    config: Config, kind: type[nn.Module], bound: float, calibrated: bool
) -> None:
    model, x = _model(), torch.randn(2, 64, 32)
    expected = model(x)
    if calibrated:
        rows = calibrate_(model, [x], config, quiet=True).rows
        assert [row.rounding for row in rows] == ["gptq", "gptq"]
    report = quantize_(model, config, only_if_faster=False)
    assert [row.shape for row in report.rows] == [(96, 32), (48, 96)]
    assert [row.rounding for row in report.rows] == ["gptq" if calibrated else "nearest"] * 2
    assert type(model[0]) is type(model[2]) is kind  # type: ignore[index]
    assert _error(model(x), expected) < bound


def test_weight_is_that_of_the_transposed_linear_layer() -> None:
    model = _model()
    linear = nn.Linear(32, 96)
    linear.load_state_dict({"weight": model[0].weight.t(), "bias": model[0].bias})  # type: ignore[index,union-attr]
    quantize_(model, Int8(), only_if_faster=False)
    assert torch.equal(model[0].weight, Int8Linear.from_float(linear).weight)  # type: ignore[index]


def test_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = _model(), torch.randn(5, 32)
    quantize_(model, Int8(), only_if_faster=False)
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(load(_model(), tmp_path / "model.safetensors")(x), model(x))


def test_tied_ones_stay_tied_but_not_to_a_linear_layer() -> None:
    model = nn.Sequential(Conv1D(32, 32), Conv1D(32, 32))
    model[1].weight = model[0].weight
    quantize_(model, Int8(), only_if_faster=False)
    assert model[1].weight is model[0].weight
    mixed, x = nn.Sequential(Conv1D(32, 32), nn.Linear(32, 32)), torch.randn(9, 32)
    mixed[1].weight = mixed[0].weight
    expected = mixed(x).detach()
    rows = quantize_(mixed, Int8(), only_if_faster=False).rows
    assert all("was tied" in row.reason for row in rows)
    assert _error(mixed(x), expected) < 0.02


def test_subclass_is_left_alone() -> None:
    class Own(Conv1D):
        pass

    assert not quantize_(nn.Sequential(Own(8, 8)), Int8(), only_if_faster=False).rows
