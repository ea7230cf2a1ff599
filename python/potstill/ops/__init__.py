"""Operations with a pure-torch definition and fast kernels; one file per op, one registry: ``OPS``."""

from potstill.ops.add_layer_norm import add_layer_norm
from potstill.ops.attention import attention
from potstill.ops.block_sparse_linear import block_sparse_linear
from potstill.ops.int4_linear import int4_linear
from potstill.ops.int8_embedding import int8_embedding
from potstill.ops.int8_linear import int8_linear
from potstill.ops.kd_loss import kd_loss
from potstill.ops.linear_kd_loss import linear_kd_loss
from potstill.ops.op import OPS, Op
from potstill.ops.semi_sparse_int8_linear import semi_sparse_int8_linear
from potstill.ops.sparse_int8_linear import sparse_int8_linear
from potstill.ops.sparse_linear import sparse_linear
from potstill.ops.topk import top_k

__all__ = [
    "OPS",
    "Op",
    "add_layer_norm",
    "attention",
    "block_sparse_linear",
    "int4_linear",
    "int8_embedding",
    "int8_linear",
    "kd_loss",
    "linear_kd_loss",
    "semi_sparse_int8_linear",
    "sparse_int8_linear",
    "sparse_linear",
    "top_k",
]
