"""The loss of :data:`potstill.ops.kd_loss` from hidden states and the weights of both heads, without whole logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.ops import linear_kd_samples
from potstill.ops.kd_loss import check_labels, check_options, check_rows, is_one, kd_loss
from potstill.ops.linear_kd_chunks import Arguments, gradient_dtype, run_chunks
from potstill.ops.op import Kernel, Op
from potstill.ops.topk import check_top_k

_NAME = "linear_kd_loss"
_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def check(a: Arguments, has_head: bool = False) -> None:
    """Raises :class:`ValueError` for options and shapes that do not fit, before anything is computed.

    ``has_head``: a callable stands for ``teacher_weight``.
    """
    check_options(a.options(), _NAME)
    check_chunks(a.reduction, a.max_memory_bytes)
    _check_linear("student", "weight", a.student, a.weight)
    _check_bias("bias", a.bias, "weight", a.weight)
    if a.student.shape[:-1] != a.teacher.shape[:-1]:
        raise ValueError(
            f"{_NAME}: student has shape {list(a.student.shape)} but teacher {list(a.teacher.shape)}; all but the last "
            "dimension must be equal"
        )
    _check_teacher(a, has_head)
    check_rows(_NAME, a.student.shape[:-1], a.options())


def check_chunks(reduction: str, max_memory_bytes: int | None) -> None:
    """Raises :class:`ValueError` for the options that :data:`kd_loss` takes otherwise, or not at all."""
    if reduction == "none":
        raise ValueError(
            f"{_NAME}: reduction is 'none'; expected mean or sum. The gradient of the weight is a sum over the rows "
            "that the forward pass makes, which cannot know how the rows' losses will be used: pass row_weight"
        )
    if max_memory_bytes is not None and max_memory_bytes < 1:
        raise ValueError(f"{_NAME}: max_memory_bytes is {max_memory_bytes}; expected at least 1, or None")


def _check_teacher(a: Arguments, has_head: bool) -> None:
    if a.teacher_indices is not None:
        if has_head or a.teacher_weight is not None:
            raise ValueError(
                f"{_NAME}: teacher_indices belong to given log-probabilities, but there is a teacher_weight, which "
                "makes logits; leave one of them out"
            )
        check_top_k(_NAME, a.teacher, a.teacher_indices, a.weight.shape[0], a.divergence)
    if a.teacher_weight is not None:
        _check_linear("teacher", "teacher_weight", a.teacher, a.teacher_weight)
        _check_bias("teacher_bias", a.teacher_bias, "teacher_weight", a.teacher_weight)
    elif a.teacher_bias is not None:
        raise ValueError(f"{_NAME}: there is a teacher_bias but no teacher_weight to add it to; leave it out")
    elif a.teacher.shape[-1] == 0:
        raise ValueError(f"{_NAME}: teacher has shape {list(a.teacher.shape)}; expected [..., classes], classes > 0")
    teacher_classes = a.teacher.shape[-1] if a.teacher_weight is None else a.teacher_weight.shape[0]
    if a.divergence == "dkd" and not has_head and min(a.weight.shape[0], teacher_classes) < 2:
        raise ValueError(f"{_NAME}: dkd compares the classes that are not the label; expected at least 2 classes")


def _check_linear(x_name: str, weight_name: str, x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{_NAME}: {weight_name} has shape {list(weight.shape)}; expected [classes, features], classes > 0"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{_NAME}: {x_name} has shape {list(x.shape)} but {weight_name} {list(weight.shape)}; their last "
            "dimensions, the features, must be equal"
        )


def _check_bias(name: str, bias: Tensor | None, weight_name: str, weight: Tensor) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{_NAME}: {name} has shape {list(bias.shape)} but {weight_name} {list(weight.shape)}; expected "
            f"[{weight.shape[0]}]"
        )


def chunked(a: Arguments, head: Callable[[Tensor], Tensor] | None = None) -> Results:
    """Loss and gradients in chunks of rows; ``head`` as in :func:`potstill.ops.linear_kd_chunks.run_chunks`."""
    return run_chunks(_checked(a, head is not None), head)


def _checked(a: Arguments, has_head: bool = False) -> Arguments:
    check(a, has_head)
    if a.teacher_indices is not None:
        a = a._replace(teacher_indices=a.teacher_indices.to(torch.int64))
    if a.target is not None:
        target = a.target.to(torch.int64)
        check_labels(_NAME, target, target != a.ignore_index, a.weight.shape[0], a.ignore_index)
        a = a._replace(target=target)
    return a


def _reference(a: Arguments) -> Results:
    a = _checked(a)
    student, counts = a.student.to(a.dtype), a.counting()
    if counts is not None:  # a row that does not count may hold anything, and 0 * NaN is no 0
        student = torch.where(counts.unsqueeze(-1), student, 0.0)
    logits = _linear(student, a.weight, a.bias)
    teacher = a.teacher if a.teacher_weight is None else _linear(a.teacher, a.teacher_weight, a.teacher_bias)
    loss, g = kd_loss.reference(logits, teacher.to(a.dtype), *a.options())
    nothing = [student.new_empty(0).to(gradient_dtype(x)) for x in (a.student, a.weight, a.weight)]
    if not a.options().need_grad:
        return loss, nothing[0], nothing[1], nothing[2]
    rows, x = g.reshape(-1, g.shape[-1]), student.reshape(-1, student.shape[-1])
    return (
        loss,
        (g @ a.weight.to(a.dtype)).to(gradient_dtype(a.student)) if a.need_hidden_grad else nothing[0],
        (rows.t() @ x).to(gradient_dtype(a.weight)) if a.need_weight_grad else nothing[1],
        rows.sum(0).to(gradient_dtype(a.bias)) if a.bias is not None and a.need_bias_grad else nothing[2],
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _fake(a: Arguments) -> Results:
    check(a)

    def like(x: Tensor, wanted: bool) -> Tensor:
        return x.new_empty(x.shape if wanted else (0,), dtype=gradient_dtype(x))

    return (
        a.student.new_empty((), dtype=a.dtype),
        like(a.student, a.need_hidden_grad),
        like(a.weight, a.need_weight_grad),
        like(a.weight if a.bias is None else a.bias, a.wants_bias),
    )


def _taking(function: Callable[[Arguments], Results]) -> Callable[..., Results]:
    # The dispatcher leaves out trailing arguments that have their defaults.
    def call(*args: Any, **named: Any) -> Results:
        return function(Arguments(*args, **named))

    call.__signature__ = inspect.signature(Arguments)  # type: ignore[attr-defined]
    return call


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    """Keeps the gradients that the forward has made."""
    a = Arguments(*inputs)
    gradients = []
    for name, x, gradient, wanted in (
        ("hidden", a.student, output[1], a.need_hidden_grad),
        ("weight", a.weight, output[2], a.need_weight_grad),
        ("bias", a.bias, output[3], a.need_bias_grad),
    ):
        needed = x is not None and x.requires_grad
        if needed and not wanted:
            raise RuntimeError(
                f"{_NAME}: need_{name}_grad is False but {'student' if name == 'hidden' else name} requires a "
                f"gradient; pass need_{name}_grad=True"
            )
        gradients.append(gradient if needed else None)
    ctx.dtypes = (a.student.dtype, a.weight.dtype, None if a.bias is None else a.bias.dtype)
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else torch fills tensors of zeros for the other outputs


def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments, which the forward has made."""
    found: list[Tensor | None] = [None] * len(Arguments._fields)
    if upstream is None:
        return tuple(found)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{_NAME}: no second derivative is defined; call backward() without create_graph=True")
    # loss.backward() starts from 1: autograd then keeps the saved tensors themselves.
    same = is_one(upstream)
    for position, gradient, dtype in zip(_DIFFERENTIABLE, ctx.saved_tensors, ctx.dtypes, strict=True):
        if gradient is not None:
            scaled = gradient if same else gradient * upstream.to(gradient.dtype)
            found[position] = scaled.to(dtype)
    return tuple(found)


_DIFFERENTIABLE = tuple(Arguments._fields.index(name) for name in ("student", "weight", "bias"))

linear_kd_loss: Op = Op(
    "linear_kd_loss(Tensor student, Tensor weight, Tensor teacher, Tensor? teacher_weight=None, Tensor? target=None, "
    "Tensor? bias=None, Tensor? teacher_bias=None, Tensor? teacher_indices=None, Tensor? row_weight=None, "
    "Tensor? normalizer=None, str divergence='forward_kl', float beta=0.5, str rest='tail', float temperature=1.0, "
    "float alpha=1.0, int ignore_index=-100, float label_smoothing=0.0, str reduction='mean', "
    "int? max_memory_bytes=None, bool need_hidden_grad=True, bool need_weight_grad=True, bool need_bias_grad=True) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_taking(_reference),
    fake=_taking(_fake),
    kernels={device: Kernel(_taking(chunked), _KERNEL_DTYPES) for device in ("cpu", "cuda")},
    differentiable=_DIFFERENTIABLE,
    setup_context=setup_context,
    backward=backward,
    samples=linear_kd_samples.samples,
    tolerance={torch.float32: 4e-6, torch.bfloat16: 4e-3},
    cost=linear_kd_samples.cost,
    run=lambda **arguments: linear_kd_samples.run(linear_kd_loss, **arguments),
    rivals=linear_kd_samples.rivals,
)
"""``alpha D(teacher, student) + (1 - alpha) CE(student, target)`` of the logits ``student @ weight.T + bias``.

Of the logits only a chunk of rows exists at a time, and their gradient overwrites them; the gradients by ``student``,
``weight`` and ``bias`` are made in the same pass, and backward only scales them.

- ``student``: hidden states [..., features]; ``weight``: [classes, features]; ``bias``: [classes] or None.
- ``teacher``: hidden states [..., features'] with ``teacher_weight`` [classes', features'] and maybe ``teacher_bias``
  [classes']; or, without a ``teacher_weight``, logits [..., classes']; or log-probabilities [..., k] of the classes
  ``teacher_indices`` [..., k]. The teacher counts as a constant.
- ``target``, ``row_weight``, ``normalizer`` and the options: as in :data:`potstill.ops.kd_loss`. Rows with an ignored
  label or of weight 0 count as absent; on the CPU they cost nothing. ``reduction`` is "mean" or "sum".
- ``max_memory_bytes``: chunks have the most rows for which 4 (classes + classes' + 2 features + features') bytes each
  fit, but at least 1, and are of equal size as far as possible (classes' and features' count only where logits are made
  of them, classes' also where rows of given ones are copied; bfloat16 on a GPU takes 2 classes more). None stands for
  32 MiB on a CPU and 1 GiB elsewhere, or for what 256 rows take, or 1/4 of all rows if they are fewer, if that is more.
  Beyond it there are the gradients; for half-precision weights a float32 sum of the weight's gradient and about 16 MiB
  for widened parts of each weight; and on a CPU up to as much again where malloc finds no place between what is
  in use. Fewer chunks are faster: each reads both weights, and reads and writes the weight's gradient.
- ``need_hidden_grad``, ``need_weight_grad``, ``need_bias_grad``: a gradient that is not needed is not computed.

Everything is computed in float32 (float64 if an input is), also for bfloat16 and float16 inputs and under autocast.
Any mix of float dtypes is accepted. On a GPU nothing waits for the device.

Returns the loss [], float32 or float64, and the gradients by ``student``, ``weight`` and ``bias`` of their shapes and
dtypes (float32 for float16), or [0] where not needed. Raises :class:`ValueError` for options, shapes or labels that do
not fit. A second derivative is not defined.

>>> student, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
>>> teacher, teacher_weight = torch.randn(6, 8), torch.randn(10, 8)
>>> loss, *_ = linear_kd_loss(student, weight, teacher, teacher_weight, temperature=2.0)
>>> loss.backward()
>>> student.grad.shape, weight.grad.shape
(torch.Size([6, 4]), torch.Size([10, 4]))
"""
