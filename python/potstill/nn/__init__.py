"""Drop-in modules over the ops."""

from potstill.nn.linear import Int8Linear

__all__ = ["Int8Linear"]
