"""Finds how to round the weights of a model, from the inputs that its layers get."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.errors import PotstillError
from potstill.transform.calibrate.clip import round_by_groups
from potstill.transform.calibrate.gptq import FactorisationError, gptq
from potstill.transform.calibrate.moments import Moments, chunks
from potstill.transform.calibrate.report import Calibration, CalibrationRow
from potstill.transform.calibrate.smoothing import Smoothing, smoothing
from potstill.transform.calibrate.weights import Weight, weights_of
from potstill.transform.configs import Config, Int8, Mixed
from potstill.transform.grid import Grid
from potstill.transform.measure import decibels
from potstill.transform.observe import inputs_of, watching
from potstill.transform.progress import Bar
from potstill.transform.rounding import Rounding, digest, remember


def calibrate_(
    model: nn.Module,
    loader: Iterable[Any] | None,
    config: Config | Mixed = Int8(),
    method: Literal["gptq", "mse"] = "gptq",
    memory: int = 2 << 30,
    quiet: bool = False,
) -> Calibration:
    """Finds a rounding of the weights of linear layers that changes the outputs least; :func:`quantize_` then uses it.

    - ``loader``: the inputs of ``model``, batch by batch: a tensor, a mapping of keyword arguments, or a tuple
      ``(input, ..., target)``. The model runs on them in eval mode and without gradients.
    - ``config``: what will be given to ``quantize_``.
    - ``method``: ``"gptq"`` (Frantar et al. 2022) rounds so that the errors of a layer's inputs make up for each other;
      ``"mse"`` rounds to nearest on scales that clip as much as is best, and takes ``loader=None`` too: then all inputs
      weigh the same.
    - ``memory``: bytes that second moments of inputs may take. If they are more, the layers take turns, in several runs
      over the loader. The integers, one byte for each weight, come on top.
    - ``quiet``: no progress bar.

    Where an int8 layer gains by it, the unevenness of its inputs is moved to its weights first (SmoothQuant, Xiao et
    al. 2022); its new form then multiplies its input by a factor for each feature.

    The layers themselves are not changed: each keeps the integers beside its weight, in no ``state_dict``, until
    ``quantize_`` takes them; if the weight has changed by then, they are dropped, and its report says so. Nothing is
    left in the model if the run is interrupted. An input that was always zero in ``loader`` has its weights rounded to
    nearest. Every layer sees the inputs it has in the float model.

    Raises :class:`PotstillError` if a single layer does not fit ``memory``, or if the loader yields nothing or can be
    run over once only and that is not enough; :class:`ConversionError` if a pattern of ``Mixed`` matches no layer.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> report = calibrate_(model, [torch.randn(256, 16) for _ in range(4)])
    >>> [row.rounding for row in report.rows], report.rows[1].snr_db > report.rows[1].nearest_snr_db + 1
    (['gptq', 'gptq'], True)
    """
    _check(loader, config, method)
    weights = weights_of(model, config)
    parts = chunks(weights, memory) if method == "gptq" else [weights]
    if len(parts) > 1 and isinstance(loader, Iterator):
        raise PotstillError(
            f"calibrate_: the loader can be run over only once, but the second moments need {len(parts)} runs in "
            f"{memory:,} bytes; give a list or a DataLoader, or allow more memory"
        )
    rows: list[CalibrationRow] = []
    found: list[tuple[Weight, Rounding]] = []
    bar = Bar(quiet=quiet)
    device = weights[0].tensor.device.type if weights else "cpu"
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False), bar.shown():
        for number, part in enumerate(parts, 1):
            moments = _moments(model, part, loader, method, bar, f"inputs {number}/{len(parts)}")
            smooth = smoothing(moments)
            for weight in bar.track(part, f"rounding {number}/{len(parts)}"):
                row, rounding = _round(weight, moments.pop(weight), method, smooth.get(weight))
                rows.append(row)
                found += [(weight, rounding)] if rounding is not None else []
    for weight, rounding in found:
        for module in weight.modules:
            remember(module, rounding)
    return Calibration(tuple(rows), len(parts) if loader is not None else 0)


def _check(loader: object, config: object, method: str) -> None:
    if not isinstance(config, Config | Mixed):
        raise TypeError(
            f"calibrate_: config is {config!r}, expected potstill.Int8(), potstill.Int4() or potstill.Mixed"
        )
    if method not in ("gptq", "mse"):
        raise ValueError(f"calibrate_: method is {method!r}, expected 'gptq' or 'mse'")
    if isinstance(loader, Tensor | Mapping) or not isinstance(loader, Iterable | None):
        raise TypeError(
            f"calibrate_: loader is a {type(loader).__name__}, expected an iterable of batches; put a single batch "
            "in a list"
        )
    if loader is None and method == "gptq":
        raise ValueError("calibrate_: gptq needs a loader; method='mse' does without")


def _moments(
    model: nn.Module, weights: list[Weight], loader: Iterable[Any] | None, method: str, bar: Bar, text: str
) -> dict[Weight, Moments]:
    sums = {weight: Moments.empty(weight, full=method == "gptq") for weight in weights}
    if loader is None:
        for moments in sums.values():
            moments.sum += 1
        return sums
    hooks = [(module, sums[weight].note) for weight in weights for module in weight.modules]
    batches = 0
    with watching(model, hooks):
        for item in bar.track(loader, text):
            args, kwargs = inputs_of(item)
            model(*args, **kwargs)
            batches += 1
    if not batches:
        raise PotstillError("calibrate_: the loader yielded nothing; it is exhausted, or empty")
    return sums


def _round(
    weight: Weight, moments: Moments, method: str, smooth: Smoothing | None
) -> tuple[CalibrationRow, Rounding | None]:
    names = tuple(name for layer in weight.layers for name in layer.site.names)
    row = CalibrationRow(names, weight.config, "nearest", _why_not(moments), moments.rows)
    if row.reason:
        return row, None
    tensor, grid, factor, damping = weight.tensor.float(), weight.grid, None, None
    nearest = _snr_db(tensor, round_by_groups(tensor, grid, None), grid, moments)
    row = replace(row, nearest_snr_db=nearest)
    if smooth is not None:
        strength, factor = smooth
        tensor, moments = tensor / factor, moments.smoothed(factor)
        row = replace(row, smoothing=strength)
    if method == "mse":
        integers, scale, zero = round_by_groups(tensor, grid, moments.sum)
    else:
        try:
            integers, scale, zero, damping = gptq(tensor, moments.sum, grid)
        except FactorisationError as error:
            return replace(row, reason=str(error)), None
    calibrated = _snr_db(tensor, (integers, scale, zero), grid, moments)
    row = replace(row, snr_db=calibrated, damping=damping)
    if factor is None and nearest is not None and calibrated is not None and calibrated <= nearest:
        return replace(row, reason=f"{method} is no better"), None
    parameter = weight.modules[0].get_parameter("weight")
    rounding = Rounding(weight.config, method, integers, scale, zero, digest(parameter), factor)
    return replace(row, rounding=method), rounding


def _snr_db(
    weight: Tensor, rounded: tuple[Tensor, Tensor, Tensor | None], grid: Grid, moments: Moments
) -> float | None:
    return decibels(moments.power(weight), moments.power(weight - grid.weight(*rounded)))


def _why_not(moments: Moments) -> str:
    if not bool(torch.isfinite(moments.sum).all()):
        return "its inputs have NaN or infinite values"
    if not bool(moments.sum.any()):
        return "its inputs are all zero" if moments.rows else "the loader never calls it"
    return ""
