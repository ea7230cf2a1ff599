"""Inputs of ``linear_kd_loss`` for tests and benchmarks, and what a user of plain torch would write instead."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.ops.divergence import DIVERGENCES
from potstill.ops.kd_samples import OPTIONS, plain_loss
from potstill.ops.op import Cost, Sample
from potstill.ops.rivals import can_compile, compiled
from potstill.ops.topk import REST, top_k

_BENCH_SHAPES = ((256, 64, 32000), (512, 768, 32000), (512, 1024, 32000), (512, 768, 50257))


def arguments(
    shape: tuple[int, ...],
    features: int,
    classes: int,
    teacher_features: int | None = None,
    teacher_classes: int | None = None,
    dtype: torch.dtype = torch.float32,
    ignored: float = 0.2,
    biases: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Random hidden states, weights and labels, always the same for a shape; ``ignored`` is the share of such rows."""
    random = torch.Generator().manual_seed(classes * 7919 + features)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=random).mul_(scale).to(dtype)

    from_features, from_classes = teacher_features or features, teacher_classes or classes
    target = torch.randint(classes, shape, generator=random)
    target[torch.rand(shape, generator=random) < ignored] = -100
    return {
        "student": normal(*shape, features),
        "weight": normal(classes, features, scale=3.0 / math.sqrt(features)),
        "teacher": normal(*shape, from_features),
        "teacher_weight": normal(from_classes, from_features, scale=3.0 / math.sqrt(from_features)),
        "target": target,
        "bias": normal(classes) if biases else None,
        "teacher_bias": normal(from_classes) if biases else None,
        **OPTIONS,
        "max_memory_bytes": None,
        "need_hidden_grad": True,
        "need_weight_grad": True,
        "need_bias_grad": True,
    } | options


def samples(size: str) -> Iterable[Sample]:
    """The samples of ``linear_kd_loss``."""
    yield from _bench_samples() if size == "bench" else _test_samples()


def _bench_samples() -> Iterable[Sample]:
    for rows, features, classes in _BENCH_SHAPES:
        yield bench_sample(rows, features, classes, 2.0)
    yield bench_sample(512, 768, 32000, 1.0, alpha=0.0)


def bench_sample(rows: int, features: int, classes: int, temperature: float, alpha: float = 0.7) -> Sample:
    """Hidden states and weights of two heads of one shape; can be sent to another process."""
    label = f"rows={rows} hidden={features} classes={classes}"
    make = partial(arguments, (rows,), features, classes, temperature=temperature, alpha=alpha, ignored=0.0)
    return Sample(label if alpha else f"{label} labels only", make)


def _test_samples() -> Iterable[Sample]:
    def sample(label: str, *args: Any, **options: Any) -> Sample:
        return Sample(label, partial(arguments, *args, **options))

    distil: dict[str, Any] = {"temperature": 2.0, "alpha": 0.6}
    for divergence in DIVERGENCES:
        yield sample(divergence, (7,), 5, 33, divergence=divergence, max_memory_bytes=1200, **distil)
    yield sample("leading shape, biases", (2, 3), 4, 130, 6, biases=True, max_memory_bytes=1, **distil)
    yield sample("no rows", (0,), 4, 10, biases=True, **distil)
    yield sample("one row of one class", (), 1, 1, **distil)
    yield sample("all ignored", (5,), 4, 10, biases=True, ignored=1.0, **distil)
    yield sample("teacher only", (9,), 8, 100, target=None, max_memory_bytes=4000)
    yield sample("labels only, smoothed", (9,), 8, 100, alpha=0.0, label_smoothing=0.1, max_memory_bytes=4000)
    yield sample("sum", (9,), 8, 100, reduction="sum", max_memory_bytes=4000, **distil)
    yield sample("normalizer", (9,), 8, 100, normalizer=torch.tensor(40), max_memory_bytes=4000, **distil)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0, 0.25])
    yield sample("row weights", (6,), 8, 100, row_weight=weight, max_memory_bytes=4000, **distil)
    yield sample("smaller teacher", (6,), 8, 100, 5, 60, max_memory_bytes=4000, **distil)
    yield sample("larger teacher", (6,), 8, 60, 12, 100, max_memory_bytes=4000, **distil)
    yield sample("bfloat16", (9,), 16, 300, 24, dtype=torch.bfloat16, biases=True, max_memory_bytes=9000, **distil)
    for name in ("hidden", "weight", "bias"):
        yield sample(f"no {name} gradient", (6,), 8, 100, biases=True, **distil, **{f"need_{name}_grad": False})
    none = {f"need_{name}_grad": False for name in ("hidden", "weight", "bias")}
    yield sample("no gradient", (6,), 8, 100, biases=True, max_memory_bytes=4000, **distil, **none)
    yield Sample("teacher's logits", partial(_logits, max_memory_bytes=4000, **distil))
    for rest in REST:
        yield Sample(f"top 12 {rest}", partial(_top_k, 12, rest=rest, max_memory_bytes=4000, **distil))


def _logits(**options: Any) -> dict[str, Any]:
    a = arguments((7,), 8, 100, **options)
    return a | {"teacher": a["teacher"] @ a["teacher_weight"].t(), "teacher_weight": None}


def _top_k(k: int, **options: Any) -> dict[str, Any]:
    a = _logits(**options)
    log_probs, indices = top_k(a["teacher"], k, a["temperature"])
    return a | {"teacher": log_probs, "teacher_indices": indices}


def cost(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None = None,
    alpha: float = 1.0,
    need_hidden_grad: bool = True,
    need_weight_grad: bool = True,
    **_: Any,
) -> Cost:
    """The matrix products, and per logit what ``kd_loss`` must do; logits are never in memory."""
    rows = student.numel() // max(1, student.shape[-1])
    products = (1 + need_hidden_grad + need_weight_grad) * weight.numel()
    inputs = [student, weight, teacher]
    if teacher_weight is not None and alpha > 0.0:
        products += teacher_weight.numel()
        inputs.append(teacher_weight)
    if need_hidden_grad:
        inputs.append(student)
    if need_weight_grad:
        inputs.append(weight)
    moved = sum(x.numel() * x.element_size() for x in inputs)
    return Cost(f32_ops=2.0 * rows * products + 44.0 * rows * weight.shape[0], bytes=float(moved))


def run(op: Callable[..., Any], **arguments: Any) -> Callable[[], Any]:
    """One step of training: loss and backward, with fresh gradients."""
    leaves = _leaves(arguments)
    positional = op.positional(**(arguments | leaves))  # type: ignore[attr-defined]
    return lambda: step(leaves.values(), lambda: op(*positional)[0])


def step(leaves: Iterable[Tensor], loss: Callable[[], Tensor]) -> Tensor:
    """Every step allocates its gradients, as training does."""
    for leaf in leaves:
        leaf.grad = None
    value = loss()
    value.backward()
    return value


def _leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    chosen = {"student": "need_hidden_grad", "weight": "need_weight_grad", "bias": "need_bias_grad"}
    wanted = [name for name, need in chosen.items() if arguments[need] and arguments[name] is not None]
    return {name: arguments[name].detach().requires_grad_() for name in wanted}


def rivals(**arguments: Any) -> dict[str, Callable[[], Any]]:
    """The same loss of whole logits as one writes it in torch, eager and compiled; torch's own, if labels are all."""
    leaves = _leaves(arguments)
    values = arguments | leaves
    given = {name: values[name] for name in inspect.signature(materialised).parameters}
    found: dict[str, Callable[[], Any]] = {
        "torch eager": lambda: step(leaves.values(), lambda: materialised(**given)),
    }
    if can_compile(values["student"]):
        fast = compiled(materialised)
        found["torch.compile"] = lambda: step(leaves.values(), lambda: fast(**given))
    if values["alpha"] == 0.0 and hasattr(F, "linear_cross_entropy"):  # since torch 2.13
        found["F.linear_cross_entropy"] = lambda: step(leaves.values(), lambda: _torch_chunked(values))
    if values["teacher_weight"] is not None:
        found["products alone"] = _products(**arguments)
    return found


def _products(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, **_: Any) -> Callable[[], Any]:
    # No rival: what the loss cannot be faster than, with whole matrices, in memory that is there already.
    logits, d_student, d_weight = student.new_empty(len(student), len(weight)), student.clone(), weight.clone()
    teacher_logits = student.new_empty(len(teacher), len(teacher_weight))

    def multiply() -> None:
        torch.mm(student, weight.t(), out=logits)
        torch.mm(teacher, teacher_weight.t(), out=teacher_logits)
        torch.mm(logits, weight, out=d_student)
        torch.mm(logits.t(), student, out=d_weight)

    return multiply


def materialised(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The mean loss as the usual training step has it: two heads, whole logits, no masks."""
    logits = F.linear(student, weight, bias)
    with torch.no_grad():
        teacher_logits = F.linear(teacher, teacher_weight, teacher_bias)
    options = (divergence, beta, temperature, alpha, ignore_index, label_smoothing)
    return plain_loss(logits, teacher_logits, target, *options)


def _torch_chunked(a: dict[str, Any]) -> Tensor:
    return F.linear_cross_entropy(
        a["student"],
        a["weight"],
        a["target"],
        linear_bias=a["bias"],
        ignore_index=a["ignore_index"],
        label_smoothing=a["label_smoothing"],
        options=torch.nn.LinearCrossEntropyOptions(),  # in chunks; without, it is plain eager torch
    )
