"""Finds the rounding of weights that changes a model's outputs least; :func:`quantize_` then uses it."""

from potstill.transform.calibrate.report import Calibration, CalibrationRow
from potstill.transform.calibrate.run import calibrate_

__all__ = ["Calibration", "CalibrationRow", "calibrate_"]
