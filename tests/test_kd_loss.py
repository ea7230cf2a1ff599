"""The fused distillation loss: its definition against torch's own losses, its kernels, its gradient's bookkeeping."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kd_losses import check, gradient_of, labels, logits
from torch import Tensor

from potstill import _C
from potstill.nn import KDLoss
from potstill.ops import kd_loss
from potstill.ops.op import gpu_function


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_definition_is_torchs(temperature: float, smoothing: float, alpha: float) -> None:
    student, teacher, target = logits(9, 40).double(), logits(9, 40, seed=1).double(), labels(9, 40)
    log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    hard = F.cross_entropy(student, target, label_smoothing=smoothing)
    expected = alpha * temperature**2 * F.kl_div(log_q, p, reduction="batchmean") + (1.0 - alpha) * hard
    loss, _ = kd_loss.reference(
        student, teacher, target, temperature=temperature, alpha=alpha, label_smoothing=smoothing
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradient(isa: str, temperature: float, alpha: float, reduction: str) -> None:
    loss = KDLoss(temperature, alpha, label_smoothing=0.1, reduction=reduction)
    check(logits(7, 2100), logits(7, 2100, seed=1), labels(7, 2100, ignored=2), loss)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 5),
    classes=st.integers(1, 70) | st.sampled_from([1023, 1024, 1025, 2048, 2049, 5003]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0, 7.0]),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
    smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 20.0]),
    offset=st.sampled_from([0.0, 1000.0, -1000.0]),
    half=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape_and_option(
    rows: int,
    classes: int,
    temperature: float,
    alpha: float,
    smoothing: float,
    scale: float,
    offset: float,
    half: tuple[bool, bool],
) -> None:
    student = logits(rows, classes, scale=scale) + offset
    teacher = logits(rows, classes, seed=1, scale=scale) - offset
    student, teacher = student.bfloat16() if half[0] else student, teacher.bfloat16() if half[1] else teacher
    loss = KDLoss(temperature, alpha, label_smoothing=smoothing, reduction="none")
    check(student, teacher, labels(rows, classes, ignored=rows // 3), loss, 4e-3 if half[0] else 4e-6)


def test_many_classes() -> None:
    check(logits(1, 1_000_003), logits(1, 1_000_003, seed=1), torch.tensor([1_000_002]), KDLoss(2.0, 0.5))


def test_leading_shape_and_strides() -> None:
    student, teacher, target = logits(3, 8, 90), logits(3, 8, 90, seed=1), labels(24, 80).view(3, 8)
    loss = KDLoss(2.0, 0.5)
    expected = loss(student[:, ::2, :80].contiguous(), teacher[:, ::2, 10:].contiguous(), target[:, ::2].contiguous())
    assert torch.equal(loss(student[:, ::2, :80], teacher[:, ::2, 10:], target[:, ::2]), expected)
    columns = student[..., :80].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        loss(columns, teacher[..., 10:], target), loss(columns.contiguous(), teacher[..., 10:].contiguous(), target)
    )
    shared = teacher[0, :1, :80].expand(8, 80)
    assert torch.equal(loss(student[0, :, :80], shared, target[0]), loss(student[0, :, :80], shared.clone(), target[0]))


def test_one_distribution_has_no_loss(isa: str) -> None:
    student = logits(4, 3000).requires_grad_()
    loss = KDLoss(3.0)(student, student.detach() + 0.0)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_classes_masked_in_both_count_as_absent(isa: str, temperature: float) -> None:
    student, teacher, target = logits(5, 3000), logits(5, 3000, seed=1), labels(5, 1000) * 3
    kept = torch.arange(0, 3000, 3)
    masked = torch.full((5, 3000), -math.inf).index_copy(1, kept, student[:, kept]).requires_grad_()
    hidden = torch.full((5, 3000), -math.inf).index_copy(1, kept, teacher[:, kept])
    few = student[:, kept].requires_grad_()
    loss = KDLoss(temperature, 0.5)
    value, expected = loss(masked, hidden, target), loss(few, teacher[:, kept], target // 3)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    assert masked.grad is not None
    torch.testing.assert_close(masked.grad[:, kept], few.grad)
    assert float(masked.grad[:, 1::3].abs().max()) == 0.0


def test_infinite_and_nan_rows(isa: str) -> None:
    student, teacher = logits(6, 1500), logits(6, 1500, seed=1)
    student[1, 1200] = -math.inf  # where the teacher has a probability
    student[2, 3] = math.nan
    teacher[3, 1400] = math.nan
    student[4], teacher[5] = -math.inf, -math.inf
    leaf = student.clone().requires_grad_()
    value = KDLoss(2.0, 0.5, reduction="none")(leaf, teacher, labels(6, 1000))
    value.sum().backward()
    value = value.detach()
    assert leaf.grad is not None
    assert math.isfinite(value[0])
    assert value[1] == math.inf
    assert value[2:].isnan().all()
    assert leaf.grad[:2].isfinite().all()
    assert leaf.grad[2:].isnan().any(dim=1).all()


def test_ignored_rows_count_as_absent(isa: str) -> None:
    student, teacher, target = logits(6, 1100), logits(6, 1100, seed=1), labels(6, 1100)
    target[[0, 4]] = 7
    student[0], teacher[4] = math.nan, math.inf
    loss = KDLoss(2.0, 0.5, ignore_index=7)
    kept = [1, 2, 3, 5]
    leaf, rest = student.requires_grad_(), student[kept].detach().requires_grad_()
    value, expected = loss(leaf, teacher, target), loss(rest, teacher[kept], target[kept])
    value.backward()
    expected.backward()
    assert torch.equal(value, expected)
    assert leaf.grad is not None
    assert rest.grad is not None
    assert torch.equal(leaf.grad[kept], rest.grad)
    assert float(leaf.grad[[0, 4]].abs().max()) == 0.0


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_average_is_zero(rows: int, dtype: torch.dtype) -> None:
    student = logits(rows, 20).to(dtype).requires_grad_()
    value = KDLoss(2.0, 0.5)(student, logits(rows, 20, seed=1), torch.full((rows,), -100))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_upstream_gradients() -> None:
    student, teacher, target = logits(5, 60), logits(5, 60, seed=1), labels(5, 60)
    loss, rows = KDLoss(2.0, 0.5), KDLoss(2.0, 0.5, reduction="none")
    once = gradient_of(student, lambda s: loss(s, teacher, target))
    torch.testing.assert_close(gradient_of(student, lambda s: loss(s, teacher, target) * 0.125), once * 0.125)
    weights = torch.rand(5)
    each = gradient_of(student, lambda s: rows(s, teacher, target).sum())
    torch.testing.assert_close(each / 5, once)
    weighted = gradient_of(student, lambda s: rows(s, teacher, target) @ weights)
    torch.testing.assert_close(weighted, each * weights[:, None])
    half = gradient_of(student.bfloat16(), lambda s: rows(s, teacher, target) @ weights)
    torch.testing.assert_close(half.float(), each * weights[:, None], rtol=3e-2, atol=2e-3)


def test_loss_used_twice_and_again() -> None:
    student, teacher, target = logits(5, 60), logits(5, 60, seed=1), labels(5, 60)
    loss = KDLoss(2.0, 0.5)
    once = gradient_of(student, lambda s: loss(s, teacher, target))

    def twice(s: Tensor) -> Tensor:
        value: Tensor = loss(s, teacher, target)
        return value + 2.0 * value

    torch.testing.assert_close(gradient_of(student, twice), 3.0 * once)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, target)
    value.backward(retain_graph=True)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, once)
    leaf.grad.mul_(100.0)  # what becomes of the first gradient must not reach the second
    leaf.grad = None
    value.backward(retain_graph=True)
    value.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, 2.0 * once)


def test_gradient_is_handed_over_not_copied() -> None:
    leaf = logits(5, 60).requires_grad_()
    value = KDLoss()(leaf, logits(5, 60, seed=1))
    address = value.grad_fn.saved_tensors[0].data_ptr()
    value.backward(retain_graph=True)
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() != address  # the graph still needs it
    leaf.grad = None
    value.backward()
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() == address


def test_no_gradient_is_computed_when_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bool] = []
    run = _C.kd_loss

    def spy(*args: Any) -> None:
        written.append(args[6] is not None)
        run(*args)

    monkeypatch.setattr(_C, "kd_loss", spy)
    student, teacher = logits(3, 2500).requires_grad_(), logits(3, 2500, seed=1)
    loss = KDLoss(2.0)
    with torch.no_grad():
        quiet = loss(student, teacher)
    assert not quiet.requires_grad
    assert torch.equal(quiet, loss(student.detach(), teacher))
    assert torch.equal(quiet, loss(student, teacher))
    assert written == [False, False, True]


def test_derivatives_that_are_not_defined() -> None:
    student, teacher = logits(3, 20).requires_grad_(), logits(3, 20, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(KDLoss()(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="need_grad is False"):
        kd_loss(student, teacher, need_grad=False)
    KDLoss()(student, teacher).backward()
    assert teacher.grad is None


def test_other_dtypes() -> None:
    student, teacher, target = logits(5, 60), logits(5, 60, seed=1), labels(5, 60)
    loss = KDLoss(2.0, 0.5)
    expected = gradient_of(student, lambda s: loss(s, teacher, target))
    for dtype in (torch.float64, torch.float16):
        other = gradient_of(student.to(dtype), lambda s: loss(s, teacher, target))
        assert other.dtype == dtype
        torch.testing.assert_close(other.float(), expected, rtol=5e-3, atol=2e-4)
    assert loss(student, teacher.double(), target).dtype == torch.float64
    assert torch.equal(loss(student, teacher, target), loss(student, teacher, target.int()))


def test_autocast_changes_nothing() -> None:
    student, teacher, target = logits(5, 60), logits(5, 60, seed=1), labels(5, 60)
    for s, t in ((student, teacher), (student.bfloat16(), teacher), (student.double(), teacher)):
        expected = KDLoss(2.0, 0.5)(s, t, target)
        with torch.autocast("cpu", torch.bfloat16):
            value = KDLoss(2.0, 0.5)(s, t, target)
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_float16_gradients_survive_scaling() -> None:
    student, teacher = logits(64, 500).half(), logits(64, 500, seed=1).half()
    scaled = gradient_of(student, lambda s: KDLoss()(s, teacher) * 2.0**16)
    expected = gradient_of(student.float(), lambda s: KDLoss()(s, teacher)) * 2.0**16
    torch.testing.assert_close(scaled.float(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's own doing
def test_compiles_whole() -> None:
    loss = KDLoss(2.0, 0.5)

    def step(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return loss(student * 2.0, teacher, target) * 3.0

    compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(step, fullgraph=True, backend="aot_eager")
    student, teacher, target = logits(5, 60), logits(5, 60, seed=1), labels(5, 60)
    torch.testing.assert_close(
        gradient_of(student, lambda s: compiled(s, teacher, target)),
        gradient_of(student, lambda s: step(s, teacher, target)),
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher, target), step(student, teacher, target))


@pytest.mark.parametrize("label", [-1, 20, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_label_out_of_range(label: int, dtype: torch.dtype) -> None:
    student, target = logits(3, 20).to(dtype), torch.tensor([0, label, 19])
    with pytest.raises(ValueError, match=f"label {label}"):
        KDLoss(alpha=0.5)(student, student, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDLoss(**options)
    with pytest.raises(ValueError, match=message):
        kd_loss(logits(2, 3), logits(2, 3), torch.zeros(2, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("student", "teacher", "target", "message"),
    [
        ((3, 20), (2, 20), (3,), "all but the last dimension must be equal"),
        ((3, 20), (3, 1, 20), (3,), "all but the last dimension must be equal"),
        ((3, 20), (3, 0), (3,), "classes > 0"),
        ((3, 20), (3, 20), (4,), "target has shape"),
        ((3, 20), (3, 20), (3, 1), "target has shape"),
        ((3, 0), (3, 0), (3,), "classes > 0"),
        ((), (), (), "classes > 0"),
        ((3, 20), (3, 20), None, "target is None"),
    ],
)
def test_shapes_that_do_not_fit(
    student: tuple[int, ...], teacher: tuple[int, ...], target: tuple[int, ...] | None, message: str
) -> None:
    given_labels = None if target is None else torch.zeros(target, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        KDLoss(alpha=0.5)(torch.zeros(student), torch.zeros(teacher), given_labels)


def test_labels_are_integers() -> None:
    with pytest.raises(ValueError, match="expected integer labels"):
        KDLoss(alpha=0.5)(torch.zeros(3, 20), torch.zeros(3, 20), torch.zeros(3))


def test_repr() -> None:
    assert repr(KDLoss()) == "KDLoss(temperature=1.0, alpha=1.0)"
    loss = KDLoss(2.0, 0.5, 0, 0.1, "sum")
    assert repr(loss) == "KDLoss(temperature=2.0, alpha=0.5, ignore_index=0, label_smoothing=0.1, reduction='sum')"


_PEAK = """
import torch
from potstill.nn import KDLoss

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

torch.set_num_threads(2)
loss = KDLoss(2.0, 0.5)
small = torch.randn(4, 4000)
loss(small.requires_grad_(), small.detach(), torch.zeros(4, dtype=torch.int64)).backward()
student, teacher = torch.randn(512, 32000).requires_grad_(), torch.randn(512, 32000)
target = torch.zeros(512, dtype=torch.int64)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts anew from the present size
before = peak()
with torch.no_grad():
    loss(student, teacher, target)
quiet = peak() - before
loss(student, teacher, target).backward()
print(quiet, peak() - before, student.numel() * 4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_one_gradient() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    quiet, extra, gradient = map(int, done.stdout.split())
    slack = 8 << 20  # scratch is 12 bytes per class and thread; the rest is the interpreter's and autograd's
    assert quiet <= slack
    assert gradient <= extra <= gradient + slack


def test_without_triton_a_gpu_takes_the_reference_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "triton" else found(name))
    gpu_function.cache_clear()
    student, teacher = logits(3, 20), logits(3, 20, seed=1)
    kernel = kd_loss.kernels["cuda"]
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        value, _ = kernel.function(student, teacher)
    assert torch.equal(value, kd_loss.reference(student, teacher)[0])
    kernel.function(student, teacher)  # once is enough: pytest makes errors of warnings
    assert kd_loss.backend("cuda", torch.float32) == ("reference", "the cuda kernel needs triton; pip install triton")
    gpu_function.cache_clear()
