"""Int8TransformerEncoderLayer against nn.TransformerEncoderLayer, alone and inside torch's encoder."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.quantizing import snr
from torch import Tensor, nn

import potstill
from potstill.errors import CheckpointError
from potstill.nn import Int8MultiheadAttention, Int8TransformerEncoderLayer
from potstill.ops import int8_linear
from potstill.transform.observe import unfused

WIDTH, HEADS, INNER, BATCH, LENGTH = 48, 4, 80, 3, 9


def pair(**options: Any) -> tuple[nn.TransformerEncoderLayer, Int8TransformerEncoderLayer]:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, **{"batch_first": True} | options).eval()
    for parameter in layer.parameters():
        if parameter.dim() == 1:  # torch starts biases at zero and norms at one
            nn.init.normal_(parameter, std=0.5)
    return layer, Int8TransformerEncoderLayer.from_float(layer)


def padding() -> Tensor:
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[0, -3:] = mask[1, -1] = True
    return mask


def causal() -> Tensor:
    return torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.gelu, nn.GELU(), nn.ReLU(), torch.tanh])
def test_same_as_the_float_layer(norm_first: bool, batch_first: bool, activation: Any) -> None:
    layer, fast = pair(norm_first=norm_first, batch_first=batch_first, activation=activation)
    x = torch.randn(BATCH, LENGTH, WIDTH) if batch_first else torch.randn(LENGTH, BATCH, WIDTH)
    for masks in (
        {},
        {"src_mask": causal(), "is_causal": True},
        {"src_key_padding_mask": padding()},
        {"src_mask": causal(), "src_key_padding_mask": padding()},
    ):
        with unfused():
            assert snr(layer(x, **masks), fast(x, **masks)) > 30
    assert snr(layer(x[0]), fast(x[0])) > 30
    with unfused():
        assert snr(fast.to_float()(x), fast(x)) > 33


@pytest.mark.parametrize("bias", [True, False])
def test_fused_pieces_leave_exactly_the_sum_of_the_parts(bias: bool) -> None:
    _, fast = pair(bias=bias, activation="gelu")
    x = torch.randn(BATCH, LENGTH, WIDTH)
    y = fast.norm1(x + fast.self_attn(x, x, x, need_weights=False)[0])
    assert fast.linear1.activation == "gelu"
    hidden = int8_linear(y, fast.linear1.weight, fast.linear1.scale, fast.linear1.bias)
    expected = fast.norm2(y + fast.linear2(F.gelu(hidden)))
    torch.testing.assert_close(fast(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_while_training(norm_first: bool) -> None:
    layer, fast = pair(norm_first=norm_first, dropout=0.3, batch_first=False)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    assert torch.equal(fast(x), fast(x))
    fast.train()
    layer.train()
    assert not torch.equal(fast(x), fast(x))
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    assert snr(expected, fast(x)) > 30  # both draw the same random numbers in the same places


def test_gradients_reach_the_input_and_the_norms() -> None:
    _, fast = pair(activation="gelu")
    plain = fast.to_float()
    x, upstream = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, LENGTH, WIDTH)
    gradients = []
    for module in (plain, fast):
        leaf = x.clone().requires_grad_()
        for norm in (module.norm1, module.norm2):
            norm.weight.grad = None
        module(leaf).backward(upstream)
        gradients.append([leaf.grad, module.norm1.weight.grad, module.norm2.weight.grad])
    assert all(snr(a, b) > 30 for a, b in zip(*gradients, strict=True))
    assert {n for n, p in fast.named_parameters() if p.requires_grad} == {
        f"norm{i}.{name}" for i in (1, 2) for name in ("weight", "bias")
    }


def encoder(nested: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("part", ["layer", "attention", "first layer"])
def test_inside_torchs_encoder(nested: bool, grad: bool, training: bool, part: str) -> None:
    """Its fast path, which reads the weights of the layers, declines; use_nested_tensor stays as it was."""
    model = encoder(nested)
    fast = copy.deepcopy(model)
    for i, layer in enumerate(model.layers):
        if part == "attention":
            fast.layers[i].self_attn = Int8MultiheadAttention.from_float(layer.self_attn)
        elif part == "layer" or i == 0:
            fast.layers[i] = Int8TransformerEncoderLayer.from_float(layer)
    model.train(training)
    fast.train(training)
    x, valid = torch.randn(BATCH, LENGTH, WIDTH), ~padding()
    with torch.set_grad_enabled(grad):
        for options in ({"src_key_padding_mask": padding()}, {"mask": causal()}, {}):
            with unfused():
                expected = model(x, **options)
            given = fast(x, **options)
            assert snr(expected[valid], given[valid]) > 30


def test_an_encoder_built_from_our_layer() -> None:
    _, fast = pair()
    with pytest.warns(UserWarning, match="was not TransformerEncoderLayer"):
        model = nn.TransformerEncoder(fast, 2).eval()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding()), fast(fast(x, None, padding()), None, padding())
        )


@pytest.mark.parametrize("norm_first", [False, True])
def test_state_loads_and_copies_agree(norm_first: bool) -> None:
    layer, fast = pair(norm_first=norm_first, activation="gelu")
    x = torch.randn(BATCH, LENGTH, WIDTH)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    fresh = Int8TransformerEncoderLayer(**fast.config()).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), fast(x))
    assert fast.norm1.weight is layer.norm1.weight


def test_an_encoder_saves_and_loads_into_the_float_model(tmp_path: Path) -> None:
    changed = encoder(nested=True).eval()
    for i, layer in enumerate(changed.layers):
        changed.layers[i] = Int8TransformerEncoderLayer.from_float(layer)
    potstill.save(changed, tmp_path / "model")
    loaded = potstill.load(encoder(nested=True).eval(), tmp_path / "model")
    x = torch.randn(BATCH, LENGTH, WIDTH)
    assert torch.equal(loaded(x, src_key_padding_mask=padding()), changed(x, src_key_padding_mask=padding()))
    changed.layers[1] = pair(activation=torch.tanh)[1]
    with pytest.raises(CheckpointError, match=r"'layers.1' cannot be described: .* has no name"):
        potstill.save(changed, tmp_path / "other")


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
@pytest.mark.parametrize("norm_first", [False, True])
def test_compiles_whole(norm_first: bool) -> None:
    _, fast = pair(norm_first=norm_first)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_key_padding_mask=padding()), fast(x, src_key_padding_mask=padding()))
    compiled(x).sum().backward()
    assert x.grad is not None


def test_bfloat16_and_autocast() -> None:
    layer, fast = pair()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(x)
    assert snr(expected, y) > 26
    assert snr(expected, fast.bfloat16()(x.bfloat16())) > 26


def test_what_has_no_int8_form_is_refused() -> None:
    layer, _ = pair()
    layer.norm1 = nn.RMSNorm(WIDTH)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="its norm1 is a RMSNorm, not a plain"):
        Int8TransformerEncoderLayer.from_float(layer)
    layer, _ = pair()
    layer.dropout1.p = 0.7
    with pytest.raises(ValueError, match="dropout rates differ"):
        Int8TransformerEncoderLayer.from_float(layer)
    layer, _ = pair()
    layer.norm2.eps = 0.1
    with pytest.raises(ValueError, match="eps of its norms differ"):
        Int8TransformerEncoderLayer.from_float(layer)
    with pytest.raises(ValueError, match="activation is 'swish'"):
        Int8TransformerEncoderLayer(WIDTH, HEADS, activation="swish")


def test_a_file_cannot_hold_a_function() -> None:
    layer, fast = pair(activation=torch.tanh)
    assert Int8TransformerEncoderLayer.float_config(layer) is None
    with pytest.raises(ValueError, match="has no name"):
        fast.config()
    layer, fast = pair(activation=nn.GELU())
    assert Int8TransformerEncoderLayer.float_config(layer) == fast.config()
