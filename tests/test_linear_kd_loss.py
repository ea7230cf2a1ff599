"""The distillation loss of a linear head: against autograd through whole float64 logits; memory; bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.linear_kd_losses import DISTIL, LEAVES, as_module, by_autograd, check, exact, head_of
from torch import Tensor, nn

from potstill.nn import Int8Linear, KDLoss, LinearKDLoss
from potstill.ops import linear_kd_chunks, linear_kd_loss, top_k
from potstill.ops.divergence import DIVERGENCES
from potstill.ops.linear_kd_samples import arguments
from potstill.ops.topk import REST


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
    for head in (a["teacher_weight"], head_of(a)):
        value = call(a["student"], a["weight"], teacher_weight=head)
        torch.testing.assert_close(value.double(), expected)
        with torch.no_grad():
            quiet = call(a["student"].clone().requires_grad_(), a["weight"], teacher_weight=head)
        assert not quiet.requires_grad
        assert torch.equal(quiet, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_head_that_is_a_module(dtype: torch.dtype, ignored: float) -> None:
    a = arguments((3, 4), 6, 40, 10, biases=True, dtype=dtype, ignored=ignored, **DISTIL)
    head, calls = head_of(a).to(dtype), []
    head.register_forward_hook(lambda _, inputs, output: calls.append((len(inputs[0]), output.requires_grad)))
    loss = LinearKDLoss(**DISTIL, max_memory_bytes=1200)
    given_ = by_autograd(a, as_module(loss, head))
    check(a, given_)
    rows = int((a["target"] != -100).sum())
    assert sum(n for n, _ in calls) == rows
    assert max(n for n, _ in calls) < rows
    assert not any(needs for _, needs in calls)
    assert head.weight.grad is None
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    for g, e in zip(given_, by_autograd(a, as_module(loss, a["teacher_weight"])), strict=True):
        torch.testing.assert_close(g, e, **tolerance)


def test_head_that_is_quantised() -> None:
    a = arguments((9,), 6, 96, 32, 64, biases=True, **DISTIL)
    head = Int8Linear.from_float(head_of(a))
    given_ = by_autograd(a, as_module(LinearKDLoss(**DISTIL, max_memory_bytes=3000), head))
    logits = a | {"teacher": head(a["teacher"]), "teacher_weight": None, "teacher_bias": None}
    check(logits, given_)


@pytest.mark.parametrize("head", [nn.Flatten(0), nn.Unflatten(1, (2, 5))])
def test_head_that_makes_no_logits(head: nn.Module) -> None:
    a = arguments((4,), 6, 40, 10, ignored=0.0)
    call = as_module(LinearKDLoss(), head)
    assert math.isfinite(as_module(LinearKDLoss(), nn.Identity())(**a))  # a teacher with 10 classes
    with pytest.raises(ValueError, match=r"expected logits \[4, classes\]"):
        call(**a)
