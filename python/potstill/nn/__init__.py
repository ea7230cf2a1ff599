"""Drop-in modules over the ops."""

from potstill.nn.linear import Int8Linear
from potstill.nn.loss import KDLoss

KINDS = {Int8Linear.kind: Int8Linear}
"""Each drop-in layer by the name that checkpoints know it by."""

__all__ = ["KINDS", "Int8Linear", "KDLoss"]
