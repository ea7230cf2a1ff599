"""The rows and totals of the report of :func:`quantize_`."""

from __future__ import annotations

import torch
from torch import nn

from potstill import _C
from potstill.transform.report import LayerRow
from potstill.transform.rules.linear import USUAL_ROWS
from potstill.transform.survey import Layer


def rows_of(layers: list[Layer]) -> tuple[LayerRow, ...]:
    """A row for each layer, in the order of the model; parts of what is replaced as a whole have none."""
    return tuple(_row(layer, layers) for layer in layers if not (layer.whole and not layer.whole.kept))


def _row(layer: Layer, layers: list[Layer]) -> LayerRow:
    module = layer.site.module
    size = model_bytes(module)
    converted = layer.new is not None and not layer.kept
    kept = layer.whole.kept if layer.whole is not None else layer.kept
    calls: dict[int, int] = {}
    for call, count in layer.calls.counts.items() if layer.calls is not None else ():
        calls[call.rows] = calls.get(call.rows, 0) + count
    # The time of a kept whole is already in the rows of its parts.
    seconds = None if kept and any(other.inside(layer) for other in layers) else layer.seconds
    return LayerRow(
        names=layer.site.names,
        kind=type(module).__name__,
        shape=layer.rule.shape(module) if layer.rule is not None else _shape(module),
        action=layer.rule.action if converted and layer.rule is not None else "kept",
        reason="; ".join(filter(None, [kept or _why_converted(layer), layer.note])),
        bytes_before=size,
        bytes_after=model_bytes(layer.new) if converted and layer.new is not None else size,
        ms_before=seconds[0] * 1e3 if seconds else None,
        ms_after=seconds[1] * 1e3 if seconds else None,
        snr_db=layer.snr_db,
        rounding=layer.rounding if converted else "",
        nearest_snr_db=layer.nearest_snr_db,
        rows=calls,
    )


def _shape(module: nn.Module) -> tuple[int, ...]:
    sizes = (getattr(module, name, None) for name in ("out_features", "in_features"))
    return tuple(size for size in sizes if isinstance(size, int))


def _why_converted(layer: Layer) -> str:
    if layer.seconds is None:
        return "as asked; the sample never calls it"
    ratio = layer.seconds[0] / layer.seconds[1]
    return f"{ratio:.2f} times the speed" if ratio > 1 else f"as asked, though slower: {ratio:.2f} times the speed"


def model_bytes(module: nn.Module) -> int:
    """Bytes of its parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.nbytes for t in tensors if not torch.nn.parameter.is_lazy(t))


def what_was_measured(sampled: bool) -> str:
    """What the times in the report are of."""
    what = "per run of the sample"
    if not sampled:
        what = f"per call, geometric mean over {', '.join(map(str, USUAL_ROWS))} rows"
    return f"ms {what}, {_C.isa()}, threads: {torch.get_num_threads()}"
