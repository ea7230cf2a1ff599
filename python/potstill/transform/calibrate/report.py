"""What :func:`calibrate_` found for each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from potstill.transform.configs import Config
from potstill.transform.table import text_table


@dataclass(frozen=True)
class CalibrationRow:
    """One weight.

    - ``names``: every dotted name of the layers that hold it; ``config``: what its weight was rounded for.
    - ``rounding``: the method, or ``"nearest"`` where that is as good or there was nothing to go by; ``reason`` says.
    - ``rows``: input rows that the loader brought it.
    - ``nearest_snr_db``, ``snr_db``: 10 log10(sum y^2 / sum (y - y')^2) of its outputs over all these rows, without
      bias, rounded to nearest and as calibrated; None where not measured. Method "mse" knows only the size of each
      input, and counts them as uncorrelated.
    - ``smoothing``: the share of the inputs' unevenness that was moved to the weights, or None; see :mod:`.smoothing`.
    - ``damping``: what GPTQ added to the second moments of the inputs, as a part of their mean.
    """

    names: tuple[str, ...]
    config: Config
    rounding: str
    reason: str
    rows: int
    nearest_snr_db: float | None = None
    snr_db: float | None = None
    damping: float | None = None
    smoothing: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The rows of all layers that could be calibrated; ``print`` shows a table. ``passes``: runs over the loader."""

    rows: tuple[CalibrationRow, ...]
    passes: int

    @property
    def calibrated(self) -> tuple[CalibrationRow, ...]:
        """The rows of the layers that :func:`quantize_` will not round to nearest."""
        return tuple(row for row in self.rows if row.rounding != "nearest")

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain dicts, lists, strings and numbers, ready for :func:`json.dumps`."""
        rows = [asdict(row) | {"names": list(row.names), "config": repr(row.config)} for row in self.rows]
        return {"layers": rows, "passes": self.passes}

    def __str__(self) -> str:
        """A table for a terminal of 120 columns."""
        summary = f"{len(self.calibrated)} of {len(self.rows)} layers calibrated; runs over the loader: {self.passes}"
        titles = ("bits", "rounding", "rows", "SNR dB", "damping", "smooth")
        return text_table(titles, map(_cells, self.rows), [summary])


def _cells(row: CalibrationRow) -> Iterable[str]:
    yield " = ".join(name or "(the model)" for name in row.names)
    yield str(row.config.bits)
    yield row.rounding
    yield str(row.rows)
    numbers = [f"{value:.1f}" for value in (row.nearest_snr_db, row.snr_db) if value is not None]
    yield " -> ".join(numbers)
    yield "" if row.damping is None else f"{row.damping:g}"
    yield "" if row.smoothing is None else f"{row.smoothing:g}"
    yield row.reason
