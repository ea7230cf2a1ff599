"""The student looks where the teacher looks (Zagoruyko and Komodakis 2017)."""

from __future__ import annotations

from torch import Tensor

from potstill.distill.batch import Outputs
from potstill.distill.strategies.layers import LayerStrategy, token_mask
from potstill.distill.strategies.shapes import positions, same_size, unit, without_padding
from potstill.distill.strategies.strategy import register


@register("attention_transfer")
class AttentionTransfer(LayerStrategy):
    """Activation maps: how strong a layer's activations are at each position, whatever its width.

    With Q_i = sum over channels of A_i² at position i: | Q_s / |Q_s| - Q_t / |Q_t| |², between 0 and 2, the mean over
    the examples. (The authors' code divides it by the number of positions, and weighs it with 1000.)

    Layers return [batch, channels, height, width] or [batch, tokens, features]; widths may differ, maps whose sizes
    differ are averaged down to the smaller; padded tokens (``attention_mask`` 0) count for nothing.
    Zagoruyko and Komodakis 2017, "Paying more attention to attention", equation 2.

    >>> import torch
    >>> from torch import nn
    >>> from potstill.distill import Distiller, TrainingPlan
    >>> teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 3))
    >>> student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3))
    >>> batch = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))
    >>> run = Distiller(teacher, student, AttentionTransfer("0"))
    >>> losses = run.fit([batch] * 20, TrainingPlan(epochs=1)).losses
    >>> losses[-1] < losses[0]
    True
    """

    def compare(self, student: Tensor, teacher: Tensor, outputs: Outputs, pair: int) -> Tensor:
        """The mean over the examples."""
        if student.dim() == 2:
            own, other = self.pairs[pair]
            raise ValueError(
                f"AttentionTransfer: {own!r} and {other!r} returned [batch, features], which have no positions to "
                "attend to; choose layers that return maps or tokens, or use HiddenStates"
            )
        mask = token_mask(outputs, student)
        s, t = map(positions, same_size(student, teacher))
        self._same_positions(s, t, pair)
        maps = [unit(without_padding(x.square().sum(-1), mask)) for x in (s, t)]
        return (maps[0] - maps[1]).square().sum(-1).mean()
