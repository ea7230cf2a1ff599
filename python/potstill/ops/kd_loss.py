"""Knowledge-distillation loss: divergence from a teacher plus cross-entropy with labels, value and gradient fused.

The loss is that of Hinton, Vinyals and Dean 2015 (section 2), the T^2 included, with a choice of divergences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import _C
from potstill.ops import kd_samples
from potstill.ops.divergence import check_divergence, row_divergence_gradients, row_divergences
from potstill.ops.op import Kernel, Op, gpu_function
from potstill.ops.topk import REST, check_top_k, row_topk_divergences, row_topk_gradients

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})
_REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """The arguments of :data:`kd_loss` after the logits, with the schema's defaults.

    The dispatcher leaves out trailing arguments that have them, so that implementations take the rest as one.
    """

    target: Tensor | None = None
    teacher_indices: Tensor | None = None
    row_weight: Tensor | None = None
    normalizer: Tensor | None = None
    divergence: str = "forward_kl"
    beta: float = 0.5
    rest: str = "tail"
    temperature: float = 1.0
    alpha: float = 1.0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    need_grad: bool = True


def check_options(o: Options, op: str = "kd_loss") -> None:
    """Raises :class:`ValueError` for options that :data:`kd_loss` does not accept."""
    check_divergence(op, o.divergence, o.beta)
    if o.rest not in REST:
        raise ValueError(f"{op}: rest is {o.rest!r}; expected one of {', '.join(REST)}")
    if not 0.0 < o.temperature < math.inf:
        raise ValueError(f"{op}: temperature is {o.temperature}; expected a positive finite number")
    if not 0.0 <= o.alpha <= 1.0:
        raise ValueError(f"{op}: alpha is {o.alpha}; expected a number from 0 (labels only) to 1 (teacher only)")
    if not 0.0 <= o.label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {o.label_smoothing}; expected a number from 0 to 1")
    if o.reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction is {o.reduction!r}; expected one of {', '.join(_REDUCTIONS)}")
    if o.normalizer is not None and o.reduction != "mean":
        raise ValueError(f"{op}: normalizer divides a mean, but reduction is {o.reduction!r}; leave one of them out")


def check_rows(op: str, rows: torch.Size, o: Options) -> None:
    """Raises :class:`ValueError` for tensors that do not fit ``rows``, the student's shape without the classes."""
    needs_target = o.alpha != 1.0 or (o.divergence == "dkd" and o.alpha > 0.0)
    if o.target is None:
        if needs_target:
            why = f"alpha is {o.alpha}" if o.alpha != 1.0 else "the divergence is dkd"
            raise ValueError(f"{op}: {why} but target is None; pass the labels, or alpha=1 with another divergence")
    elif o.target.shape != rows:
        raise ValueError(f"{op}: target has shape {list(o.target.shape)}; the student's rows need {list(rows)}")
    elif o.target.is_floating_point():
        raise ValueError(f"{op}: target has dtype {o.target.dtype}; expected integer labels")
    if o.row_weight is not None:
        if o.row_weight.shape != rows:
            raise ValueError(
                f"{op}: row_weight has shape {list(o.row_weight.shape)}; the student's rows need {list(rows)}"
            )
        if o.row_weight.requires_grad:
            raise ValueError(f"{op}: row_weight requires a gradient, and none is defined; detach() it")
    if o.normalizer is not None and o.normalizer.numel() != 1:
        raise ValueError(f"{op}: normalizer has shape {list(o.normalizer.shape)}; expected one number")


def _check_logits(student: Tensor, teacher: Tensor, o: Options) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"kd_loss: {name} has shape {list(logits.shape)}; expected [..., classes], classes > 0")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"kd_loss: student has shape {list(student.shape)} but teacher {list(teacher.shape)}; all but the last "
            "dimension must be equal"
        )
    if o.teacher_indices is not None:
        check_top_k("kd_loss", teacher, o.teacher_indices, student.shape[-1], o.divergence)
    elif o.divergence == "dkd" and min(student.shape[-1], teacher.shape[-1]) < 2:
        raise ValueError("kd_loss: dkd compares the classes that are not the label; expected at least 2 classes")
    check_rows("kd_loss", student.shape[:-1], o)


def check_labels(op: str, target: Tensor, valid: Tensor, classes: int, ignore_index: int) -> None:
    """Raises :class:`ValueError` for a label that is no class, if ``target`` can be looked at without waiting."""
    if target.device.type != "cpu":  # elsewhere looking would wait for the device, whose gather checks by itself
        return
    wrong = target[valid & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise ValueError(
            f"{op}: target has the label {int(wrong[0])}; expected labels from 0 to {classes - 1}, or "
            f"ignore_index = {ignore_index}"
        )


def row_losses(student: Tensor, teacher: Tensor, o: Options) -> Tensor:
    """The definition: one loss per row, differentiable by autograd, in the widest dtype given (at least float32)."""
    dtype = wide(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = student.new_zeros(student.shape[:-1])
    if o.alpha > 0.0:
        loss = loss + o.alpha * _row_divergences(student, teacher, o)
    if o.alpha < 1.0:
        loss = loss + (1.0 - o.alpha) * row_cross_entropies(student, o)
    return weighted(loss, o)


def row_gradients(student: Tensor, teacher: Tensor, o: Options) -> Tensor:
    """Of :func:`row_losses` by student, in closed form: where it runs, below the dispatcher, autograd sees nothing."""
    dtype = wide(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    gradient = torch.zeros_like(student)
    if o.alpha > 0.0:
        soft = _row_divergence_gradients(student, teacher, o)
        gradient[..., : soft.shape[-1]] = o.alpha * soft
    if o.alpha < 1.0:
        gradient = gradient + (1.0 - o.alpha) * row_cross_entropy_gradients(student, o)
    return weighted(gradient, o)


def _row_divergences(student: Tensor, teacher: Tensor, o: Options) -> Tensor:
    if o.teacher_indices is not None:
        return row_topk_divergences(student, teacher, o.teacher_indices, o.divergence, o.rest, o.temperature)
    return row_divergences(*_common(student, teacher), o.target, o.divergence, o.beta, o.temperature)


def _row_divergence_gradients(student: Tensor, teacher: Tensor, o: Options) -> Tensor:
    if o.teacher_indices is not None:
        return row_topk_gradients(student, teacher, o.teacher_indices, o.rest, o.temperature)
    return row_divergence_gradients(*_common(student, teacher), o.target, o.divergence, o.beta, o.temperature)


def row_cross_entropies(student: Tensor, o: Options) -> Tensor:
    """The cross-entropy of each row with its label; of any value where the label is ignored."""
    assert o.target is not None
    log_q = F.log_softmax(student, -1)
    labels = torch.where(o.target != o.ignore_index, o.target, 0)
    hard = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if o.label_smoothing > 0.0:
        hard = (1.0 - o.label_smoothing) * hard - o.label_smoothing * log_q.mean(-1)
    return hard


def row_cross_entropy_gradients(student: Tensor, o: Options) -> Tensor:
    """The gradient of :func:`row_cross_entropies`."""
    assert o.target is not None
    labels = torch.where(o.target != o.ignore_index, o.target, 0).unsqueeze(-1)
    aim = torch.full_like(student, o.label_smoothing / student.shape[-1])
    aim = aim.scatter_add(-1, labels, torch.full_like(aim[..., :1], 1.0 - o.label_smoothing))
    return F.softmax(student, -1) - aim


def weighted(rows: Tensor, o: Options) -> Tensor:
    """Losses [...] or gradients [..., classes] times the rows' weights; exactly 0 where a row is ignored."""
    if o.row_weight is not None:
        weight = _beside(o.row_weight.to(rows.dtype), rows)
        rows = torch.where(weight == 0.0, 0.0, rows * weight)
    return rows if o.target is None else torch.where(_beside(o.target != o.ignore_index, rows), rows, 0.0)


def _beside(row: Tensor, rows: Tensor) -> Tensor:
    return row.unsqueeze(-1) if rows.dim() > row.dim() else row


def divisor(rows: int, o: Options) -> Tensor | float:
    """What the sum over the rows is divided by: 1 unless ``reduction`` is mean."""
    if o.reduction != "mean":
        return 1.0
    if o.normalizer is not None:
        return torch.where(o.normalizer == 0, 1, o.normalizer).reshape(())  # no row counts: all losses are 0
    return float(max(rows, 1)) if o.target is None else (o.target != o.ignore_index).sum().clamp(min=1)


def wide(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype that the definition computes in."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _common(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    # A column that one side lacks is no part of either distribution.
    columns = min(student.shape[-1], teacher.shape[-1])
    return student[..., :columns], teacher[..., :columns]


def _reference(student: Tensor, teacher: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    o = Options(*rest, **named)
    check_options(o)
    _check_logits(student, teacher, o)
    if o.teacher_indices is not None:
        o = o._replace(teacher_indices=o.teacher_indices.to(torch.int64))
    if o.target is not None:
        target = o.target.to(torch.int64)
        check_labels("kd_loss", target, target != o.ignore_index, student.shape[-1], o.ignore_index)
        o = o._replace(target=target)
    loss = row_losses(student, teacher, o)
    by = divisor(loss.numel(), o)
    if o.reduction != "none":
        loss = (loss.sum() / by).to(loss.dtype)
    if not o.need_grad:
        return loss, student.new_empty(0)
    return loss, (row_gradients(student, teacher, o) / by).to(student.dtype)


def _fake(student: Tensor, teacher: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    o = Options(*rest, **named)
    check_options(o)
    _check_logits(student, teacher, o)
    loss = student.new_empty(student.shape[:-1] if o.reduction == "none" else (), dtype=wide(student, teacher))
    return loss, student.new_empty(student.shape if o.need_grad else (0,))


def _cpu(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    o = Options(*rest)
    if o.teacher_indices is not None and teacher.dtype in (torch.float16, torch.bfloat16):
        teacher = teacher.float()  # k numbers a row
    if teacher.dtype not in _KERNEL_DTYPES:
        return _reference(student, teacher, *rest)
    check_options(o)
    _check_logits(student, teacher, o)
    grad = torch.empty_like(student, memory_format=torch.contiguous_format) if o.need_grad else None
    loss = _run_kernel(student, teacher, o, grad)
    return loss, student.new_empty(0) if grad is None else grad


def _cuda(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    launch = gpu_function("kd_loss", "launch")
    found: tuple[Tensor, Tensor] = (_reference if launch is None else launch)(student, teacher, *rest)
    return found


def kd_loss_in_place(student: Tensor, teacher: Tensor, o: Options) -> Tensor:
    """The loss; its gradient overwrites ``student`` [rows, classes]. For implementations of ops; checks nothing."""
    if student.is_cpu and student.dtype in _KERNEL_DTYPES and teacher.dtype in _KERNEL_DTYPES:
        return _run_kernel(student, teacher, o, student)
    launch = gpu_function("kd_loss", "launch_in_place") if student.is_cuda else None
    if launch is not None:
        on_gpu: Tensor = launch(student, teacher, o)
        return on_gpu
    loss, grad = _reference(student, teacher, *o)
    student.copy_(grad)
    return loss


def _run_kernel(student: Tensor, teacher: Tensor, o: Options, grad: Tensor | None) -> Tensor:
    loss = student.new_empty(student.shape[:-1] if o.reduction == "none" else (), dtype=torch.float32)
    _C.kd_loss(
        _rows(student),
        _rows(teacher),
        None if o.teacher_indices is None else _rows(o.teacher_indices.to(torch.int64)),
        _flat(o.target, torch.int64),
        _flat(o.row_weight, torch.float32),
        loss.view(-1) if o.reduction == "none" else loss,
        None if grad is None else _rows(grad),
        o.divergence,
        o.beta,
        o.rest,
        o.temperature,
        o.alpha,
        o.label_smoothing,
        o.ignore_index,
        o.reduction == "mean",
        0.0 if o.normalizer is None else float(o.normalizer) or 1.0,  # 0: the kernel counts the valid rows
    )
    return loss


def _rows(x: Tensor) -> Tensor:
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _flat(rows: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if rows is None:
        return None
    if rows.dtype != dtype:
        rows = rows.to(dtype)
    return (rows if rows.dim() == 1 else rows.reshape(-1)).contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad = output[1]
    if not inputs[-1]:
        raise RuntimeError("kd_loss: need_grad is False but student requires a gradient; pass need_grad=True")
    ctx.save_for_backward(grad)
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)  # else torch fills a tensor of zeros for the second output


def _backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 15
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("kd_loss: no second derivative is defined; call backward() without create_graph=True")
    (grad,) = ctx.saved_tensors
    # loss.backward() starts from 1: autograd then keeps the saved tensor itself as student.grad.
    if not is_one(upstream):
        grad = grad * upstream.unsqueeze(-1).to(grad.dtype)
    return (grad, *(None,) * 14)


def is_one(x: Tensor) -> bool:
    """Whether ``x`` is known to be the number 1, without waiting for a device."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return False  # a value that is not known yet, or that would have to be waited for
    return x.dim() == 0 and x.item() == 1.0


def _run(student: Tensor, **options: Any) -> Callable[[], Any]:
    leaf = student.detach().requires_grad_()
    arguments = kd_loss.positional(leaf, **options)  # as KDLoss passes them
    return lambda: kd_samples.step(leaf, lambda: kd_loss(*arguments)[0])


kd_loss = Op(
    "kd_loss(Tensor student, Tensor teacher, Tensor? target=None, Tensor? teacher_indices=None, "
    "Tensor? row_weight=None, Tensor? normalizer=None, str divergence='forward_kl', float beta=0.5, str rest='tail', "
    "float temperature=1.0, float alpha=1.0, int ignore_index=-100, float label_smoothing=0.0, str reduction='mean', "
    "bool need_grad=True) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": Kernel(_cpu, _KERNEL_DTYPES), "cuda": Kernel(_cuda, _KERNEL_DTYPES | {torch.float16}, "triton")},
    differentiable=(0,),
    setup_context=_setup_context,
    backward=_backward,
    samples=kd_samples.samples,
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3},
    cost=kd_samples.cost,
    run=_run,
    rivals=kd_samples.rivals,
)
"""``alpha D(teacher, student) + (1 - alpha) CE(student, target)``, and its gradient.

- ``student``, ``teacher``: logits [..., classes]; float32 or bfloat16 each for the kernel, any float dtype for the
  reference. The teacher counts as a constant. If one has more classes, the columns that the other lacks are no part of
  either distribution in D; the cross-entropy has all the student's.
- ``target``: integer labels [...], or None if ``alpha`` is 1 and ``divergence`` is not dkd. Rows with the label
  ``ignore_index`` count as absent, for both terms. Any other label that is no class of the student's raises
  :class:`ValueError`.
- ``teacher_indices``: integers [..., k]: the teacher is known by its k likeliest classes, and ``teacher`` [..., k] has
  their log-probabilities at this temperature: see :func:`potstill.ops.top_k`. A class that is given twice has the sum
  of both probabilities. ``rest`` says what is assumed of the others: "tail", "renormalize" or "partial"
  (:mod:`potstill.ops.topk`). Only forward_kl and soft_ce are defined.
- ``row_weight``: [...], a factor of each row's loss; a row of weight 0 is 0, whatever its logits are.
- ``divergence``: D, with its T^2: a name of :mod:`potstill.ops.divergence`, where the formulas are; ``beta`` is the
  jsd's teacher's share, or the weight of dkd's non-target part, and means nothing to the others.
- ``temperature``: T; mse does not depend on it.
- ``label_smoothing``: as in :func:`torch.nn.functional.cross_entropy`.
- ``reduction``: "mean" over the rows that are not ignored (0 if there are none, where torch gives NaN), "sum", or
  "none". ``normalizer``, one number in a tensor, replaces the number of rows in a mean: with that of a whole batch the
  losses of its parts add up to the batch's, and so do their gradients.

Returns the loss, float32 (float64 if an input is), [] or [...], and the gradient of its sum by ``student``, of its
shape and dtype and from the same pass: backward only scales it. With ``need_grad=False`` the second result is empty. A
second derivative is not defined.

A logit of -inf is a probability of exactly 0 and contributes nothing; where the divergence of such a distribution is
infinite (forward_kl: the teacher has a probability where the student has none) so is the loss. A NaN, or a row of
nothing but -inf, gives NaN.

>>> student = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
>>> teacher = torch.tensor([[0.0, 2.0, 0.0]])
>>> loss, _ = kd_loss(student, teacher, torch.tensor([1]), temperature=2.0, alpha=0.5)
>>> loss.backward()
>>> student.grad.sum().abs() < 1e-6
tensor(True)
"""
