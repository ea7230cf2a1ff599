"""A teacher that runs in int8, where that is faster and near enough."""

from __future__ import annotations

import copy
import glob
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from potstill.distill.batch import Batch
from potstill.distill.features import Features, Patterns, modules_named, tensor_of
from potstill.errors import ConversionError
from potstill.transform import LayerRow, Report, fuse_, quantize_
from potstill.transform.measure import fastest
from potstill.transform.observe import evaluating, watching
from potstill.transform.swap import replace

_SHOWN = 3


@dataclass(frozen=True)
class Int8Teacher:
    """The model to learn from, and why it is that.

    - ``model``: the int8 copy if it is ``used``, otherwise the teacher that was given, itself.
    - ``errors``: of the int8 model, the relative Euclidean error |y - y'| / |y| of each tensor in the output, and of
      each named layer; empty if nothing was converted.
    - ``speedup``: the teacher's time over the int8 model's; None if that was not measured.
    - ``kept``: layers that were left in float because their errors were too large.
    """

    model: nn.Module
    used: bool
    reason: str
    errors: dict[str, float]
    speedup: float | None
    kept: tuple[str, ...]

    def table(self) -> Table:
        """The errors for people, the largest first."""
        table = Table("what is learnt from", "relative error", title=self.reason)
        for name, error in sorted(self.errors.items(), key=lambda pair: -pair[1]):
            table.add_row(name, f"{error:.3g}")
        return table


def int8_teacher(teacher: nn.Module, sample: Any, *, max_error: float = 0.05, layers: Patterns = ()) -> Int8Teacher:
    """An int8 copy of ``teacher`` if it is faster and its errors are at most ``max_error``; otherwise the teacher.

    - ``sample``: an item of the loader, (input, ..., target). Both models are run on it, in evaluation mode.
    - ``layers``: names of modules, with wildcards, whose outputs are learnt from too.

    The copy is made by :func:`quantize_`, of the layers that int8 makes faster, and :func:`fuse_`. Errors are relative:
    |y - y'| / |y| of each tensor in the output and of each named layer. If one is above ``max_error``, each layer's own
    share is measured, by a run of the sample with that layer alone in int8, and those with the largest stay in float,
    as few as will do. Time is that of the whole model, interleaved with the teacher's. The teacher is not changed.

    Raises :class:`ValueError` for a ``max_error`` that is not positive, and for a name that no module has.

    >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    >>> result = int8_teacher(teacher, (torch.randn(2, 3, 8, 8), torch.zeros(2)))
    >>> result.model is teacher, result.reason
    (True, 'nothing in it can be int8: it has no linear layer, embedding or attention')
    """
    if not 0.0 < max_error < math.inf:
        raise ValueError(f"int8_teacher: max_error is {max_error}; expected a positive number, such as 0.05")
    return _Trial(teacher, sample, modules_named(teacher, layers, "teacher"), max_error).result()


class _Trial:
    """One teacher, one batch, and what the teacher says about it."""

    def __init__(self, teacher: nn.Module, sample: Any, layers: list[str], max_error: float) -> None:
        self.teacher = teacher
        device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
        self.batch = Batch.of(sample).to(device)
        self.layers = layers
        self.max_error = max_error
        self.wanted = self.outputs(teacher)
        idle = [name for name in layers if name not in self.wanted]
        if idle:
            raise ValueError(f"int8_teacher: the module {idle[0]!r} did not run on the sample; name another")

    def result(self) -> Int8Teacher:
        model, report = self.converted(set())
        if not report.converted:
            return self.refused(_why_nothing(report), {})
        errors = self.errors(model)
        kept: tuple[str, ...] = ()
        if not self.near(errors):
            found = self.nearer(model, report.converted)
            if found is None:
                worst = max(errors, key=lambda name: errors[name])
                return self.refused(
                    f"the error of {worst} is {errors[worst]:.3g} in int8, and comes below {self.max_error:g} only "
                    "with all layers in float. Raise max_error, or try calibrate_ and quantize_ on a copy",
                    errors,
                )
            model, kept = found
        model = self.joined(model)
        errors = self.errors(model)
        speedup = self.speedup(model)
        if speedup <= 1.0:
            return self.refused(f"int8 has {speedup:.2f} times the teacher's speed", errors, speedup)
        reason = f"int8 has {speedup:.2f} times the teacher's speed, and errors of {max(errors.values()):.3g} at most"
        return Int8Teacher(model, True, reason, errors, speedup, kept)

    def refused(self, reason: str, errors: dict[str, float], speedup: float | None = None) -> Int8Teacher:
        return Int8Teacher(self.teacher, False, reason, errors, speedup, ())

    def converted(self, exclude: set[str]) -> tuple[nn.Module, Report]:
        """A copy in int8, but for the layers in ``exclude`` and for whole modules that have named layers inside."""
        while True:
            model = copy.deepcopy(self.teacher)
            patterns = [glob.escape(name) for name in sorted(exclude)]
            report = quantize_(model, exclude=patterns or None, sample_input=self.batch.kwargs or self.batch.args)
            around = {name for row in report.converted for name in row.names if self.is_around_layers(name)}
            if not around:
                return model, report
            exclude = exclude | around  # their parts may still be converted

    def is_around_layers(self, name: str) -> bool:
        return any(layer.startswith(f"{name}." if name else "") for layer in self.layers)

    def nearer(self, model: nn.Module, rows: Sequence[LayerRow]) -> tuple[nn.Module, tuple[str, ...]] | None:
        """A copy that is near enough, some layers of ``model`` being in float; None if that leaves no int8 layer."""
        shares = self.shares(model, rows)
        order = sorted(rows, key=lambda row: max(shares[row.names].values()), reverse=True)
        count = next(n for n in range(1, len(order) + 1) if self.fits([shares[row.names] for row in order[n:]]))
        while count < len(order):
            kept = tuple(name for row in order[:count] for name in row.names)
            found, report = self.converted({*kept})
            if report.converted and self.near(self.errors(found)):
                return found, kept
            count += max(count // 2, 1)  # errors were not as independent as was assumed
        return None

    def shares(self, model: nn.Module, rows: Sequence[LayerRow]) -> dict[tuple[str, ...], dict[str, float]]:
        """The errors that each layer of ``model`` makes alone."""
        probe, found = copy.deepcopy(self.teacher), {}
        for row in rows:
            undo = replace(probe, row.names, model.get_submodule(row.names[0]))
            try:
                found[row.names] = self.errors(probe)
            finally:
                undo()
        return found

    def fits(self, shares: Sequence[Mapping[str, float]]) -> bool:
        """Whether the errors of several layers, if they are independent, add up to little enough."""
        return all(math.hypot(*(share[name] for share in shares)) <= self.max_error for name in self.wanted)

    def joined(self, model: nn.Module) -> nn.Module:
        """With layers joined, unless a named layer is lost in that, or returns something else than before."""
        fused = copy.deepcopy(model)
        try:
            fuse_(fused, self.batch.kwargs or self.batch.args)
        except ConversionError:
            return model
        return fused if self.near(self.errors(fused)) else model

    def speedup(self, model: nn.Module) -> float:
        with evaluating(self.teacher), evaluating(model), torch.no_grad():
            times = fastest({"run": {"float": self.call(self.teacher), "int8": self.call(model)}})["run"]
        return times["float"] / times["int8"]

    def call(self, model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with Features(model, self.layers):  # as Distiller does
                return self.batch.feed(model)

        return run

    def near(self, errors: Mapping[str, float]) -> bool:
        return all(error <= self.max_error for error in errors.values())

    def errors(self, model: nn.Module) -> dict[str, float]:
        found = self.outputs(model)
        return {name: _error(y, found[name]) if name in found else math.inf for name, y in self.wanted.items()}

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors in the output, and what the named layers returned, but for those that are gone or did not run."""
        modules, found = dict(model.named_modules()), {}

        def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
            found[name] = tensor_of(output, name)

        with ExitStack() as stack:
            for name in self.layers:
                if name in modules:
                    stack.callback(modules[name].register_forward_hook(partial(keep, name)).remove)
            stack.enter_context(watching(model, ()))
            output = self.batch.feed(model)
        return {**dict(_tensors("output", output)), **found}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key in value:
            yield from _tensors(f"{name}.{key}", value[key])
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from _tensors(f"{name}.{place}", item)


def _error(wanted: Tensor, found: Tensor) -> float:
    y, other = wanted.double(), found.double()
    difference = torch.where(y == other, 0.0, y - other)  # where both exclude a class with -inf, there is none
    size, error = float(y[y.isfinite()].norm()), float(difference.norm())
    if error == 0.0:
        return 0.0
    return error / size if size > 0.0 and math.isfinite(error) else math.inf


def _why_nothing(report: Report) -> str:
    if not report.rows:
        return "nothing in it can be int8: it has no linear layer, embedding or attention"
    reasons = [f"{row.names[0] or 'the model'}: {row.reason}" for row in report.rows]
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return f"nothing in it became int8: {'; '.join(reasons[:_SHOWN])}{more}"
