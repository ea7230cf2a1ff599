"""What a change of a model did, layer by layer, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from potstill.transform.table import text_table


@dataclass(frozen=True)
class LayerRow:
    """One layer: what was done with it, why, and what that gains.

    - ``names``: every dotted name of the layer in the model; ``""`` is the model itself.
    - ``kind``: the class it had; ``shape``: (out_features, in_features).
    - ``action``: what it is now: ``"int8"``, ``"int4"``, or ``"kept"`` as it was; ``reason``: why.
    - ``bytes_before``, ``bytes_after``: its parameters and buffers; those shared with other layers count in each.
    - ``ms_before``, ``ms_after``: milliseconds of the float and of the new form, as :attr:`Report.measured` says; None
      where nothing was measured. A layer that was kept because it would be slower has both.
    - ``snr_db``: 10 log10(sum y^2 / sum (y - y_new)^2) of its outputs; None where not measured or the same.
    - ``rounding``: how its weights were rounded: ``"nearest"``, or the method of :func:`calibrate_`; "" if kept.
    - ``nearest_snr_db``: ``snr_db`` if a calibrated layer had been rounded to nearest.
    - ``rows``: input rows of a call -> calls with so many, in one run of the sample.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    action: str
    reason: str
    bytes_before: int
    bytes_after: int
    ms_before: float | None
    ms_after: float | None
    snr_db: float | None
    rounding: str
    nearest_snr_db: float | None
    rows: dict[int, int]


@dataclass(frozen=True)
class Report:
    """The rows of all layers, and the size of the whole model before and after; ``print(report)`` shows a table.

    ``measured`` says of what the times are, and on what.
    """

    rows: tuple[LayerRow, ...]
    bytes_before: int
    bytes_after: int
    measured: str

    @property
    def converted(self) -> tuple[LayerRow, ...]:
        """The rows of the layers that were changed."""
        return tuple(row for row in self.rows if row.action != "kept")

    @property
    def kept(self) -> tuple[LayerRow, ...]:
        """The rows of the layers that were left alone."""
        return tuple(row for row in self.rows if row.action == "kept")

    @property
    def ms_before(self) -> float:
        """Milliseconds of all measured layers before the change."""
        return sum(row.ms_before or 0.0 for row in self.rows)

    @property
    def ms_after(self) -> float:
        """Milliseconds of the same layers as they are now."""
        return sum((row.ms_before if row.action == "kept" else row.ms_after) or 0.0 for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain dicts, lists, strings and numbers, ready for :func:`json.dumps`."""
        rows = [
            asdict(row)
            | {"names": list(row.names), "shape": list(row.shape)}
            | {"rows": {str(rows): calls for rows, calls in row.rows.items()}}
            for row in self.rows
        ]
        totals = {
            "converted": len(self.converted),
            "kept": len(self.kept),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ms_before": self.ms_before,
            "ms_after": self.ms_after,
        }
        return {"layers": rows, "totals": totals, "measured": self.measured}

    def __str__(self) -> str:
        """A table for a terminal of 120 columns."""
        return text_table(("out x in", "now", "size", "ms", "SNR dB"), map(_cells, self.rows), self._summary())

    def _summary(self) -> Iterable[str]:
        yield f"{len(self.converted)} of {len(self.rows)} layers converted"
        smaller = f" ({self.bytes_before / self.bytes_after:.2f} times smaller)" if self.bytes_after else ""
        yield f"model size: {_size(self.bytes_before)} -> {_size(self.bytes_after)}{smaller}"
        if self.ms_after:
            ratio = self.ms_before / self.ms_after
            yield f"time of the layers: {self.ms_before:.3g} -> {self.ms_after:.3g} ms ({ratio:.2f} times the speed)"
            yield f"times are {self.measured}"
        if any(row.nearest_snr_db is not None for row in self.rows):
            yield "SNR of calibrated layers: with weights rounded to nearest -> as calibrated"


def _cells(row: LayerRow) -> tuple[str, ...]:
    names = " = ".join(name or "(the model)" for name in row.names)
    size = _size(row.bytes_before)
    if row.bytes_after != row.bytes_before:
        size += f" -> {_size(row.bytes_after)}"
    ms = "" if row.ms_before is None or row.ms_after is None else f"{row.ms_before:.3g} -> {row.ms_after:.3g}"
    snr = "" if row.snr_db is None else f"{row.snr_db:.1f}"
    if row.nearest_snr_db is not None:
        snr = f"{row.nearest_snr_db:.1f} -> {snr}"
    return names, " x ".join(map(str, row.shape)), row.action, size, ms, snr, row.reason


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
