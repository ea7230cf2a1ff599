"""The GPU kernel of ``int8_embedding`` against the reference, by triton's interpreter."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tests.interpreted.common import NoWaiting, memory_starts_as_nan, of_numpy
from torch import Tensor

from potstill.ops import int8_embedding
from potstill.ops.triton import int8_embedding as gpu

__all__ = ["memory_starts_as_nan"]  # a fixture of all tests here

pytestmark = of_numpy

SAMPLES = list(int8_embedding.samples("test"))
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 0.0, torch.float32: 0.0, torch.float64: 0.0}  # bfloat16 is truncated


@pytest.fixture(autouse=True)
def _several_blocks_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LARGEST_BLOCK", 64)
    monkeypatch.setattr(gpu, "VALUES", 512)


def table(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Integers and scales, all from a fixed seed."""
    random = torch.Generator().manual_seed(rows + columns)
    weight = torch.randint(-127, 128, (rows, columns), generator=random, dtype=torch.int8)
    return weight, torch.rand(rows, generator=random) + 1e-3


def assert_equal(given: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for a bfloat16, which may be the next one towards 0."""
    assert (given.dtype, given.shape) == (expected.dtype, expected.shape)
    assert torch.equal(given.isnan(), expected.isnan())
    given, expected, ulp = given.double().nan_to_num(), expected.double().nan_to_num(), ULP[given.dtype]
    assert ((given - expected).abs() <= ulp * expected.abs()).all()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_agrees_with_the_reference(sample: Any) -> None:
    arguments = sample.make()
    assert_equal(gpu.launch(**arguments), int8_embedding.reference(**arguments))


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("columns", [200, 193])
def test_every_dtype_is_rounded_once(dtype: torch.dtype, columns: int) -> None:
    weight, scale = table(40, columns)
    indices = torch.randint(0, 40, (31,))
    assert_equal(gpu.launch(weight, scale, indices, dtype), int8_embedding.reference(weight, scale, indices, dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_outside_gives_nan_and_reads_nothing(dtype: torch.dtype) -> None:
    memory, scale = table(30, 70)
    weight, scale = memory[10:20], scale[10:20]
    wrong = [-1, 10, -(2**31), 2**31 - 1] + ([2**40, -(2**62)] if dtype == torch.int64 else [])
    indices = torch.tensor([3, *wrong, 9], dtype=dtype)
    y = gpu.launch(weight, scale, indices)
    assert y[1:-1].isnan().all()
    assert torch.equal(y[[0, -1]], int8_embedding.reference(weight, scale, indices[[0, -1]]))
    assert gpu.launch(weight[:0], scale[:0], indices).isnan().all()


def test_the_reference_gives_nan_too_where_looking_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it raises; a tensor that says that it is elsewhere stands for one on a GPU."""

    class Elsewhere(Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    weight, scale = table(10, 70)
    indices = torch.tensor([3, -1, 10, 9])
    with NoWaiting():
        y = int8_embedding.reference(weight, scale, indices.as_subclass(Elsewhere)).as_subclass(Tensor)
    assert_equal(gpu.launch(weight, scale, indices), y)
    assert y.isnan().all(1).tolist() == [False, True, True, False]


def test_rows_that_lie_apart() -> None:
    weight, scale = table(20, 300)
    indices = torch.randint(0, 20, (9, 14)).t()[::2]
    for part in (weight[:, 7:150], weight[:, ::3], weight[::2]):
        own = scale[: len(part)]
        rows = indices % len(part)
        assert_equal(gpu.launch(part, own, rows), int8_embedding.reference(part, own, rows))


def test_rows_further_apart_than_int32() -> None:
    torch.use_deterministic_algorithms(False)  # fills no pages that are not used
    memory, stride = torch.empty(2**32 + 600, dtype=torch.int8), 2**31 + 256
    torch.use_deterministic_algorithms(True)
    weight, scale = table(3, 80)
    apart = memory.as_strided((2, 80), (stride, 1)).copy_(weight[:2])
    indices = torch.tensor([1, 0, 1])
    assert torch.equal(gpu.launch(apart, scale[:2], indices), int8_embedding.reference(weight[:2], scale[:2], indices))


def test_nothing_waits_for_the_device() -> None:
    weight, scale = table(10, 40)
    with NoWaiting():
        gpu.launch(weight, scale, torch.tensor([1, 99]))


def test_wrong_arguments_raise_before_the_launch() -> None:
    weight, scale = table(10, 40)
    cuda = sys.modules["potstill.ops.int8_embedding"]._cuda
    with pytest.raises(ValueError, match=r"int8_embedding: .*scale"):
        cuda(weight, scale[:9], torch.tensor([1]))
    assert torch.equal(cuda(weight, scale, torch.tensor([1])), gpu.launch(weight, scale, torch.tensor([1])))
