"""Strategies that compare what layers inside the two models return."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from potstill.distill.batch import Outputs
from potstill.distill.features import Patterns, match_layers, modules_named
from potstill.distill.strategies.shapes import positions, widened
from potstill.distill.strategies.strategy import Strategy


class LayerStrategy(Strategy):
    """A term that is the mean over pairs of layers: the ``student``'s, each with one of the ``teacher``'s.

    Both are names of modules, with wildcards, in the order of the models; where the teacher has more they are paired
    evenly, the last with the last. ``teacher=None`` means: the same names.

    Layers return [batch, features], [batch, tokens, features] or maps [batch, channels, height, width], or a tuple or
    mapping whose first tensor is one. Everything is computed in float32, or in float64 if they are, also under
    autocast. Every example counts, whatever its label.

    A subclass defines :meth:`compare`; one that trains projections extends :class:`ProjectedStrategy`.
    """

    same_rank: ClassVar[bool] = True  # both layers return features, or tokens, or maps: a position has its counterpart

    def __init__(self, student: Patterns, teacher: Patterns | None = None) -> None:
        super().__init__()
        self.student = self._patterns("student", student)
        self.teacher = self.student if teacher is None else self._patterns("teacher", teacher)
        self.pairs: list[tuple[str, str]] = []

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Finds the layers; raises :class:`ValueError` where a name fits none."""
        if teacher is not None:
            self.pairs = pair_layers(student, teacher, self.student, self.teacher)

    def student_layers(self) -> list[str]:
        """The student's layers of all pairs."""
        return [name for name, _ in self.pairs]

    def teacher_layers(self) -> list[str]:
        """The teacher's layers of all pairs."""
        return [name for _, name in self.pairs]

    def rows(self, target: Tensor) -> int:
        """Examples: the layers of a row count whatever its label is."""
        return target.shape[0] if target.dim() else 1

    def forward(self, outputs: Outputs) -> Tensor:
        """The mean over the pairs."""
        with full_precision(outputs.target):
            terms = [self.compare(s, t, outputs, i) for i, (s, t) in enumerate(self.features(outputs))]
            return torch.stack(terms).mean()

    def features(self, outputs: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
        """What the layers of each pair returned, widened; no gradient flows to the teacher's."""
        if not self.pairs:
            raise RuntimeError(f"{self._name}: it has no layers yet; use it in a Distiller, or call attach first")
        for own, other in self.pairs:
            student = widened(outputs.student_features[own])
            teacher = widened(outputs.teacher_features[other]).detach().to(student.dtype)
            ranks = {student.dim(), teacher.dim()}
            if student.shape[:1] != teacher.shape[:1] or ranks - {2, 3, 4} or (self.same_rank and len(ranks) > 1):
                raise ValueError(
                    f"{self._name}: the student's {own!r} returned {list(student.shape)} and the teacher's {other!r} "
                    f"{list(teacher.shape)}; expected the same batch first, and {'both' if self.same_rank else 'each'} "
                    "[batch, features], [batch, tokens, features] or [batch, channels, height, width]"
                )
            yield student, teacher

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, outputs: Outputs, pair: int) -> Tensor:
        """The term of one pair: a scalar, the mean over the examples."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"student": self.student, "teacher": self.teacher}

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _patterns(self, argument: str, given: Patterns) -> Patterns:
        names = [given] if isinstance(given, str) else list(given)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{self._name}: {argument} is {given!r}; expected the name of a module, or several")
        return given if isinstance(given, str) else names

    def _several(self, argument: str, given: Patterns, count: int, what: str) -> None:
        if isinstance(given, str) or len(given) != count:
            raise ValueError(f"{self._name}: {argument} is {given!r}; expected {count} names, {what}")

    def _same_positions(self, student: Tensor, teacher: Tensor, pair: int) -> None:
        if student.shape[1] != teacher.shape[1]:
            own, other = self.pairs[pair]
            raise ValueError(
                f"{self._name}: the student's {own!r} returned {student.shape[1]} tokens and the teacher's {other!r} "
                f"{teacher.shape[1]}; they must be the same tokens: choose layers before they are merged"
            )


class ProjectedStrategy(LayerStrategy):
    """A term that maps the student's features linearly to the teacher's width where the two differ.

    The map is trained with the student, and starts from torch's generator as a layer does; of maps [batch, channels,
    height, width] it is a 1 x 1 convolution. Distiller's ``sample`` tells the widths; where they are the same no sample
    is needed and nothing is mapped.
    """

    def __init__(self, student: Patterns, teacher: Patterns | None = None) -> None:
        super().__init__(student, teacher)
        self.projections = nn.ModuleList()

    def prepare(self, outputs: Outputs) -> None:
        """Makes the projections."""
        widths = [(s, positions(s).shape[-1], positions(t).shape[-1]) for s, t in self.features(outputs)]
        self.projections = nn.ModuleList(
            nn.Identity() if own == other else nn.Linear(own, other, device=s.device, dtype=s.dtype)
            for s, own, other in widths
        )

    def project(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The student's [batch, positions, width] at the teacher's width."""
        found: Tensor = self.projections[pair](student) if len(self.projections) else student
        if found.shape[-1] != teacher.shape[-1]:
            own, other = self.pairs[pair]
            raise ValueError(
                f"{self._name}: the student's {own!r} returned {student.shape[-1]} features and the teacher's "
                f"{other!r} {teacher.shape[-1]}; pass Distiller a batch as sample=next(iter(loader)), so that a "
                "projection can be made"
            )
        return found


def pair_layers(student: nn.Module, teacher: nn.Module, own: Patterns, other: Patterns) -> list[tuple[str, str]]:
    """The names of the student's modules that fit ``own``, each with that of a teacher's that fits ``other``."""
    return match_layers(modules_named(student, own, "student"), modules_named(teacher, other, "teacher"))


def full_precision(like: Tensor) -> torch.autocast:
    """A context without autocast on the device of ``like``."""
    return torch.autocast(like.device.type, enabled=False)


def token_mask(outputs: Outputs, features: Tensor) -> Tensor | None:
    """Which tokens of ``features`` [batch, tokens, ...] count: the model's ``attention_mask`` input, if it fits.

    True where a token counts, [batch, tokens]; None where all do.
    """
    mask = outputs.batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and features.dim() == 3 and mask.shape == features.shape[:2]:
        return mask.bool()
    return None
