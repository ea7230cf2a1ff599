"""Drop-in modules over the ops."""

from potstill.nn.activation import FusedActivation
from potstill.nn.linear import Int8Linear
from potstill.nn.loss import KDLoss
from potstill.nn.shared import Int8LinearPart

KINDS = {kind.kind: kind for kind in (Int8Linear, Int8LinearPart, FusedActivation)}
"""Each drop-in layer by the name that checkpoints know it by."""

__all__ = ["KINDS", "FusedActivation", "Int8Linear", "Int8LinearPart", "KDLoss"]
