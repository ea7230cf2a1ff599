"""Turns layers with zeros into layers that are faster for it, or leaves them dense where none is."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor, nn

from potstill.nn import BlockSparseLinear, Int8Linear, MaskedConv2d, SemiSparseLinear, SparseConv2d, SparseLinear
from potstill.nn.float_linear import as_linear
from potstill.nn.masked import Masked
from potstill.nn.sparse import Weights
from potstill.ops import (
    Op,
    block_sparse_linear,
    semi_sparse_int8_linear,
    sparse_int8_linear,
    sparse_linear,
    sparse_units,
)
from potstill.ops.block_sparse import SIZES, as_blocks
from potstill.ops.semi_sparse import is_semi
from potstill.ops.sparse import ROWS, Rows, to_blocks
from potstill.transform.measure import autocast, calling, fastest, geometric_mean, snr_db
from potstill.transform.observe import (
    KEPT_ROWS,
    BlockCalls,
    Call,
    RowCalls,
    Sample,
    evaluating,
    observe,
    usual_calls,
)
from potstill.transform.report import LayerRow, Report
from potstill.transform.rows import model_bytes, what_was_measured
from potstill.transform.rules.linear import USUAL_ROWS, LinearToInt8
from potstill.transform.swap import Site, replace, sites

DENSE = "dense"
_DENSE_FORMS = (DENSE, "int8")

SEMI_DEVICES = frozenset({"cuda"})
"""Types of devices on which zeros that are 2:4 may be worth something."""

LEAST_ZEROS = 0.2
"""The share of a layer's blocks that must be zero for it to be made sparse: with fewer there is nothing to gain."""

LEAST_ZERO_BLOCKS = 0.5
"""The share of a layer's square blocks that must be zero for it to be made of these."""

_FEWER = 0.75
"""Smaller blocks must leave at most this share of the larger ones' weights: larger ones are faster otherwise."""

_SMALLEST_GAIN = 1.1
"""A sparse layer must be faster than the dense one by this factor: a smaller gain may be a timing's error."""


@dataclass(eq=False)
class _Pruned:
    """A layer with zeros, how it is called, and what may take its place: name -> layer; ``chosen`` is one of these."""

    site: Site
    calls: RowCalls | BlockCalls
    forms: dict[str, nn.Module] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    chosen: str = DENSE
    reason: str = ""


def realise_(
    model: nn.Module, sample_input: Sample | None = None, weights: Weights = "int8", only_if_faster: bool = True
) -> Report:
    """Replaces every layer of ``model`` that has many zeros, in place, by the fastest layer that computes the same.

    These are the layers that :func:`prune_` masked, and linear layers with at least a fifth of their blocks of four
    inputs zero, or on a GPU two of each four inputs, however they came to be.

    - ``sample_input``: a tensor, a tuple of positional or a mapping of keyword arguments. The model is run on it once,
      in eval mode and without gradients, to see how many rows each layer gets; without it 1, 32 and 128 rows count.
    - ``weights``: "int8" or "float": what :class:`nn.SparseLinear` holds. With "int8" an :class:`nn.Int8Linear` with
      the zeros in it is a candidate too, and what a sparse layer has to beat.
    - ``only_if_faster``: ``False`` makes every such linear layer sparse, in the form that is fastest.

    On a GPU a linear layer of whose weight at least two of each four inputs are zero may become a
    :class:`nn.SemiSparseLinear`, "2:4 int8" or "2:4 float" in its row, a float one only in 16 bits; with float weights
    one whose zeros are whole square blocks of 16 to 128 may become a :class:`nn.BlockSparseLinear`.
    Masked convolutions become :class:`nn.SparseConv2d`, if there is a sample to measure them on. A masked layer whose
    zeros gain nothing becomes a plain ``nn.Linear`` or ``nn.Conv2d`` with zeros, or an int8 layer, and its row says
    why. What is new is frozen; gradients flow to the inputs.
    Rows measure milliseconds of the dense float layer and of what took its place.

    Raises :class:`ValueError` for other ``weights``.

    >>> from potstill import Prune, prune_
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16)).eval()
    >>> _ = prune_(model, Prune(sparsity=0.9), include="0")
    >>> report = realise_(model, torch.randn(64, 256), only_if_faster=False)
    >>> [(row.names, row.action) for row in report.rows]
    [(('0',), 'sparse int8')]
    >>> isinstance(model[0], SparseLinear), model[0].blocks  # a tenth of 256 x 64
    (True, 1638)
    """
    if weights not in get_args(Weights):
        raise ValueError(f"realise_: weights is {weights!r}, expected one of {', '.join(get_args(Weights))}")
    layers = [_Pruned(site, _watch(site.module)) for site in sites(model, nn.Module) if _has_zeros(site)]
    if sample_input is not None:
        observe(model, [(layer.site.module, layer.calls) for layer in layers], sample_input)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        for layer in layers:
            _make_forms(layer, weights, sample_input is not None, only_if_faster)
        _measure(layers, sample_input is not None)
        for layer in layers:
            _choose(layer, only_if_faster)
        rows, before = tuple(map(_row, layers)), model_bytes(model)
        for layer in layers:
            new = layer.forms[layer.chosen]
            if new is not layer.site.module:
                replace(model, layer.site.names, new.train(layer.site.module.training))
    return Report(rows, before, model_bytes(model), what_was_measured(sample_input is not None))


def _watch(module: nn.Module) -> RowCalls | BlockCalls:
    return BlockCalls() if isinstance(module, MaskedConv2d) else RowCalls()


def _make_forms(layer: _Pruned, weights: Weights, sampled: bool, only_if_faster: bool) -> None:
    module = layer.site.module
    plain: nn.Module = module.to_float().requires_grad_(False) if isinstance(module, Masked) else module
    layer.forms = {DENSE: plain}
    layer.reason = _why_not(module, layer.calls, sampled and only_if_faster)
    if layer.reason:
        return
    linear = as_linear(plain)
    if linear is not None:
        layer.forms |= _gpu_forms(linear, layer.calls, weights)
    op = sparse_int8_linear if weights == "int8" else sparse_linear
    layer.reason = _no_kernel(op, plain, layer.calls)
    if layer.reason:
        return
    if weights == "int8" and linear is not None:
        layer.forms["int8"] = Int8Linear.from_float(linear)
    if only_if_faster and _zero_blocks(plain) < LEAST_ZEROS:
        layer.reason = "fewer than a fifth of its blocks of four inputs are zero"
        return
    for rows in ROWS:
        form = _sparse(plain if linear is None else linear, weights, rows)
        layer.forms[f"sparse {weights}, {rows} rows"] = form


def _block_sizes(weight: Tensor) -> Iterator[int]:
    """The largest square blocks of which enough are zero, and smaller ones that leave markedly fewer weights."""
    least = math.inf
    for size in SIZES:
        kept = float((as_blocks(weight, size) != 0).flatten(2).any(-1).double().mean())
        if kept <= 1.0 - LEAST_ZERO_BLOCKS and kept <= _FEWER * least:
            least = kept
            yield size


def _sparse(plain: nn.Module, weights: Weights, rows: Rows) -> nn.Module:
    if isinstance(plain, nn.Conv2d):
        return SparseConv2d.from_float(plain, weights, rows)
    assert isinstance(plain, nn.Linear)
    return SparseLinear.from_float(plain, weights, rows)


def _zero_blocks(plain: nn.Module) -> float:
    """The share of blocks that are all zero."""
    mask, _ = to_blocks((as_linear(plain) or plain).get_parameter("weight").detach().flatten(1))
    return float((~mask).double().mean())


def _has_zeros(site: Site) -> bool:
    if isinstance(site.module, Masked):
        return True
    linear = as_linear(site.module)
    if linear is None or LinearToInt8().why_not(site):
        return False
    return _zero_blocks(linear) >= LEAST_ZEROS or (linear.weight.device.type in SEMI_DEVICES and is_semi(linear.weight))


def _why_not(module: nn.Module, calls: RowCalls | BlockCalls, must_be_called: bool) -> str:
    if isinstance(module, MaskedConv2d):
        if SparseConv2d.float_config(module.to_float()) is None:
            return "there is no sparse form of a Conv2d with groups, or with padding by name"
        if not calls.counts:
            return "a convolution is measured on the images of a sample, and it got none"
    weight = module.masked_weight() if isinstance(module, Masked) else module.get_parameter("weight")
    if not bool(torch.isfinite(weight).all()):
        return "weight has NaN or infinite values"
    return "the sample never calls it" if must_be_called and not calls.counts else ""


def _no_kernel(op: Op, module: nn.Module, calls: RowCalls | BlockCalls) -> str:
    """Why ``op`` has no kernel for what the layer gets; empty if it has."""
    weight = module.get_parameter("weight")
    reasons = (op.backend(weight.device.type, dtype) for dtype in _dtypes(weight, calls))
    return next((why for backend, why in reasons if backend != "kernel"), "")


def _gpu_forms(linear: nn.Linear, calls: RowCalls | BlockCalls, weights: Weights) -> dict[str, nn.Module]:
    """What only GPUs have kernels for: zeros that are 2:4, and whole square blocks of them."""
    forms: dict[str, nn.Module] = {}
    if _takes_semi(linear, calls, weights) and is_semi(linear.weight):
        forms[f"2:4 {weights}"] = SemiSparseLinear.from_float(linear, weights)
    if weights == "float" and not _no_kernel(block_sparse_linear, linear, calls):
        for block in _block_sizes(linear.weight.detach()):
            forms[f"block sparse, {block}x{block}"] = BlockSparseLinear.from_float(linear, block)
    return forms


def _takes_semi(linear: nn.Linear, calls: RowCalls | BlockCalls, weights: Weights) -> bool:
    """Whether there is something on the weight's device that is made for 2:4."""
    device, dtypes = linear.weight.device, _dtypes(linear.weight, calls)
    if device.type not in SEMI_DEVICES:
        return False
    if weights == "int8":
        return not _no_kernel(semi_sparse_int8_linear, linear, calls)
    return len(dtypes) == 1 and sparse_units.library(device, linear.weight.dtype) is not None


def _dtypes(weight: Tensor, calls: RowCalls | BlockCalls) -> set[torch.dtype]:
    return {weight.dtype, *(call.used_dtype for call in calls.counts)}


def _counts(layer: _Pruned, sampled: bool) -> Mapping[Call, int]:
    if sampled and layer.calls.counts:
        return layer.calls.counts
    weight = layer.site.module.get_parameter("weight")
    return usual_calls(weight.dtype, weight.device.type, USUAL_ROWS)


def _alike(layer: _Pruned, call: Call) -> Hashable:
    """Layers of the same sizes and about the same share of blocks are timed once."""
    density = [
        round(_stored(form).sparsity, 2)
        for form in layer.forms.values()
        if isinstance(form, SparseLinear | SparseConv2d | BlockSparseLinear)
    ]
    plain = layer.forms[DENSE]
    return type(plain), _shape(plain), plain.bias is None, tuple(density), tuple(layer.forms), call


def _stored(form: SparseLinear | SparseConv2d | BlockSparseLinear) -> SparseLinear | BlockSparseLinear:
    return form.linear if isinstance(form, SparseConv2d) else form


def _shape(plain: nn.Module) -> tuple[int, ...]:
    """Of the weight; (outputs, inputs) of linear layers."""
    linear = as_linear(plain)
    return tuple((linear or plain).get_parameter("weight").shape)


def _measure(layers: list[_Pruned], sampled: bool) -> None:
    open_layers = [layer for layer in layers if len(layer.forms) > 1]
    comparisons: dict[Hashable, dict[str, Callable[[], object]]] = {}
    for layer in open_layers:
        for call in _counts(layer, sampled):
            for form in layer.forms.values():
                if isinstance(form, SemiSparseLinear):
                    form.tune(call.rows)
            if _alike(layer, call) not in comparisons:
                args = _arguments(layer, call)
                ways = {name: calling(form, call, args, {}) for name, form in layer.forms.items()}
                comparisons[_alike(layer, call)] = ways
    times = fastest(comparisons)
    for layer in open_layers:
        counts = _counts(layer, sampled)
        for name in layer.forms:
            each = [times[_alike(layer, call)][name] for call in counts]
            total = sum(seconds * count for seconds, count in zip(each, counts.values(), strict=True))
            layer.seconds[name] = total if sampled else geometric_mean(each)


def _arguments(layer: _Pruned, call: Call) -> tuple[Tensor]:
    if isinstance(layer.calls, BlockCalls):
        args, kwargs = layer.calls.examples[call]
        return (next(iter((*args, *kwargs.values()))),)
    weight = layer.forms[DENSE].get_parameter("weight")
    return (torch.randn(call.rows, _shape(layer.forms[DENSE])[1]).to(weight.device, call.dtype),)


def _choose(layer: _Pruned, only_if_faster: bool) -> None:
    if not layer.seconds:
        return
    dense = min((name for name in layer.forms if name in _DENSE_FORMS), key=layer.seconds.__getitem__)
    sparse = min((name for name in layer.forms if name not in _DENSE_FORMS), key=layer.seconds.__getitem__, default="")
    if not sparse:
        layer.chosen = dense
        return
    ratio = layer.seconds[dense] / layer.seconds[sparse]
    what = "dense int8" if dense == "int8" else "dense"
    layer.chosen = sparse if ratio > _SMALLEST_GAIN or not only_if_faster else dense
    than = f"{ratio:.2f} times the speed of the {what} layer"
    name = sparse.split(",")[0].removesuffix(" int8").removesuffix(" float")
    layer.reason = than if layer.chosen == sparse else f"{name} would have {than}"


def _row(layer: _Pruned) -> LayerRow:
    old, new = layer.site.module, layer.forms[layer.chosen]
    seconds = layer.seconds
    rows: dict[int, int] = {}
    for call, count in layer.calls.counts.items():
        rows[call.rows] = rows.get(call.rows, 0) + count
    return LayerRow(
        names=layer.site.names,
        kind=type(old).__name__,
        shape=_shape(layer.forms[DENSE]),
        action="kept" if new is old else layer.chosen.split(",")[0],
        reason=f"{_zeros(layer.forms[DENSE]):.0%} zeros: {layer.reason}",
        bytes_before=model_bytes(old),
        bytes_after=model_bytes(new),
        ms_before=seconds[DENSE] * 1e3 if seconds else None,
        ms_after=seconds[layer.chosen] * 1e3 if seconds else None,
        snr_db=_snr(layer) if seconds else None,
        rounding="nearest" if "int8" in layer.chosen else "",
        nearest_snr_db=None,
        rows=rows,
    )


def _zeros(plain: nn.Module) -> float:
    return float((plain.get_parameter("weight") == 0).double().mean())


def _snr(layer: _Pruned) -> float | None:
    """Of the chosen form's outputs, on inputs seen, else on random ones."""
    plain = layer.forms[DENSE]
    if isinstance(layer.calls, BlockCalls):
        seen = [_arguments(layer, call)[0] for call in list(layer.calls.counts)[:1]]
    else:
        seen = layer.calls.inputs or [torch.randn(KEPT_ROWS, _shape(plain)[1])]
    weight = plain.get_parameter("weight")
    x = torch.cat([part.to(weight.device, weight.dtype) for part in seen])
    with autocast(None, weight.device.type):
        return snr_db(plain(x), layer.forms[layer.chosen](x))
