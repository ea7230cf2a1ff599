"""Changes a model in place, one kind of change per file; every change reports what it did and why."""

from potstill.transform.calibrate import Calibration, CalibrationRow, calibrate_
from potstill.transform.configs import Int4, Int8, Mixed
from potstill.transform.fuse import FusionReport, FusionRow, fuse_
from potstill.transform.prune import Prune, prune_
from potstill.transform.prune_report import PruneReport, PruneRow
from potstill.transform.prune_rounds import prune_iteratively_
from potstill.transform.quantize import quantize_
from potstill.transform.realise import realise_
from potstill.transform.report import LayerRow, Report

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
    "calibrate_",
    "fuse_",
    "prune_",
    "prune_iteratively_",
    "quantize_",
    "realise_",
]
