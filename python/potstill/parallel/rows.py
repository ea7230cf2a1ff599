"""The losses of whole rows from merged statistics, and the gradient of one rank's columns.

The formulas are those of :mod:`potstill.ops.divergence` and :mod:`potstill.ops.topk`; ``merged`` is what
:func:`potstill.parallel.statistics.merge` returns. The jsd and tv need both softmaxes for each of their terms, thus a
second round: :func:`second_statistics`, whose sums over the ranks join ``merged``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.ops.kd_loss import Options
from potstill.parallel.shards import VocabShards
from potstill.parallel.statistics import Rows, Slice, difference, expected


def needs_second_round(o: Options) -> bool:
    """Whether the divergence is a sum that cannot be written with each softmax up to its scale."""
    return o.alpha > 0.0 and o.teacher_indices is None and o.divergence in ("jsd", "tv")


def second_statistics(part: Slice, merged: Rows) -> Rows:
    """This rank's part of "value", the divergence without T^2, and of "pull", the mean over q of what pulls at q."""
    log_q, log_p = _log_softmaxes(part, merged)
    q, p, beta = log_q.exp(), log_p.exp(), part.options.beta
    if part.options.divergence == "tv":
        return {"value": 0.5 * expected(torch.ones_like(q), (q - p).abs()), "pull": expected(q, _tv_pull(q, p))}
    log_m = _mixture(log_p, log_q, beta)
    pull = expected(q, log_q - log_m)
    return {"value": beta * expected(p, log_p - log_m) + (1.0 - beta) * pull, "pull": (1.0 - beta) * pull}


def row_losses(merged: Rows, o: Options, shards: VocabShards) -> Tensor:
    """[rows] in float64, not yet weighted; of any value where the label is ignored."""
    loss = torch.zeros_like(next(iter(merged.values())))
    if o.alpha > 0.0:
        loss = loss + o.alpha * _divergences(merged, o, shards)
    if o.alpha < 1.0:
        total = merged["label_max"] + merged["label_log"]
        hard = total - merged["label_logit"]
        if o.label_smoothing > 0.0:
            mean = merged["label_total"] / shards.classes
            hard = (1.0 - o.label_smoothing) * hard + o.label_smoothing * (total - mean)
        loss = loss + (1.0 - o.alpha) * hard
    return loss


def _divergences(merged: Rows, o: Options, shards: VocabShards) -> Tensor:
    if o.divergence == "mse":
        return merged["squares"] / min(shards.classes, shards.teacher_classes)
    if o.teacher_indices is not None:
        value = _top_k(merged, o)
    elif "value" in merged:
        value = merged["value"]
    elif o.divergence == "soft_ce":
        value = merged["cross"] + merged["student_log"]
    else:
        signed = -1.0 if o.divergence == "reverse_kl" else 1.0
        value = merged["cross"] + signed * (merged["student_log"] - merged["teacher_log"])
    if o.divergence == "dkd":
        value = _target_part(merged, o, shards) + o.beta * value
    return o.temperature**2 * value


def _top_k(merged: Rows, o: Options) -> Tensor:
    r, log_q_rest = _rest(merged, o)
    value = merged["cross"] + merged["mass"] * merged["student_log"]
    value = value - torch.where(r == 0.0, 0.0, r * log_q_rest)
    return value + merged["entropy"] + torch.xlogy(r, r) if o.divergence == "forward_kl" else value


def _rest(merged: Rows, o: Options) -> tuple[Tensor, Tensor]:
    # The teacher's probability of the classes that are not given, and the logarithm of the student's.
    log_q = (merged["rest_max"] - merged["student_max"]) / o.temperature + merged["rest_log"] - merged["student_log"]
    if o.rest != "tail":
        return torch.zeros_like(log_q), log_q
    return torch.where(log_q == -math.inf, 0.0, (1.0 - merged["mass"]).clamp(min=0.0)), log_q


def _target_part(merged: Rows, o: Options, shards: VocabShards) -> Tensor:
    assert o.target is not None
    log_q, log_p = _binary(merged, "student", o.temperature), _binary(merged, "teacher", o.temperature)
    value = torch.zeros_like(log_q[0])
    for p, q in zip(log_p, log_q, strict=True):
        value = value + torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return torch.where(_present(o, shards), value, 0.0)


def _present(o: Options, shards: VocabShards) -> Tensor:
    # A label that the teacher lacks leaves both distributions whole.
    assert o.target is not None
    return (o.target >= 0) & (o.target < min(shards.classes, shards.teacher_classes))


def _binary(merged: Rows, name: str, temperature: float) -> tuple[Tensor, Tensor]:
    # Log-probabilities of the label and of all others; logits relative to the maximum of the others, as their sum is.
    own, rest = (merged[f"{name}_own"] - merged[f"{name}_max"]) / temperature, merged[f"{name}_log"]
    total = torch.logaddexp(own, rest)
    return own - total, rest - total


def local_gradient(part: Slice, merged: Rows) -> Tensor:
    """Of the sum of the rows' losses by ``part.student``: [rows, columns], not yet weighted."""
    o, gradient = part.options, torch.zeros_like(part.student)
    if o.alpha > 0.0:
        soft = _top_k_gradient(part, merged) if o.teacher_indices is not None else _divergence_gradient(part, merged)
        gradient[:, : soft.shape[-1]] = o.alpha * soft
    if o.alpha < 1.0:
        hard = _log_softmax(part.student, merged, "label", 1.0).exp()
        if o.label_smoothing > 0.0:
            hard -= o.label_smoothing / part.shards.classes
        own = torch.full_like(merged["label_max"], o.label_smoothing - 1.0)
        gradient += (1.0 - o.alpha) * _add_at_label(part, hard, own)
    return gradient


def _divergence_gradient(part: Slice, merged: Rows) -> Tensor:
    o = part.options
    if o.divergence == "mse":
        return 2.0 / min(part.shards.classes, part.shards.teacher_classes) * difference(*part.common())
    if o.divergence == "dkd":
        return o.temperature * _decoupled_gradient(part, merged)
    log_q, log_p = _log_softmaxes(part, merged)
    q, p = log_q.exp(), log_p.exp()
    if o.divergence in ("forward_kl", "soft_ce"):
        return o.temperature * (q - p)
    if o.divergence == "tv":
        pull, mean = _tv_pull(q, p), merged["pull"]
    elif o.divergence == "reverse_kl":
        pull, mean = log_q - log_p, merged["cross"] - merged["student_log"] + merged["teacher_log"]
    else:
        pull, mean = (1.0 - o.beta) * (log_q - _mixture(log_p, log_q, o.beta)), merged["pull"]
    return o.temperature * q * (torch.where(q == 0.0, 0.0, pull) - _column(mean, q))


def _decoupled_gradient(part: Slice, merged: Rows) -> Tensor:
    o = part.options
    student, teacher = part.others()
    q = _log_softmax(student, merged, "student", o.temperature).exp()
    p = _log_softmax(teacher, merged, "teacher", o.temperature).exp()
    (log_q, log_rest), (log_p, log_teacher_rest) = (_binary(merged, n, o.temperature) for n in ("student", "teacher"))
    # p_y - q_y from the smaller pair: near 1 both would have lost their last digits.
    pull = torch.where(log_p > -1.0, log_rest.exp() - log_teacher_rest.exp(), log_p.exp() - log_q.exp())
    pull = torch.where(_present(o, part.shards), pull, 0.0)
    return _add_at_label(part, _column(pull, q) * q + o.beta * (q - p), -pull)


def _top_k_gradient(part: Slice, merged: Rows) -> Tensor:
    o = part.options
    p, _ = part.given()
    q = _log_softmax(part.student, merged, "student", o.temperature).exp()
    r, log_q_rest = _rest(merged, o)
    outside = torch.where(r == 0.0, 0.0, r / log_q_rest.exp())
    total = merged["mass"] + r
    return o.temperature * torch.where(p == 0.0, _column(total - outside, q) * q, _column(total, q) * q - p)


def _log_softmaxes(part: Slice, merged: Rows) -> tuple[Tensor, Tensor]:
    student, teacher = part.common()
    t = part.options.temperature
    return _log_softmax(student, merged, "student", t), _log_softmax(teacher, merged, "teacher", t)


def _log_softmax(logits: Tensor, merged: Rows, name: str, temperature: float) -> Tensor:
    # The maximum is one of the logits, so it is exact in their dtype; what is left has the softmax's own precision.
    return (logits - _column(merged[f"{name}_max"], logits)) / temperature - _column(merged[f"{name}_log"], logits)


def _column(rows: Tensor, beside: Tensor) -> Tensor:
    return rows.to(beside.dtype).unsqueeze(-1)


def _add_at_label(part: Slice, gradient: Tensor, values: Tensor) -> Tensor:
    if gradient.shape[-1] == 0:
        return gradient
    here, label = part.labels(gradient.shape[-1])
    return gradient.scatter_add_(-1, label, _column(torch.where(here, values, 0.0), gradient))


def _tv_pull(q: Tensor, p: Tensor) -> Tensor:
    return 0.5 * torch.sign(q - p)


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
