"""Changes a model in place, one kind of change per file; every change reports what it did and why."""

from potstill.transform.quantize import Int8, quantize_
from potstill.transform.report import LayerRow, Report

__all__ = ["Int8", "LayerRow", "Report", "quantize_"]
