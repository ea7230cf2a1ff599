"""Small language models for the tests of what they write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 4


class Writer(nn.Module):
    """Logits that depend on the whole prefix, and on a source [batch, tokens] if it reads one."""

    def __init__(
        self, seed: int = 0, *, reads_source: bool = False, bias: Mapping[int, float] | None = None, width: int = 16
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tokens, self.source = nn.Embedding(CLASSES, width), nn.Embedding(CLASSES, width)
            self.middle, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)
        with torch.no_grad():
            self.head.weight.mul_(2.0)
            for token, value in (bias or {}).items():
                self.head.bias[token] = value
        self.reads_source = reads_source

    def forward(self, *ids: Tensor) -> Tensor:
        *source, prefix = ids
        x = self.tokens(prefix)
        x = means(x)
        if self.reads_source:
            (given,) = source
            x = x + 2.0 * means(self.source(given))[:, -1:]
        return self.head(torch.tanh(self.middle(x)))


def means(x: Tensor) -> Tensor:
    """[batch, tokens, width]: of all tokens up to each, of which the last counts most."""
    place = torch.arange(1.0, x.shape[1] + 1.0).unsqueeze(-1)
    return torch.cumsum(x * place, 1) / place.cumsum(0)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The number of tokens that each call of the model read."""
    widths: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        widths.append(args[-1].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()
