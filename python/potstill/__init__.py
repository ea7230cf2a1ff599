"""Makes a PyTorch model smaller and faster, and proves it."""

import torch  # noqa: F401  # first: the extension then shares torch's OpenMP runtime

from potstill import nn, ops
from potstill.checkpoint import load, save
from potstill.transform import (
    Calibration,
    CalibrationRow,
    FusionReport,
    FusionRow,
    Int4,
    Int8,
    LayerRow,
    Mixed,
    Prune,
    PruneReport,
    PruneRow,
    Report,
    calibrate_,
    fuse_,
    prune_,
    prune_iteratively_,
    quantize_,
    realise_,
)

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "CalibrationRow",
    "FusionReport",
    "FusionRow",
    "Int4",
    "Int8",
    "LayerRow",
    "Mixed",
    "Prune",
    "PruneReport",
    "PruneRow",
    "Report",
    "__version__",
    "calibrate_",
    "fuse_",
    "load",
    "nn",
    "ops",
    "prune_",
    "prune_iteratively_",
    "quantize_",
    "realise_",
    "save",
]
