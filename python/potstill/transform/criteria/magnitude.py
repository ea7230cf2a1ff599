"""The size of a weight."""

from __future__ import annotations

from torch import Tensor

from potstill.transform.criteria.criterion import LayerFacts, criterion


@criterion("magnitude", comparable=False)
def magnitude(facts: LayerFacts) -> Tensor:
    """|w|; needs nothing, and is hard to beat where the model is trained on afterwards (Gale et al. 2019).

    >>> import torch
    >>> magnitude.scores(LayerFacts("0", torch.tensor([[-2.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)))
    tensor([[2., 1.]])
    """
    return facts.weight.abs()
