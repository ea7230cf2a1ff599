"""How sensitive the mean loss is to the presence of a weight."""

from __future__ import annotations

from torch import Tensor

from potstill.transform.criteria.criterion import LayerFacts, criterion


@criterion("snip", needs="gradient")
def snip(facts: LayerFacts) -> Tensor:
    """|w dL/dw| for the mean loss L of the batches; meant for untrained models and ``scope="global"``.

    Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", equation 6. Divided by their
    sum over all layers, as there, the scores would rank in the same order, so they are not.
    """
    return (facts.weight * facts.gradient).abs()
