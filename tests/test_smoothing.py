"""calibrate_ moves the unevenness of inputs to the weights of int8 layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import potstill
from potstill.errors import CheckpointError
from potstill.nn import Int8Linear


class Projections(nn.Module):
    """Two layers with one input, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 48), nn.Linear(64, 32), nn.Linear(80, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.cat([self.a(x), self.b(x)], -1))
        return y


def uneven(rows: int, seed: int = 0, width: int = 64) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 60  # one input is far larger than the others, in every row
    return x


def error(model: nn.Module, wanted: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - wanted).norm() / wanted.norm())


def quantized(model: nn.Module, calibrated: bool) -> nn.Module:
    model = copy.deepcopy(model).eval()
    if calibrated:
        potstill.calibrate_(model, [uneven(128, seed) for seed in range(1, 5)], quiet=True)
    potstill.quantize_(model, only_if_faster=False)
    return model


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    built = Projections().eval()
    with torch.no_grad():
        for layer in (built.a, built.b):
            layer.weight[:, 3] /= 60  # so that the large input does not drown the others in the output
    return built


def test_error_falls(model: nn.Module) -> None:
    x = uneven(200, 9)
    wanted = model(x)
    assert error(quantized(model, True), wanted, x) < 0.5 * error(quantized(model, False), wanted, x)


def test_layers_with_one_input_have_one_factor(model: nn.Module) -> None:
    smooth = quantized(model, True)
    assert smooth.a.factor is not None
    assert torch.equal(smooth.a.factor, smooth.b.factor)
    assert smooth.a.factor[3] < 0.2 * smooth.a.factor.median()
    x = uneven(20, 9)
    before = smooth(x)
    rows = {row.names: row.action for row in potstill.fuse_(smooth, x, only_if_faster=False).rows}
    assert rows == {("a", "b"): "fused"}
    torch.testing.assert_close(smooth(x), before)


def test_even_inputs_need_none() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    report = potstill.calibrate_(model, [torch.randn(128, 64) for _ in range(3)], quiet=True)
    assert report.rows[0].smoothing is None
    potstill.quantize_(model, only_if_faster=False)
    assert model[0].factor is None


def test_weight_is_the_same_with_factors(model: nn.Module) -> None:
    layer = quantized(model, True).a
    wanted = model.a.weight
    assert (layer.to_float().weight - wanted).norm() < 0.02 * wanted.norm()
    x = uneven(5, 9).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.to_float().weight.sum(0).expand(5, 64), atol=1e-5, rtol=1e-4)


def test_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    smooth, x = quantized(model, True), uneven(7, 9)
    potstill.save(smooth, tmp_path / "model")
    same = potstill.load(Projections().eval(), tmp_path / "model")
    assert torch.equal(same(x), smooth(x))
    half = copy.deepcopy(smooth).to(torch.bfloat16)
    assert half.a.factor.dtype == torch.float32
    smooth.a.factor[2] = -1.0
    potstill.save(smooth, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"a\.factor has values that are not positive and finite"):
        potstill.load(Projections().eval(), tmp_path / "bad")


def test_layers_inside_a_block_have_none() -> None:
    block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    report = potstill.calibrate_(block, [uneven(40, seed).view(2, 20, 64) for seed in range(3)], quiet=True)
    assert report.rows
    assert all(row.smoothing is None for row in report.rows)


def test_wrong_factors_are_refused() -> None:
    integers, scale = torch.ones(4, 6, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match=r"factor is torch.float32 \[5\], expected float32 \[6\]"):
        Int8Linear.from_integers(integers, scale, factor=torch.ones(5))
