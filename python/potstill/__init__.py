"""Makes a PyTorch model smaller and faster, and proves it."""

import torch  # noqa: F401  # first: the extension then shares torch's OpenMP runtime

from potstill import nn, ops

__version__ = "0.1.0"
__all__ = ["__version__", "nn", "ops"]
