"""The likeliest classes by logits that are split by vocabulary over the ranks of a process group."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from potstill.parallel.shards import VocabShards, gather

OP = "vocab_parallel_top_k"


@torch.no_grad()
def vocab_parallel_top_k(
    logits_shard: Tensor,
    k: int,
    temperature: float = 1.0,
    *,
    group: dist.ProcessGroup | None = None,
    shards: VocabShards | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`potstill.ops.top_k` of logits whose vocabulary is split over ``group``: the same result on every rank.

    - ``logits_shard``: this rank's columns, [..., columns]; slices may have any sizes, also none.
    - ``shards``: where the columns lie; without it an additional small collective finds out.

    Returns log-probabilities [..., k] in float32 (float64 for float64 logits) and class numbers of the whole vocabulary
    [..., k], int64, sorted. They are what another model's :data:`potstill.ops.kd_loss` takes as ``teacher`` and
    ``teacher_indices``, on devices that have nothing of this one. Each rank sends 2 k + 1 float64 numbers per row,
    nothing of the logits' size.

    Raises :class:`ValueError` if there are fewer classes than k, on every rank.

    >>> log_probs, indices = vocab_parallel_top_k(torch.tensor([[0.0, 3.0, 1.0]]), 2)  # one process is the only rank
    >>> indices, log_probs.exp()
    (tensor([[1, 2]]), tensor([[0.8438, 0.1142]]))
    """
    columns, device = logits_shard.shape[-1], logits_shard.device
    shards = VocabShards.gather(columns, group=group, device=device) if shards is None else shards
    if not 1 <= k <= shards.classes:
        raise ValueError(f"{OP}: k is {k}; expected 1 to {shards.classes}, the number of classes on all ranks")
    scaled = logits_shard.to(torch.float64) / temperature
    values, places = scaled.topk(min(k, columns), -1)
    message = scaled.new_full((*scaled.shape[:-1], 2 * k + 1), -math.inf)
    message[..., k:-1] = 0.0  # the class of what is not there, with the log-probability -inf
    message[..., : values.shape[-1]] = values
    message[..., k : k + places.shape[-1]] = (places + shards.start).to(torch.float64)  # exact up to 2^53
    message[..., -1] = torch.logsumexp(scaled, -1) if columns else -math.inf
    ranks = gather(message, group)
    candidates, classes = (part.movedim(0, -2).flatten(-2) for part in (ranks[..., :k], ranks[..., k:-1]))
    best, where = candidates.topk(k, -1)
    log_probs = best - torch.logsumexp(ranks[..., -1], 0).unsqueeze(-1)
    dtype = torch.promote_types(logits_shard.dtype, torch.float32)
    return log_probs.to(dtype), classes.gather(-1, where).to(torch.int64)
