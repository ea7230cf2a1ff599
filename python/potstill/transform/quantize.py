"""Replaces layers by integer ones where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from potstill.transform.build import build
from potstill.transform.configs import Config, Int8, Mixed
from potstill.transform.measure import autocast, calling, fastest, geometric_mean, snr_db
from potstill.transform.observe import BlockCalls, Call, Sample, evaluating, observe, unfused
from potstill.transform.reads import ForeignReads
from potstill.transform.report import Report
from potstill.transform.rounding import forget
from potstill.transform.rows import model_bytes, rows_of, what_was_measured
from potstill.transform.rules.rule import Rule
from potstill.transform.survey import Layer, keep, outermost, survey, tied_groups
from potstill.transform.swap import Pattern, Site, fast_path_blocks, replace


def quantize_(
    model: nn.Module,
    config: Config | Mixed = Int8(),
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    only_if_faster: bool = True,
    sample_input: Sample | None = None,
) -> Report:
    """Converts layers of ``model`` to the integer form that ``config`` names, in place, and reports every layer.

    - ``config``: :class:`Int8`, :class:`Int4`, or :class:`Mixed` for another one per layer. Int8 is there for linear
      layers, embeddings, attention and encoder layers; of a module and its parts the whole comes first.
    - ``include``, ``exclude``: wildcards for dotted names (``"encoder.*.mlp.*"``) or module types, one or several. A
      type stands for the layers that are of it or lie inside a module of it.
    - ``only_if_faster``: convert a layer only if that is faster here, at the row counts it gets from ``sample_input``,
      or at 1, 32 and 128 rows. ``False`` converts every layer that can be converted.
    - ``sample_input``: a tensor, a tuple of positional or a mapping of keyword arguments. The model is run on it once,
      in eval mode and without gradients, to see how each layer is called and to measure its error on real inputs.

    Weights are rounded to nearest, or as :func:`calibrate_` found best for the same config. A layer that other code
    reads without calling it (attention's projections), whose weight is tied to one that is kept, that has hooks,
    parametrisations or a behaviour of its own, or whose dtype or device has no kernel, is kept, with the reason in its
    row. Tied weights stay tied if their new forms are of one kind; an embedding and a head get a copy each. Torch's
    fused path of ``nn.TransformerEncoder`` and its layers is switched off where a layer inside is converted; if the
    sample shows that this costs more than the integers gain, nothing inside is converted. Converted layers are frozen;
    gradients flow through to their inputs.

    Raises :class:`ConversionError` if a pattern matches no layer; the model is then unchanged.

    >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    >>> report = quantize_(model, exclude="2", only_if_faster=False, sample_input=torch.randn(32, 256))
    >>> [(row.names, row.action) for row in report.rows]
    [(('0',), 'int8'), (('2',), 'kept')]
    >>> model[0]
    Int8Linear(in_features=256, out_features=512, bias=True)
    """
    if not isinstance(config, Config | Mixed):
        raise TypeError(f"quantize_: config is {config!r}, expected potstill.Int8(), potstill.Int4() or potstill.Mixed")
    layers = survey(model, config, include, exclude)
    blocks = fast_path_blocks(model)
    runs = {block: BlockCalls() for block in blocks}
    if sample_input is not None:
        _observe(model, layers, runs, sample_input, only_if_faster)
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could never take part in training
        groups = _decide(model, layers, blocks, sample_input is not None, only_if_faster)
        if only_if_faster:
            with evaluating(model):
                _keep_fused(groups, runs)
        rows, bytes_before = rows_of(layers), model_bytes(model)
        for layer in layers:
            if layer.new is not None and not layer.kept:
                replace(model, layer.site.names, layer.new)
        forget(layer.site.module for layer in layers)
    return Report(rows, bytes_before, model_bytes(model), what_was_measured(sample_input is not None))


def _observe(
    model: nn.Module, layers: list[Layer], runs: Mapping[Site, BlockCalls], sample: Sample, only_if_faster: bool
) -> None:
    for layer in layers:
        if layer.rule is not None and not layer.kept:
            layer.calls = layer.rule.watch()
    records = [(layer.site.module, layer.calls) for layer in layers if layer.calls is not None]
    with ForeignReads(map(_weights, layers)) as reads:
        observe(model, [*records, *((block.module, record) for block, record in runs.items())], sample)
    for layer in layers:
        if layer.rule is not None and layer.calls is not None:
            reasons = [layer.rule.why_not_call(call) for call in layer.calls.counts]
            if layer.site.module in reads.found:
                reasons.append("its weight is read in the sample by code that does not call it")
            if layer.calls.nested:
                reasons.append("the sample calls it with a nested tensor")
            if only_if_faster and not layer.calls.counts:
                reasons.append("the sample never calls it")
            layer.kept = next((why for why in reasons if why), "")


def _weights(layer: Layer) -> tuple[nn.Module, list[Tensor]]:
    module = layer.site.module
    names = layer.rule.weights(module) if layer.rule is not None and not layer.kept else ()
    return module, [module.get_parameter(name) for name in names]


def _decide(
    model: nn.Module, layers: list[Layer], blocks: list[Site], sampled: bool, only_if_faster: bool
) -> list[list[Layer]]:
    """Makes and measures the new forms, of whole modules before those of their parts; returns the groups of ties."""
    done: list[list[Layer]] = []
    open_layers = [layer for layer in layers if not layer.kept]
    while open_layers:
        now = outermost(open_layers)
        groups = tied_groups(model, layers, now)
        build(groups)
        _measure(now, blocks, sampled)
        if only_if_faster:
            _keep_slower(groups)
        done += groups
        for part in layers:
            around = (whole for whole in now if not whole.kept and part.inside(whole))
            part.whole = part.whole or next(around, None)
        open_layers = [layer for layer in open_layers if layer not in now and layer.whole is None]
    return done


def _measure(layers: list[Layer], blocks: list[Site], sampled: bool) -> None:
    made = [(x, x.rule, x.new) for x in layers if x.rule is not None and x.new is not None]
    comparisons: dict[Hashable, dict[str, Callable[[], object]]] = {}  # layers that are alike are timed once
    for layer, rule, new in made:
        for call in _calls(layer, rule, sampled):
            key = _alike(layer, rule, call)
            comparisons[key] = comparisons.get(key) or _forms(layer, rule, new, call, blocks)
    seconds = fastest(comparisons)
    for layer, rule, new in made:
        times = [(seconds[_alike(layer, rule, call)], n) for call, n in _calls(layer, rule, sampled).items()]
        if times and sampled:
            layer.seconds = sum(t["float"] * n for t, n in times), sum(t[rule.action] * n for t, n in times)
        elif times:
            layer.seconds = (
                geometric_mean(t["float"] for t, _ in times),
                geometric_mean(t[rule.action] for t, _ in times),
            )
        _measure_error(layer, rule, new)


def _forms(
    layer: Layer, rule: Rule[Any], new: nn.Module, call: Call, blocks: list[Site]
) -> dict[str, Callable[[], object]]:
    """The old and the new form of a layer, ready to be timed.

    Where torch's fused path may go around the layer, the old form is timed without: :func:`_keep_fused` adds that.
    """
    module = layer.site.module
    args, kwargs = rule.arguments(module, call, layer.calls)
    old = calling(module, call, args, kwargs)
    fusable = any(_touches(layer, block) for block in blocks)
    return {"float": unfused()(old) if fusable else old, rule.action: calling(new, call, args, kwargs)}


def _calls(layer: Layer, rule: Rule[Any], sampled: bool) -> Mapping[Call, int]:
    return layer.calls.counts if sampled and layer.calls is not None else rule.usual(layer.site.module)


def _alike(layer: Layer, rule: Rule[Any], call: Call) -> Hashable:
    """What the times of a layer depend on."""
    return rule, layer.config, rule.alike(layer.site.module), call


def _measure_error(layer: Layer, rule: Rule[Any], new: nn.Module) -> None:
    module = layer.site.module
    device = next(module.parameters()).device.type
    args, kwargs = rule.example(module, layer.calls or rule.watch())

    def output(form: nn.Module) -> Tensor:
        with autocast(None, device):
            result = form(*args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]  # attention returns its weights too

    wanted = output(module)
    layer.snr_db = snr_db(wanted, output(new))
    if layer.rounding != "nearest":
        layer.nearest_snr_db = snr_db(wanted, output(rule.build(module, layer.config, None)))


def _keep_slower(groups: list[list[Layer]]) -> None:
    for group in groups:
        times = [layer.seconds for layer in group if layer.seconds is not None]
        before, after = sum(t[0] for t in times), sum(t[1] for t in times)
        if times and after >= before and group[0].rule is not None:
            keep(group, f"{group[0].rule.action} is slower: {before / after:.2f} times the speed")


def _keep_fused(groups: list[list[Layer]], runs: Mapping[Site, BlockCalls]) -> None:
    """Keeps the layers inside an encoder whose fused path is worth more than the integers."""
    inside: dict[Site, list[list[Layer]]] = {}
    for block in runs:
        touched = [g for g in groups if any(not x.kept and _touches(x, block) for x in g)]
        if touched:
            inside[block] = touched
    comparisons = {}
    for block in inside:
        for call, (args, kwargs) in runs[block].examples.items():
            run = calling(block.module, call, args, kwargs)
            comparisons[block, call] = {"fused": run, "plain": unfused()(run)}
    seconds = fastest(comparisons)
    for block, touched in inside.items():
        times = [(seconds[block, call], count) for call, count in runs[block].counts.items()]
        cost = sum((t["plain"] - t["fused"]) * count for t, count in times)
        gain = sum(x.seconds[0] - x.seconds[1] for g in touched for x in g if x.seconds is not None and not x.kept)
        if times and cost >= gain:
            name, lost, won = block.names[0] or "the model", f"{cost * 1e3:.3g} ms", f"{gain * 1e3:.3g}"
            for group in touched:
                what = group[0].rule.action if group[0].rule is not None else ""
                keep(group, f"would switch off torch's fused path of {name}: costs {lost}, {what} gains {won}")


def _touches(layer: Layer, block: Site) -> bool:
    return block.module in (layer.site.module, *layer.site.ancestors)
