"""What one rank knows of each row from its own columns, and how the ranks' knowledge becomes that of whole rows.

Of a row x, split by columns, each rank r sends its maximum m_r and Z_r = sum e^((x - m_r) / T). With M = max m_r,

    Z = sum_r c_r Z_r,  c_r = e^((m_r - M) / T),  and the logarithm of the sum of e^(x / T) is M / T + ln Z.

A sum of logit differences weighted by a softmax is kept relative to the maxima, where its terms are small numbers; for
the forward KL, with s and t of maxima m_r and n_r here, M and N everywhere,

    A_r = sum e^((t - n_r) / T) ((t - n_r) - (s - m_r)) / T
    A   = sum_r c_r (A_r + Z_r ((n_r - N) - (m_r - M)) / T),        KL = A / Z_t - ln Z_t + ln Z_s.

A maximum is at least the lowest finite number, so that no -inf is subtracted from another: a rank whose columns are all
-inf (or that has none) adds 0. Terms are computed in the logits' wide dtype; they are summed, sent and merged as
float64, where the sums lose nothing that the terms had.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from potstill.ops.kd_loss import Options
from potstill.parallel.shards import VocabShards

Rows = dict[str, Tensor]  # name -> [rows] float64 (merge takes [ranks, rows])

# The weights' pair (maximum and sum) of the sum "cross", and the other whose maximum it is relative to.
_CROSS = {
    "forward_kl": ("teacher", "student"),
    "dkd": ("teacher", "student"),
    "reverse_kl": ("student", "teacher"),
    "soft_ce": ("teacher", "student"),
}


class Slice(NamedTuple):
    """Logits [rows, columns] of one rank in their wide dtype; ``teacher`` [rows, k] if the teacher's top k are given.

    ``options`` has tensors of the same rows, ``target`` int64 and ``teacher_indices`` int64, in global numbers.
    """

    student: Tensor
    teacher: Tensor
    options: Options
    shards: VocabShards

    def common(self) -> tuple[Tensor, Tensor]:
        """The columns that both have."""
        columns = min(self.student.shape[-1], self.teacher.shape[-1])
        return self.student[:, :columns], self.teacher[:, :columns]

    def labels(self, columns: int) -> tuple[Tensor, Tensor]:
        """For the first ``columns``: whether the label is one of them, [rows], and which, [rows, 1] (0 if none is)."""
        assert self.options.target is not None
        label = self.options.target - self.shards.start
        here = (label >= 0) & (label < columns)
        return here, torch.where(here, label, 0).unsqueeze(-1)

    def at_label(self, logits: Tensor) -> Tensor:
        """The logit of the label, [rows]; 0 where another rank has it."""
        here, label = self.labels(logits.shape[-1])
        if logits.shape[-1] == 0:
            return torch.zeros_like(here, dtype=torch.float64)
        return torch.where(here, logits.gather(-1, label).squeeze(-1), 0.0).double()

    def others(self) -> tuple[Tensor, Tensor]:
        """:meth:`common` without the label's column, which becomes -inf."""
        student, teacher = self.common()
        here, label = self.labels(student.shape[-1])
        if student.shape[-1] == 0:
            return student, teacher
        mask = torch.zeros_like(student, dtype=torch.bool).scatter(-1, label, here.unsqueeze(-1))
        return student.masked_fill(mask, -torch.inf), teacher.masked_fill(mask, -torch.inf)

    def given(self) -> tuple[Tensor, Tensor]:
        """Of the top k: each of this rank's columns' probability [rows, columns], and their sum on all ranks [rows]."""
        assert self.options.teacher_indices is not None
        probability = self.teacher.exp()
        total = probability.sum(-1)
        index = self.options.teacher_indices - self.shards.start
        here = (index >= 0) & (index < self.student.shape[-1])
        p = torch.zeros_like(self.student)
        if p.shape[-1]:
            p.scatter_add_(-1, torch.where(here, index, 0), torch.where(here, probability, 0.0))
        return (p / total.unsqueeze(-1) if self.options.rest == "renormalize" else p), total


def local_statistics(part: Slice) -> Rows:
    """What this rank sends of each row: one loss always has the same names, in the same order."""
    found: Rows = {}
    o = part.options
    if o.alpha > 0.0:
        found |= _top_k_statistics(part) if o.teacher_indices is not None else _divergence_statistics(part)
    if o.alpha < 1.0:
        maximum, weights = _softmax(part.student, 1.0)
        found |= _pair("label", maximum, weights) | {"label_logit": part.at_label(part.student)}
        if o.label_smoothing > 0.0:
            found["label_total"] = _sum(part.student)
    return found


def _divergence_statistics(part: Slice) -> Rows:
    o = part.options
    if o.divergence == "mse":
        return {"squares": _sum(difference(*part.common()).square())}
    student, teacher = part.others() if o.divergence == "dkd" else part.common()
    (m, q), (n, p) = _softmax(student, o.temperature), _softmax(teacher, o.temperature)
    found = _pair("student", m, q) | _pair("teacher", n, p)
    if o.divergence == "dkd":
        found |= {"student_own": part.at_label(part.common()[0]), "teacher_own": part.at_label(part.common()[1])}
    if o.divergence in ("forward_kl", "dkd"):
        found["cross"] = expected(p, ((teacher - n) - (student - m)) / o.temperature)
    elif o.divergence == "reverse_kl":
        found["cross"] = expected(q, ((student - m) - (teacher - n)) / o.temperature)
    elif o.divergence == "soft_ce":
        found["cross"] = expected(p, (m - student) / o.temperature)
    return found


def _top_k_statistics(part: Slice) -> Rows:
    o = part.options
    p, _ = part.given()
    m, q = _softmax(part.student, o.temperature)
    n, outside = _softmax(part.student.masked_fill(p > 0.0, -torch.inf), o.temperature)
    found = _pair("student", m, q) | _pair("rest", n, outside) | {"mass": _sum(p)}
    found["cross"] = expected(p, (m - part.student) / o.temperature)
    if o.divergence == "forward_kl":
        found["entropy"] = _sum(torch.xlogy(p, p))
    return found


def _softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    lowest = torch.finfo(logits.dtype).min
    if logits.shape[-1] == 0:
        return logits.new_full((logits.shape[0], 1), lowest), logits
    maximum = logits.amax(-1, keepdim=True).clamp(min=lowest)
    return maximum, ((logits - maximum) / temperature).exp()


def _pair(name: str, maximum: Tensor, weights: Tensor) -> Rows:
    return {f"{name}_max": maximum.squeeze(-1).double(), f"{name}_sum": _sum(weights)}


def _sum(terms: Tensor) -> Tensor:
    return terms.sum(-1, dtype=torch.float64)


def expected(weight: Tensor, value: Tensor) -> Tensor:
    """The sum of ``weight * value`` over the columns, in float64; a weight of 0 makes any value absent."""
    return _sum(torch.where(weight == 0.0, 0.0, weight * value))


def difference(student: Tensor, teacher: Tensor) -> Tensor:
    """``student - teacher``, and 0 where both are -inf."""
    return (student - teacher).masked_fill((student == -torch.inf) & (teacher == -torch.inf), 0.0)


def merge(ranks: Rows, o: Options) -> Rows:
    """[ranks, rows] each -> [rows]: "x_max" and "x_sum" become "x_max" and "x_log", the logarithm of the sum."""
    merged: Rows = {}
    scales: Rows = {}
    shifts: Rows = {}
    for name in [key.removesuffix("_max") for key in ranks if key.endswith("_max")]:
        temperature = 1.0 if name == "label" else o.temperature
        top = ranks[f"{name}_max"].amax(0)
        shifts[name] = (ranks[f"{name}_max"] - top) / temperature
        scales[name] = shifts[name].exp()
        merged[f"{name}_max"] = top
        merged[f"{name}_log"] = (scales[name] * ranks[f"{name}_sum"]).sum(0).log()
    if "cross" in ranks:
        merged["cross"] = _merged_cross(ranks, shifts, scales, merged, o)
    alone = [key for key in ranks if key != "cross" and not key.endswith(("_max", "_sum"))]
    return merged | {key: ranks[key].sum(0) for key in alone}


def _merged_cross(ranks: Rows, shifts: Rows, scales: Rows, merged: Rows, o: Options) -> Tensor:
    # The mean over the weights: divided by their sum here, so that nothing else needs the sum itself.
    if o.teacher_indices is not None:
        return (ranks["cross"] - ranks["mass"] * shifts["student"]).sum(0)
    weights, other = _CROSS[o.divergence]
    shift = -shifts[other] if o.divergence == "soft_ce" else shifts[weights] - shifts[other]
    scale = scales[weights]
    terms = torch.where(scale == 0.0, 0.0, scale * (ranks["cross"] + ranks[f"{weights}_sum"] * shift))
    return terms.sum(0) / merged[f"{weights}_log"].exp()
