"""Changes a model in place, one kind of change per file; every change reports what it did and why."""

from potstill.transform.fuse import FusionReport, FusionRow, fuse_
from potstill.transform.quantize import Int8, quantize_
from potstill.transform.report import LayerRow, Report

__all__ = ["FusionReport", "FusionRow", "Int8", "LayerRow", "Report", "fuse_", "quantize_"]
