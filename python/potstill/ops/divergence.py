"""How far a student's distribution is from its teacher's: each divergence and its gradient, row by row, in plain torch.

With s and t a row's logits at the columns that both have, T the temperature, q = softmax(s/T), p = softmax(t/T):

==========  ======================================================  ==============================================
name        value (all times T^2, but mse)                          gradient by s_i (all times T, but mse)
==========  ======================================================  ==============================================
forward_kl  sum p (ln p - ln q)                                     q_i - p_i
soft_ce     - sum p ln q                                            q_i - p_i
reverse_kl  R = sum q (ln q - ln p)                                 q_i (ln q_i - ln p_i - R)
jsd         b KL(p, m) + (1-b) KL(q, m), m = b p + (1-b) q          (1-b) q_i (ln q_i - ln m_i - KL(q, m))
tv          1/2 sum abs(q - p)                                      1/2 q_i (g_i - sum q g), g = sign(q - p)
dkd         KL of (p_y, 1-p_y) from (q_y, 1-q_y) + b sum P ln(P/Q)  (p_y - q_y) Q_i + b (Q_i - P_i); q_y - p_y at y
mse         1/v sum (s - t)^2                                       2/v (s_i - t_i)
==========  ======================================================  ==============================================

b is ``beta``; y is the label, P and Q are p and q without it, renormalised; v is the number of columns. Where a
probability is exactly 0, because its logit is -inf, its term is 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv", "dkd", "soft_ce", "mse")


def check_divergence(op: str, divergence: str, beta: float) -> None:
    """Raises :class:`ValueError` for a divergence that does not exist, or a ``beta`` that it does not take."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"{op}: divergence is {divergence!r}; expected one of {', '.join(DIVERGENCES)}")
    if divergence == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(
            f"{op}: beta is {beta}; the jsd takes a number between 0 and 1 (its limits are 0: use forward_kl or "
            "reverse_kl)"
        )
    if divergence == "dkd" and not 0.0 <= beta < math.inf:
        raise ValueError(f"{op}: beta is {beta}; dkd takes the weight of its non-target part, a number of at least 0")


def row_divergences(
    student: Tensor, teacher: Tensor, target: Tensor | None, divergence: str, beta: float, temperature: float
) -> Tensor:
    """[..., v], [..., v], labels [...] (of dkd) -> [...], differentiable by autograd; T^2 is included."""
    if divergence == "mse":
        return _difference(student, teacher).square().mean(-1)
    if divergence == "dkd":
        return temperature**2 * _decoupled(student / temperature, teacher / temperature, target, beta)
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    if divergence == "forward_kl":
        rows = _expected(log_p, log_p - log_q)
    elif divergence == "soft_ce":
        rows = _expected(log_p, -log_q)
    elif divergence == "reverse_kl":
        rows = _expected(log_q, log_q - log_p)
    elif divergence == "jsd":
        log_m = _mixture(log_p, log_q, beta)
        rows = beta * _expected(log_p, log_p - log_m) + (1.0 - beta) * _expected(log_q, log_q - log_m)
    else:
        rows = 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)
    return temperature**2 * rows


def row_divergence_gradients(
    student: Tensor, teacher: Tensor, target: Tensor | None, divergence: str, beta: float, temperature: float
) -> Tensor:
    """The gradient of the sum of :func:`row_divergences` by ``student``, in closed form."""
    if divergence == "mse":
        return 2.0 / student.shape[-1] * _difference(student, teacher)
    if divergence == "dkd":
        return temperature * _decoupled_gradient(student / temperature, teacher / temperature, target, beta)
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    q, p = log_q.exp(), log_p.exp()
    if divergence in ("forward_kl", "soft_ce"):
        return temperature * (q - p)
    if divergence == "tv":
        pull = 0.5 * torch.sign(q - p)
    elif divergence == "reverse_kl":
        pull = torch.where(q == 0.0, 0.0, log_q - log_p)
    else:
        pull = (1.0 - beta) * torch.where(q == 0.0, 0.0, log_q - _mixture(log_p, log_q, beta))
    return temperature * q * (pull - (q * pull).sum(-1, keepdim=True))


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    absent = (student == -math.inf) & (teacher == -math.inf)
    return student.masked_fill(absent, 0.0) - teacher.masked_fill(absent, 0.0)


def _expected(log_weight: Tensor, value: Tensor) -> Tensor:
    # Both are masked before they are multiplied: 0 * inf would be a NaN, in the value and in autograd's gradient.
    weight = log_weight.exp()
    return (weight * value.masked_fill(weight == 0.0, 0.0)).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    absent = (log_p == -math.inf) & (log_q == -math.inf)  # autograd of logaddexp(-inf, -inf) is a NaN
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _decoupled(student: Tensor, teacher: Tensor, target: Tensor | None, beta: float) -> Tensor:
    # A label that the teacher lacks leaves both distributions whole: there is nothing to decouple.
    present, label = _labels(student, target)
    (own, others), (teacher_own, teacher_others) = _split(student, present, label), _split(teacher, present, label)
    target_part = torch.zeros_like(own)
    for log_p, log_q in zip(_binary(teacher_own, teacher_others), _binary(own, others), strict=True):
        target_part = target_part + torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
    log_q, log_p = F.log_softmax(others, -1), F.log_softmax(teacher_others, -1)
    rest = _expected(log_p, log_p - log_q)
    return torch.where(present, target_part, 0.0) + beta * rest


def _decoupled_gradient(student: Tensor, teacher: Tensor, target: Tensor | None, beta: float) -> Tensor:
    present, label = _labels(student, target)
    (own, others), (teacher_own, teacher_others) = _split(student, present, label), _split(teacher, present, label)
    log_q, log_rest = _binary(own, others)
    log_p, log_teacher_rest = _binary(teacher_own, teacher_others)
    # p_y - q_y from the smaller pair: near 1 both would have lost their last digits.
    pull = torch.where(log_p > -1.0, log_rest.exp() - log_teacher_rest.exp(), log_p.exp() - log_q.exp())
    pull = torch.where(present, pull, 0.0).unsqueeze(-1)
    q, p = F.softmax(others, -1), F.softmax(teacher_others, -1)
    gradient = pull * q + beta * (q - p)
    return gradient.scatter_add(-1, label.unsqueeze(-1), -pull)


def _labels(student: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    if target is None:
        raise ValueError("dkd: target is None; it needs the labels")
    present = (target >= 0) & (target < student.shape[-1])
    return present, torch.where(present, target, 0)


def _split(logits: Tensor, present: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    own = logits.gather(-1, label.unsqueeze(-1))
    return own.squeeze(-1), logits.scatter(-1, label.unsqueeze(-1), torch.where(present.unsqueeze(-1), -math.inf, own))


def _binary(own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    rest = others.logsumexp(-1)
    total = torch.logaddexp(own, rest)
    return own - total, rest - total
