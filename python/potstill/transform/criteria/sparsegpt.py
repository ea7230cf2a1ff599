"""SparseGPT: removes weights column by column and lets the columns to come make up for each.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot". For one output w
and its pruned form q the error is (w - q) H (w - q)' with H = sum x'x over the inputs x. As in GPTQ (see
:mod:`potstill.transform.calibrate.gptq`), with H^-1 = U'U for the damped H, the weights behind column j that make up
best for w_j -> 0 change by -w_j / U_jj * U_j,j+1.. , at the price of (w_j / U_jj)^2. The weights of that price that is
lowest are removed: chosen for 128 columns at a time, with n:m for each m, so that the choice sees the changes so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.transform.calibrate.gptq import FactorisationError, inverse_factor
from potstill.transform.criteria.criterion import Criterion, LayerFacts, register
from potstill.transform.patterns import Blocks, NofM, Pattern, rounded

_BLOCK = 128


class SparseGPT(Criterion):
    """Removes what costs the layer's outputs least, and changes the weights that stay to make up for it.

    It starts from the weights that count, not from masked ones, and sets what it removes to zero. Each group of 128
    inputs loses the same share of blocks. Inputs that were always zero go first: their weights cost nothing.
    """

    name = "sparsegpt"
    needs = "second moments"
    comparable = False

    def why_not(self, pattern: Pattern) -> str:
        """See :class:`Criterion`."""
        if isinstance(pattern, Blocks) and pattern.rows > 1:
            return "solves each output by itself: it takes 'unstructured', n:m and blocks of one output, as '1x4'"
        return ""

    def scores(self, facts: LayerFacts) -> Tensor:
        """w^2 / [H^-1]_jj: what removing a weight costs if all others may make up for it (Hassibi and Stork 1993)."""
        costs = []
        for weight, hessian in _groups(facts):
            factor = _factor(hessian, facts.name)
            costs.append(weight.square() / factor.square().sum(dim=0) * (hessian.diagonal() > 0))
        return torch.cat(costs)

    def choose(self, facts: LayerFacts, pattern: Pattern, pruned: int, balanced: bool) -> tuple[Tensor, Tensor | None]:
        """See :class:`Criterion`."""
        masks, weights = [], []
        groups = _groups(facts)
        for number, (weight, hessian) in enumerate(groups):
            own = _share(pruned, number, number + 1, len(groups))
            columns = weight.t().contiguous()
            kept = _prune_columns(columns, _factor(hessian, facts.name), hessian.diagonal() > 0, pattern, own, balanced)
            masks.append(kept.t())
            weights.append(columns.t())
        return torch.cat(masks), torch.cat(weights)


def _groups(facts: LayerFacts) -> list[tuple[Tensor, Tensor]]:
    """The weights that count and the second moments of the inputs of each group of outputs."""
    weights = (facts.weight * facts.mask).chunk(len(facts.second_moments))
    return list(zip(weights, facts.second_moments, strict=True))


def _factor(hessian: Tensor, name: str) -> Tensor:
    try:
        return inverse_factor(hessian)[0]
    except FactorisationError as error:
        raise FactorisationError(f"sparsegpt: {name}: {error}") from error


def _share(whole: int, start: int, stop: int, of: int) -> int:
    """What the part from ``start`` to ``stop`` of ``of`` gets of a ``whole`` that is shared out evenly."""
    return rounded(whole * stop / of) - rounded(whole * start / of)


def _prune_columns(
    columns: Tensor, factor: Tensor, alive: Tensor, pattern: Pattern, pruned: int, balanced: bool
) -> Tensor:
    """Prunes ``columns`` [inputs, outputs] in place; returns which are kept."""
    kept = torch.ones_like(columns, dtype=torch.bool)
    prices = alive / factor.diagonal().square()
    unit = pattern.m if isinstance(pattern, NofM) else pattern.columns
    step = max(_BLOCK // unit, 1) * unit
    for start in range(0, len(columns), step):
        block, mask = columns[start : start + step], kept[start : start + step]
        stop = start + len(block)
        errors, inside = torch.empty_like(block), factor[start:stop, start:stop].t().contiguous()
        if isinstance(pattern, Blocks):
            ends = (-(-column // unit) for column in (start, stop, len(columns)))
            scores = pattern.reduce((block.square() * prices[start:stop, None]).t())
            mask.copy_(_keep(pattern, scores, pruned, tuple(ends), balanced, mask.t().shape).t())
        for i, column in enumerate(block):
            if isinstance(pattern, NofM) and i % unit == 0:
                ahead = block[i : i + unit] - inside[i : i + unit, :i] @ errors[:i]
                mask[i : i + unit] = pattern.mask((ahead.square() * prices[start + i : start + i + unit, None]).t()).t()
            column.addmv_(errors[:i].t(), inside[i, :i], alpha=-1)
            errors[i] = torch.where(mask[i], 0.0, column / inside[i, i])
            column.mul_(mask[i])
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return kept


def _keep(
    pattern: Blocks, scores: Tensor, pruned: int, ends: tuple[int, ...], balanced: bool, shape: torch.Size
) -> Tensor:
    """The mask of some columns, ``ends``: of their blocks, and how many there are; the others lose as large a share."""
    rows = len(scores)
    own = rows * _share(rounded(pruned / rows), *ends) if balanced else _share(pruned, *ends)
    return pattern.expand(pattern.keep(scores, own, balanced), shape)


register(SparseGPT())
