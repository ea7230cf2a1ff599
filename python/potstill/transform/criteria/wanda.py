"""The size of a weight times that of its input."""

from __future__ import annotations

from torch import Tensor

from potstill.transform.criteria.criterion import LayerFacts, criterion


@criterion("wanda", needs="norms", per_output=True)
def wanda(facts: LayerFacts) -> Tensor:
    """|w_ij| ||x_j||, compared within an output i: what it changes of that output, alone.

    Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models". The norm of an input is over
    all rows of the data.
    """
    return facts.weight.abs() * facts.norms
