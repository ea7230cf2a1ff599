"""Drop-in modules over the ops."""

from typing import Any

from potstill.nn.activation import FusedActivation
from potstill.nn.attention import Int8MultiheadAttention
from potstill.nn.block_sparse import BlockSparseLinear
from potstill.nn.embedding import Int8Embedding
from potstill.nn.encoder import Int8TransformerEncoderLayer
from potstill.nn.int4 import Int4Linear
from potstill.nn.linear import Int8Linear
from potstill.nn.linear_kd_loss import LinearKDLoss
from potstill.nn.loss import KDLoss
from potstill.nn.masked import MaskedConv2d, MaskedLinear
from potstill.nn.norm import AddLayerNorm
from potstill.nn.residual import LinearAddNorm
from potstill.nn.semi_sparse import SemiSparseLinear
from potstill.nn.shared import Int8LinearPart
from potstill.nn.sparse import SparseLinear
from potstill.nn.sparse_conv import SparseConv2d

_LAYERS = (Int8Linear, Int8LinearPart, Int4Linear, FusedActivation, Int8Embedding, Int8MultiheadAttention)
_SPARSE = (MaskedLinear, MaskedConv2d, SparseLinear, SparseConv2d, SemiSparseLinear, BlockSparseLinear)
KINDS: dict[str, Any] = {kind.kind: kind for kind in (*_LAYERS, Int8TransformerEncoderLayer, *_SPARSE)}
"""Each drop-in layer by the name that checkpoints know it by."""

__all__ = [
    "KINDS",
    "AddLayerNorm",
    "BlockSparseLinear",
    "FusedActivation",
    "Int4Linear",
    "Int8Embedding",
    "Int8Linear",
    "Int8LinearPart",
    "Int8MultiheadAttention",
    "Int8TransformerEncoderLayer",
    "KDLoss",
    "LinearAddNorm",
    "LinearKDLoss",
    "MaskedConv2d",
    "MaskedLinear",
    "SemiSparseLinear",
    "SparseConv2d",
    "SparseLinear",
]
