"""The distillation loss of heads that are split by vocabulary, from hidden states: no logits of all rows are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from potstill.ops.kd_loss import Options, check_options, check_rows, divisor, weighted, wide
from potstill.parallel.checks import check_classes, check_local, find_shards, problem_of
from potstill.parallel.kd_loss import flattened, losses_and_gradient, rows_of, scaled
from potstill.parallel.shards import VocabShards, add_up, gather, ranks_of

OP = "vocab_parallel_linear_kd_loss"
_BYTES_PER_LOGIT = 64  # of a chunk: both logits and the gradient in float32, and the temporaries of its computation


class _Heads(NamedTuple):
    """What the loss is computed from; hidden states as [rows, features]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None


class _Plan(NamedTuple):
    """How it is computed; ``step`` rows at a time. ``needs`` says which of hidden, weight, bias need a gradient."""

    options: Options
    shards: VocabShards
    group: dist.ProcessGroup | None
    step: int
    needs: tuple[bool, bool, bool]


def vocab_parallel_linear_kd_loss(
    student_hidden: Tensor,
    weight_shard: Tensor,
    teacher_hidden: Tensor,
    teacher_weight_shard: Tensor,
    target: Tensor | None = None,
    *,
    bias_shard: Tensor | None = None,
    teacher_bias_shard: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    shards: VocabShards | None = None,
    max_memory_bytes: int = 512 << 20,
    row_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """:func:`vocab_parallel_kd_loss` of ``hidden @ weight_shard.T + bias_shard``, some rows at a time.

    - ``student_hidden`` [..., features], ``teacher_hidden`` [..., its features]: the same on every rank.
    - ``weight_shard`` [columns, features], ``bias_shard`` [columns], and the teacher's: this rank's rows of the heads.
    - ``target`` and the options: as for :func:`vocab_parallel_kd_loss`; ``reduction`` is "mean" or "sum".
    - ``max_memory_bytes``: roughly what a chunk of rows may take on a rank that holds an equal share of the vocabulary,
      beside the gradients; the same on every rank.

    Logits are float32 whatever the dtype of hidden states and weights is, also under autocast: the gradient is a
    difference of nearly equal probabilities, which logits rounded to bfloat16 would leave wrong by tens of percent.
    Sums over chunks and ranks are float32, too. Float16 heads, and bfloat16 ones on the CPU, are widened as a whole.

    Each chunk takes one collective (jsd and tv: two); a last one adds up the ranks' parts of ``student_hidden``'s
    gradient, which is complete on every rank; those of weight and bias are of the shard. All are computed in this
    pass; backward only scales them. No gradient flows to the teacher.

    Raises :class:`ValueError` for options, shapes or labels out of range.

    >>> hidden, head = torch.randn(6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    >>> loss = vocab_parallel_linear_kd_loss(hidden, head, torch.randn(6, 32), torch.randn(50, 32), temperature=2.0)
    >>> loss.backward()
    >>> hidden.grad.shape, head.grad.shape
    (torch.Size([6, 16]), torch.Size([50, 16]))
    """
    check_local(
        OP, (student_hidden, weight_shard, bias_shard, teacher_hidden, teacher_weight_shard, teacher_bias_shard)
    )
    if normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = torch.tensor(float(normalizer), device=student_hidden.device)
    inputs = (student_hidden, weight_shard, bias_shard)
    hidden, weight, bias = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    o = Options(
        target=target,
        row_weight=row_weight,
        normalizer=normalizer,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        alpha=alpha,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        need_grad=hidden or weight or bias,
    )
    heads = _Heads(student_hidden, weight_shard, bias_shard, teacher_hidden, teacher_weight_shard, teacher_bias_shard)
    problem = problem_of(lambda: _check(heads, o, max_memory_bytes))
    rows, device = student_hidden.shape[:-1].numel(), student_hidden.device
    columns, teacher_columns = (x.shape[0] if x.dim() else 0 for x in (weight_shard, teacher_weight_shard))
    shards = find_shards(OP, rows, columns, teacher_columns, problem, shards, group, device)
    check_classes(OP, teacher_hidden, o, shards)
    step = _rows_at_a_time(shards, ranks_of(group), max_memory_bytes)
    plan = _Plan(flattened(o), shards, group, step, (hidden, weight, bias))
    return _apply(*heads, plan)


def _check(heads: _Heads, o: Options, max_memory_bytes: int) -> None:
    for name, hidden, weight, bias in (("student", *heads[:3]), ("teacher", *heads[3:])):
        if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{OP}: {name}_hidden has shape {list(hidden.shape)} but its weight {list(weight.shape)}; expected "
                "[..., features] and [columns, features]"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{OP}: the {name}'s bias has shape {list(bias.shape)}; its weight has {weight.shape[0]} columns"
            )
    if heads.hidden.shape[:-1] != heads.teacher_hidden.shape[:-1]:
        raise ValueError(
            f"{OP}: student_hidden has shape {list(heads.hidden.shape)} but teacher_hidden "
            f"{list(heads.teacher_hidden.shape)}; all but the last dimension must be equal"
        )
    check_options(o, OP)
    if o.reduction == "none":
        raise ValueError(
            f"{OP}: reduction is 'none', but the heads' gradients are summed over the rows before backward() could "
            "weigh them; expected mean or sum, with row_weight for factors of rows"
        )
    if max_memory_bytes <= 0:
        raise ValueError(f"{OP}: max_memory_bytes is {max_memory_bytes}; expected a positive number")
    check_rows(OP, heads.hidden.shape[:-1], o)


def _rows_at_a_time(shards: VocabShards, ranks: int, max_memory_bytes: int) -> int:
    # From numbers that all ranks share, since all must have the same chunks: each is a collective.
    columns = math.ceil(max(shards.classes, shards.teacher_classes) / ranks)
    return max(max_memory_bytes // (_BYTES_PER_LOGIT * columns), 1)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        heads, plan = _Heads(*args[:-1]), args[-1]
        with torch.autocast(heads.hidden.device.type, enabled=False):
            loss, gradients = _loss_and_gradients(heads, plan)
        ctx.dtypes = [None if x is None else x.dtype for x in heads[:3]]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = (None if g is None else scaled(OP, g, upstream, upstream).to(dtype) for g, dtype in pairs)
        return (*gradients, None, None, None, None)


_apply: Callable[..., Tensor] = _Gradient.apply


def _loss_and_gradients(heads: _Heads, plan: _Plan) -> tuple[Tensor, list[Tensor | None]]:
    o, shards, (needs_hidden, needs_weight, needs_bias) = plan.options, plan.shards, plan.needs
    student = _Head.of(heads.hidden, heads.weight, heads.bias)
    teacher = _Head.of(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias)
    rows = len(student.hidden)
    by, alive = divisor(rows, o), weighted(student.hidden.new_ones(rows), o) != 0.0
    loss = torch.zeros((), dtype=torch.float64, device=student.hidden.device)
    hidden_gradient = student.hidden.new_zeros(student.hidden.shape, dtype=student.dtype) if needs_hidden else None
    weight_gradient = torch.zeros_like(student.weight, dtype=student.dtype) if needs_weight else None
    bias_gradient = student.weight.new_zeros(len(student.weight), dtype=student.dtype) if needs_bias else None
    for first in range(0, rows, plan.step):
        part = slice(first, first + plan.step)
        x, s = student.logits(part, alive)
        t = teacher.logits(part, alive)[1] if o.alpha > 0.0 else s  # with labels alone any will do
        losses, g = losses_and_gradient(s, t, rows_of(o, part), shards, lambda mine: gather(mine, plan.group), by)
        loss += losses.sum()
        if g is None:
            continue
        if hidden_gradient is not None:
            hidden_gradient[part] = _product(g, student.weight, student.dtype)
        if weight_gradient is not None:
            weight_gradient += _product(g.t(), x, student.dtype)
        if bias_gradient is not None:
            bias_gradient += g.sum(0)
    if hidden_gradient is not None:
        hidden_gradient = add_up(hidden_gradient, plan.group).reshape(heads.hidden.shape)
    found = (hidden_gradient, weight_gradient, bias_gradient)
    kept = [None if x is None or g is None else g.to(_kept(x.dtype)) for g, x in zip(found, heads[:3], strict=True)]
    return loss.to(torch.promote_types(student.dtype, teacher.dtype)), kept


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype  # where a gradient could vanish before it is scaled


class _Head(NamedTuple):
    """A linear layer with results in ``dtype``, of bfloat16 factors where the device can do it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Head:
        dtype = wide(hidden, weight)
        # Float16 is widened everywhere: it could not hold the small numbers of the logits' gradient.
        as_is = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
        return cls(rows, weight if as_is else weight.to(dtype), None if bias is None else bias.to(dtype), dtype)

    def logits(self, rows: slice, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of some rows; a row that counts as absent is 0, so that a NaN in it has no part."""
        hidden = self.hidden[rows].to(self.weight.dtype).masked_fill(~alive[rows].unsqueeze(-1), 0.0)
        logits = _product(hidden, self.weight.t(), self.dtype)
        return hidden, logits if self.bias is None else logits.add_(self.bias)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right``, summed in ``dtype``; of factors in the dtype of ``right``."""
    if right.dtype == dtype:
        return left @ right
    return torch.mm(left.to(right.dtype), right, out_dtype=dtype)
