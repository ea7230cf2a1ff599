"""Losses of models that are split over processes."""

from potstill.parallel.kd_loss import vocab_parallel_kd_loss
from potstill.parallel.linear_kd_loss import vocab_parallel_linear_kd_loss
from potstill.parallel.shards import VocabShards

__all__ = ["VocabShards", "vocab_parallel_kd_loss", "vocab_parallel_linear_kd_loss"]
