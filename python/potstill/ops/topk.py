"""A teacher known by its k likeliest classes: how to make one, and its divergence from a student, in plain torch.

With p_i the given probabilities (a class given twice has their sum, P = sum p) and q the student's at temperature T,
both divergences have the form sum p_i (ln p_i - ln q_i) + r (ln r - ln q_r), where q_r is the student's probability of
all classes that are not given, and ``rest`` says what the teacher's is:

- "tail": r = 1 - P: all other classes count as one. A student that has no other class has no such term.
- "renormalize": the given ones are all that there is: p_i / P for p_i, and r = 0.
- "partial": r = 0, and P stays below 1. Pulls the student's P up to 1; its minimum is not at q = p.

The gradient by s_i, divided by T, is (P + r) q_i - p_i for a class that is given, (P + r - r / q_r) q_i for another.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

REST = ("tail", "renormalize", "partial")


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The ``k`` largest log-probabilities of ``logits / temperature`` [..., classes], and their classes: [..., k] each.

    Log-probabilities are float32 (float64 for float64 logits), classes int64. Given to
    :func:`potstill.ops.kd_loss` as ``teacher`` and ``teacher_indices`` they replace the logits at 1 / classes of the
    memory times ``3 k``; use the same temperature there. Raises :class:`ValueError` if there are fewer classes.

    >>> log_probs, indices = top_k(torch.tensor([[0.0, 3.0, 1.0]]), 2)
    >>> indices
    tensor([[1, 2]])
    >>> log_probs.exp()
    tensor([[0.8438, 0.1142]])
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k: k is {k}; expected 1 to {logits.shape[-1]}, the number of classes")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    values, indices = logits.topk(k, -1)
    total = torch.logsumexp(logits.to(dtype) / temperature, -1, keepdim=True)
    return values.to(dtype) / temperature - total, indices


def check_top_k(op: str, log_probs: Tensor, indices: Tensor, classes: int, divergence: str) -> None:
    """Raises :class:`ValueError` for a teacher that is none of ``classes``' top k."""
    if divergence not in ("forward_kl", "soft_ce"):
        raise ValueError(f"{op}: {divergence} needs the teacher's logits; its top k serve forward_kl and soft_ce")
    if indices.shape != log_probs.shape:
        raise ValueError(
            f"{op}: teacher_indices has shape {list(indices.shape)} but teacher, the log-probabilities, "
            f"{list(log_probs.shape)}; they must be equal"
        )
    if indices.is_floating_point():
        raise ValueError(f"{op}: teacher_indices has dtype {indices.dtype}; expected integers")
    if log_probs.device.type != "cpu" or log_probs.numel() == 0 or type(log_probs) is not Tensor:
        return  # looking at the values would wait for the device
    low, high = (int(x) for x in indices.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{op}: teacher_indices has the class {low if low < 0 else high}; expected 0 to {classes - 1}. Give a "
            "class that the student lacks the index 0 and the log-probability -inf"
        )
    largest = float(log_probs.max())
    if largest > 1e-2:  # bfloat16's rounding of a probability of 1 is less
        raise ValueError(
            f"{op}: teacher has the log-probability {largest:g}; expected at most 0. With teacher_indices it takes "
            "log-probabilities, as top_k makes them"
        )


def row_topk_divergences(
    student: Tensor, log_probs: Tensor, indices: Tensor, divergence: str, rest: str, temperature: float
) -> Tensor:
    """[..., classes], [..., k], [..., k] -> [...], differentiable by ``student``; T^2 is included."""
    log_q = F.log_softmax(student / temperature, -1)
    p, r, log_q_rest = _parts(log_q, log_probs, indices, rest)
    value = -(p * log_q.masked_fill(p == 0.0, 0.0)).sum(-1)
    value = value - r * log_q_rest.masked_fill(r == 0.0, 0.0)
    if divergence == "forward_kl":
        value = value + torch.xlogy(p, p).sum(-1) + torch.xlogy(r, r)
    return temperature**2 * value


def row_topk_gradients(student: Tensor, log_probs: Tensor, indices: Tensor, rest: str, temperature: float) -> Tensor:
    """The gradient of the sum of :func:`row_topk_divergences`, the same for both divergences."""
    log_q = F.log_softmax(student / temperature, -1)
    q = log_q.exp()
    p, r, log_q_rest = _parts(log_q, log_probs, indices, rest)
    outside = torch.where(r > 0.0, r / log_q_rest.exp(), 0.0).unsqueeze(-1)
    total = (p.sum(-1) + r).unsqueeze(-1)
    return temperature * torch.where(p > 0.0, total * q - p, (total - outside) * q)


def _parts(log_q: Tensor, log_probs: Tensor, indices: Tensor, rest: str) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.zeros_like(log_q).scatter_add(-1, indices, log_probs.to(log_q.dtype).exp())
    total = p.sum(-1)
    log_q_rest = log_q.masked_fill(p > 0.0, -math.inf).logsumexp(-1)
    r = torch.zeros_like(total)
    if rest == "renormalize":
        p = p / total.unsqueeze(-1)
    elif rest == "tail":
        r = torch.where(log_q_rest == -math.inf, 0.0, (1.0 - total).clamp(min=0.0))
    return p, r, log_q_rest
