"""The CUDA implementation of ``kd_loss``: chooses and launches the kernels, and never waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from potstill.ops.kd_loss import Options, kd_loss
from potstill.ops.triton.kd_loss_kernel import kd_loss_kernel
from potstill.ops.triton.kd_rows import count_kernel
from potstill.ops.triton.kd_topk_kernel import topk_kernel

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

# By 8 logits per thread, which is 16 bytes at once of the 16-bit dtypes. Two such programs fit a multiprocessor: enough
# loads under way to fill the memory's latency, and yet so few rows that L2 keeps most of them for the next pass.
LARGEST_BLOCK = 4096
LARGEST_K_BLOCK = 32  # all pairs of two such blocks are compared at once


def launch(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient, as the reference has them."""
    if teacher.dtype not in DTYPES:
        return kd_loss.reference(student, teacher, *rest)  # type: ignore[no-any-return]
    loss, grad = kd_loss.fake(student, teacher, *rest)  # checks, and allocates
    o = Options(*rest)
    return _run(_rows(student), _rows(teacher), o, loss, _rows(grad) if o.need_grad else None), grad


def launch_in_place(student: Tensor, teacher: Tensor, o: Options) -> Tensor:
    """The loss; its gradient overwrites ``student`` [rows, classes]."""
    if teacher.dtype not in DTYPES or student.dtype not in DTYPES or student.stride(-1) != 1:
        loss, grad = (
            launch(student, teacher, *o) if student.dtype in DTYPES else kd_loss.reference(student, teacher, *o)
        )
        student.copy_(grad)
        return loss
    loss = student.new_empty(student.shape[:-1] if o.reduction == "none" else (), dtype=torch.float32)
    return _run(student, _rows(teacher), o, loss, student)


def _run(student: Tensor, teacher: Tensor, o: Options, loss: Tensor, grad: Tensor | None) -> Tensor:
    rows = student.shape[0]
    losses = loss.view(-1) if o.reduction == "none" else loss.new_empty(rows)
    with torch.cuda.device_of(student):
        if rows > 0:
            by_row: dict[str, Any] = {
                "student": student,
                "target": _flat(o.target),
                "row_weight": _flat(o.row_weight),
                "count": _count(student, o),
                "loss": losses,
                "classes": student.shape[1],
                "cool": 1.0 / o.temperature,
                "hard": 1.0 - o.alpha,
                "smoothing": o.label_smoothing,
                "divisor": float(rows) if o.reduction == "mean" else 1.0,
                "ignore_index": o.ignore_index,
                "HARD": o.alpha < 1.0,
                "SMOOTH": o.alpha < 1.0 and o.label_smoothing > 0.0,
            }
            if o.teacher_indices is None or o.alpha == 0.0:
                _launch_logits(by_row, student, teacher, o, grad)
            else:
                _launch_top_k(by_row, student, teacher, _rows(o.teacher_indices), o, grad)
        return loss if o.reduction == "none" else losses.sum()


def _launch_logits(by_row: dict[str, Any], student: Tensor, teacher: Tensor, o: Options, grad: Tensor | None) -> None:
    classes = student.shape[1]
    divergence = o.divergence if o.alpha > 0.0 else "none"
    if divergence == "none":
        teacher = student
    common = min(classes, teacher.shape[1])
    soft = divergence not in ("none", "mse", "dkd")
    strides = (student.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0))
    kd_loss_kernel[(student.shape[0],)](
        **by_row,
        teacher=teacher,
        grad=grad,
        s_stride=strides[0],
        t_stride=strides[1],
        g_stride=strides[2],
        common=common,
        soft_value=o.alpha if divergence == "mse" else o.alpha * o.temperature**2,
        soft_grad=o.alpha if divergence == "mse" else o.alpha * o.temperature,
        beta=o.beta,
        rest=1.0 - o.beta,
        DIVERGENCE=divergence,
        EXTRA=common < classes,
        POWER=_power(o) if soft and common == classes else 0,
        **_shape(common, divergence, (classes, common, *strides), student, teacher),
    )


def _launch_top_k(
    by_row: dict[str, Any], student: Tensor, log_probs: Tensor, indices: Tensor, o: Options, grad: Tensor | None
) -> None:
    rows, classes = student.shape
    k = indices.shape[1]
    out = torch.empty_like(student) if grad is None and o.rest == "tail" else grad
    strides = (student.stride(0), 0 if out is None else out.stride(0))
    topk_kernel[(rows,)](
        **by_row,
        out=out,
        log_probs=log_probs,
        indices=indices,
        kept=student.new_empty((rows, 2, k), dtype=torch.float32),
        s_stride=strides[0],
        o_stride=strides[1],
        p_stride=log_probs.stride(0),
        i_stride=indices.stride(0),
        k=k,
        soft_value=o.alpha * o.temperature**2,
        soft_grad=o.alpha * o.temperature,
        DIVERGENCE=o.divergence,
        REST=o.rest,
        GRAD=grad is not None,
        COPY=out is not student,
        POWER=_power(o),
        K_BLOCK=min(LARGEST_K_BLOCK, triton.next_power_of_2(k)),
        **_shape(classes, o.divergence, (classes, *strides), student),
    )


def _shape(columns: int, divergence: str, sizes: tuple[int, ...], *tensors: Tensor) -> dict[str, Any]:
    """How a row is cut into blocks [times, threads, vector], and how its kernel is compiled.

    ``sizes`` are the numbers of columns and the strides, which vectors must divide. Where dtypes are mixed the larger
    one's vector serves both: each thread then has the same columns of both, and they need not be exchanged.
    """
    whole = 16 // max(x.element_size() for x in tensors)  # what a thread may load at once
    align = math.gcd(whole, *sizes) if all(x.data_ptr() % 16 == 0 for x in tensors) else 1
    # Three passes need more registers than all the threads can have; so does loading one by one, even with fewer logits
    # per thread.
    largest = LARGEST_BLOCK // (2 if divergence in ("jsd", "tv") else 1) // (2 if align < whole else 1)
    block = min(largest, max(128, triton.next_power_of_2(columns)))
    warps = max(1, block // (256 if align == whole else 128))
    vector = min(align, block // (32 * warps))
    shape = (block // (32 * warps * vector), 32 * warps, vector)
    # Two programs of 512 threads or three of 256; left to itself ptxas spills some for one more, or fits one less.
    registers = 64 if warps > 8 else 80
    return {"ALIGN": align, "SHAPE": shape, "num_warps": warps, "maxnreg": registers, "enable_fp_fusion": True}


def _power(o: Options) -> int:
    return int(o.temperature) if o.temperature in (1.0, 2.0, 4.0) and o.alpha < 1.0 else 0


def _count(student: Tensor, o: Options) -> Tensor | None:
    """What a mean is divided by, if it is known to the device alone."""
    if o.reduction != "mean":
        return None
    if o.normalizer is not None:
        return o.normalizer.to(student.device, non_blocking=True)
    if o.target is None:
        return None
    count = student.new_empty((), dtype=torch.float32)
    target = _flat(o.target)
    count_kernel[(1,)](target, count, o.target.numel(), o.ignore_index, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    return count


def _rows(x: Tensor) -> Tensor:
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _flat(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.reshape(-1).contiguous()
