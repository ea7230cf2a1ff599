"""The distillation loss of a linear head: against autograd through whole float64 logits; memory; bookkeeping."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import linear_kd_runs
from torch import Tensor, nn

from potstill.nn import Int8Linear, KDLoss, LinearKDLoss
from potstill.ops import linear_kd_chunks, linear_kd_loss, top_k
from potstill.ops.divergence import DIVERGENCES
from potstill.ops.kd_loss import divisor, row_losses
from potstill.ops.linear_kd_chunks import Arguments, gradient_dtype, rows_per_chunk, run_chunks
from potstill.ops.linear_kd_samples import arguments
from potstill.ops.topk import REST

LEAVES = ("student", "weight", "bias")
DISTIL: dict[str, Any] = {"temperature": 2.0, "alpha": 0.6}


def exact(a: dict[str, Any]) -> list[Tensor | None]:
    """Loss and gradients by autograd through whole float64 logits."""
    x: dict[str, Any] = {
        n: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in a.items()
    }
    leaves = [x[name].requires_grad_() if x[name] is not None else None for name in LEAVES]
    o = Arguments(**x).options()
    teacher = x["teacher"]
    if x["teacher_weight"] is not None:
        teacher = F.linear(teacher, x["teacher_weight"], x["teacher_bias"])
    rows = row_losses(F.linear(*leaves), teacher, o)
    loss = rows.sum() / divisor(rows.numel(), o)
    loss.backward()
    return [loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def by_autograd(a: dict[str, Any], function: Callable[..., Any] = linear_kd_loss) -> list[Tensor | None]:
    """Loss and gradients as a training step gets them."""
    leaves = {name: a[name].detach().requires_grad_() for name in LEAVES if a[name] is not None}
    result = function(**(a | leaves))
    loss: Tensor = result if isinstance(result, Tensor) else result[0]
    loss.backward()
    return [loss.detach(), *(leaves[name].grad if name in leaves else None for name in LEAVES)]


def check(a: dict[str, Any], given_: list[Tensor | None], rounding: float = 4e-6) -> None:
    """Errors by ``rounding`` of the largest number, and by what float32 leaves of a difference of probabilities.

    A logit's gradient is such a difference times T at most, times the row's factor; the others are products with it.
    """
    expected = exact(a)
    o = Arguments(**a).options()
    row = 1.0 if a["row_weight"] is None or a["row_weight"].numel() == 0 else max(1.0, float(a["row_weight"].max()))
    unit = 4e-6 * max(1.0, a["temperature"]) * row / float(divisor(a["student"][..., 0].numel(), o))
    counted = a["student"][torch.isfinite(a["student"])]
    largest = {"student": float(a["weight"].abs().max()), "bias": 1.0}
    largest["weight"] = float(counted.abs().max()) if counted.numel() else 0.0
    for what, g, e in zip(("loss", *LEAVES), given_, expected, strict=True):
        if e is None or e.numel() == 0:
            assert g is None or g.numel() == 0, what
            continue
        assert g is not None, what
        assert g.shape == e.shape
        assert what == "loss" or g.dtype == a[what].dtype
        if what == "loss":
            limit = 4e-6 * max(float(e.abs()), a["temperature"] ** 2)
        else:
            limit = rounding * float(e.abs().max()) + unit * largest[what]
        error = float((g.double() - e).abs().max())
        assert error <= limit, f"{what}: {error:.1e} > {limit:.1e}"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("memory", [None, 1, 4 * 2 * (140 + 30) * 3])
@pytest.mark.parametrize("onednn", [True, False])
def test_value_and_gradients(
    monkeypatch: pytest.MonkeyPatch, divergence: str, memory: int | None, onednn: bool
) -> None:
    monkeypatch.setattr(linear_kd_chunks, "_HAS_ONEDNN", onednn and linear_kd_chunks._HAS_ONEDNN)
    a = arguments((2, 5), 12, 130, 20, biases=True, divergence=divergence, max_memory_bytes=memory, **DISTIL)
    check(a, by_autograd(a))


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 17), st.integers(2, 70), st.integers(1, 17), st.integers(2, 70)),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
    smoothing=st.sampled_from([0.0, 0.2]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    biases=st.booleans(),
    weighted=st.booleans(),
    memory=st.sampled_from([1, 700, 2000, 10_000, None]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_and_option(
    rows: int,
    sizes: tuple[int, int, int, int],
    divergence: str,
    temperature: float,
    alpha: float,
    smoothing: float,
    ignored: float,
    reduction: str,
    biases: bool,
    weighted: bool,
    memory: int | None,
    dtype: torch.dtype,
) -> None:
    options: dict[str, Any] = {"temperature": temperature, "alpha": alpha, "label_smoothing": smoothing}
    options |= {"reduction": reduction, "divergence": divergence, "max_memory_bytes": memory}
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0, 0.0, 0.25, 1.0, 1.0])[:rows] if weighted else None
    a = arguments((rows,), *sizes, dtype=dtype, ignored=ignored, biases=biases, row_weight=weight, **options)
    check(a, by_autograd(a), 4e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("onednn", [True, False])
def test_half_precision_weights_are_widened_in_blocks(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    monkeypatch.setattr(linear_kd_chunks, "_HAS_ONEDNN", onednn and linear_kd_chunks._HAS_ONEDNN)
    monkeypatch.setattr(linear_kd_chunks, "_BLOCK", 4 * (12 + 256) * 17)
    a = arguments((2, 5), 12, 130, 20, biases=True, dtype=torch.bfloat16, max_memory_bytes=5000, **DISTIL)
    assert linear_kd_chunks._Linear(a["student"], a["weight"], None, torch.float32).wide.shape == (17, 12)
    check(a, by_autograd(a), 4e-3)


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("memory", [1, 1500])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_top_k(rest: str, memory: int, ignored: float) -> None:
    a = arguments((7,), 8, 100, biases=True, ignored=ignored, rest=rest, max_memory_bytes=memory, **DISTIL)
    log_probs, indices = top_k(F.linear(a["teacher"], a["teacher_weight"]), 9, 2.0)
    a |= {"teacher": log_probs, "teacher_weight": None, "teacher_bias": None, "teacher_indices": indices}
    check(a, by_autograd(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_given_logits(dtype: torch.dtype, ignored: float) -> None:
    a = arguments((7,), 8, 100, ignored=ignored, max_memory_bytes=1500, **DISTIL)
    a |= {"teacher": F.linear(a["teacher"], a["teacher_weight"]).to(dtype), "teacher_weight": None}
    check(a, by_autograd(a))


@pytest.mark.parametrize(("classes", "teacher_classes"), [(130, 90), (90, 130)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocabularies_of_different_sizes(classes: int, teacher_classes: int, divergence: str) -> None:
    a = arguments((7,), 8, classes, 6, teacher_classes, divergence=divergence, max_memory_bytes=2000, **DISTIL)
    check(a, by_autograd(a))


def test_half_precision_gradients_are_those_of_exact_logits() -> None:
    """Where the student is near its teacher, a bfloat16 model's own logits would spoil the gradient."""
    a = arguments((64,), 128, 2000, dtype=torch.bfloat16, target=None)
    noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    a |= {"teacher": (a["student"].float() + 0.02 * noise).bfloat16(), "teacher_weight": a["weight"].clone()}
    _, hidden, weight, _ = exact(a)

    def relative(g: Tensor | None, e: Tensor | None) -> float:
        assert g is not None
        assert e is not None
        return float((g.double() - e).norm() / e.norm())

    rounded = by_autograd(a, lambda student, weight, teacher, teacher_weight, **_: KDLoss()(
        F.linear(student, weight), F.linear(teacher, teacher_weight)
    ))  # fmt: skip
    ours = by_autograd(a)
    assert relative(rounded[1], hidden) > 0.1
    assert relative(rounded[2], weight) > 0.1
    # Nothing but the rounding of the result, whose mean is about 2^-9 / sqrt(3).
    assert relative(ours[1], hidden) < 2e-3
    assert relative(ours[2], weight) < 2e-3


@pytest.mark.parametrize("way", ["left out", "kept", "reference"])
def test_rows_that_do_not_count_may_hold_anything(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "kept":  # as on a GPU
        monkeypatch.setattr(linear_kd_chunks, "_KNOWN", ())
    a = arguments((8,), 6, 40, biases=True, ignored=0.0, max_memory_bytes=1500, **DISTIL)
    a |= {"row_weight": torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 1.0, 3.0]), "normalizer": torch.tensor(6.0)}
    a["target"][[1, 6]] = -100
    kept = [0, 3, 4, 5, 7]
    few = a | {name: a[name][kept] for name in ("student", "teacher", "target", "row_weight")}
    a["student"][[1, 2]] = math.nan
    a["teacher"][[2, 6]] = math.inf
    function = linear_kd_loss.reference if way == "reference" else linear_kd_loss
    given_, expected = function(**a), function(**few)
    torch.testing.assert_close(given_[1][kept], expected[1])
    assert torch.equal(given_[1][[1, 2, 6]], torch.zeros(3, 6))
    for i in (0, 2, 3):
        torch.testing.assert_close(given_[i], expected[i])


def test_rows_that_do_not_count_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = linear_kd_chunks._Linear.forward

    def spy(self: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(linear_kd_chunks._Linear, "forward", spy)
    a = arguments((10,), 6, 40, ignored=0.0, **DISTIL)
    a["target"][:7] = -100
    linear_kd_loss(**a)
    assert seen == [3, 3]  # of the student and of the teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_average_is_zero(rows: int, dtype: torch.dtype) -> None:
    a = arguments((rows,), 6, 40, biases=True, ignored=1.0, dtype=dtype, **DISTIL)
    for g in by_autograd(a):
        assert g is not None
        assert torch.equal(g, torch.zeros_like(g))


def test_micro_batches_add_up() -> None:
    a = arguments((11,), 6, 40, biases=True, ignored=0.3, max_memory_bytes=1500, **DISTIL)
    whole = by_autograd(a)
    counted = (a["target"] != -100).sum()
    assert 0 < int(counted) < 11
    parts = [
        by_autograd(a | {name: a[name][part] for name in ("student", "teacher", "target")} | {"normalizer": counted})
        for part in (slice(0, 4), slice(4, 5), slice(5, 11))
    ]
    for i, what in enumerate(("loss", *LEAVES)):
        found = [part[i] for part in parts]
        total = torch.cat(found) if what == "student" else torch.stack(found).sum(0)
        torch.testing.assert_close(total, whole[i], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", LEAVES)
def test_frozen_parts_cost_nothing(monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    products: list[str] = []
    for name in ("backward", "accumulate"):
        method = getattr(linear_kd_chunks._Linear, name)

        def spy(*args: Any, name: str = name, method: Callable[..., None] = method) -> None:
            products.append(name)
            method(*args)

        monkeypatch.setattr(linear_kd_chunks._Linear, name, spy)
    a = arguments((5,), 6, 40, biases=True, **DISTIL)
    leaves = {name: a[name].requires_grad_(name != frozen) for name in LEAVES}
    call = LinearKDLoss(**DISTIL)
    loss = call(a["student"], a["weight"], a["teacher"], a["teacher_weight"], a["target"], a["bias"], a["teacher_bias"])
    loss.backward()
    assert leaves[frozen].grad is None
    for name, e in zip(LEAVES, exact(a | {n: x.detach() for n, x in leaves.items()})[1:], strict=True):
        if name != frozen:
            torch.testing.assert_close(leaves[name].grad.double(), e, rtol=1e-4, atol=1e-7)
    assert products == {"student": ["accumulate"], "weight": ["backward"], "bias": ["backward", "accumulate"]}[frozen]


def test_no_gradient_is_computed_when_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    a = arguments((5,), 6, 40, max_memory_bytes=1500, **DISTIL)
    expected = exact(a)[0]
    monkeypatch.setattr(linear_kd_chunks, "kd_loss_in_place", None)
    call = partial(LinearKDLoss(**DISTIL), teacher_hidden=a["teacher"], target=a["target"])
    for head in (a["teacher_weight"], _head(a)):
        value = call(a["student"], a["weight"], teacher_weight=head)
        torch.testing.assert_close(value.double(), expected)
        with torch.no_grad():
            quiet = call(a["student"].clone().requires_grad_(), a["weight"], teacher_weight=head)
        assert not quiet.requires_grad
        assert torch.equal(quiet, value)


def _head(a: dict[str, Any]) -> nn.Linear:
    classes, features = a["teacher_weight"].shape
    head = nn.Linear(features, classes, bias=a["teacher_bias"] is not None)
    with torch.no_grad():
        head.weight.copy_(a["teacher_weight"])
        if a["teacher_bias"] is not None:
            head.bias.copy_(a["teacher_bias"])
    return head


def _as_module(loss: LinearKDLoss, head: Tensor | nn.Module) -> Callable[..., Tensor]:
    def call(**a: Any) -> Tensor:
        teacher_bias = a["teacher_bias"] if isinstance(head, Tensor) else None
        value: Tensor = loss(a["student"], a["weight"], a["teacher"], head, a["target"], a["bias"], teacher_bias)
        return value

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_head_that_is_a_module(dtype: torch.dtype, ignored: float) -> None:
    a = arguments((3, 4), 6, 40, 10, biases=True, dtype=dtype, ignored=ignored, **DISTIL)
    head, calls = _head(a).to(dtype), []
    head.register_forward_hook(lambda _, inputs, output: calls.append((len(inputs[0]), output.requires_grad)))
    loss = LinearKDLoss(**DISTIL, max_memory_bytes=1200)
    given_ = by_autograd(a, _as_module(loss, head))
    check(a, given_)
    rows = int((a["target"] != -100).sum())
    assert sum(n for n, _ in calls) == rows
    assert max(n for n, _ in calls) < rows
    assert not any(needs for _, needs in calls)
    assert head.weight.grad is None
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    for g, e in zip(given_, by_autograd(a, _as_module(loss, a["teacher_weight"])), strict=True):
        torch.testing.assert_close(g, e, **tolerance)


def test_head_that_is_quantised() -> None:
    a = arguments((9,), 6, 96, 32, 64, biases=True, **DISTIL)
    head = Int8Linear.from_float(_head(a))
    given_ = by_autograd(a, _as_module(LinearKDLoss(**DISTIL, max_memory_bytes=3000), head))
    logits = a | {"teacher": head(a["teacher"]), "teacher_weight": None, "teacher_bias": None}
    check(logits, given_)


@pytest.mark.parametrize("head", [nn.Flatten(0), nn.Unflatten(1, (2, 5))])
def test_head_that_makes_no_logits(head: nn.Module) -> None:
    a = arguments((4,), 6, 40, 10, ignored=0.0)
    call = _as_module(LinearKDLoss(), head)
    assert math.isfinite(_as_module(LinearKDLoss(), nn.Identity())(**a))  # a teacher with 10 classes
    with pytest.raises(ValueError, match=r"expected logits \[4, classes\]"):
        call(**a)


def test_autocast_changes_nothing() -> None:
    a = arguments((9,), 6, 40, 10, biases=True, max_memory_bytes=1500, **DISTIL)
    loss = LinearKDLoss(**DISTIL)
    for dtype in (torch.float32, torch.bfloat16):
        b = {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in a.items()}
        for head in (b["teacher_weight"], _Logits(F.linear(b["teacher"].float(), b["teacher_weight"].float()))):
            expected = by_autograd(b, _as_module(loss, head))
            with torch.autocast("cpu", torch.bfloat16):
                found = by_autograd(b, _as_module(loss, head))
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
    call = _as_module(LinearKDLoss(**DISTIL), _head(a))
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
    head = _head(a) if kind == "head" else None
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
        LinearKDLoss()(a["student"], a["weight"], a["teacher"], _head(a), teacher_indices=torch.zeros(3, 10).long())
    with pytest.raises(ValueError, match="teacher_bias but no teacher_weight"):
        LinearKDLoss()(a["student"], a["weight"], a["teacher"], _head(a), teacher_bias=torch.zeros(20))


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
    # Whole logits would be 131 MB on each side. The slack is for the libraries' buffers, and for what malloc keeps: a
    # last chunk of another size may come from the heap, which does not shrink while the others are mapped.
    allowed, slack = 32 << 20, (32 << 20) + (10 << 20)
    assert allowed // 2 <= full <= 1.5 * allowed + slack  # half: what malloc may lose between chunks
    # The sum of the weight's gradient in float32, and a widened part of each weight with its logits.
    assert half <= 1.5 * allowed + 4 * 32000 * 64 + 2 * (16 << 20) + slack
