"""linear_kd_loss in a training step: autocast, upstream gradients, compilation, chunks, memory, what does not fit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import linear_kd_runs
from tests.linear_kd_losses import DISTIL, LEAVES, as_module, by_autograd, check, head_of
from torch import Tensor, nn

from potstill.nn import LinearKDLoss
from potstill.ops import linear_kd_chunks, linear_kd_loss
from potstill.ops.linear_kd_chunks import Arguments, gradient_dtype, rows_per_chunk, run_chunks
from potstill.ops.linear_kd_samples import arguments


def test_autocast_changes_nothing() -> None:
    a = arguments((9,), 6, 40, 10, biases=True, max_memory_bytes=1500, **DISTIL)
    loss = LinearKDLoss(**DISTIL)
    for dtype in (torch.float32, torch.bfloat16):
        b = {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in a.items()}
        for head in (b["teacher_weight"], _Logits(F.linear(b["teacher"].float(), b["teacher_weight"].float()))):
            expected = by_autograd(b, as_module(loss, head))
            with torch.autocast("cpu", torch.bfloat16):
                found = by_autograd(b, as_module(loss, head))
            for g, e in zip(found, expected, strict=True):
                assert g is not None
                assert e is not None
                assert g.dtype == e.dtype
                assert torch.equal(g, e)


class _Logits(nn.Module):
    # A head that no autocast could change.
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits[: len(hidden)]


def test_upstream_double_use_and_retained_graphs() -> None:
    a = arguments((7,), 6, 40, biases=True, max_memory_bytes=1500, **DISTIL)
    once = by_autograd(a)

    def scaled(**x: Any) -> Tensor:
        value: Tensor = linear_kd_loss(**x)[0]
        return value + 0.25 * value

    for g, e in zip(by_autograd(a, scaled), once, strict=True):
        torch.testing.assert_close(g, 1.25 * e)
    leaves = {name: a[name].detach().requires_grad_() for name in LEAVES}
    value = linear_kd_loss(**(a | leaves))[0]
    value.backward(retain_graph=True)
    for leaf, e in zip(leaves.values(), once[1:], strict=True):
        assert torch.equal(leaf.grad, e)
        leaf.grad.mul_(100.0)  # what becomes of the first gradient must not reach the second
        leaf.grad = None
    value.backward(retain_graph=True)
    value.backward()
    for leaf, e in zip(leaves.values(), once[1:], strict=True):
        assert torch.equal(leaf.grad, 2.0 * e)


def test_gradients_are_handed_over_not_copied() -> None:
    a = arguments((7,), 6, 40, biases=True, **DISTIL)
    leaves = {name: a[name].detach().requires_grad_() for name in LEAVES}
    value = linear_kd_loss(**(a | leaves))[0]
    addresses = [saved.data_ptr() for saved in value.grad_fn.saved_tensors]
    value.backward()
    assert [leaf.grad.data_ptr() for leaf in leaves.values()] == addresses


def test_float16_gradients_survive_scaling() -> None:
    """A scaler's factor undoes a small mean only if float16 is not in between."""
    options: dict[str, Any] = {"normalizer": torch.tensor(2.0**20), "max_memory_bytes": 20_000, **DISTIL}
    a = arguments((9,), 32, 500, dtype=torch.float16, biases=True, **options)
    wide = {n: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in a.items()}

    def scaled(**x: Any) -> Tensor:
        value: Tensor = linear_kd_loss(**x)[0]
        return value * 2.0**20

    for name, g, e in zip(("loss", *LEAVES), by_autograd(a, scaled), by_autograd(wide, scaled), strict=True):
        assert g is not None
        assert e is not None
        assert name == "loss" or g.dtype == torch.float16
        assert float((g.float() - e).abs().max()) <= 1e-3 * float(e.abs().max())


def test_mixed_dtypes() -> None:
    a = arguments((7,), 6, 40, 10, biases=True, max_memory_bytes=1500, **DISTIL)
    for change, dtype in (
        ({"student": torch.bfloat16}, torch.float32),
        ({"weight": torch.bfloat16, "teacher": torch.float16}, torch.float32),
        ({"teacher_weight": torch.bfloat16}, torch.float32),
        ({"weight": torch.float64}, torch.float64),
        ({"teacher": torch.float64}, torch.float64),
    ):
        b = a | {name: a[name].to(d) for name, d in change.items()}
        found = by_autograd(b)
        assert found[0] is not None
        assert found[0].dtype == dtype
        check(b, found, 4e-3)


def test_derivatives_that_are_not_defined() -> None:
    a = arguments((7,), 6, 40, **DISTIL)
    a["student"].requires_grad_()
    a["teacher"].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_kd_loss(**a)[0], a["student"], create_graph=True)
    with pytest.raises(RuntimeError, match="need_hidden_grad is False but student requires a gradient"):
        linear_kd_loss(**(a | {"need_hidden_grad": False}))
    linear_kd_loss(**a)[0].backward()
    assert a["teacher"].grad is None


def test_torchs_own_call_has_no_gradient() -> None:
    a = arguments((7,), 6, 40, max_memory_bytes=1500, **DISTIL)
    expected = linear_kd_loss(**a)
    a["weight"].requires_grad_()
    for g, e in zip(torch.ops.potstill.linear_kd_loss(**a), expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's own doing
def test_compiles_whole() -> None:
    a = arguments((7,), 6, 40, biases=True, max_memory_bytes=1500, **DISTIL)
    loss = LinearKDLoss(**DISTIL, max_memory_bytes=1500)

    def step(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        value: Tensor = loss(student * 2.0, weight, teacher, teacher_weight, a["target"], bias)
        return value * 3.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = [a[name].detach().clone().requires_grad_() for name in LEAVES]
        function(*leaves, a["teacher"], a["teacher_weight"]).backward()
        results.append([leaf.grad for leaf in leaves])
    for g, e in zip(*results, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
def test_head_that_is_a_module_works_in_a_compiled_step() -> None:
    a = arguments((7,), 6, 40, biases=True, **DISTIL)
    call = as_module(LinearKDLoss(**DISTIL), head_of(a))
    compiled = torch.compile(call, backend="aot_eager")
    for g, e in zip(by_autograd(a, compiled), by_autograd(a, call), strict=True):
        torch.testing.assert_close(g, e)


def test_chunks() -> None:
    assert rows_per_chunk(512, 1000, 512_000) == 512
    assert rows_per_chunk(513, 1000, 512_000) == 257
    assert rows_per_chunk(7, 1000, 999) == 1
    assert rows_per_chunk(0, 1000, 10_000) == 0


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", ["weight", "head", "logits"])
def test_rows_of_a_chunk_follow_the_formula(monkeypatch: pytest.MonkeyPatch, kind: str, copied: bool) -> None:
    a = arguments((64,), 6, 40, 10, 30, ignored=0.0, **DISTIL)
    if copied:
        a["target"][0] = -100
    numbers = 40 + 2 * 6 + {"weight": 30 + 10, "head": 30 + 10, "logits": 30 if copied else 0}[kind]
    if kind == "logits":
        a |= {"teacher": F.linear(a["teacher"], a["teacher_weight"]), "teacher_weight": None}
    head = head_of(a) if kind == "head" else None
    if kind == "head":
        a["teacher_weight"] = None
    for memory, rows in ((8 * 4 * numbers, 8), (8 * 4 * numbers - 1, 7)):
        loop = linear_kd_chunks._Loop(Arguments(**(a | {"max_memory_bytes": memory})), head)
        count = 63 if copied else 64
        assert loop.rows == math.ceil(count / math.ceil(count / rows))


@pytest.mark.parametrize(("rows", "classes", "most"), [(4096, 80_000, 256), (400, 80_000, 100), (4096, 5000, 838)])
def test_default_memory(rows: int, classes: int, most: int) -> None:
    x, w = torch.zeros(rows, 1), torch.zeros(classes, 1)
    loop = linear_kd_chunks._Loop(Arguments(x, w, x, w), None)
    assert loop.rows == math.ceil(rows / math.ceil(rows / most))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [False, True])
def test_elsewhere_nothing_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, native: bool
) -> None:
    """A meta tensor has no values: whatever would look at one raises, and products check shapes and dtypes."""
    if native:
        monkeypatch.setattr(linear_kd_chunks, "_WIDE_PRODUCTS", ("meta",))
    a = arguments((20,), 6, 40, 10, biases=True, dtype=dtype, max_memory_bytes=1500, **DISTIL)
    a |= {"row_weight": torch.ones(20)}
    meta = Arguments(**{name: x.to("meta") if isinstance(x, Tensor) else x for name, x in a.items()})
    shapes = [(r.shape, r.dtype) for r in run_chunks(meta)]
    assert shapes == [(r.shape, r.dtype) for r in linear_kd_loss(**a)]
    assert shapes[1][1] == gradient_dtype(a["student"])


def wrong(**change: Any) -> dict[str, Any]:
    a = arguments((3,), 6, 20, 10, **DISTIL)
    return a | {name: x(a) if callable(x) else x for name, x in change.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "reduction is 'none'; expected mean or sum.*row_weight"),
        ({"reduction": "average"}, "reduction is 'average'"),
        ({"temperature": 0.0}, "linear_kd_loss: temperature is 0.0"),
        ({"divergence": "l2"}, "linear_kd_loss: divergence is 'l2'"),
        ({"max_memory_bytes": 0}, "max_memory_bytes is 0"),
        ({"weight": torch.zeros(20, 7)}, "student has shape .* but weight .* must be equal"),
        ({"weight": torch.zeros(20)}, r"weight has shape \[20\]; expected \[classes, features\]"),
        ({"weight": torch.zeros(0, 6)}, "classes > 0"),
        ({"teacher_weight": torch.zeros(20, 9)}, "teacher has shape .* but teacher_weight"),
        ({"teacher": torch.zeros(4, 10)}, "all but the last dimension must be equal"),
        ({"bias": torch.zeros(21)}, r"bias has shape \[21\] but weight \[20, 6\]; expected \[20\]"),
        ({"teacher_bias": torch.zeros(1, 20)}, "teacher_bias has shape"),
        ({"teacher_weight": None, "teacher_bias": torch.zeros(10)}, "there is a teacher_bias but no teacher_weight"),
        ({"teacher_weight": None, "teacher": torch.zeros(3, 0)}, "classes > 0"),
        ({"teacher_indices": torch.zeros(3, 10, dtype=torch.int64)}, "but there is a teacher_weight"),
        (
            {"teacher_indices": torch.zeros(3, 9, dtype=torch.int64), "teacher_weight": None},
            "linear_kd_loss: teacher_indices has shape",
        ),
        ({"target": None}, "target is None"),
        ({"target": torch.tensor([0, 20, 1])}, "linear_kd_loss: target has the label 20"),
        ({"row_weight": torch.ones(4)}, "row_weight has shape"),
        ({"normalizer": torch.tensor(3), "reduction": "sum"}, "normalizer divides a mean"),
        (
            {"divergence": "dkd", "teacher_weight": torch.zeros(1, 10), "alpha": 0.5},
            "dkd compares the classes that are not the label",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_fit(change: dict[str, Any], message: str, dtype: torch.dtype) -> None:
    a = {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in wrong(**change).items()}
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(**a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "linear_kd_loss: temperature is -1.0"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"max_memory_bytes": -5}, "max_memory_bytes is -5"),
        ({"beta": 0.3}, "LinearKDLoss: beta is 0.3, but forward_kl has none"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearKDLoss(**options)


def test_head_that_is_a_module_takes_no_top_k() -> None:
    a = arguments((3,), 6, 20, 10, **DISTIL)
    with pytest.raises(ValueError, match="leave one of them out"):
        LinearKDLoss()(a["student"], a["weight"], a["teacher"], head_of(a), teacher_indices=torch.zeros(3, 10).long())
    with pytest.raises(ValueError, match="teacher_bias but no teacher_weight"):
        LinearKDLoss()(a["student"], a["weight"], a["teacher"], head_of(a), teacher_bias=torch.zeros(20))


def test_normalizer_and_row_weight_of_the_module() -> None:
    a = arguments((5,), 6, 20, 10, normalizer=torch.tensor(7.0), row_weight=torch.rand(5), **DISTIL)
    loss = LinearKDLoss(**DISTIL)
    tensors = (a["student"], a["weight"], a["teacher"], a["teacher_weight"], a["target"])
    value = loss(*tensors, row_weight=a["row_weight"], normalizer=7)
    assert torch.equal(value, linear_kd_loss(**a)[0])
    assert not torch.equal(value, loss(*tensors))


def test_repr() -> None:
    assert repr(LinearKDLoss()) == "LinearKDLoss(temperature=1.0, alpha=1.0)"
    text = "LinearKDLoss(divergence='jsd', temperature=2.0, alpha=0.5, beta=0.5, max_memory_bytes=1024)"
    assert repr(LinearKDLoss(2.0, 0.5, "jsd", max_memory_bytes=1024)) == text


def test_under_fsdp2(tmp_path: Path) -> None:
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    program = [sys.executable, "-W", "error", linear_kd_runs.__file__]
    ranks = [
        subprocess.Popen([*program, str(i), str(tmp_path / "meeting"), str(file)], stderr=subprocess.PIPE, text=True)
        for i, file in enumerate(files)
    ]
    try:
        complaints = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], complaints
    for file in files:
        found = json.loads(file.read_text())
        for way in ("forward", "loss_of"):
            loss_error, gradient_error = found[way]
            assert loss_error < 1e-6
            assert gradient_error < 1e-5
        assert "is a DTensor" in found["outside"]
        assert "register_fsdp_forward_method" in found["outside"]


_PEAK = """
import sys
import torch
from potstill.nn import LinearKDLoss

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

def extra(dtype, classes, memory):
    def normal(*shape):
        return torch.randn(shape).to(dtype)
    loss = LinearKDLoss(2.0, max_memory_bytes=memory)
    student, weight = normal(1024, 64).requires_grad_(), normal(classes, 64).requires_grad_()
    teacher, teacher_weight = normal(1024, 64), normal(classes, 64)
    loss(student, weight, teacher, teacher_weight).backward()  # so that gradients are part of what was there before
    student.grad = weight.grad = None
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts anew from the present size
    before = peak()
    loss(student, weight, teacher, teacher_weight).backward()
    return peak() - before - sum(x.grad.numel() * x.grad.element_size() for x in (student, weight))

torch.set_num_threads(2)
print(extra(torch.float32, 32000, 32 << 20), extra(torch.bfloat16, 32000, 32 << 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_was_allowed() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    full, half = map(int, done.stdout.split())
    allowed, slack = 32 << 20, 10 << 20  # whole logits would be 131 MB on each side; slack for the libraries' buffers
    assert allowed // 2 <= full <= 2 * allowed + slack  # oneDNN's results are fresh: malloc may keep a chunk's
    # The sum of the weight's gradient in float32, and a widened part of each weight with its logits.
    assert half <= 2 * allowed + 4 * 32000 * 64 + 2 * (16 << 20) + slack
