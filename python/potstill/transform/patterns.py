"""Which weights become zero together: single ones, blocks, or n of m consecutive inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``rows`` outputs by ``columns`` inputs; 1 by 1 is single weights.

    At the ends of a weight whose sizes are no multiples, blocks are partial: they count as one, and their score is the
    mean over the weights that they have.
    """

    rows: int = 1
    columns: int = 1

    def grid(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns of blocks of a weight [outputs, inputs]."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def count(self, shape: torch.Size) -> int:
        """Blocks of a weight [outputs, inputs].

        >>> Blocks(1, 4).count(torch.Size([2, 10]))
        6
        """
        across, along = self.grid(shape)
        return across * along

    def reduce(self, scores: Tensor) -> Tensor:
        """The mean of each block's ``scores`` [outputs, inputs], as [rows of blocks, columns of blocks] float64."""
        wide = scores.double()  # so that blocks of equal values tie exactly, whatever the order of their sum
        if self == Blocks():
            return wide
        return self._sum(wide) / self._sum(torch.ones_like(wide))

    def _sum(self, values: Tensor) -> Tensor:
        across, along = self.grid(values.shape)
        missing = along * self.columns - values.shape[1], across * self.rows - values.shape[0]
        padded = F.pad(values, (0, missing[0], 0, missing[1]))
        return padded.view(across, self.rows, along, self.columns).sum(dim=(1, 3))

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """A mask of ``shape`` from which blocks are ``kept`` [rows of blocks, columns of blocks], bool."""
        full = kept.repeat_interleave(self.rows, dim=0).repeat_interleave(self.columns, dim=1)
        return full[: shape[0], : shape[1]].contiguous()

    def mask(self, scores: Tensor, pruned: int, balanced: bool = False) -> Tensor:
        """The mask without the ``pruned`` blocks of the lowest mean score; of equal ones the first go.

        With ``balanced`` every row of blocks loses the same number, so that the sum comes closest to ``pruned``.

        >>> Blocks(1, 2).mask(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), pruned=1)
        tensor([[False, False,  True,  True]])
        """
        return self.expand(self.keep(self.reduce(scores), pruned, balanced), scores.shape)

    @staticmethod
    def keep(scores: Tensor, pruned: int, balanced: bool) -> Tensor:
        """Which blocks with these scores, [rows of blocks, columns of blocks], are kept; see :meth:`mask`."""
        kept = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)  # contiguous, whatever scores are
        if balanced:
            each = rounded(pruned / len(scores))
            kept.scatter_(1, scores.argsort(dim=1, stable=True)[:, :each], False)
        else:
            kept.view(-1)[scores.flatten().argsort(stable=True)[:pruned]] = False
        return kept


@dataclass(frozen=True)
class NofM:
    """``n`` of each ``m`` consecutive inputs of an output are kept; at the end of an output ``n`` of what is left."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """The share of the weights that become zero."""
        return 1.0 - self.n / self.m

    def mask(self, scores: Tensor) -> Tensor:
        """Keeps the ``n`` highest ``scores`` [outputs, inputs] of each group; of equal ones the last.

        >>> NofM(2, 4).mask(torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0]]))
        tensor([[ True, False,  True, False,  True]])
        """
        outputs, inputs = scores.shape
        missing = -inputs % self.m
        groups = F.pad(scores.double(), (0, missing), value=-torch.inf).view(outputs, -1, self.m)
        kept = torch.ones_like(groups, dtype=torch.bool)
        kept.scatter_(2, groups.argsort(dim=2, stable=True)[..., : self.m - self.n], False)
        return kept.view(outputs, -1)[:, :inputs].contiguous()


Pattern = Blocks | NofM


def parse_pattern(text: str) -> Pattern:
    """The pattern that :class:`Prune` knows by this name; raises :class:`ValueError` for any other text.

    >>> parse_pattern("16x4"), parse_pattern("2:4"), parse_pattern("unstructured")
    (Blocks(rows=16, columns=4), NofM(n=2, m=4), Blocks(rows=1, columns=1))
    """
    if text == "unstructured":
        return Blocks()
    found = re.fullmatch(r"([1-9]\d{0,3})([:x])([1-9]\d{0,3})", text) if isinstance(text, str) else None
    if found is not None:
        first, second = int(found[1]), int(found[3])
        if found[2] == "x":
            return Blocks(first, second)
        if first < second:
            return NofM(first, second)
    raise ValueError(
        f"Prune: pattern is {text!r}, expected 'unstructured', blocks of outputs by inputs such as '1x4' or '16x4', or "
        "n of m inputs that are kept, such as '2:4', with n < m"
    )


def rounded(value: float) -> int:
    """To nearest, and halves up, so that neighbouring sizes are not rounded in different directions."""
    return int(value + 0.5)
