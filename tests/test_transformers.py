"""Models of the transformers package, tiny and with random weights: what quantize_ and fuse_ make of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from potstill import fuse_, load, quantize_, save
from potstill.errors import ConversionError
from potstill.nn import Int8Embedding, Int8Linear, LinearAddNorm
from potstill.ops import attention
from potstill.transform.attention_interface import _forward, attention_models, switch
from potstill.transform.block_end import linear_add_norm

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TOKENS = torch.arange(12).view(2, 6) % 50


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    config = transformers.BertConfig(vocab_size=50, **SIZES)
    return transformers.BertModel(config), {"input_ids": TOKENS, "attention_mask": mask}


def _vit() -> tuple[nn.Module, dict[str, Tensor]]:
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SIZES))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def _gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=64, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """With two query heads to a head of keys and values."""
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES)
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS}


MODELS = {"bert": _bert, "vit": _vit, "gpt2": _gpt2, "llama": _llama}
Build = Callable[[], tuple[nn.Module, dict[str, Tensor]]]
each = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def _built(build: Build) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = build()
    return model.eval().requires_grad_(False), inputs


def _output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**inputs)[0]
    return output


def _error(y: Tensor, expected: Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the op by the attention interface."""
    calls: list[int] = []

    def counting(*args: object) -> Tensor:
        calls.append(1)
        output: Tensor = attention(*args)
        return output

    monkeypatch.setattr("potstill.transform.attention_interface.attention", counting)
    return calls


@each
def test_attention_computes_the_same(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _built(build)
    expected = _output(model, inputs)
    report = fuse_(model, inputs, only_if_faster=False)
    assert [row.what for row in report.fused] == ["attention"]
    calls = _counted(monkeypatch)
    torch.testing.assert_close(_output(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2  # one for each layer
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    _output(model, inputs)
    assert len(calls) == 2


@each
def test_is_quantised_fused_saved_and_loaded(build: Build, tmp_path: Path) -> None:
    model, inputs = _built(build)
    expected = _output(model, inputs)
    report = quantize_(model, sample_input=inputs, only_if_faster=False)
    assert not [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)], str(report)
    fused = fuse_(model, inputs, only_if_faster=False)
    assert {row.what for row in fused.fused} >= {"attention"}
    assert _error(_output(model, inputs), expected) < 0.1
    save(model, tmp_path / "model.safetensors")
    again = load(_built(build)[0], tmp_path / "model.safetensors")
    assert _error(_output(again, inputs), _output(model, inputs)) < 0.02


@pytest.mark.parametrize("build", [_gpt2, _llama], ids=["gpt2", "llama"])
def test_generates_with_a_cache_as_without(build: Build) -> None:
    model, inputs = _built(build)
    expected = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    fuse_(model, inputs, only_if_faster=False)
    found = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert torch.equal(found, expected)


def test_residuals_are_added_by_the_normalisation() -> None:
    model, inputs = _built(_bert)
    quantize_(model, sample_input=inputs, only_if_faster=False)
    expected, state = _output(model, inputs), model.state_dict()
    rows = [row for row in fuse_(model, inputs, only_if_faster=False).fused if row.what == "residual"]
    assert [row.names[0].removeprefix("encoder.layer.") for row in rows] == [
        "0.attention.output", "0.output", "1.attention.output", "1.output"
    ]  # fmt: skip
    assert sum(type(m) is LinearAddNorm for m in model.modules()) == 4
    assert _error(_output(model, inputs), expected) < 0.02
    assert model.state_dict().keys() == state.keys()
    layer = model.encoder.layer[0].output.train()  # type: ignore[union-attr,index]
    x, residual = torch.randn(5, 128), torch.randn(5, 64)
    torch.manual_seed(1)
    wanted = layer.LayerNorm(layer.dropout(layer.dense(x)) + residual)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x, residual), wanted)


def test_modules_that_look_like_the_end_of_a_block() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.LayerNorm, self.dropout = Int8Linear(8, 8), nn.LayerNorm(8), nn.Dropout()

        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            return hidden_states

    assert linear_add_norm(Own()) is None
    model = _built(_bert)[0]
    assert linear_add_norm(model.encoder.layer[0].output) is None  # type: ignore[union-attr,index]  # not quantised


def test_end_of_a_block_with_a_hook_is_left() -> None:
    model, inputs = _built(_bert)
    quantize_(model, sample_input=inputs, only_if_faster=False)
    first, second = (layer.output for layer in model.encoder.layer)  # type: ignore[union-attr]
    first.register_forward_hook(lambda *_: None)
    second.LayerNorm.register_forward_hook(lambda *_: None)
    assert linear_add_norm(first) is linear_add_norm(second) is None


def test_options_that_are_off_keep_the_fast_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _counted(monkeypatch)
    q = torch.randn(1, 2, 5, 16)
    module = nn.Module()
    y, _ = _forward(module, q, q, q, None, is_causal=False, output_attentions=False, softcap=None)
    assert calls == [1]
    bias = torch.randn(1, 2, 5, 5)
    _forward(module, q, q, q, None, is_causal=False, position_bias=bias)
    assert calls == [1]
    torch.testing.assert_close(y.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_tied_embedding_and_head_become_integers() -> None:
    model, inputs = _built(_gpt2)
    quantize_(model, sample_input=inputs, only_if_faster=False)
    assert type(model.transformer.wte) is Int8Embedding  # type: ignore[union-attr]
    assert type(model.lm_head) is Int8Linear


def test_gradients_and_dropout_take_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _built(_bert)
    fuse_(model, inputs, only_if_faster=False)
    calls = _counted(monkeypatch)
    model.requires_grad_(True)
    _output(model, inputs).sum().backward()
    model.requires_grad_(False).train()
    _output(model, inputs)
    assert not calls


def test_attention_is_left_where_torchs_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _built(_bert)
    slow = {"potstill": 2.0, "sdpa": 1.0, "run": 1.0}
    monkeypatch.setattr(
        "potstill.transform.fuse.fastest", lambda ways: {k: {name: slow[name] for name in v} for k, v in ways.items()}
    )
    (row,) = fuse_(model, inputs).rows
    assert (row.what, row.action, row.reason) == ("attention", "kept", "torch's is as fast")
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_attention_is_taken_back_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _built(_bert)
    monkeypatch.setattr("potstill.transform.fuse._agree", lambda before, after: False)
    with pytest.raises(ConversionError, match="taken back"):
        fuse_(model, inputs, only_if_faster=False)
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_models_that_are_found() -> None:
    bert, vit = _built(_bert)[0], _built(_vit)[0]
    both = nn.ModuleDict({"bert": bert, "vit": vit, "head": nn.Linear(4, 4)})
    assert attention_models(both) == [bert, vit]
    switch([bert], "potstill")
    assert attention_models(both) == [vit]
    eager = copy.deepcopy(vit)
    eager.set_attn_implementation("eager")  # type: ignore[operator]
    assert not attention_models(eager)
