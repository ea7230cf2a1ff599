"""One way to build each registered strategy, and the small models that they connect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distill import (
    DIST,
    AttentionRelations,
    AttentionTransfer,
    Batch,
    Contrastive,
    Gram,
    HardLabels,
    HiddenStates,
    LogitStandardisation,
    Outputs,
    Relational,
    Similarity,
    SoftTargets,
    Strategy,
)
from potstill.distill.features import Features

ROWS, TOKENS, CLASSES = 8, 5, 4


class TokenNet(nn.Module):
    """Tokens [batch, tokens, 3] -> logits, with queries, keys and values by name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.pooled = nn.Identity()
        self.classes = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.embed(x).tanh()
        seen = attention_mask.bool()[:, None, :]
        q, k, v = self.query(tokens), self.key(tokens), self.value(tokens)
        tokens = tokens + F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        weight = attention_mask.to(tokens.dtype).unsqueeze(-1)
        return self.classes(self.pooled((tokens * weight).sum(1) / weight.sum(1)))


class MapNet(nn.Module):
    """Images [batch, 1, 6, 6] -> logits; ``stride`` 2 halves the second map."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, stride, padding=1), nn.Tanh())
        self.classes = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.second(self.first(x)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """``additive``: the gradients of micro-batches add up to that of their batch."""

    tokens: Callable[[], Strategy]
    maps: Callable[[], Strategy] | None = None
    additive: bool = True


LAYERS = ["embed", "value"]
MAPS = ["first", "second"]

CASES = {
    "hard_labels": Case(HardLabels),
    "soft_targets": Case(lambda: SoftTargets(2.0, alpha=1.0)),
    "logit_standardisation": Case(lambda: LogitStandardisation(2.0, alpha=1.0)),
    "dist": Case(lambda: DIST(2.0, inter=0.7), additive=False),
    "hidden_states": Case(lambda: HiddenStates(LAYERS), lambda: HiddenStates(MAPS, loss="cosine")),
    "attention_transfer": Case(lambda: AttentionTransfer(LAYERS), lambda: AttentionTransfer(MAPS)),
    "attention_relations": Case(lambda: AttentionRelations(("query", "key", "value"), heads=2)),
    "similarity": Case(lambda: Similarity(LAYERS), lambda: Similarity(MAPS), additive=False),
    "relational": Case(lambda: Relational(LAYERS), lambda: Relational(MAPS), additive=False),
    "contrastive": Case(lambda: Contrastive(LAYERS, width=5), lambda: Contrastive(MAPS, width=5), additive=False),
    "gram": Case(lambda: Gram(LAYERS), lambda: Gram(MAPS)),
}


def seeded(make: Callable[[], nn.Module], seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def token_item(rows: int = ROWS, seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """A loader's item; the examples have 2 to 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, TOKENS, 3, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, TOKENS + 1, (rows, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).long()
    return {"x": x, "attention_mask": mask}, torch.arange(rows) % CLASSES


def map_item(rows: int = ROWS, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(rows) % CLASSES


def outputs_of(strategy: Strategy, student: nn.Module, teacher: nn.Module, item: Any) -> Outputs:
    """What the Distiller would give the strategy, which is attached to the models."""
    strategy.attach(student, teacher)
    batch = Batch.of(item)
    with torch.no_grad(), Features(teacher, strategy.teacher_layers()) as other:
        taught = batch.feed(teacher)
    with Features(student, strategy.student_layers()) as own:
        learnt = batch.feed(student)
    return Outputs(batch, learnt, taught, own, other)


def of_features(
    strategy: Any, student: dict[str, Tensor], teacher: dict[str, Tensor], mask: Tensor | None = None
) -> Outputs:
    """Outputs of models whose layers returned these, in this order; the strategy is attached and prepared."""
    strategy.attach(
        nn.ModuleDict({name: nn.Identity() for name in student}),
        nn.ModuleDict({name: nn.Identity() for name in teacher}),
    )
    rows = len(next(iter(student.values())))
    batch = Batch((), {} if mask is None else {"attention_mask": mask}, torch.arange(rows))
    outputs = Outputs(batch, None, None, student, teacher)
    strategy.prepare(outputs)
    return outputs
