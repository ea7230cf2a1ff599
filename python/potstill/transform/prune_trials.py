"""How sparse each layer should be by what that does to the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from potstill.errors import PotstillError
from potstill.transform.allocation import cheapest
from potstill.transform.patterns import rounded
from potstill.transform.prune_layers import Candidate, computing_with
from potstill.transform.sensitivity import outputs_of, relative_error

Choose = Callable[[Candidate, int], tuple[Tensor, Tensor | None]]
"""The mask of a layer that loses so many blocks, and new weights or None for the old ones."""


def by_error(
    model: nn.Module,
    layers: Sequence[Candidate],
    blocks: Mapping[Candidate, int],
    sparsity: float,
    data: Iterable[Any],
    choose: Choose,
) -> list[int]:
    """The blocks that each layer loses, so that the sum of the errors is least.

    Each layer alone is pruned by five shares around ``sparsity``, and the relative squared error of the model's output
    to that of the model as it is now is noted, as :meth:`Mixed.auto` does. See :func:`cheapest` for the rest.
    """
    shares = (sparsity / 2, 3 * sparsity / 4, sparsity, (1 + sparsity) / 2, (3 + sparsity) / 4)
    counts = {layer: sorted({rounded(share * blocks[layer]) for share in shares} - {0}) for layer in layers}
    trials = [(layer, _weight(layer, choose(layer, count))) for layer in layers for count in counts[layer]]
    errors = [0.0] * len(trials)
    batches = 0
    for item in data:
        batches += 1
        wanted = outputs_of(model, item)
        for index, (layer, weight) in enumerate(trials):
            with computing_with([layer], [weight]):
                errors[index] += relative_error(wanted, outputs_of(model, item))
    if not batches:
        raise PotstillError("prune_: data yielded nothing; it is exhausted, or empty")
    measured = iter(errors)
    curves = [[(count, next(measured)) for count in counts[layer]] for layer in layers]
    return cheapest(curves, rounded(sparsity * sum(blocks.values())))


def _weight(layer: Candidate, choice: tuple[Tensor, Tensor | None]) -> Tensor:
    mask, weight = choice
    weight = layer.weight if weight is None else weight
    return (weight * mask).to(layer.form.weight.dtype)
