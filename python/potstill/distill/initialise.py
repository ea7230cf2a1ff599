"""Parameter distillation: the student starts from its teacher's own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from potstill.distill.batch import Batch
from potstill.distill.depths import choose, pattern, sources, stacks
from potstill.distill.follow import Axis
from potstill.distill.refit import Refit
from potstill.distill.runs import calm
from potstill.distill.widths import WIDTHS, Narrowing, Width, narrow


@dataclass(frozen=True)
class Initialisation:
    """Where a student's parameters came from.

    ``layers`` has, for each stack of layers by name, the teacher's layers that each of the student's was made from;
    ``widths`` what is narrower in the student, and how much of it was kept; ``copied`` the student's tensors -> the
    teacher's; ``cut`` those of them of which the student has a part; ``refitted`` the weights of these that were then
    fitted to the teacher's outputs -> the relative error of these outputs before and after, on the sample; ``left``
    the tensors that stayed as they were -> why.
    """

    layers: dict[str, list[list[int]]]
    copied: dict[str, list[str]]
    left: dict[str, str]
    parameters: int
    parameters_copied: int
    widths: list[Width] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    refitted: dict[str, tuple[float, float]] = field(default_factory=dict)

    def table(self) -> Table:
        """The map for people: a line per stack of layers, per width, and per tensor that was left."""
        share = 100 * self.parameters_copied / max(self.parameters, 1)
        table = Table(
            "student", "from the teacher", title=f"{share:.1f} % of the student's numbers come from the teacher"
        )
        for name, chosen in self.layers.items():
            for i, layers in enumerate(chosen):
                table.add_row(f"{name}.{i}", ", ".join(f"{name}.{j}" for j in layers))
        for width in self.widths:
            table.add_row(str(width), width.summary())
        if self.refitted:
            before, after = (100 * sum(errors) / len(errors) for errors in zip(*self.refitted.values(), strict=True))
            what = f"mean error of their outputs {before:.1f} % -> {after:.1f} %"
            table.add_row(f"{len(self.refitted)} weights refitted", what)
        for name, why in self.left.items():
            table.add_row(name, f"left as it was: {why}")
        return table


def initialise(
    student: nn.Module,
    teacher: nn.Module,
    layers: str | Sequence[int] = "even",
    sample: Any = None,
    widths: str = "project",
) -> Initialisation:
    """Copies the teacher's parameters and buffers into a student of the same family that has fewer layers, or narrower.

    A tensor is copied where the teacher has one of the same name and shape. Stacks of layers (an ``nn.ModuleList`` or
    ``nn.Sequential`` whose items are of one class) may be shorter in the student; ``layers`` says which of the
    teacher's it takes:

    - "even": evenly spaced, its last from the last; "first" and "last": so many from either end;
    - "average": each is the mean of the teacher's layers from the previous even one's successor to its own;
    - "influence": those that change their input most (1 - cosine of a token's, or a pixel's, features before and
      after: Men et al. 2024, ShortGPT), in their order; measured on ``sample``, an item of a loader;
    - a sequence of the teacher's layer numbers.

    Where the teacher's tensor is larger, the student takes a part of it: a subset of the features, the same in all
    tensors that have to do with them (the residual stream, hidden units, channels; whole attention heads where there
    are fewer of them, dimensions of each head where these are smaller). Both models are run on ``sample`` to see which
    tensors these are, so one is needed. Of a table of positions the first are taken; classes, vocabularies and what
    else a model takes or returns must agree. ``widths`` says what is kept:

    - "importance": the features that give most to the weights that read them: the norm of a feature's values times the
      norm of the weights that it meets, summed (what Sun et al. 2024, Wanda, ask of single weights);
    - "project": features from which the others can best be computed linearly; then each weight that was cut is fitted,
      in the order in which they run, so that the student's layer gives what the teacher's does on ``sample`` (least
      squares, as He et al. 2017 for channels). It gains the more rows (tokens, pixels) the sample has; where a fit does
      no better on rows that it has not seen, the weight stays as it was cut. What the teacher's layers that are cut
      give on the sample is held in memory.

    Returns the map, with everything that could not be copied, and why. Raises :class:`ValueError` where the choice does
    not fit, or nothing at all could be copied. The models keep their devices and dtypes.

    >>> def model(depth): return nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth))))
    >>> student, teacher = model(2), model(6)
    >>> initialise(student, teacher).layers
    {'1': [[2], [5]]}
    >>> torch.equal(student[1][0].weight, teacher[1][2].weight)
    True

    >>> def perceptron(units): return nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 3))
    >>> made = initialise(perceptron(8), perceptron(32), sample=(torch.randn(64, 4), torch.zeros(64)))
    >>> print(*made.widths, made.widths[0].of, made.widths[0].kept, made.left)
    0.weight[0] and 2 more 32 8 {}
    """
    if widths not in WIDTHS:
        raise ValueError(f"initialise: widths is {widths!r}; expected one of {', '.join(WIDTHS)}")
    chosen = {name: choose(name, *depths, layers, teacher, sample) for name, depths in stacks(student, teacher).items()}
    return _Transfer(student, teacher, chosen).run(sample, widths)


class _Transfer:
    """One call of :func:`initialise` after the layers were chosen."""

    def __init__(self, student: nn.Module, teacher: nn.Module, chosen: dict[str, list[list[int]]]) -> None:
        self._student, self._teacher, self._chosen = student, teacher, chosen
        self._own, self._given = student.state_dict(), teacher.state_dict()
        self._own_first, self._given_first = _first_names(student), _first_names(teacher)
        self._narrowing = Narrowing()

    def run(self, sample: Any, widths: str) -> Initialisation:
        smaller, refit = self._smaller(), Refit(self._source)
        fits = widths == "project" and bool(smaller) and sample is not None
        if smaller and sample is not None:
            self._check_single()
            batch = Batch.of(sample)
            self._narrowing = self._narrow(smaller, batch, widths, refit if fits else None)
        left = {name: why for name in self._own if (why := self._unfit(name, sampled=sample is not None))}
        copied = {name: sources(name, self._chosen) for name in self._own if name not in left}
        if not copied:
            raise ValueError(
                f"initialise: no tensor of the student ({_few(self._own)}) has a namesake of its shape in the teacher "
                f"({_few(self._given)}); both must be of one family"
            )
        with torch.no_grad():
            for name, others in copied.items():
                self._own[name].copy_(self._part(name, _mean([self._given[other] for other in others])))
        cut = [name for name in copied if self._own[name].shape != self._given[copied[name][0]].shape]
        if fits:
            axes = [axis for axis in smaller if axis[0] not in left]
            refit.run(self._student, axes, batch, self._narrowing.part)
        count = sum(tensor.numel() for tensor in self._own.values())
        numbers = sum(self._own[name].numel() for name in copied)
        return Initialisation(self._chosen, copied, left, count, numbers, self._narrowing.widths, cut, refit.errors)

    def _smaller(self) -> list[Axis]:
        # The axes that are smaller in the student than in the teacher, of tensors that could be cut.
        found = []
        for name in dict.fromkeys(self._own_first.values()):
            mine, given = self._own.get(name), self._given.get(sources(name, self._chosen)[0])
            if mine is None or given is None or mine.dim() != given.dim():
                continue
            if all(n <= m for n, m in zip(mine.shape, given.shape, strict=True)):
                found += [(name, dim) for dim, n in enumerate(mine.shape) if n < given.shape[dim]]
        return found

    def _source(self, name: str) -> str:
        return self._given_first[sources(name, self._chosen)[0]]

    def _check_single(self) -> None:
        if any(len(layers) > 1 for stack in self._chosen.values() for layers in stack):
            raise ValueError(
                "initialise: layers='average' takes means of layers, but the student is narrower, and which features "
                "are kept is another choice in each layer; use layers='even' or 'influence'"
            )

    def _narrow(self, smaller: list[Axis], batch: Batch, widths: str, refit: Refit | None) -> Narrowing:
        given = dict.fromkeys((self._source(name), dim) for name, dim in smaller)
        used = {self._source(name) for name in self._own_first if self._is_there(name)}
        wanted = {(pattern(name, self._chosen), dim) for name, dim in smaller}
        dropped = [
            (name, dim)  # layers that the student lacks; the teacher's run goes through them
            for name in self._given
            for dim in range(self._given[name].dim())
            if self._given_first[name] == name and name not in used and (pattern(name, self._chosen), dim) in wanted
        ]
        record = None if refit is None else refit.record
        _check_runs(self._student, batch)
        return narrow(self._student, self._teacher, (smaller, [*given, *dropped]), self._source, batch, widths, record)

    def _is_there(self, name: str) -> bool:
        return all(source in self._given for source in sources(name, self._chosen))

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        for dim in range(tensor.dim()):
            tensor = self._narrowing.part((self._own_first[name], dim), tensor, dim)
        return tensor

    def _unfit(self, name: str, *, sampled: bool) -> str:
        mine = self._own[name]
        for source in sources(name, self._chosen):
            if source not in self._given:
                return f"the teacher has no {source}"
            given, narrowing = self._given[source], self._narrowing
            differ = [
                (self._own_first[name], dim)
                for dim in range(min(mine.dim(), given.dim()))
                if mine.shape[dim] != given.shape[dim]
            ]
            if mine.dim() == given.dim() and all(axis in narrowing.places for axis in differ):
                continue
            why = next((f": {narrowing.left[axis]}" for axis in differ if axis in narrowing.left), "")
            can = not sampled and mine.dim() == given.dim() and all(mine.shape[d] <= given.shape[d] for _, d in differ)
            hint = "; to take a part of it, pass a sample" if can else ""
            return f"its shape is {list(mine.shape)}, the teacher's {list(given.shape)}{why}{hint}"
        return ""


def _check_runs(student: nn.Module, batch: Batch) -> None:
    # A student that takes another input than its teacher shows it here; both must run on the sample.
    try:
        with calm(student):
            batch.to(next(student.parameters()).device).feed(student)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"initialise: the student cannot run on the sample ({error}); it must take what its teacher takes"
        ) from error


def _first_names(model: nn.Module) -> dict[str, str]:
    # The first name of each tensor of the state: tied ones have several.
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if not tensors[0].is_floating_point():
        return tensors[-1]  # counters, and tables of positions: the same in all
    return torch.stack([tensor.float() for tensor in tensors]).mean(0)


def _few(names: Mapping[str, Any]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
