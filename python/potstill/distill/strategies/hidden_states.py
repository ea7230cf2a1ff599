"""The student's layers learn to return what the teacher's do (Romero et al. 2015; Sanh et al. 2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from potstill.distill.batch import Outputs
from potstill.distill.features import Patterns
from potstill.distill.strategies.layers import ProjectedStrategy, token_mask
from potstill.distill.strategies.shapes import mean_over_tokens, positions, same_size, unit
from potstill.distill.strategies.strategy import register

_LOSSES = ("mse", "cosine")


@register("hidden_states")
class HiddenStates(ProjectedStrategy):
    """Hints: each layer of the student, mapped to the teacher's width, is pulled towards one of the teacher's.

    With s = projection(student) and t the teacher's features at one position (token or pixel), of width w: "mse" is
    1/w |s - t|², "cosine" is 1 - s·t / (|s| |t|). The mean is over the positions of each example, then over the
    examples; padded tokens (``attention_mask`` 0) count for nothing.

    Layers return [batch, features], [batch, tokens, features] or [batch, channels, height, width]; maps whose sizes
    differ are averaged down to the smaller. Where the widths differ a projection is trained: see
    :class:`ProjectedStrategy`, and pass ``sample`` to the Distiller.
    Romero et al. 2015, "FitNets: hints for thin deep nets", equation 3; the cosine is DistilBERT's, Sanh et al. 2019.

    >>> import torch
    >>> from torch import nn
    >>> from potstill.distill import Distiller, TrainingPlan
    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
    >>> run = Distiller(teacher, student, HiddenStates("1"), sample=batch)
    >>> losses = run.fit([batch] * 20, TrainingPlan(epochs=1)).losses
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(self, student: Patterns, teacher: Patterns | None = None, *, loss: str = "mse") -> None:
        super().__init__(student, teacher)
        if loss not in _LOSSES:
            raise ValueError(f"HiddenStates: loss is {loss!r}; expected one of {', '.join(_LOSSES)}")
        self.loss = loss

    def compare(self, student: Tensor, teacher: Tensor, outputs: Outputs, pair: int) -> Tensor:
        """The mean over the examples."""
        mask = token_mask(outputs, student)
        s, t = map(positions, same_size(student, teacher))
        self._same_positions(s, t, pair)
        s = self.project(s, t, pair)
        values = (s - t).square().mean(-1) if self.loss == "mse" else 1.0 - (unit(s) * unit(t)).sum(-1)
        return mean_over_tokens(values, mask).mean()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().config(), "loss": self.loss}
