"""Several teachers as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.distill.batch import logits
from potstill.distill.strategies.shapes import widened

_COMBINE = ("mean", "weighted", "agreement")


class Teachers(nn.Module):
    """A teacher that returns what several say together, as logits [..., classes], so that every strategy can learn it.

    What is averaged are probabilities at ``temperature`` T, which should be the strategy's: with p_k = softmax(z_k/T)
    of teacher k and weights w_k of sum 1 it returns T ln(sum of w_k p_k), whose softmax at T is that mean exactly. (At
    T = 1 these are log-probabilities. At another temperature than T the softmax is not the mean of the teachers'.)

    ``combine`` says what the weights are:

    - "mean": the same for all.
    - "weighted": those given, over their sum.
    - "agreement": for each row, proportional to exp(-KL(p_k || m)), where m is the plain mean: who is alone with an
      opinion counts less, in this row. No label is needed.

    All get the same arguments, and return logits of one shape. Their layers are named ``models.0.…``, ``models.1.…``.

    >>> sure, unsure = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> for teacher, odds in ((sure, 8.0), (unsure, 1.0)):
    ...     _ = teacher.weight.data.zero_(), teacher.bias.data.copy_(torch.tensor([odds, 1.0]).log())
    >>> Teachers([sure, unsure])(torch.zeros(1, 2)).softmax(-1)
    tensor([[0.6944, 0.3056]], grad_fn=<SoftmaxBackward0>)
    >>> Teachers([sure, unsure], "weighted", weights=[3.0, 1.0])(torch.zeros(1, 2)).softmax(-1)
    tensor([[0.7917, 0.2083]], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        combine: str = "mean",
        *,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        if not len(self.models):
            raise ValueError("Teachers: models is empty; expected at least one")
        if combine not in _COMBINE:
            raise ValueError(f"Teachers: combine is {combine!r}; expected one of {', '.join(_COMBINE)}")
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"Teachers: temperature is {temperature}; expected a positive number")
        self.combine = combine
        self.temperature = temperature
        self.weights = _shares(weights, len(self.models), combine)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits of all together."""
        found = [widened(logits(model(*args, **kwargs), f"teacher {i}")) for i, model in enumerate(self.models)]
        shapes = [list(one.shape) for one in found]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"Teachers: the logits are {' and '.join(map(str, shapes))}; all teachers need the same classes"
            )
        log_p = (torch.stack(found) / self.temperature).log_softmax(-1)
        log_weights = log_p.new_tensor(self.weights).log().reshape(-1, *[1] * (log_p.dim() - 1))
        if self.combine == "agreement":
            log_weights = _agreement(log_p, (log_p + log_weights).logsumexp(0))
        return self.temperature * (log_p + log_weights).logsumexp(0)

    def extra_repr(self) -> str:
        """The constructor's other arguments."""
        weights = f", weights={self.weights}" if self.combine == "weighted" else ""
        return f"combine={self.combine!r}{weights}, temperature={self.temperature}"


def _shares(weights: Sequence[float] | None, count: int, combine: str) -> list[float]:
    if combine != "weighted":
        if weights is not None:
            raise ValueError(f"Teachers: weights are given, but combine is {combine!r}; expected combine='weighted'")
        return [1.0 / count] * count
    if weights is None or len(weights) != count or not all(0.0 < weight < math.inf for weight in weights):
        raise ValueError(f"Teachers: weights is {weights}; expected a positive number for each of {count} teachers")
    return [weight / math.fsum(weights) for weight in weights]


def _agreement(log_p: Tensor, log_mean: Tensor) -> Tensor:
    """[teachers, ..., classes], [..., classes] -> ln w [teachers, ..., 1]."""
    # Not KL(m || p_k), which is infinite for a teacher that excludes what another finds possible; this is at most
    # ln(teachers), as each p_k is part of m. Where p_k is 0 its term is 0.
    difference = (log_p - log_mean).masked_fill(log_p == -math.inf, 0.0)
    divergence = (log_p.exp() * difference).sum(-1, keepdim=True)
    return (-divergence).log_softmax(0)
