"""Inputs of the distillation losses for tests and benchmarks, and what a user of plain torch would write instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.ops.divergence import DIVERGENCES
from potstill.ops.op import Cost, Sample
from potstill.ops.rivals import can_compile, compiled
from potstill.ops.topk import REST, top_k

_BENCH_SHAPES = ((64, 1000, 2.0), (256, 32000, 2.0), (256, 32000, 4.0), (512, 128256, 2.0))


OPTIONS: dict[str, Any] = {
    "teacher_indices": None,
    "row_weight": None,
    "normalizer": None,
    "divergence": "forward_kl",
    "beta": 0.5,
    "rest": "tail",
    "temperature": 1.0,
    "alpha": 1.0,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "reduction": "mean",
}
"""What the losses share, in the order of their schemas."""


def arguments(
    shape: tuple[int, ...],
    student: torch.dtype = torch.float32,
    teacher: torch.dtype = torch.float32,
    ignored: float = 0.2,
    teacher_classes: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Random logits and labels, always the same for a shape; ``ignored`` is the share of ignored rows."""
    random = torch.Generator().manual_seed(shape[-1] * 7919 + len(shape))
    target = torch.randint(shape[-1], shape[:-1], generator=random)
    target[torch.rand(shape[:-1], generator=random) < ignored] = -100
    return {
        "student": torch.randn(shape, generator=random).mul_(3.0).to(student),
        "teacher": torch.randn((*shape[:-1], teacher_classes or shape[-1]), generator=random).mul_(3.0).to(teacher),
        "target": target,
        **OPTIONS,
        "need_grad": True,
    } | options


def _sample(label: str, shape: tuple[int, ...], **options: Any) -> Sample:
    return Sample(label, lambda: arguments(shape, **options))


def samples(size: str) -> Iterable[Sample]:
    """The samples of ``kd_loss``."""
    yield from _bench_samples() if size == "bench" else _test_samples()


def _bench_samples() -> Iterable[Sample]:
    for rows, classes, temperature in _BENCH_SHAPES:
        label = f"rows={rows} classes={classes} T={temperature:g}"
        yield _sample(label, (rows, classes), temperature=temperature, alpha=0.7, ignored=0.0)
    for divergence in DIVERGENCES[1:]:
        label = f"rows=256 classes=32000 T=2 {divergence}"
        yield _sample(label, (256, 32000), temperature=2.0, alpha=0.7, ignored=0.0, divergence=divergence)


def _test_samples() -> Iterable[Sample]:
    for shape in ((5, 7), (3, 1), (0, 10), (2, 3, 33), (129,), (70, 257), (4, 1024), (2, 1025), (3, 2999)):
        for temperature, alpha, smoothing in ((1.0, 0.5, 0.0), (2.0, 0.7, 0.1), (4.0, 0.3, 0.0), (3.0, 0.7, 0.1)):
            label = f"{list(shape)} T={temperature:g} alpha={alpha:g} smoothing={smoothing:g}"
            yield _sample(label, shape, temperature=temperature, alpha=alpha, label_smoothing=smoothing)
    for divergence in DIVERGENCES[1:]:
        yield from _test_samples_of(divergence)
    wide, half = torch.float32, torch.bfloat16
    for student, teacher in ((half, half), (half, wide), (wide, half)):
        label = f"{str(student).removeprefix('torch.')} student, {str(teacher).removeprefix('torch.')} teacher"
        yield _sample(label, (9, 1100), student=student, teacher=teacher, temperature=2.0, alpha=0.7)
    yield _sample("reduction sum", (3, 4, 50), temperature=2.0, alpha=0.7, reduction="sum")
    yield _sample("reduction none", (3, 4, 50), temperature=2.0, alpha=0.7, reduction="none")
    yield _sample("teacher only", (6, 130), temperature=2.0, target=None)
    yield _sample("labels only", (6, 130), alpha=0.0, label_smoothing=0.1)
    yield _sample("no gradient", (6, 1300), temperature=2.0, alpha=0.5, need_grad=False)
    yield _sample("all ignored", (6, 30), alpha=0.5, ignored=1.0)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0, 0.25])
    yield _sample("row weights", (6, 1300), temperature=2.0, alpha=0.5, row_weight=weight)
    yield _sample("normalizer", (6, 1300), temperature=2.0, alpha=0.5, normalizer=torch.tensor(40))
    yield from _top_k_samples()
    yield Sample("offset 1000", lambda: _shifted((6, 1300), 1000.0))
    yield Sample("teacher -inf", lambda: _masked((6, 1300), "teacher", -math.inf))
    yield Sample("both masked with -inf", lambda: _masked((6, 1300), "student", -math.inf))
    yield Sample(
        "both masked with the lowest float32", lambda: _masked((6, 1300), "student", torch.finfo(torch.float32).min)
    )
    yield Sample("student nan", lambda: _poisoned("student"))
    yield Sample("teacher nan", lambda: _poisoned("teacher"))
    yield Sample("strided rows", lambda: _strided((6, 1300)))


def _test_samples_of(divergence: str) -> Iterable[Sample]:
    shapes = ((5, 7), (0, 10), (2, 3, 33), (70, 257), (4, 1024), (2, 1025), (3, 2999))
    for shape in shapes:
        for temperature, alpha, beta in ((1.0, 1.0, 0.5), (2.0, 0.7, 0.1), (3.0, 0.5, 0.9)):
            label = f"{divergence} {list(shape)} T={temperature:g} alpha={alpha:g} beta={beta:g}"
            make = partial(arguments, shape, divergence=divergence, temperature=temperature, alpha=alpha, beta=beta)
            yield Sample(
                label, make, slack=2.0 if divergence == "jsd" else 1.0
            )  # ln p - ln q has the logits' last bits
    of: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "alpha": 0.6}
    half = torch.bfloat16
    yield _sample(f"{divergence} bfloat16", (9, 1100), student=half, teacher=half, **of)
    yield _sample(f"{divergence} smaller teacher", (6, 2100), teacher_classes=1030, label_smoothing=0.1, **of)
    yield _sample(f"{divergence} larger teacher", (6, 1030), teacher_classes=2100, **of)
    yield _sample(f"{divergence} no gradient", (6, 1300), need_grad=False, **of)
    yield Sample(f"{divergence} masked", lambda: _masked((6, 1300), "student", -math.inf) | of)
    yield Sample(f"{divergence} nan", lambda: _poisoned("student") | of)


def _top_k_samples() -> Iterable[Sample]:
    for rest in REST:
        for shape, k in (((5, 7), 3), ((3, 2999), 40), ((2, 3, 1025), 1), ((4, 9), 9), ((0, 10), 2)):
            for temperature, alpha, divergence in (
                (1.0, 1.0, "forward_kl"),
                (2.0, 0.7, "soft_ce"),
                (3.0, 0.5, "forward_kl"),
            ):
                label = f"top {k} {rest} {list(shape)} T={temperature:g} alpha={alpha:g} {divergence}"
                options: dict[str, Any] = {
                    "rest": rest,
                    "temperature": temperature,
                    "alpha": alpha,
                    "divergence": divergence,
                }
                yield Sample(label, partial(_top_k, shape, k, **options))
        twice = partial(_top_k, (6, 1300), 32, rest=rest, temperature=2.0, alpha=0.6, twice=True)
        yield Sample(f"top 32 {rest} with classes given twice, and some with probability 0", twice)
        yield Sample(f"top 32 {rest} bfloat16", partial(_top_k, (6, 1300), 32, rest=rest, student=torch.bfloat16))
        yield Sample(f"top 32 {rest} no gradient", partial(_top_k, (6, 1300), 32, rest=rest, need_grad=False))


def _top_k(shape: tuple[int, ...], k: int, twice: bool = False, **options: Any) -> dict[str, Any]:
    a = arguments(shape, **options)
    log_probs, indices = top_k(a["teacher"], k, a["temperature"])
    if twice:
        indices[..., 1] = indices[..., 0]
        log_probs[..., 2::7] = -math.inf
    return a | {"teacher": log_probs, "teacher_indices": indices}


def _shifted(shape: tuple[int, ...], offset: float) -> dict[str, Any]:
    a = arguments(shape, temperature=2.0, alpha=0.5, label_smoothing=0.1)
    return a | {"student": a["student"] + offset, "teacher": a["teacher"] - offset}


def _masked(shape: tuple[int, ...], which: str, value: float) -> dict[str, Any]:
    a = arguments(shape, temperature=2.0, alpha=0.5)
    a["target"].clamp_(max=9)
    for name in {"teacher", which}:
        a[name][:, 10::3] = value
    return a


def _poisoned(which: str) -> dict[str, Any]:
    a = arguments((6, 1300), temperature=2.0, alpha=0.5)
    a[which][3, 1200] = math.nan
    return a


def _strided(shape: tuple[int, int]) -> dict[str, Any]:
    a = arguments((2 * shape[0], 2 * shape[1]), temperature=2.0, alpha=0.5)
    return a | {
        "student": a["student"][::2, : shape[1]],
        "teacher": a["teacher"][::2, ::2],
        "target": a["target"][::2] % shape[1],
    }


def cost(student: Tensor, teacher: Tensor, need_grad: bool = True, **_: Any) -> Cost:
    """Two exponentials of at least 8 multiply-adds, a multiply-add in each of three sums and three gradient terms."""
    moved = student.element_size() * (2 if need_grad else 1) + teacher.element_size()
    return Cost(f32_ops=44.0 * student.numel(), bytes=float(moved * student.numel()))


def step(leaf: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    """Every step allocates its gradient, as training does."""
    leaf.grad = None
    value = loss()
    value.backward()
    return value


def rivals(student: Tensor, teacher: Tensor, **options: Any) -> dict[str, Callable[[], Any]]:
    """The same loss as one writes it in torch, eager and compiled."""
    leaf = student.detach().requires_grad_()
    if options["teacher_indices"] is not None:
        teacher = torch.full_like(student, -1e4).scatter_(-1, options["teacher_indices"], teacher.to(student.dtype))
    names = ("target", "divergence", "beta", "temperature", "alpha", "ignore_index", "label_smoothing")
    rest = [options[name] for name in names]
    found: dict[str, Callable[[], Any]] = {"torch eager": lambda: step(leaf, lambda: plain_loss(leaf, teacher, *rest))}
    if can_compile(student):
        fast = compiled(plain_loss)
        found["torch.compile"] = lambda: step(leaf, lambda: fast(leaf, teacher, *rest))
    return found


def plain_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The mean loss as the papers' code and the usual tutorials have it: no masks, logits of one shape."""
    soft = _plain_divergence(student, teacher, target, divergence, beta, temperature)
    if divergence != "mse":
        soft = soft * temperature**2
    hard = F.cross_entropy(student, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
    return alpha * soft + (1.0 - alpha) * hard


def _plain_divergence(s: Tensor, t: Tensor, target: Tensor, divergence: str, beta: float, temperature: float) -> Tensor:
    if divergence == "mse":
        return F.mse_loss(s, t)
    if divergence == "dkd":
        return _plain_decoupled(s / temperature, t / temperature, target, beta)
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    if divergence == "forward_kl":
        return F.kl_div(log_q, log_p.exp(), reduction="batchmean")
    if divergence == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    if divergence == "soft_ce":
        return F.cross_entropy(s / temperature, log_p.exp())
    if divergence == "tv":
        return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1).mean()
    log_m = torch.logsumexp(torch.stack((log_p + math.log(beta), log_q + math.log1p(-beta))), 0)
    to_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return beta * to_p + (1.0 - beta) * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)


def _plain_decoupled(s: Tensor, t: Tensor, target: Tensor, beta: float) -> Tensor:
    # Zhao et al. 2022, whose code masks the label by subtracting 1000.
    own = torch.zeros_like(s, dtype=torch.bool).scatter_(1, target.unsqueeze(1), True)
    q, p = s.softmax(1), t.softmax(1)
    q2 = torch.stack(((q * own).sum(1), (q * ~own).sum(1)), 1)
    p2 = torch.stack(((p * own).sum(1), (p * ~own).sum(1)), 1)
    rest = F.kl_div(F.log_softmax(s - 1000.0 * own, 1), F.softmax(t - 1000.0 * own, 1), reduction="batchmean")
    return F.kl_div(q2.log(), p2, reduction="batchmean") + beta * rest
