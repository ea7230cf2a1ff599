"""Makes a PyTorch model smaller and faster, and proves it."""

import torch  # noqa: F401  # first: the extension then shares torch's OpenMP runtime

from potstill import nn, ops
from potstill.checkpoint import load, save
from potstill.transform import FusionReport, FusionRow, Int8, LayerRow, Report, fuse_, quantize_

__version__ = "0.1.0"
__all__ = ["FusionReport", "FusionRow", "Int8", "LayerRow", "Report"]
__all__ += ["__version__", "fuse_", "load", "nn", "ops", "quantize_", "save"]
