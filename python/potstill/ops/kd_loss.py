"""Knowledge-distillation loss: softened KL divergence from a teacher plus cross-entropy with labels, fused.

The loss is that of Hinton, Vinyals and Dean 2015 (section 2), the T^2 included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import _C
from potstill.ops.op import Cost, Kernel, Op, Sample

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})
_REDUCTIONS = ("mean", "sum", "none")


def check_options(temperature: float, alpha: float, label_smoothing: float, reduction: str) -> None:
    """Raises :class:`ValueError` for options that :data:`kd_loss` does not accept."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"kd_loss: temperature is {temperature}; expected a positive finite number")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"kd_loss: alpha is {alpha}; expected a number from 0 (labels only) to 1 (teacher only)")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"kd_loss: label_smoothing is {label_smoothing}; expected a number from 0 to 1")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"kd_loss: reduction is {reduction!r}; expected one of {', '.join(_REDUCTIONS)}")


def _check_tensors(student: Tensor, teacher: Tensor, target: Tensor | None, alpha: float) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"kd_loss: student has shape {list(student.shape)} but teacher {list(teacher.shape)}; they must be equal"
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"kd_loss: student has shape {list(student.shape)}; expected [..., classes], classes > 0")
    if target is None:
        if alpha != 1.0:
            raise ValueError(f"kd_loss: alpha is {alpha} but target is None; pass the labels, or alpha=1")
    elif target.shape != student.shape[:-1]:
        raise ValueError(
            f"kd_loss: target has shape {list(target.shape)}, but the student's {list(student.shape)} needs "
            f"{list(student.shape[:-1])}"
        )
    elif target.is_floating_point():
        raise ValueError(f"kd_loss: target has dtype {target.dtype}; expected integer labels")


def row_losses(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The definition: one loss per row, differentiable by autograd, in the widest dtype given (at least float32)."""
    dtype = _wide(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = student.new_zeros(student.shape[:-1])
    if alpha > 0.0:
        log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
        p = log_p.exp()
        terms = torch.where(p == 0.0, 0.0, p * (log_p - log_q))  # 0 (-inf) would be a NaN
        loss = loss + alpha * temperature**2 * terms.sum(-1)
    if target is None:
        return loss
    valid = target != ignore_index
    if alpha < 1.0:
        log_q1 = F.log_softmax(student, -1)
        hard = -log_q1.gather(-1, torch.where(valid, target, 0).unsqueeze(-1)).squeeze(-1)
        if label_smoothing > 0.0:
            hard = (1.0 - label_smoothing) * hard - label_smoothing * log_q1.mean(-1)
        loss = loss + (1.0 - alpha) * hard
    return torch.where(valid, loss, 0.0)


def _row_gradients(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    # Of row_losses by student, in closed form: below the dispatcher, where it runs, autograd records nothing.
    dtype = _wide(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    gradient = torch.zeros_like(student)
    if alpha > 0.0:
        q, p = F.softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
        gradient = gradient + alpha * temperature * (q - p)
    if target is None:
        return gradient
    valid = (target != ignore_index).unsqueeze(-1)
    if alpha < 1.0:
        labels = torch.where(valid, target.unsqueeze(-1), 0)
        aim = torch.full_like(student, label_smoothing / student.shape[-1])
        aim = aim.scatter_add(-1, labels, torch.full_like(aim[..., :1], 1.0 - label_smoothing))
        gradient = gradient + (1.0 - alpha) * (F.softmax(student, -1) - aim)
    return torch.where(valid, gradient, 0.0)


def _wide(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _reference(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    need_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    check_options(temperature, alpha, label_smoothing, reduction)
    _check_tensors(student, teacher, target, alpha)
    valid = None
    if target is not None:
        target = target.to(torch.int64)
        valid = target != ignore_index
        _check_labels(target, valid, student.shape[-1], ignore_index)
    arguments = (student, teacher, target, temperature, alpha, ignore_index, label_smoothing)
    loss = row_losses(*arguments)
    count: Tensor | int = max(loss.numel(), 1) if valid is None else valid.sum().clamp(min=1)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / count
    if not need_grad:
        return loss, student.new_empty(0)
    gradient = _row_gradients(*arguments)
    return loss, (gradient / count if reduction == "mean" else gradient).to(student.dtype)


def _check_labels(target: Tensor, valid: Tensor, classes: int, ignore_index: int) -> None:
    if target.device.type != "cpu":  # elsewhere looking would wait for the device, whose gather checks by itself
        return
    wrong = target[valid & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise ValueError(
            f"kd_loss: target has the label {int(wrong[0])}; expected labels from 0 to {classes - 1}, or "
            f"ignore_index = {ignore_index}"
        )


def _fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    need_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    check_options(temperature, alpha, label_smoothing, reduction)
    _check_tensors(student, teacher, target, alpha)
    shape = student.shape[:-1] if reduction == "none" else ()
    loss = student.new_empty(shape, dtype=_wide(student, teacher))
    return loss, student.new_empty(student.shape if need_grad else (0,))


def _cpu(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    need_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    if teacher.dtype not in _KERNEL_DTYPES:
        return _reference(
            student, teacher, target, temperature, alpha, ignore_index, label_smoothing, reduction, need_grad
        )
    check_options(temperature, alpha, label_smoothing, reduction)
    _check_tensors(student, teacher, target, alpha)
    loss = student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=torch.float32)
    grad = torch.empty_like(student, memory_format=torch.contiguous_format) if need_grad else student.new_empty(0)
    _C.kd_loss(
        _rows(student),
        _rows(teacher),
        None if target is None else _labels(target),
        loss.view(-1) if reduction == "none" else loss,
        _rows(grad) if need_grad else None,
        temperature,
        alpha,
        label_smoothing,
        ignore_index,
        reduction == "mean",
    )
    return loss, grad


def _rows(x: Tensor) -> Tensor:
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _labels(target: Tensor) -> Tensor:
    if target.dtype != torch.int64:
        target = target.to(torch.int64)
    return (target if target.dim() == 1 else target.reshape(-1)).contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad = output[1]
    if not inputs[-1]:
        raise RuntimeError("kd_loss: need_grad is False but student requires a gradient; pass need_grad=True")
    ctx.save_for_backward(grad)
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)  # else torch fills a tensor of zeros for the second output


def _backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 9
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("kd_loss: no second derivative is defined; call backward() without create_graph=True")
    (grad,) = ctx.saved_tensors
    # loss.backward() starts from 1: autograd then keeps the saved tensor itself as student.grad.
    if not _is_one(upstream):
        grad = grad * upstream.unsqueeze(-1).to(grad.dtype)
    return (grad, *(None,) * 8)


def _is_one(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return False  # a value that is not known yet, or that would have to be waited for
    return x.dim() == 0 and x.item() == 1.0


def _arguments(
    shape: tuple[int, ...],
    student: torch.dtype = torch.float32,
    teacher: torch.dtype = torch.float32,
    ignored: float = 0.2,
    **options: Any,
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(shape[-1] * 7919 + len(shape))
    target = torch.randint(shape[-1], shape[:-1], generator=random)
    target[torch.rand(shape[:-1], generator=random) < ignored] = -100
    return {
        "student": torch.randn(shape, generator=random).mul_(3.0).to(student),
        "teacher": torch.randn(shape, generator=random).mul_(3.0).to(teacher),
        "target": target,
        "temperature": 1.0,
        "alpha": 1.0,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "reduction": "mean",
        "need_grad": True,
    } | options


def _sample(label: str, shape: tuple[int, ...], **options: Any) -> Sample:
    return Sample(label, lambda: _arguments(shape, **options))


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        for rows, classes, temperature in ((64, 1000, 2.0), (256, 32000, 2.0), (256, 32000, 4.0), (512, 128256, 2.0)):
            yield _sample(
                f"rows={rows} classes={classes} T={temperature:g}",
                (rows, classes),
                temperature=temperature,
                alpha=0.7,
                ignored=0.0,
            )
        return
    for shape in ((5, 7), (3, 1), (0, 10), (2, 3, 33), (129,), (70, 257), (4, 1024), (2, 1025), (3, 2999)):
        for temperature, alpha, smoothing in ((1.0, 0.5, 0.0), (2.0, 0.7, 0.1), (4.0, 0.3, 0.0), (3.0, 0.7, 0.1)):
            label = f"{list(shape)} T={temperature:g} alpha={alpha:g} smoothing={smoothing:g}"
            yield _sample(label, shape, temperature=temperature, alpha=alpha, label_smoothing=smoothing)
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
    yield Sample("offset 1000", lambda: _shifted((6, 1300), 1000.0))
    yield Sample("teacher -inf", lambda: _masked((6, 1300), "teacher", -math.inf))
    yield Sample("both masked with -inf", lambda: _masked((6, 1300), "student", -math.inf))
    yield Sample(
        "both masked with the lowest float32", lambda: _masked((6, 1300), "student", torch.finfo(torch.float32).min)
    )
    yield Sample("student nan", lambda: _poisoned("student"))
    yield Sample("teacher nan", lambda: _poisoned("teacher"))
    yield Sample("strided rows", lambda: _strided((6, 1300)))


def _shifted(shape: tuple[int, ...], offset: float) -> dict[str, Any]:
    arguments = _arguments(shape, temperature=2.0, alpha=0.5, label_smoothing=0.1)
    return arguments | {"student": arguments["student"] + offset, "teacher": arguments["teacher"] - offset}


def _masked(shape: tuple[int, ...], which: str, value: float) -> dict[str, Any]:
    arguments = _arguments(shape, temperature=2.0, alpha=0.5)
    arguments["target"].clamp_(max=9)
    for name in {"teacher", which}:
        arguments[name][:, 10::3] = value
    return arguments


def _poisoned(which: str) -> dict[str, Any]:
    arguments = _arguments((6, 1300), temperature=2.0, alpha=0.5)
    arguments[which][3, 1200] = math.nan
    return arguments


def _strided(shape: tuple[int, int]) -> dict[str, Any]:
    arguments = _arguments((2 * shape[0], 2 * shape[1]), temperature=2.0, alpha=0.5)
    return arguments | {
        "student": arguments["student"][::2, : shape[1]],
        "teacher": arguments["teacher"][::2, ::2],
        "target": arguments["target"][::2] % shape[1],
    }


def _cost(student: Tensor, teacher: Tensor, need_grad: bool = True, **_: Any) -> Cost:
    # Two exponentials of at least 8 multiply-adds, and a multiply-add in each of three sums and three gradient terms.
    moved = student.element_size() * (2 if need_grad else 1) + teacher.element_size()
    return Cost(f32_ops=44.0 * student.numel(), bytes=float(moved * student.numel()))


def _run(student: Tensor, **options: Any) -> Callable[[], Any]:
    leaf = student.detach().requires_grad_()
    arguments = kd_loss.positional(leaf, **options)  # as KDLoss passes them
    return lambda: _step(leaf, lambda: kd_loss(*arguments)[0])


def _step(leaf: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    leaf.grad = None  # every step allocates its gradient, as training does
    value = loss()
    value.backward()
    return value


def _rivals(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
    **_: Any,
) -> dict[str, Callable[[], Any]]:
    leaf = student.detach().requires_grad_()

    def loss() -> Tensor:
        log_q, p = F.log_softmax(leaf / temperature, -1), F.softmax(teacher / temperature, -1)
        soft = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
        hard = F.cross_entropy(leaf, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
        return alpha * soft + (1.0 - alpha) * hard

    return {"torch eager": lambda: _step(leaf, loss)}


kd_loss = Op(
    "kd_loss(Tensor student, Tensor teacher, Tensor? target=None, float temperature=1.0, float alpha=1.0, "
    "int ignore_index=-100, float label_smoothing=0.0, str reduction='mean', bool need_grad=True) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": Kernel(_cpu, _KERNEL_DTYPES)},
    differentiable=(0,),
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3},
    cost=_cost,
    run=_run,
    rivals=_rivals,
)
"""``alpha T^2 KL(softmax(teacher/T) || softmax(student/T)) + (1 - alpha) CE(student, target)``, and its gradient.

- ``student``, ``teacher``: logits [..., classes] of one shape; float32 or bfloat16 each for the kernel, any float dtype
  for the reference. The teacher counts as a constant.
- ``target``: integer labels [...], or None if ``alpha`` is 1. Rows with the label ``ignore_index`` count as absent, for
  both terms. Any other label outside 0 ... classes - 1 raises :class:`ValueError`.
- ``label_smoothing``: as in :func:`torch.nn.functional.cross_entropy`.
- ``reduction``: "mean" over the rows that count (0 if there are none, where torch gives NaN), "sum", or "none".

Returns the loss, float32 (float64 if an input is), [] or [...], and the gradient of its sum by ``student``, of its
shape and dtype and from the same pass: backward only scales it. With ``need_grad=False`` the second result is empty. A
second derivative is not defined.

A teacher's logit of -inf is a probability of exactly 0 and contributes nothing; a student's -inf where the teacher has
a probability gives an infinite loss; a NaN, or a row of nothing but -inf, gives NaN.

>>> student = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
>>> teacher = torch.tensor([[0.0, 2.0, 0.0]])
>>> loss, _ = kd_loss(student, teacher, torch.tensor([1]), temperature=2.0, alpha=0.5)
>>> loss.backward()
>>> student.grad.sum().abs() < 1e-6
tensor(True)
"""
