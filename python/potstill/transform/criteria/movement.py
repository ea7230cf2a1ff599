"""Whether training moves a weight away from zero, or towards it."""

from __future__ import annotations

from torch import Tensor

from potstill.transform.criteria.criterion import LayerFacts, criterion


@criterion("movement", needs="gradient")
def movement(facts: LayerFacts) -> Tensor:
    """-w dL/dw for the mean loss L of the batches: positive where a step of gradient descent makes |w| larger.

    Sanh, Wolf and Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", equation 5, where the sum is over
    the steps of a training; here over the batches of ``data``, at one point. Of a model at a minimum of its loss it
    says little: call it while the model learns, batch by batch or with the batches of the next steps.
    """
    return -facts.weight * facts.gradient
