"""What the tests of the interpreted GPU kernels share; each is a process that test_triton.py starts.

The interpreter runs one program after the other on CPU tensors; it truncates what it stores as bfloat16 where a GPU
rounds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton.py"

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GUARD = 16  # NaN before and after each row, which must neither be read nor written

of_numpy = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of NaN and infinity


@pytest.fixture(autouse=True)
def memory_starts_as_nan() -> Iterator[None]:
    """An element that no kernel writes is then seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    assert torch.empty(1).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def guarded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy with NaN around each row, and the memory it is in."""
    memory = x.new_full((*x.shape[:-1], x.shape[-1] + 2 * GUARD), math.nan)
    copy = memory[..., GUARD : GUARD + x.shape[-1]]
    return copy.copy_(x), memory


def same(x: Tensor, y: Tensor) -> bool:
    """Equal numbers, and NaN in the same places."""
    return torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) and torch.equal(x.isnan(), y.isnan())


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Float tensors as float64."""
    return {n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in arguments.items()}


def assert_close(given: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Within ``tolerance`` of the largest value; NaN and infinities in the same places."""
    assert given.shape == expected.shape, what
    assert torch.equal(given.isnan(), expected.isnan()), f"{what}: NaN in different places"
    infinite = expected.isinf()
    assert torch.equal(given[infinite].double(), expected[infinite]), f"{what}: infinities differ"
    finite = torch.isfinite(expected)
    if finite.any():
        largest = expected[finite].abs().max().clamp_min(1e-30)
        error = float((given[finite].double() - expected[finite]).abs().max() / largest)
        assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


class NoWaiting(TorchDispatchMode):
    """Raises where the host asks for a number on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
