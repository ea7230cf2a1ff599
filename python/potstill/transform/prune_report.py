"""What :func:`prune_` did to each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from potstill.transform.table import text_table


@dataclass(frozen=True)
class PruneRow:
    """One layer.

    - ``names``: every dotted name of the layer in the model; ``""`` is the model itself.
    - ``kind``: the class it had; ``shape``: (outputs, inputs), of a convolution the rows and columns of its matrix.
    - ``action``: ``"pruned"``, or ``"kept"`` as it was; ``reason``: why it was kept.
    - ``sparsity``: the share of its weights that are zero by its mask now; 0 of a layer that has none.
    - ``blocks``, ``kept_blocks``: blocks of the pattern, and those left; single weights for n:m. 0 where kept.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    action: Literal["pruned", "kept"]
    reason: str = ""
    sparsity: float = 0.0
    blocks: int = 0
    kept_blocks: int = 0


@dataclass(frozen=True)
class PruneReport:
    """The rows of all layers; ``print`` shows a table. ``config`` is the :class:`Prune`, as text."""

    rows: tuple[PruneRow, ...]
    config: str

    @property
    def pruned(self) -> tuple[PruneRow, ...]:
        """The rows of the layers that have a new mask."""
        return tuple(row for row in self.rows if row.action == "pruned")

    @property
    def kept(self) -> tuple[PruneRow, ...]:
        """The rows of the layers that were left alone."""
        return tuple(row for row in self.rows if row.action == "kept")

    @property
    def sparsity(self) -> float:
        """The share of the weights of the pruned layers, together, that are zero; 0 if there are none."""
        sizes = [row.shape[0] * row.shape[1] for row in self.pruned]
        zeros = sum(row.sparsity * size for row, size in zip(self.pruned, sizes, strict=True))
        return zeros / max(sum(sizes), 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain dicts, lists, strings and numbers, ready for :func:`json.dumps`."""
        rows = [asdict(row) | {"names": list(row.names), "shape": list(row.shape)} for row in self.rows]
        return {"layers": rows, "sparsity": self.sparsity, "config": self.config}

    def __str__(self) -> str:
        """A table for a terminal of 120 columns."""
        summary = f"{len(self.pruned)} of {len(self.rows)} layers pruned; {self.sparsity:.1%} of their weights are zero"
        titles = ("out x in", "now", "sparsity", "blocks kept")
        return text_table(titles, map(_cells, self.rows), [summary, self.config])


def _cells(row: PruneRow) -> Iterable[str]:
    yield " = ".join(name or "(the model)" for name in row.names)
    yield " x ".join(map(str, row.shape))
    yield row.action
    yield f"{row.sparsity:.1%}" if row.action == "pruned" or row.sparsity else ""
    yield f"{row.kept_blocks} of {row.blocks}" if row.action == "pruned" else ""
    yield row.reason
