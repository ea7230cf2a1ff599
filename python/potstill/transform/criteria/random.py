"""No criterion at all, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.transform.criteria.criterion import LayerFacts, criterion


@criterion("random")
def random(facts: LayerFacts) -> Tensor:
    """Uniform random numbers, the same for the same seed and name of the layer, on every device.

    >>> facts = LayerFacts("0", torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), seed=1)
    >>> torch.equal(random.scores(facts), random.scores(facts))
    True
    """
    return torch.rand(facts.weight.shape, generator=facts.generator()).to(facts.weight.device)
