"""The models that the tests of plans spread over processes, and their data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.nn import Int4Linear, Int8Linear, MaskedLinear, SparseLinear

WIDTH, HEADS, HIDDEN, CLASSES, LENGTH, ROWS = 64, 4, 128, 41, 6, 8  # the classes are odd: shares differ
PADDING = 30


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.other_norm = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(self.other_norm(x))))


class Model(nn.Module):
    """A small language model of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def plain(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return Model()


def converted(kind: str, seed: int = 3) -> nn.Module:
    """With the linear layers of its blocks converted."""
    model = plain(seed)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name.startswith("blocks")]
    for name in names:
        model.set_submodule(name, CONVERSIONS[kind](model.get_submodule(name)))
    return model


def _pruned(linear: nn.Linear) -> nn.Linear:
    keep = torch.rand(linear.out_features, linear.in_features // 4, generator=torch.Generator().manual_seed(5)) < 0.4
    with torch.no_grad():
        linear.weight *= keep.repeat_interleave(4, 1)
    return linear


CONVERSIONS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8": Int8Linear.from_float,
    "int4": lambda linear: Int4Linear.from_float(linear, 32, symmetric=False),
    "sparse": lambda linear: SparseLinear.from_float(_pruned(linear)),
    "sparse float": lambda linear: SparseLinear.from_float(_pruned(linear), "float", "few"),
    "masked": lambda linear: MaskedLinear.from_float(linear, _pruned(linear).weight != 0),
}


def transformer(name: str, seed: int = 3) -> nn.Module:
    import transformers as t

    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "vocab_size": CLASSES}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    if name == "bert":
        model = t.BertForMaskedLM(t.BertConfig(**sizes, intermediate_size=HIDDEN, pad_token_id=PADDING))
    elif name == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(**sizes, n_positions=32, **tokens))
    else:
        llama = t.LlamaConfig(**sizes, num_key_value_heads=HEADS, intermediate_size=HIDDEN, **tokens)
        model = t.LlamaForCausalLM(llama)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases that are zero would hide whether they are added once
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


MODELS: dict[str, Callable[..., nn.Module]] = {
    "plain": plain,
    **{kind: partial(converted, kind) for kind in CONVERSIONS},
    **{name: partial(transformer, name) for name in ("bert", "gpt2", "llama")},
}


class Tokenwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(CLASSES, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def data() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    x, y = (torch.randint(CLASSES, (ROWS, LENGTH), generator=random) for _ in range(2))
    return x, y
