"""Models that are spread over processes, and losses of models that are split."""

from potstill.parallel.kd_loss import vocab_parallel_kd_loss
from potstill.parallel.linear_kd_loss import vocab_parallel_linear_kd_loss
from potstill.parallel.pin import pin
from potstill.parallel.plan import Plan
from potstill.parallel.shards import VocabShards
from potstill.parallel.top_k import vocab_parallel_top_k

__all__ = [
    "Plan",
    "VocabShards",
    "pin",
    "vocab_parallel_kd_loss",
    "vocab_parallel_linear_kd_loss",
    "vocab_parallel_top_k",
]
