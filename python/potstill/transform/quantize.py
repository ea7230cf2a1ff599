"""Replaces linear layers by int8 ones where that is faster."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from potstill import _C
from potstill.nn import Int8Linear
from potstill.ops import int8_linear
from potstill.transform.eligible import why_not
from potstill.transform.measure import fastest, forward, geometric_mean, snr_db
from potstill.transform.observe import (
    KEPT_ROWS,
    Call,
    Calls,
    Runs,
    Sample,
    autocast_dtype,
    evaluating,
    observe,
    unfused,
)
from potstill.transform.report import LayerRow, Report
from potstill.transform.swap import Pattern, Site, fast_path_blocks, matching, replace, shared_names, sites

_USUAL_ROWS = (1, 32, 128)  # without a sample: a token, a small batch, a sentence


@dataclass(frozen=True)
class Int8:
    """Int8 weights with one scale per output, activations quantised per row on the fly; see :class:`nn.Int8Linear`."""


@dataclass(eq=False)
class _Layer:
    """A linear layer under consideration; ``kept`` says why it stays as it is, once that is known."""

    site: Site
    kept: str
    calls: Calls = field(default_factory=Calls)
    int8: Int8Linear | None = None
    seconds: tuple[float, float] | None = None  # of the float and the int8 form
    snr_db: float | None = None


def quantize_(
    model: nn.Module,
    config: Int8 = Int8(),
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    only_if_faster: bool = True,
    sample_input: Sample | None = None,
) -> Report:
    """Converts ``nn.Linear`` layers of ``model`` to :class:`nn.Int8Linear` in place, and reports every layer.

    - ``include``, ``exclude``: wildcards for dotted names (``"encoder.*.mlp.*"``) or module types, one or several. A
      type stands for the layers that are of it or lie inside a module of it.
    - ``only_if_faster``: convert a layer only if int8 is faster here, at the row counts it gets from ``sample_input``,
      or at 1, 32 and 128 rows. ``False`` converts every layer that can be converted.
    - ``sample_input``: a tensor, a tuple of positional or a mapping of keyword arguments. The model is run on it once,
      in eval mode and without gradients, to see how each layer is called and to measure its error on real inputs.

    A layer that other code reads without calling it (attention's projections, weights tied to an embedding), that has
    hooks, parametrisations or a behaviour of its own, or whose dtype or device has no kernel, is kept, with the reason
    in its row. Torch's fused path of ``nn.TransformerEncoder`` and its layers is switched off where a layer inside is
    converted; if the sample shows that this costs more than int8 gains, nothing inside is converted. Converted layers
    are frozen; gradients flow through to their inputs.

    Raises :class:`ConversionError` if a pattern matches no layer; the model is then unchanged.

    >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    >>> report = quantize_(model, exclude="2", only_if_faster=False, sample_input=torch.randn(32, 256))
    >>> [(row.names, row.action) for row in report.rows]
    [(('0',), 'int8'), (('2',), 'kept')]
    >>> model[0]
    Int8Linear(in_features=256, out_features=512, bias=True)
    """
    if not isinstance(config, Int8):
        raise TypeError(f"quantize_: config is {config!r}, expected potstill.Int8()")
    layers = _survey(model, include, exclude)
    groups = _tied_groups(model, layers)
    blocks = fast_path_blocks(model)
    runs: dict[nn.Module, Runs] = {}
    if sample_input is not None:
        open_layers = [layer for layer in layers if not layer.kept]
        watched, inside = [layer.site.module for layer in open_layers], [block.module for block in blocks]
        calls, runs = observe(model, watched, inside, sample_input)
        for layer in open_layers:
            layer.calls = calls[layer.site.module]
            layer.kept = _why_not_these_calls(layer, only_if_faster)
    _settle_ties(groups)
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could never take part in training
        _convert(groups)
        _measure(layers, sampled=sample_input is not None)
        if only_if_faster:
            _keep_slower(groups)
            with evaluating(model):
                _keep_fused(groups, blocks, runs)
        rows, bytes_before = _rows(model, layers), _bytes(model)
        for layer in layers:
            if layer.int8 is not None and not layer.kept:
                replace(model, layer.site.names, layer.int8)
    return Report(rows, bytes_before, _bytes(model), _measured(sample_input is not None))


def _survey(
    model: nn.Module, include: Pattern | Iterable[Pattern] | None, exclude: Pattern | Iterable[Pattern] | None
) -> list[_Layer]:
    found = sites(model, (nn.Linear, Int8Linear))
    included, excluded = matching(found, include, "include"), matching(found, exclude, "exclude")
    layers = []
    for site in found:
        if include is not None and site.module not in included:
            kept = "not in include"
        elif site.module in excluded:
            pattern = excluded[site.module]
            kept = f"excluded by {pattern if isinstance(pattern, str) else pattern.__name__}"
        else:
            kept = why_not(site)
        layers.append(_Layer(site, kept))
    return layers


def _why_not_these_calls(layer: _Layer, only_if_faster: bool) -> str:
    if layer.calls.nested:
        return "the sample calls it with a nested tensor"
    if only_if_faster and not layer.calls.counts:
        return "the sample never calls it"
    for call in layer.calls.counts:
        backend, why = int8_linear.backend("cpu", call.used_dtype)
        if backend != "kernel":
            return f"for its input in the sample {why}"
    return ""


def _tied_groups(model: nn.Module, layers: list[_Layer]) -> list[list[_Layer]]:
    """Layers that share one weight, together; all of them are kept if something else holds that weight too."""
    shared = shared_names(model)
    owner = {f"{name}.weight".removeprefix("."): layer for layer in layers for name in layer.site.names}
    groups: dict[_Layer, list[_Layer]] = {}
    for name, layer in owner.items():
        names = shared.get(name, (name,))
        members = list(dict.fromkeys(owner[other] for other in names if other in owner))
        groups[members[0]] = members
        outside = [other for other in names if other not in owner]
        if outside:
            layer.kept = layer.kept or f"weight is tied to {', '.join(outside)}"
    return list(groups.values())


def _settle_ties(groups: list[list[_Layer]]) -> None:
    for group in groups:
        stays = next((layer for layer in group if layer.kept), None)
        if stays is not None:
            _keep(group, f"weight is tied to {stays.site.names[0]}.weight, which is kept")


def _keep(group: list[_Layer], why: str) -> None:
    for layer in group:
        layer.kept = layer.kept or why


def _convert(groups: list[list[_Layer]]) -> None:
    """Makes the int8 forms; layers with one weight get one packed weight and scale, with one bias one bias."""
    biases: dict[int, nn.Parameter | None] = {}
    for group in groups:
        made: list[Int8Linear] = []
        for layer in group:
            linear = layer.site.module
            if layer.kept or not isinstance(linear, nn.Linear):
                continue
            layer.int8 = int8 = Int8Linear.from_float(linear)
            int8.bias = biases.setdefault(id(linear.bias), int8.bias)
            made.append(int8)
            int8.weight, int8.scale = made[0].weight, made[0].scale


def _measure(layers: list[_Layer], sampled: bool) -> None:
    pairs = [(layer, layer.int8) for layer in layers if layer.int8 is not None]
    comparisons = {}  # layers that are alike are timed once
    for layer, int8 in pairs:
        for call in _calls(layer, sampled):
            if _alike(layer, call) not in comparisons:
                forms = {"float": layer.site.module, "int8": int8}
                runs = {name: forward(form, call, int8.in_features) for name, form in forms.items()}
                comparisons[_alike(layer, call)] = runs
    seconds = fastest(comparisons)
    for layer, int8 in pairs:
        times = [(seconds[_alike(layer, call)], count) for call, count in _calls(layer, sampled).items()]
        if times and sampled:
            layer.seconds = sum(t["float"] * n for t, n in times), sum(t["int8"] * n for t, n in times)
        elif times:
            layer.seconds = geometric_mean(t["float"] for t, _ in times), geometric_mean(t["int8"] for t, _ in times)
        layer.snr_db = snr_db(layer.site.module, int8, _inputs(layer))


def _calls(layer: _Layer, sampled: bool) -> Mapping[Call, int]:
    if sampled:
        return layer.calls.counts
    return {Call(rows, _weight(layer).dtype, autocast_dtype()): 1 for rows in _USUAL_ROWS}


def _alike(layer: _Layer, call: Call) -> Hashable:
    """What the times of a layer depend on."""
    weight = _weight(layer)
    return weight.shape, weight.dtype, layer.site.module.bias is None, call


def _weight(layer: _Layer) -> nn.Parameter:
    return layer.site.module.get_parameter("weight")


def _inputs(layer: _Layer) -> Tensor:
    weight, rows = _weight(layer), layer.calls.inputs
    if not rows:
        rows = [torch.randn(KEPT_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))]
    return torch.cat([part.to(weight.dtype) for part in rows])


def _keep_slower(groups: list[list[_Layer]]) -> None:
    for group in groups:
        times = [layer.seconds for layer in group if layer.seconds is not None]
        before, after = sum(t[0] for t in times), sum(t[1] for t in times)
        if times and after >= before:
            _keep(group, f"int8 is slower: {before / after:.2f} times the speed")


def _keep_fused(groups: list[list[_Layer]], blocks: list[Site], runs: dict[nn.Module, Runs]) -> None:
    """Keeps the layers inside an encoder whose fused path is worth more than int8."""
    inside = {b: [g for g in groups if any(not x.kept and b.module in x.site.ancestors for x in g)] for b in blocks}
    first = {b: runs[b.module].first for b in blocks if inside[b] and b.module in runs}
    seconds = fastest({b: {"fused": run, "plain": unfused()(run)} for b, run in first.items() if run is not None})
    for block, times in seconds.items():
        cost = (times["plain"] - times["fused"]) * runs[block.module].count
        gain = sum(x.seconds[0] - x.seconds[1] for g in inside[block] for x in g if x.seconds is not None)
        if cost >= gain:
            name = block.names[0] or "the model"
            why = (
                f"would switch off torch's fused path of {name}: costs {cost * 1e3:.3g} ms, int8 gains {gain * 1e3:.3g}"
            )
            for group in inside[block]:
                _keep(group, why)


def _rows(model: nn.Module, layers: list[_Layer]) -> tuple[LayerRow, ...]:
    rows = {layer.site.module: _row(layer) for layer in layers}
    ordered: list[LayerRow] = []
    for site in sites(model, (nn.Linear, Int8Linear, nn.MultiheadAttention)):
        if isinstance(site.module, nn.MultiheadAttention):
            ordered += _attention_rows(site)
        else:
            ordered.append(rows[site.module])
    return tuple(ordered)


def _row(layer: _Layer) -> LayerRow:
    module = layer.site.module
    size = _bytes(module)
    converted = layer.int8 is not None and not layer.kept
    calls: dict[int, int] = {}
    for call, count in layer.calls.counts.items():
        calls[call.rows] = calls.get(call.rows, 0) + count
    return LayerRow(
        names=layer.site.names,
        kind=type(module).__name__,
        shape=(int(module.out_features), int(module.in_features)),  # type: ignore[arg-type]
        action="int8" if converted else "kept",
        reason=layer.kept or _why_converted(layer),
        bytes_before=size,
        bytes_after=_bytes(layer.int8) if converted and layer.int8 is not None else size,
        ms_before=layer.seconds[0] * 1e3 if layer.seconds else None,
        ms_after=layer.seconds[1] * 1e3 if layer.seconds else None,
        snr_db=layer.snr_db,
        rows=calls,
    )


def _why_converted(layer: _Layer) -> str:
    if layer.seconds is None:
        return "as asked; the sample never calls it"
    ratio = layer.seconds[0] / layer.seconds[1]
    return f"{ratio:.2f} times the speed" if ratio > 1 else f"as asked, though slower: {ratio:.2f} times the speed"


def _attention_rows(site: Site) -> Iterable[LayerRow]:
    for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = getattr(site.module, attribute)
        if weight is not None:
            yield LayerRow(
                names=tuple(f"{name}.{attribute}".removeprefix(".") for name in site.names),
                kind=type(site.module).__name__,
                shape=(weight.shape[0], weight.shape[1]),
                action="kept",
                reason="a parameter of nn.MultiheadAttention, not a layer",
                bytes_before=weight.nbytes,
                bytes_after=weight.nbytes,
                ms_before=None,
                ms_after=None,
                snr_db=None,
                rows={},
            )


def _bytes(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.nbytes for t in tensors if not torch.nn.parameter.is_lazy(t))


def _measured(sampled: bool) -> str:
    what = "per run of the sample"
    if not sampled:
        what = f"per call, geometric mean over {', '.join(map(str, _USUAL_ROWS))} rows"
    return f"ms {what}, {_C.isa()}, threads: {torch.get_num_threads()}"
