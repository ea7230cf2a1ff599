"""A converted model: a torch citizen like any other; its report; and the changes that can be undone."""

import copy
import io
import json
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from tests.quantizing import Containers, convert, mlp, snr
from torch import nn

from potstill.nn import Int8Linear
from potstill.transform import swap

pytestmark = pytest.mark.usefixtures("quick")


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
    assert data["totals"]["converted"] == len(report.converted) == 4
    assert data["totals"]["kept"] == len(report.kept) == 3
    assert data["layers"][0]["names"] == ["body.several.0"]
    text = str(report)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120
    for line in report.rows:
        assert line.names[0] in text
    assert "4 of 7 layers converted" in text
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
