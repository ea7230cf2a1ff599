"""quantize_ on embeddings, attention and encoder layers: what is replaced, what is left, and why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantizing import convert, row, snr
from torch import Tensor, nn

import potstill
from potstill.nn import Int8Embedding, Int8Linear, Int8MultiheadAttention, Int8TransformerEncoderLayer

pytestmark = pytest.mark.usefixtures("quick", "one_thread")


class Encoder(nn.Module):
    def __init__(self, activation: Any = "gelu", batch_first: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.tokens(tokens), src_key_padding_mask=padding))


TOKENS, PADDING = torch.arange(12).view(2, 6), torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]])


@pytest.mark.parametrize("sample", [None, (TOKENS,), (TOKENS, PADDING)])
def test_a_whole_encoder(sample: tuple[Tensor, ...] | None, tmp_path: Path) -> None:
    model = Encoder().eval()
    y = model(TOKENS, PADDING)
    report = convert(model, sample_input=sample)
    assert {r.names[0]: r.kind for r in report.converted} == {
        "tokens": "Embedding",
        "encoder.layers.0": "TransformerEncoderLayer",
        "encoder.layers.1": "TransformerEncoderLayer",
        "head": "Linear",
    }
    assert not report.kept
    assert row(report, "tokens").shape == (50, 32)
    assert row(report, "encoder.layers.0").shape == (32, 64)
    assert all(r.snr_db is not None and r.snr_db > 30 for r in report.rows)
    if sample is not None:
        assert row(report, "tokens").rows == row(report, "encoder.layers.1").rows == {12: 1}
    with torch.no_grad():
        assert snr(y[~PADDING], model(TOKENS, PADDING)[~PADDING]) > 25
    potstill.save(model, tmp_path / "model")
    loaded = potstill.load(Encoder().eval(), tmp_path / "model")
    assert torch.equal(loaded(TOKENS, PADDING), model(TOKENS, PADDING))
    assert {r.reason for r in convert(model).rows} == {"already int8"}


CHANGES: dict[str, Callable[[nn.TransformerEncoderLayer], object]] = {
    "its norm1: has forward_hooks": lambda layer: layer.norm1.register_forward_hook(lambda *_: None),
    "its linear2 is a Identity": lambda layer: setattr(layer, "linear2", nn.Identity()),
    "its dropout rates differ": lambda layer: setattr(layer.dropout, "p", 0.3),
    "its activation": lambda layer: setattr(layer, "activation", torch.tanh),
    "its self_attn: its out_proj: has": lambda layer: layer.self_attn.out_proj.register_forward_hook(lambda *_: None),
    "has forward_pre_hooks": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize(
    ("why", "parts"),
    [
        ("its norm1: has forward_hooks", {"self_attn", "linear1", "linear2"}),
        ("its linear2 is a Identity", {"self_attn", "linear1"}),
        ("its dropout rates differ", {"self_attn", "linear1", "linear2"}),
        ("its activation", {"self_attn", "linear1", "linear2"}),
        ("its self_attn: its out_proj: has", {"linear1", "linear2"}),
        ("has forward_pre_hooks", {"self_attn", "linear1", "linear2"}),
    ],
)
def test_parts_of_a_layer_that_is_left(why: str, parts: set[str]) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    CHANGES[why](layer)
    report = convert(nn.Sequential(layer))
    assert row(report, "0").reason.startswith(why)
    assert {r.names[0] for r in report.converted} == {f"0.{part}" for part in parts}


def test_weights_that_cannot_be_quantised() -> None:
    attention = nn.MultiheadAttention(32, 4)
    with torch.no_grad():
        attention.in_proj_weight[0, 0] = float("nan")
    assert "in_proj_weight: weight has NaN" in row(convert(nn.Sequential(attention)), "0").reason
    attention = nn.MultiheadAttention(32, 4).double()
    assert "float64" in row(convert(nn.Sequential(attention)), "0").reason
    assert "max_norm" in row(convert(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))), "0").reason


def test_two_embeddings_with_one_weight_share_the_rows() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(20, 8), "b": nn.Embedding(20, 8)})
    model["b"].weight = model["a"].weight
    convert(model)
    assert type(model["b"]) is Int8Embedding
    assert model["a"].weight is model["b"].weight


@pytest.mark.parametrize("options", [{}, {"kdim": 16, "vdim": 24}, {"batch_first": True, "bias": False}])
def test_attention_alone(options: dict[str, Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(32, 4, **options)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.mix(query, key, value)[0]

    model = Model().eval()
    inputs = tuple(torch.randn(6, 6, w) for w in (32, model.mix.kdim, model.mix.vdim))
    y = model(*inputs)
    for sample in (None, inputs):
        report = convert(Model(), sample_input=sample)
        assert [r.names for r in report.rows] == [("mix",)]
    convert(model, sample_input=inputs)
    assert type(model.mix) is Int8MultiheadAttention
    assert snr(y, model(*inputs)) > 30


def test_what_is_slower_stays_and_its_parts_are_tried(speed: Callable) -> None:
    def seconds(calls: dict[str, Any]) -> dict[str, float]:
        whole = not isinstance(calls["float"](), Tensor) or calls["float"]().dim() == 3
        return {"float": 2.0, "int8": 3.0 if whole else 1.0} | dict.fromkeys(calls.keys() - {"float", "int8"}, 1.0)

    speed(seconds)
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
    report = potstill.quantize_(model)
    assert {r.names[0] for r in report.converted} == {"0.linear1", "0.linear2"}
    assert row(report, "0").reason == row(report, "0.self_attn").reason == "int8 is slower: 0.67 times the speed"
    assert type(model[0].linear1) is Int8Linear


def test_an_encoder_without_batch_first_and_in_bfloat16() -> None:
    model = Encoder(batch_first=False).bfloat16().eval()
    y = model(TOKENS)
    convert(model, sample_input=TOKENS)
    assert type(model.encoder.layers[0]) is Int8TransformerEncoderLayer
    assert model(TOKENS).dtype == torch.bfloat16
    assert snr(y, model(TOKENS)) > 20
