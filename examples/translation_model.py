"""A small transformer that translates, and its tokens.

Layers are plain linear ones around torch's attention, so that potstill can run them in int8, and cut a smaller model
out of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

PAD, START, END = 0, 1, 2
SPECIAL = ["[pad]", "[start]", "[end]", "[unknown]", *(f"{{{i}}}" for i in range(1, 10))]


@dataclass(frozen=True)
class Size:
    """Of a model; ``layers`` in the encoder, and as many in the decoder."""

    width: int
    heads: int
    hidden: int
    layers: int
    dropout: float


class Attention(nn.Module):
    """Of ``x`` [batch, tokens, width] to ``other``, under a mask; without one each token sees those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        inputs = ((self.query, x), (self.key, other), (self.value, other))
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, y in inputs)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(found.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(size.width), Attention(size.width, size.heads)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(nn.Linear(size.width, size.hidden), nn.ReLU(), nn.Linear(size.hidden, size.width))
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normal = self.norm(x)
        x = x + self.dropout(self.attention(normal, normal, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class DecoderLayer(EncoderLayer):
    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.source_norm, self.source_attention = nn.LayerNorm(size.width), Attention(size.width, size.heads)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        normal = self.norm(x)
        x = x + self.dropout(self.attention(normal, normal, None))
        x = x + self.dropout(self.source_attention(self.source_norm(x), memory, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Translator(nn.Module):
    """Source [batch, tokens] and the German so far [batch, tokens] -> logits of each next token."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.places = nn.Embedding(128, size.width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=size.width**-0.5)
        self.head = nn.Linear(size.width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.token_norm, self.dropout = nn.LayerNorm(size.width), nn.Dropout(size.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(size) for _ in range(size.layers))
        self.decoder = nn.ModuleList(DecoderLayer(size) for _ in range(size.layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(size.width), nn.LayerNorm(size.width)

    def forward(self, source: Tensor, german: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logits(self.decode(*self.encode(source, attention_mask), german))

    def encode(self, source: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The memory, and a mask of the tokens in it that count; these are given, or those that are no padding."""
        mask = (source != PAD if attention_mask is None else attention_mask)[:, None, None]
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), mask

    def decode(self, memory: Tensor, mask: Tensor, german: Tensor) -> Tensor:
        x = self.embed(german)
        for layer in self.decoder:
            x = layer(x, mask, memory)
        return self.decoder_norm(x)

    def logits(self, decoded: Tensor) -> Tensor:
        logits: Tensor = self.head(decoded)
        return logits

    def embed(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.dropout(self.token_norm(self.tokens(ids) + self.places(places)))


class Writer(nn.Module):
    """A translator that is given what its encoder made of the source, and tells only the next token."""

    def __init__(self, model: Translator) -> None:
        super().__init__()
        self.model = model

    def forward(self, memory: Tensor, mask: Tensor, german: Tensor) -> Tensor:
        return self.model.logits(self.model.decode(memory, mask, german)[:, -1:])


def trained_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding of both languages together; numbered placeholders are tokens of their own."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
