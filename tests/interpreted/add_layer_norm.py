"""The GPU kernels of ``add_layer_norm`` against the float64 reference, by triton's interpreter."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tests.interpreted.common import (
    TOLERANCE,
    NoWaiting,
    assert_close,
    guarded,
    memory_starts_as_nan,
    of_numpy,
    same,
    widened,
)
from torch import Tensor

from potstill.ops import add_layer_norm
from potstill.ops.triton import add_layer_norm as gpu

__all__ = ["memory_starts_as_nan"]  # a fixture of all tests here

pytestmark = of_numpy

SAMPLES = list(add_layer_norm.samples("test"))


@pytest.fixture(params=["one block a row", "several"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels: long rows have blocks of 64."""
    if request.param == "several":
        monkeypatch.setattr(gpu, "LONGEST_ROW", 0)
        monkeypatch.setattr(gpu, "BLOCK", 64)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Launches with guards around all rows and parameters, and compares."""
    given = [None if t is None else guarded(t) for t in (x, residual, weight, bias)]
    before = [None if pair is None else pair[1].clone() for pair in given]
    y = gpu.launch(*(None if pair is None else pair[0] for pair in given), eps)
    assert all(pair is None or same(pair[1], old) for pair, old in zip(given, before, strict=True))
    assert y.dtype == x.dtype
    names = ("x", "residual", "weight", "bias")
    exact = add_layer_norm.reference(**widened(dict(zip(names, (x, residual, weight, bias), strict=True))), eps=eps)
    assert_close(y, exact, {**TOLERANCE, torch.float32: 4e-6}[x.dtype], "y")
    return y


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_agrees_with_float64_reference(sample: Any) -> None:
    arguments = sample.make()
    if len(arguments["x"]) > 9 and arguments["x"].dim() > 1:  # the interpreter takes a millisecond for each row
        arguments |= {n: t[:9] for n in ("x", "residual") if (t := arguments[n]) is not None}
    check(**arguments)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [64, 193])
def test_every_pair_of_dtypes(dtype: torch.dtype, parameters: torch.dtype, features: int) -> None:
    x, residual = random(4, features, dtype=dtype), random(5, features, dtype=dtype)[1:]
    check(x, residual, random(features, dtype=parameters), random(features + 1, dtype=parameters)[1:], 1e-5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_part_may_be_absent(residual: bool, weight: bool, bias: bool) -> None:
    tensors = [random(3, 130) + 1.0, random(130) * 2.0, random(131)[1:]]
    used = [t if use else None for t, use in zip(tensors, (residual, weight, bias), strict=True)]
    check(random(3, 130), *used, 1e-3)


@pytest.mark.usefixtures("blocks")
def test_the_variance_does_not_cancel() -> None:
    """By the mean of the squares less the square of the mean no digit would be left."""
    x = 3e3 + 1e-2 * random(2, 257)
    exact = add_layer_norm.reference(x.double(), None, None, None, 1e-9)
    y = gpu.launch(x, None, None, None, 1e-9)
    assert_close(y, exact, 1e-2, "y")  # the mean itself is rounded to 2.4e-4, which is 0.02 deviations
    naive = (x - x.mean(1, keepdim=True)) * (x.square().mean(1) - x.mean(1).square()).clamp_min(0).add(1e-9).rsqrt()[
        :, None
    ]
    assert float((naive - exact).abs().max()) > 1.0


def test_a_long_row_whose_blocks_differ_in_their_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LONGEST_ROW", 0)
    monkeypatch.setattr(gpu, "BLOCK", 32)
    check(random(2, 333) + torch.arange(333) // 32 * 100.0, None, None, None, 1e-5)


@pytest.mark.usefixtures("blocks")
def test_rows_further_apart_than_int32() -> None:
    rows, stride = 3, 2**30 + 8
    torch.use_deterministic_algorithms(False)  # fills no pages that are not used
    memory = torch.empty(2 * stride + 200, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    values = random(rows, 100, dtype=torch.bfloat16)
    x = memory.as_strided((rows, 100), (stride, 1)).copy_(values)
    residual = memory[100:].as_strided((rows, 100), (stride, 1)).copy_(values)
    y = gpu.launch(x, residual, None, None, 1e-5)
    assert torch.equal(y, gpu.launch(values, values, None, None, 1e-5))


@pytest.mark.usefixtures("blocks")
def test_a_column_stride_and_more_dimensions() -> None:
    x, residual = random(3, 4, 60)[..., ::2], random(4, 3, 30).transpose(0, 1)
    expected = add_layer_norm.reference(x.double(), residual.double(), None, None, 1e-5)
    assert_close(gpu.launch(x, residual, None, None, 1e-5), expected, 4e-6, "y")


@pytest.mark.usefixtures("blocks")
def test_nothing_waits_for_the_device() -> None:
    with NoWaiting():
        gpu.launch(random(2, 100), random(2, 100), random(100), random(100), 1e-5)


def test_wrong_arguments_raise_before_the_launch() -> None:
    cuda = sys.modules["potstill.ops.add_layer_norm"]._cuda
    with pytest.raises(ValueError, match="add_layer_norm: weight has shape"):
        cuda(random(2, 5), None, random(4), None, 1e-5)
    assert torch.equal(cuda(random(2, 5), None, None, None, 1e-5), gpu.launch(random(2, 5), None, None, None, 1e-5))
