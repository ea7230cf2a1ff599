"""Every GPU kernel against the float64 reference, on the device, over the samples of the tests and larger ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.ops import OPS
from potstill.ops.op import Op, Sample

LARGE = 2  # samples of the benchmarks, drawn by the seed, that are looked at too
FLOAT16 = 2e-3  # tolerance where an op states none for it


@dataclass(frozen=True)
class Fault:
    """What differs where."""

    op: str
    label: str
    what: str


def check(device: torch.device, seed: int, report: Callable[[str, int], None]) -> list[Fault]:
    """All ops that have a kernel for the device; ``report`` gets the op and how many samples were looked at.

    What a kernel returns is memory that holds NaN before: torch fills what it allocates, so that a number that is not
    written is seen.
    """
    faults: list[Fault] = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for name, op in sorted(OPS.items()):
            if device.type not in op.kernels:
                continue
            chosen = list(_samples(op, seed))
            for sample in chosen:
                faults += (Fault(name, sample.label, what) for what in _differences(op, sample, device))
            report(name, len(chosen))
    finally:
        torch.use_deterministic_algorithms(before)
    return faults


def _samples(op: Op, seed: int) -> Iterator[Sample]:
    yield from op.samples("test")
    large = list(op.samples("bench"))
    yield from random.Random(seed).sample(large, min(LARGE, len(large)))


def _differences(op: Op, sample: Sample, device: torch.device) -> Iterator[str]:
    arguments = sample.make()
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    expected = op.reference(*op.positional(**wide))
    try:
        given = op(**op.on(arguments, device))
    except Exception as error:
        yield f"{type(error).__name__}: {error}"
        return
    tolerance = op.tolerance.get(first.dtype, FLOAT16) * sample.slack
    for i, (mine, exact) in enumerate(zip(_tensors(given), _tensors(expected), strict=True)):
        wrong = difference(mine.cpu(), exact, max(tolerance, _rounding(mine.dtype)))
        if wrong:
            yield f"result {i}: {wrong}"


def difference(given: Tensor, exact: Tensor, tolerance: float) -> str:
    """What is wrong with ``given``, if an error of ``tolerance`` of the largest value is not; empty if nothing."""
    if given.shape != exact.shape:
        return f"the shape is {list(given.shape)}, expected {list(exact.shape)}"
    given = given.double()
    if not torch.equal(given.isnan(), exact.isnan()):
        return f"{int((given.isnan() != exact.isnan()).sum())} numbers are NaN that should not be, or the reverse"
    if not torch.equal(given[exact.isinf()], exact[exact.isinf()]):
        return "infinities differ"
    finite = torch.isfinite(exact)
    if not finite.any():
        return ""
    largest = exact[finite].abs().max().clamp_min(1e-30)
    error = float((given[finite] - exact[finite]).abs().max() / largest)
    return "" if error <= tolerance else f"relative error {error:.1e}, allowed {tolerance:.0e}"


def _rounding(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
