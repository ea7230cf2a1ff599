"""Fits the weights of a narrower student so that its layers give what the teacher's do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distill.batch import Batch
from potstill.distill.follow import WEIGHT, Axis, follow
from potstill.distill.runs import named_tensors

_RIDGES = (1e-6, 1e-4, 1e-2, 1.0)  # of the mean square of the inputs
_ROWS = 16384  # at most so many rows (tokens, pixels), evenly spaced
_EXACT = 1e-5  # a smaller relative error is rounding


class Places(Protocol):
    """What of a teacher's tensor along an axis the student has."""

    def __call__(self, axis: Axis, tensor: Tensor, dim: int) -> Tensor:
        """The student's part of ``tensor`` along ``dim``, cut as the student's ``axis`` is."""


class Refit:
    """Least squares, weight by weight in the order in which they run.

    :meth:`record` is given to a run of the teacher, and keeps what each weight gave; then :meth:`run` lets the student
    run, and at each weight stops, changes it so that from the student's own input (with what was fitted before) it
    gives as nearly as possible what the teacher's gave, and goes on. So errors of earlier layers are corrected as far
    as a linear layer can. The change is kept small by a ridge, chosen on rows that the fit has not seen; a weight for
    which none helps there is left. The weight and bias of a layer norm are fitted feature by feature.
    """

    def __init__(self, source: Callable[[str], str]) -> None:
        self._source = source
        self._given: dict[str, list[Tensor]] = {}
        self.errors: dict[str, tuple[float, float]] = {}

    def record(self, name: str, op: str, args: Sequence[Any], out: Any, again: Callable[[], Any]) -> Any:
        """Keeps what the teacher's weight ``name`` gave."""
        self._given.setdefault(name, []).append(_tensor(out).clone())  # what follows may change it in place
        return out

    def run(self, student: nn.Module, axes: Iterable[Axis], batch: Batch, places: Places) -> None:
        """Fits the weights that have one of the ``axes``; those that ran more than once are left alone."""
        parameters = named_tensors(student)

        def fit(name: str, op: str, args: Sequence[Any], out: Any, again: Callable[[], Any]) -> Any:
            given = self._given.get(self._source(name), [])
            if len(given) != 1 or name in self.errors:
                return out
            step = {"convolution": _convolution, "native_layer_norm": _norm}.get(op, _linear)
            axis = name, _outputs(op, args[WEIGHT[op]], parameters[name])
            wanted = places(axis, given[0], 1 if op == "convolution" else -1)
            found = _tensor(out)
            if wanted.shape != found.shape:
                return out
            wanted = wanted.to(found)
            before = _error(found, wanted)
            if before < _EXACT or not step(args, found, wanted):
                return out
            out = again()
            self.errors[name] = before, _error(_tensor(out), wanted)
            return out

        follow(student, axes, batch, each=fit)


def _tensor(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


def _outputs(op: str, weight: Tensor, parameter: Tensor) -> int:
    # Which dimension of the parameter has the outputs: a linear layer multiplies with the transposed one.
    as_it_is = weight.shape == parameter.shape and weight.stride() == parameter.stride()
    return 1 if op in ("mm", "addmm") and as_it_is else 0


def _error(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def _linear(args: Sequence[Any], out: Tensor, wanted: Tensor) -> bool:
    *bias, x, weight = args
    if bias and bias[0].dim() != 1:
        return False
    return _solve(x, wanted - out, weight.add_, bias[0] if bias else None)


def _convolution(args: Sequence[Any], out: Tensor, wanted: Tensor) -> bool:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    if transposed or groups != 1 or x.dim() != 4:
        return False
    patches = F.unfold(x, weight.shape[2:], dilation, padding, stride).transpose(1, 2).flatten(0, 1)

    def add(change: Tensor) -> None:
        weight.add_(change.T.reshape(weight.shape))

    return _solve(patches, (wanted - out).permute(0, 2, 3, 1).flatten(0, 2), add, bias)


def _solve(x: Tensor, missing: Tensor, add: Callable[[Tensor], object], bias: Tensor | None) -> bool:
    every = -(-len(x) // _ROWS)
    x, missing = x[::every].double(), missing[::every].double()
    if bias is not None:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    halves = [slice(len(x) // 2), slice(len(x) // 2, None)]
    unseen = [0.0] * len(_RIDGES)
    for mine, other in (halves, halves[::-1]):
        for i, change in enumerate(_changes(x[mine], missing[mine])):
            unseen[i] += float((missing[other] - x[other] @ change).square().sum())
    best = min(range(len(_RIDGES)), key=unseen.__getitem__)
    if not unseen[best] < float(missing.square().sum()):
        return False
    change = _changes(x, missing)[best].to(x)
    if bias is not None:
        bias.add_(change[-1])
        change = change[:-1]
    add(change)
    return True


def _changes(x: Tensor, missing: Tensor) -> list[Tensor]:
    products, wanted = x.T @ x, x.T @ missing
    scale = products.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(products), dtype=x.dtype, device=x.device)
    return [torch.cholesky_solve(wanted, torch.linalg.cholesky(products + ridge * scale * eye)) for ridge in _RIDGES]


def _norm(args: Sequence[Any], out: Tensor, wanted: Tensor) -> bool:
    weight, bias = args[2], args[3]
    out, wanted = (t.reshape(-1, out.shape[-1]).double() for t in (out, wanted))
    shift = 0.0 if bias is None else out.mean(0)
    goal = 0.0 if bias is None else wanted.mean(0)
    spread = (out - shift).square().sum(0)
    slope = torch.where(spread > 0, ((out - shift) * (wanted - goal)).sum(0) / spread.clamp_min(1e-30), 1.0)
    weight.mul_(slope)
    if bias is not None:
        bias.copy_(bias.double() * slope + goal - slope * shift)
    return True
