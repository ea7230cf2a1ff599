"""Drop-in modules over the ops."""

from potstill.nn.int4 import Int4Linear
from potstill.nn.linear import Int8Linear
from potstill.nn.loss import KDLoss

KINDS = {kind.kind: kind for kind in (Int8Linear, Int4Linear)}
"""Each drop-in layer by the name that checkpoints know it by."""

__all__ = ["KINDS", "Int4Linear", "Int8Linear", "KDLoss"]
