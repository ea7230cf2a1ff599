"""Embeddings."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import nn

from potstill.nn import Int8Embedding
from potstill.ops import int8_linear
from potstill.transform.configs import Int8
from potstill.transform.eligible import why_not_plain, why_not_weight
from potstill.transform.observe import KEPT_ROWS, Call, RowCalls, usual_calls
from potstill.transform.rounding import Rounding
from potstill.transform.rules.linear import USUAL_ROWS
from potstill.transform.rules.rule import Arguments, Rule
from potstill.transform.swap import Site


class EmbeddingToInt8(Rule[RowCalls]):
    """``nn.Embedding`` becomes :class:`nn.Int8Embedding`."""

    source = nn.Embedding
    target = Int8Embedding
    config = Int8
    action = "int8"
    shared = ("weight", "scale")

    def why_not(self, site: Site) -> str:
        """See :class:`Rule`."""
        module = site.module
        why = why_not_plain(module, nn.Embedding, ("weight",)) or Int8Embedding.unsupported(module)  # type: ignore[arg-type]
        # Its kernel writes the dtypes that int8_linear's reads.
        return why or why_not_weight(module.get_parameter("weight"), int8_linear)

    def why_not_call(self, call: Call) -> str:
        """Any call will do."""
        return ""

    def watch(self) -> RowCalls:
        """See :class:`Rule`."""
        return RowCalls(row_dims=0)

    def usual(self, module: nn.Module) -> Mapping[Call, int]:
        """See :class:`Rule`."""
        return usual_calls(torch.int64, module.get_parameter("weight").device.type, USUAL_ROWS)

    def build(self, module: nn.Embedding, config: Int8, rounding: Rounding | None) -> Int8Embedding:
        """See :class:`Rule`."""
        return Int8Embedding.from_float(module)

    def arguments(self, module: nn.Embedding, call: Call, calls: RowCalls | None) -> Arguments:
        """Random rows of the table."""
        return (_random_rows(module, call.rows).to(call.dtype),), {}

    def example(self, module: nn.Embedding, calls: RowCalls) -> Arguments:
        """See :class:`Rule`."""
        return (torch.cat(calls.inputs) if calls.inputs else _random_rows(module, KEPT_ROWS),), {}

    def shape(self, module: nn.Embedding) -> tuple[int, ...]:
        """(num_embeddings, embedding_dim)."""
        return module.num_embeddings, module.embedding_dim

    def alike(self, module: nn.Embedding) -> Hashable:
        """Sizes and dtype."""
        return module.weight.shape, module.weight.dtype


def _random_rows(module: nn.Embedding, rows: int) -> torch.Tensor:
    indices = torch.randint(module.num_embeddings, (rows,), generator=torch.Generator().manual_seed(0))
    return indices.to(module.weight.device)
