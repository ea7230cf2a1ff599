"""The student gets from one layer to the next as the teacher does (Yim, Joo, Bae and Kim 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.distill.batch import Outputs
from potstill.distill.strategies.layers import ProjectedStrategy, full_precision, pair_layers, token_mask
from potstill.distill.strategies.shapes import positions, same_size, without_padding
from potstill.distill.strategies.strategy import register


@register("gram")
class Gram(ProjectedStrategy):
    """The flow of the solution procedure: which features of a layer go with which features of a later one.

    With A [positions, m] and B [positions, n] what two layers return for an example, G = Aᵀ B / positions [m, n]: the
    mean over the entries of (G_student - G_teacher)², over the examples, and over the flows. (The paper sums the
    entries; their mean makes one weight fit all widths.) Two times the same layer gives its Gram matrix.

    ``student`` and ``teacher`` each name 2 layers, where a flow begins and where it ends; with wildcards they are as
    many beginnings as ends. They return [batch, tokens, features] or [batch, channels, height, width]: of the two
    layers of a flow maps of different sizes are averaged down to the smaller. Student and teacher need not have the
    same positions; padded tokens (``attention_mask`` 0) count for nothing. Where their widths differ a projection is
    trained for each layer: see :class:`ProjectedStrategy`, and pass ``sample`` to the Distiller.
    Yim et al. 2017, "A gift from knowledge distillation", equations 1 and 2.

    >>> from potstill.distill import Distiller, TrainingPlan
    >>> def network(width):
    ...     maps = nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3)
    ...     return nn.Sequential(*maps, nn.Flatten(), nn.Linear(width * 16, 3))
    >>> batch = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))
    >>> run = Distiller(network(8), network(4), Gram(("0", "2")), sample=batch)
    >>> losses = run.fit([batch] * 20, TrainingPlan(epochs=1)).losses
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(self, student: Sequence[str], teacher: Sequence[str] | None = None) -> None:
        super().__init__(student, teacher)
        for argument, names in (("student", self.student), ("teacher", self.teacher)):
            self._several(argument, names, 2, "of the layers where a flow begins and where it ends")

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Finds the layers; raises :class:`ValueError` where a name fits none."""
        if teacher is None:
            return
        begin, end = (pair_layers(student, teacher, *names) for names in zip(self.student, self.teacher, strict=True))
        if len(begin) != len(end):
            raise ValueError(
                f"Gram: {len(begin)} layers of the student fit {self.student[0]!r} and {len(end)} fit "
                f"{self.student[1]!r}; expected as many beginnings of flows as ends"
            )
        self.pairs = [pair for flow in zip(begin, end, strict=True) for pair in flow]

    def forward(self, outputs: Outputs) -> Tensor:
        """The mean over the flows."""
        with full_precision(outputs.target):
            found = list(self.features(outputs))
            terms = [self._flow(found[i], found[i + 1], outputs, i) for i in range(0, len(found), 2)]
            return torch.stack(terms).mean()

    def compare(self, student: Tensor, teacher: Tensor, outputs: Outputs, pair: int) -> Tensor:
        """The mean over the examples of the squared difference of two matrices [batch, m, n]."""
        return (student - teacher).square().mean()

    def _flow(self, begin: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor], outputs: Outputs, pair: int) -> Tensor:
        (own_begin, own_end), (other_begin, other_end) = (
            self._sides(a, b, pair) for a, b in zip(begin, end, strict=True)
        )
        own = self.project(own_begin, other_begin, pair), self.project(own_end, other_end, pair + 1)
        matrices = (
            _matrix(*own, token_mask(outputs, begin[0])),
            _matrix(other_begin, other_end, token_mask(outputs, begin[1])),
        )
        return self.compare(*matrices, outputs, pair)

    def _sides(self, begin: Tensor, end: Tensor, pair: int) -> tuple[Tensor, Tensor]:
        a, b = map(positions, same_size(begin, end))
        if begin.dim() == 2 or a.shape[1] != b.shape[1]:
            raise ValueError(
                f"Gram: {self.pairs[pair][0]!r} to {self.pairs[pair + 1][0]!r} (teacher: {self.pairs[pair][1]!r} to "
                f"{self.pairs[pair + 1][1]!r}) is from {list(begin.shape)} to {list(end.shape)}; expected two times "
                "[batch, channels, height, width], or [batch, tokens, features] of the same tokens"
            )
        return a, b


def _matrix(begin: Tensor, end: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, positions, m], [batch, positions, n] -> [batch, m, n]."""
    if mask is None:
        return begin.transpose(1, 2) @ end / begin.shape[1]
    count = mask.sum(1).clamp(min=1)[:, None, None]
    return without_padding(begin, mask).transpose(1, 2) @ end / count
