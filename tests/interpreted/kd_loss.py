"""The GPU kernels of ``kd_loss`` against the float64 reference, by triton's interpreter."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from tests.interpreted.common import (
    GUARD,
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

from potstill.ops import kd_loss, kd_samples
from potstill.ops.divergence import DIVERGENCES
from potstill.ops.kd_loss import Options
from potstill.ops.topk import REST, top_k
from potstill.ops.triton import kd_loss as gpu
from potstill.ops.triton import kd_rows

__all__ = ["memory_starts_as_nan"]  # a fixture of all tests here

pytestmark = of_numpy

SAMPLES = list(kd_samples.samples("test"))
KINDS = (*DIVERGENCES, "labels", *REST)


@pytest.fixture(autouse=True)
def _several_blocks_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LARGEST_BLOCK", 512)
    monkeypatch.setattr(gpu, "LARGEST_K_BLOCK", 16)


def exact(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return kd_loss.reference(**widened(arguments))  # type: ignore[no-any-return]


def check(arguments: dict[str, Any], tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Launches with guards and compares both results; a tolerance not given is the student's dtype's."""
    student, around_student = guarded(arguments["student"])
    teacher, around_teacher = guarded(arguments["teacher"])
    before = around_student.clone(), around_teacher.clone()
    rest = kd_loss.positional(**arguments)[2:]
    loss, grad = gpu.launch(student, teacher, *rest)
    assert loss.dtype == torch.float32
    assert same(around_student, before[0])
    assert same(around_teacher, before[1])
    expected = exact(arguments)
    assert_close(loss, expected[0], tolerance or TOLERANCE[torch.float32], "loss")
    assert_close(grad, expected[1], tolerance or TOLERANCE[student.dtype], "gradient")
    return loss, grad


def of_kind(kind: str, shape: tuple[int, ...] = (4, 1300), k: int = 20, **options: Any) -> dict[str, Any]:
    """Arguments for a divergence, for labels alone, or for a top-k teacher and what is assumed of its rest."""
    options = {"temperature": 2.0, "alpha": 0.6, "label_smoothing": 0.1} | options
    if kind == "labels":
        return kd_samples.arguments(shape, **options | {"alpha": 0.0})
    if kind in DIVERGENCES:
        return kd_samples.arguments(shape, divergence=kind, **options)
    return with_top_k(kd_samples.arguments(shape, rest=kind, **options), k)


def with_top_k(a: dict[str, Any], k: int) -> dict[str, Any]:
    log_probs, indices = top_k(a["teacher"], k, a["temperature"])
    return a | {"teacher": log_probs, "teacher_indices": indices}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_agrees_with_float64_reference(sample: Any) -> None:
    arguments = sample.make()
    rows = arguments["student"].shape[0]
    if rows > 9 and arguments["student"].dim() == 2:  # the interpreter takes 10 ms for each
        arguments = {n: a[:4] if isinstance(a, Tensor) and a.shape[:1] == (rows,) else a for n, a in arguments.items()}
    check(arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_float16(kind: str) -> None:
    check(of_kind(kind, student=torch.float16, teacher=torch.float16))
    check(of_kind(kind, (3, 77), student=torch.float16), tolerance=1e-3)


@pytest.mark.parametrize(("classes", "dtype"), [(1024, torch.float32), (1025, torch.bfloat16), (130, torch.float32)])
@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kind: str, classes: int, dtype: torch.dtype) -> None:
    arguments = of_kind(kind, (4, classes), student=dtype)
    expected_loss, expected = gpu.launch(*kd_loss.positional(**arguments))
    student, memory = guarded(arguments["student"])
    teacher, _ = guarded(arguments["teacher"])
    options = Options(*kd_loss.positional(**arguments)[2:])
    loss = gpu.launch_in_place(student, teacher, options)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(student, expected)
    assert memory[:, :GUARD].isnan().all()
    assert memory[:, -GUARD:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_without_a_unit_stride(kind: str) -> None:
    arguments = of_kind(kind, (3, 40))
    student = torch.stack((arguments["student"],) * 2, -1)[..., 0]
    loss = gpu.launch_in_place(student, arguments["teacher"], Options(*kd_loss.positional(**arguments)[2:]))
    expected = exact(arguments)
    assert_close(loss, expected[0], 2e-6, "loss")
    assert_close(student, expected[1], 2e-6, "gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_and_empty_rows(kind: str) -> None:
    a = kd_samples.arguments((6, 700), ignored=0.0, reduction="none")
    a["target"] %= 300
    student, teacher = a["student"], a["teacher"]
    student[1] = -math.inf
    teacher[2] = -math.inf
    student[3, 300:] = -math.inf
    teacher[4, 300:] = -math.inf
    student[5, 300:], teacher[5, 300:] = -math.inf, -math.inf
    if kind in REST:
        log_probs, indices = top_k(teacher.nan_to_num(neginf=-1e4), 12)
        a |= {"teacher": log_probs, "teacher_indices": indices, "rest": kind}
    elif kind in DIVERGENCES:
        a["divergence"] = kind
    for alpha in (0.0,) if kind == "labels" else (1.0, 0.4):
        # What nothing defines, and where the reference's NaN and infinities depend on its order, is compared by class.
        loss, grad = gpu.launch(*kd_loss.positional(**a | {"alpha": alpha}))
        expected, expected_grad = exact(a | {"alpha": alpha})
        assert torch.equal(torch.isfinite(loss), torch.isfinite(expected)), (loss, expected)
        assert torch.equal(loss.isnan(), expected.isnan()), (loss, expected)
        good = torch.isfinite(expected)
        assert_close(loss[good], expected[good], 2e-6, "loss")
        assert_close(grad[good], expected_grad[good], 2e-6, "gradient")
        assert not torch.isfinite(grad[expected.isnan()]).any() or kind in ("mse", "reverse_kl")


@pytest.mark.parametrize("rest", REST)
def test_a_student_without_other_classes(rest: str) -> None:
    """There is no rest: where the teacher has a tail, it does not count."""
    a = of_kind(rest, (3, 600), k=7, ignored=0.0, alpha=1.0)
    student = torch.full_like(a["student"], -math.inf)
    check(a | {"student": student.scatter_(1, a["teacher_indices"], a["student"])})


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_is_no_class_gives_nan(kind: str) -> None:
    a = of_kind(kind, (4, 90), reduction="none", ignored=0.0)
    expected = exact(a)
    a["target"][1], a["target"][2] = 90, -1
    loss, grad = gpu.launch(*kd_loss.positional(**a))
    assert loss.isnan().tolist() == [False, True, True, False]
    assert grad[1:3].isnan().all()
    assert_close(loss[::3], expected[0][::3], 2e-6, "loss")
    assert_close(grad[::3], expected[1][::3], 2e-6, "gradient")


@pytest.mark.parametrize("rest", REST)
def test_a_given_class_that_is_none_gives_nan(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd_loss_module(), "check_top_k", lambda *_: None)  # on a GPU it does not look
    a = of_kind(rest, (3, 90), reduction="none", ignored=0.0)
    expected = exact(a)
    a["teacher_indices"][1, 3] = 90
    loss, grad = gpu.launch(*kd_loss.positional(**a))
    assert loss.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().all()
    assert_close(grad[::2], expected[1][::2], 2e-6, "gradient")


def kd_loss_module() -> Any:
    """The module of the op, whose name in the package is the op itself."""
    return sys.modules["potstill.ops.kd_loss"]


@pytest.mark.parametrize("divergence", ["jsd", "tv", "reverse_kl", "forward_kl", "dkd"])
def test_a_student_close_to_its_teacher(divergence: str) -> None:
    """jsd is second order in the difference: by ln m, as by the difference of two entropies, it would be lost."""
    a = kd_samples.arguments((4, 900), ignored=0.0, divergence=divergence)
    a["student"] = a["teacher"] + 1e-2 * torch.randn_like(a["teacher"])
    loss, grad = gpu.launch(*kd_loss.positional(**a))
    expected = exact(a)
    assert_close(grad, expected[1], 1e-4, "gradient")
    if divergence in ("jsd", "tv"):
        assert_close(loss, expected[0], 2e-4, "loss")


@triton.jit
def elementary(x, y, log1p, expm1, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(log1p + i, kd_rows.log1p(tl.load(y + i), 1.0 + tl.load(y + i)))
    tl.store(expm1 + i, kd_rows.expm1(tl.load(x + i), tl.exp2(tl.load(x + i) * 1.4426950408889634)))


def test_elementary_functions_near_zero() -> None:
    size = torch.logspace(-30, 0, 512)
    y, x = torch.cat((size, -0.9 * size)), torch.cat((-size, -80.0 * size))
    log1p, expm1 = torch.empty(1024), torch.empty(1024)
    elementary[(1,)](x, y, log1p, expm1, count=1024)
    for given, exact_values in ((log1p, y.double().log1p()), (expm1, x.double().expm1())):
        assert float((given / exact_values - 1.0).abs().max()) < 4e-7


@pytest.mark.parametrize("divergence", ["jsd", "tv", "mse"])
def test_a_student_that_is_its_teacher(divergence: str) -> None:
    a = kd_samples.arguments((4, 900), ignored=0.0, divergence=divergence)
    a["student"] = a["teacher"].clone()
    loss, grad = gpu.launch(*kd_loss.positional(**a))
    assert loss == 0.0
    assert (grad == 0.0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mse"])
def test_a_large_common_offset(kind: str) -> None:
    a = kd_samples.arguments((4, 1300), temperature=2.0, alpha=0.4, label_smoothing=1.0, ignored=0.0)
    a = a | {"student": a["student"] + 1000.0}
    if kind in REST:
        check(with_top_k(a | {"rest": kind}, 20))
    elif kind == "labels":
        check(a | {"alpha": 0.0})
    else:
        check(a | {"divergence": kind, "teacher": a["teacher"] - 1000.0})


@pytest.mark.parametrize("gap", [5.0, 40.0, 300.0])
def test_the_rest_s_probability_does_not_cancel(gap: float) -> None:
    """1 - sum q, in float32, would be 0 and its logarithm -inf."""
    a = kd_samples.arguments((4, 800), ignored=0.0)
    a["student"].scatter_add_(1, a["teacher"].topk(9, 1).indices, torch.full((4, 9), gap))
    check(with_top_k(a, 9), tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 40), (2, 700)])
def test_rows_further_apart_than_int32(kind: str, shape: tuple[int, int]) -> None:
    rows, stride = 3, 2**30 + 8
    a = of_kind(kind, (rows, shape[1]), student=torch.bfloat16, ignored=0.0)
    torch.use_deterministic_algorithms(False)  # fills no pages that are not used
    memory = torch.empty(2 * stride + shape[1], dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    student = memory.as_strided((rows, shape[1]), (stride, 1)).copy_(a["student"])
    options = Options(*kd_loss.positional(**a)[2:])
    expected = exact(a)
    loss, grad = gpu.launch(student, a["teacher"], *options)
    assert_close(loss, expected[0], 2e-6, "loss")
    assert_close(grad, expected[1], 8e-3, "gradient")
    assert torch.equal(gpu.launch_in_place(student, a["teacher"], options), loss)
    assert torch.equal(student, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd_loss_module(), "check_top_k", lambda *_: None)  # on a GPU it does not look
    for more in ({}, {"reduction": "sum"}, {"normalizer": torch.tensor(3)}, {"row_weight": torch.ones(2)}):
        a = of_kind(kind, (2, 40)) | more
        with NoWaiting():
            gpu.launch(*kd_loss.positional(**a))
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(1).item()


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_other_dtypes(kind: str) -> None:
    a = of_kind(kind, (4, 90), ignore_index=7)
    a["target"] = torch.tensor([7, 3, 7, 89], dtype=torch.int32)
    if kind in REST:
        a["teacher_indices"] = a["teacher_indices"].to(torch.int32)
    check(a)
    check(a | {"target": a["target"].to(torch.uint8)})


def test_a_teacher_of_float64_is_left_to_the_reference() -> None:
    a = kd_samples.arguments((3, 20), temperature=2.0)
    a["teacher"] = a["teacher"].double()
    for given, expected in zip(gpu.launch(*kd_loss.positional(**a)), kd_loss.reference(**a), strict=True):
        assert torch.equal(given, expected)


def test_wrong_options_raise() -> None:
    a = kd_samples.arguments((3, 20))
    with pytest.raises(ValueError, match="temperature"):
        gpu.launch(*kd_loss.positional(**a | {"temperature": 0.0}))
    with pytest.raises(ValueError, match="shape"):
        gpu.launch(*kd_loss.positional(**a | {"teacher": a["teacher"][:2]}))


def test_top_k_of_many_classes() -> None:
    """More given classes than are compared at once, classes twice among them and apart."""
    for rest in REST:
        a = of_kind(rest, (2, 300), k=70)
        a["teacher_indices"][:, 60] = a["teacher_indices"][:, 2]
        a["teacher"] -= 1.0  # what is given twice must not exceed 1
        check(a)
