"""How much the loss changes without a weight, to first order."""

from __future__ import annotations

from torch import Tensor

from potstill.transform.criteria.criterion import LayerFacts, criterion


@criterion("taylor", needs="squared gradient")
def taylor(facts: LayerFacts) -> Tensor:
    """The mean over the batches of (w dL/dw)^2.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 7: the square of the change of
    the loss, to first order, when the weight becomes zero. A block counts the sum of its weights' squares (as its mean
    does, but for partial blocks), which takes the changes as independent.
    """
    return facts.weight.square() * facts.squared_gradient
