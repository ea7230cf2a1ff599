"""The student's queries, keys and values are related as the teacher's are (Wang et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.distill.batch import Outputs
from potstill.distill.strategies.layers import LayerStrategy, pair_layers, token_mask
from potstill.distill.strategies.shapes import mean_over_tokens
from potstill.distill.strategies.strategy import register


@register("attention_relations")
class AttentionRelations(LayerStrategy):
    """Self-attention relations: which tokens' queries are alike, and which keys, and which values.

    The output A of a layer is cut into ``heads`` relation heads of width d (not the attention's own heads), and each
    has the relation R = softmax(A Aᵀ / sqrt(d)) [tokens, tokens]; the term is KL(R_teacher || R_student) per token: the
    mean over the tokens and heads of each example, over the examples, and over queries, keys and values. Padded tokens
    (``attention_mask`` 0) count for nothing, on both sides of a relation.

    ``student`` and ``teacher`` each name 3 layers, of the queries, the keys and the values, which return [batch,
    tokens, features]; the names may have wildcards, but the paper's choice is one layer: the student's last, with one
    of the upper layers of the teacher. Widths may differ; both are multiples of ``heads``.
    Wang et al. 2021, "MiniLMv2: multi-head self-attention relation distillation", equations 5 to 7.

    >>> from potstill.distill import Batch
    >>> strategy = AttentionRelations(("query", "key", "value"), heads=2)
    >>> model = nn.ModuleDict({name: nn.Identity() for name in strategy.student})
    >>> strategy.attach(model, model)
    >>> student = {name: torch.randn(2, 5, 4) for name in model}
    >>> teacher = {name: torch.cat((x[..., :2], x[..., :2], x[..., 2:], x[..., 2:]), -1) for name, x in student.items()}
    >>> outputs = Outputs(Batch((), {}, torch.zeros(2)), None, None, student, teacher)
    >>> bool(strategy(outputs) > 0.0)
    True
    """

    def __init__(self, student: Sequence[str], teacher: Sequence[str] | None = None, *, heads: int = 12) -> None:
        super().__init__(student, teacher)
        for argument, names in (("student", self.student), ("teacher", self.teacher)):
            self._several(argument, names, 3, "of the layers of the queries, the keys and the values")
        if heads < 1:
            raise ValueError(f"AttentionRelations: heads is {heads}; expected at least 1")
        self.heads = heads

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Finds the layers; raises :class:`ValueError` where a name fits none."""
        if teacher is not None:
            roles = zip(self.student, self.teacher, strict=True)
            self.pairs = [pair for own, other in roles for pair in pair_layers(student, teacher, own, other)]

    def compare(self, student: Tensor, teacher: Tensor, outputs: Outputs, pair: int) -> Tensor:
        """The mean over the examples."""
        for features, name in zip((student, teacher), self.pairs[pair], strict=True):
            if features.dim() != 3 or features.shape[-1] % self.heads:
                raise ValueError(
                    f"AttentionRelations: {name!r} returned {list(features.shape)}; expected [batch, tokens, features] "
                    f"with a multiple of {self.heads} features: choose other layers or another number of heads"
                )
        self._same_positions(student, teacher, pair)
        mask = token_mask(outputs, student)
        log_q, log_p = self._relations(student, mask), self._relations(teacher, mask)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        return mean_over_tokens(divergence.mean(1), mask).mean()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().config(), "heads": self.heads}

    def _relations(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, tokens, features] -> log R [batch, heads, tokens, tokens]."""
        heads = features.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores: Tensor = heads @ heads.transpose(-1, -2) / heads.shape[-1] ** 0.5
        if mask is not None:
            # Not -inf: its probability 0 times a difference of infinities would be NaN. Half of the least number
            # leaves room for what log_softmax subtracts.
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min / 2)
        return scores.log_softmax(-1)
