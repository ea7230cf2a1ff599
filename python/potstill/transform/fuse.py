"""Joins int8 layers with what comes next to them, where that is faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from potstill.errors import ConversionError
from potstill.nn import (
    BlockSparseLinear,
    FusedActivation,
    Int8Linear,
    Int8LinearPart,
    LinearAddNorm,
    SemiSparseLinear,
    SparseLinear,
)
from potstill.nn.activation import activation_name
from potstill.nn.shared import link, why_not_shared
from potstill.transform.attention_interface import NAME, TORCH, attention_models, switch
from potstill.transform.block_end import linear_add_norm
from potstill.transform.measure import calling, fastest
from potstill.transform.observe import Call, Sample, run
from potstill.transform.swap import Undo, all_of, replace, sites
from potstill.transform.table import text_table
from potstill.transform.trace import Trace, trace

Fusable = Int8Linear | SparseLinear | SemiSparseLinear | BlockSparseLinear
"""Layers that may apply an activation."""

What = Literal["activation", "shared input", "residual", "attention"]


@dataclass(frozen=True)
class FusionRow:
    """What was found: the layers, what could be joined, whether it was (``action``), why, and the time of both ways.

    ``ms_before`` and ``ms_after`` are milliseconds of all calls in one run of the sample; None where not measured.
    """

    names: tuple[str, ...]
    what: What
    action: Literal["fused", "kept"]
    reason: str
    ms_before: float | None
    ms_after: float | None


@dataclass(frozen=True)
class FusionReport:
    """All that was found, and the whole model's milliseconds for the sample; ``print`` shows a table."""

    rows: tuple[FusionRow, ...]
    ms_before: float
    ms_after: float

    @property
    def fused(self) -> tuple[FusionRow, ...]:
        """The rows that changed the model."""
        return tuple(row for row in self.rows if row.action == "fused")

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain dicts, lists, strings and numbers, ready for :func:`json.dumps`."""
        rows = [asdict(row) | {"names": list(row.names)} for row in self.rows]
        return {"fusions": rows, "ms_before": self.ms_before, "ms_after": self.ms_after}

    def __str__(self) -> str:
        """A table for a terminal of 120 columns."""
        ratio = self.ms_before / self.ms_after
        summary = (
            f"{len(self.fused)} of {len(self.rows)} fused; the model takes {self.ms_before:.3g} -> "
            f"{self.ms_after:.3g} ms for the sample ({ratio:.2f} times the speed)"
        )
        return text_table(("what", "now", "ms"), map(_cells, self.rows), [summary])


def _cells(row: FusionRow) -> Iterable[str]:
    ms = "" if row.ms_before is None else f"{row.ms_before:.3g} -> {row.ms_after:.3g}"
    return ", ".join(row.names), row.what, row.action, ms, row.reason


@dataclass(eq=False)
class _Candidate:
    """Something to join: its layers, how to do it, and both ways as callables for each kind of call."""

    what: What
    names: tuple[str, ...]
    calls: Counter[Call]
    ways: Callable[[Call], dict[str, Callable[[], object]]]
    apply: Callable[[], Undo]
    kept: str = ""
    ms: tuple[float, float] | None = None


def fuse_(model: nn.Module, sample_input: Sample, only_if_faster: bool = True) -> FusionReport:
    """Joins int8 and sparse layers of ``model`` with what is next to them, in place, after quantize_ or realise_.

    - A layer whose outputs go to an activation module (ReLU, GELU, tanh-GELU, SiLU, of whatever class) and nowhere else
      applies it itself; the module's place is taken by :class:`nn.FusedActivation`.
    - Int8 layers that read the same tensor (attention's query, key and value) are computed by one call; each becomes an
      :class:`nn.Int8LinearPart`, so that the model's own code need not change.
    - The ends of the blocks of BERT and its relatives add the residual while they normalise:
      :class:`nn.LinearAddNorm`.
    - Models of the transformers package that call ``F.scaled_dot_product_attention`` call :data:`ops.attention`, as the
      attention implementation ``"potstill"`` of their config; ``model.set_attn_implementation("sdpa")`` undoes it.

    A file that :func:`save` writes keeps the first two. The last two change classes of the model's own, and no tensors:
    after :func:`load`, ``fuse_`` does them again.

    ``sample_input`` is a tensor, a tuple of positional or a mapping of keyword arguments; the model is run on it, in
    eval mode, to see where tensors go. ``only_if_faster=False`` joins whatever can be joined. Outputs before and after
    must agree, or everything is taken back and :class:`ConversionError` raised.

    >>> from potstill import quantize_
    >>> model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(16, 64)
    >>> _ = quantize_(model, only_if_faster=False)
    >>> [(row.names, row.action) for row in fuse_(model, x, only_if_faster=False).rows]
    [(('0', '1'), 'fused')]
    >>> model[:2]
    Sequential(
      (0): Int8Linear(in_features=64, out_features=64, bias=True, activation='gelu')
      (1): FusedActivation('gelu')
    )
    """
    names = {site.module: site.names for site in sites(model, nn.Module)}
    layers = [m for m in names if isinstance(m, Fusable) and not isinstance(m, Int8LinearPart)]
    activations = [m for m in names if not isinstance(m, FusedActivation) and activation_name(m)]
    seen = trace(model, layers, activations, sample_input)
    candidates = [
        *_activations(model, seen, names),
        *_groups(model, seen, names),
        *_residuals(model, seen, names),
    ]
    with torch.inference_mode(False), torch.no_grad():
        _measure([c for c in candidates if not c.kept])
        for candidate in candidates:
            if only_if_faster and candidate.ms is not None and candidate.ms[1] >= candidate.ms[0]:
                candidate.kept = "separate calls are as fast"
        before = _time(model, sample_input)
        undo = all_of([c.apply() for c in candidates if not c.kept])
        link(model)
        attention, undo_attention = _attention(model, sample_input, only_if_faster)
    if not _agree(seen.result, run(model, sample_input)):
        all_of([undo, undo_attention])()
        raise ConversionError(
            "fuse_: the model's outputs for sample_input changed, so that everything was taken back; does the model "
            "keep the output of a layer beside its activation, or is it random in eval mode?"
        )
    return FusionReport((*map(_row, candidates), *attention), before, _time(model, sample_input))


def _attention(model: nn.Module, sample: Sample, only_if_faster: bool) -> tuple[list[FusionRow], Undo]:
    models = attention_models(model)
    if not models:
        return [], all_of([])

    def with_attention(name: str) -> None:
        switch(models, name)
        run(model, sample)

    ways = {name: partial(with_attention, name) for name in (TORCH, NAME)}
    seconds = fastest({"model": ways})["model"]
    ratio = seconds[TORCH] / seconds[NAME]
    chosen = NAME if ratio > 1.0 or not only_if_faster else TORCH
    switch(models, chosen)
    names = tuple(name or "the model" for name, module in model.named_modules() if module in models)
    action: Literal["fused", "kept"] = "fused" if chosen == NAME else "kept"
    reason = f"{ratio:.2f} times the model's speed" if chosen == NAME else "torch's is as fast"
    return [FusionRow(names, "attention", action, reason, None, None)], partial(switch, models, TORCH)


def _activations(model: nn.Module, seen: Trace, names: dict[nn.Module, tuple[str, ...]]) -> Iterable[_Candidate]:
    for module, inputs in seen.activations.items():
        layers = {output.layer for output in inputs if output is not None}
        if not layers:
            continue
        layer = next(iter(layers))
        name = activation_name(module)
        if not isinstance(layer, Fusable) or name is None:
            continue
        fused, gone = _with_activation(layer, name), FusedActivation.of(module, name)
        yield _Candidate(
            "activation",
            (*names[layer], *names[module]),
            Counter(seen.calls[layer]),
            partial(_activation_ways, layer, module, fused),
            partial(_apply, model, [(names[layer], fused), (names[module], gone)]),
            kept=_why_not_activation(seen, module, layer),
        )


def _why_not_activation(seen: Trace, module: nn.Module, layer: Fusable) -> str:
    if layer.activation != "none":
        return "the layer applies one already"
    inputs, own = seen.activations[module], [output for output in seen.outputs if output.layer is layer]
    if any(output is None or output.layer is not layer for output in inputs):
        return "the activation is also used elsewhere"
    if any(reader is not module for output in own for reader in output.readers) or len(inputs) != len(own):
        return "the layer's output is also read by others"
    return ""


def _with_activation(layer: Fusable, activation: str) -> Fusable:
    fused = type(layer).__new__(type(layer))
    fused.__dict__.update(vars(layer))
    fused.activation = activation
    return fused


def _activation_ways(layer: Fusable, module: nn.Module, fused: Fusable, call: Call) -> dict[str, Callable[[], object]]:
    separate = nn.Sequential(layer, module)
    return _ways(separate, fused, call, layer.in_features)


def _groups(model: nn.Module, seen: Trace, names: dict[nn.Module, tuple[str, ...]]) -> Iterable[_Candidate]:
    taken: set[nn.Module] = set()
    number = 1 + max((m.group for m in model.modules() if isinstance(m, Int8LinearPart)), default=-1)
    for together in seen.inputs:
        layers = [m for m in dict.fromkeys(together) if isinstance(m, Int8Linear)]
        if len(layers) < 2 or taken & set(layers):
            continue
        taken.update(layers)
        parts = [Int8LinearPart.of(layer, number) for layer in layers]
        yield _Candidate(
            "shared input",
            tuple(name for layer in layers for name in names[layer]),
            Counter(seen.calls[layers[0]]),
            partial(_group_ways, layers, parts),
            partial(_apply, model, [(names[layer], part) for layer, part in zip(layers, parts, strict=True)]),
            kept=_why_not_group(seen, layers),
        )
        number += 1


def _why_not_group(seen: Trace, layers: Sequence[Int8Linear]) -> str:
    others = [together for together in seen.inputs if set(together) & set(layers)]
    if any(Counter(together) != Counter(layers) for together in others):
        return "they do not always read the same input"
    activated = {output.layer for outputs in seen.activations.values() for output in outputs if output is not None}
    if activated & set(layers):
        return "an activation follows one of them, which its layer applies"
    return why_not_shared(layers)


def _group_ways(
    layers: Sequence[Int8Linear], parts: Sequence[Int8LinearPart], call: Call
) -> dict[str, Callable[[], object]]:
    link(nn.ModuleList(parts))
    return _ways(_All(layers), _All(parts), call, layers[0].in_features)


def _ways(before: nn.Module, after: nn.Module, call: Call, features: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(call.rows, features, generator=torch.Generator().manual_seed(0)).to(call.dtype)
    return {"before": calling(before, call, (x,), {}), "after": calling(after, call, (x,), {})}


def _residuals(model: nn.Module, seen: Trace, names: dict[nn.Module, tuple[str, ...]]) -> Iterable[_Candidate]:
    for module in names:
        fused = linear_add_norm(module)
        if fused is not None and fused.dense in seen.calls:
            yield _Candidate(
                "residual",
                names[module],
                Counter(seen.calls[fused.dense]),
                partial(_residual_ways, module, fused),
                partial(_apply_residual, model, names[module], module),
            )


def _apply_residual(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> Undo:
    fused = linear_add_norm(module)  # anew: its layer may have become a part of another call
    return all_of([] if fused is None else [replace(model, names, fused)])


def _residual_ways(module: nn.Module, fused: LinearAddNorm, call: Call) -> dict[str, Callable[[], object]]:
    random = torch.Generator().manual_seed(0)
    sizes = fused.dense.in_features, fused.dense.out_features
    inputs = tuple(torch.randn(call.rows, size, generator=random).to(call.dtype) for size in sizes)
    return {"before": calling(module, call, inputs, {}), "after": calling(fused, call, inputs, {})}


class _All(nn.Module):
    """Gives one input to several layers."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = list(layers)  # no submodules: they keep their places in the model

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def _apply(model: nn.Module, places: Iterable[tuple[tuple[str, ...], nn.Module]]) -> Undo:
    return all_of([replace(model, names, new) for names, new in places])


def _measure(candidates: Sequence[_Candidate]) -> None:
    comparisons = {(i, call): c.ways(call) for i, c in enumerate(candidates) for call in c.calls}
    seconds = fastest(comparisons)
    for i, candidate in enumerate(candidates):
        totals = [
            1e3 * sum(count * seconds[i, call][way] for call, count in candidate.calls.items())
            for way in ("before", "after")
        ]
        candidate.ms = (totals[0], totals[1])


def _time(model: nn.Module, sample: Sample) -> float:
    times = fastest({"model": {"run": partial(run, model, sample)}})
    return 1e3 * times["model"]["run"]


def _agree(before: object, after: object) -> bool:
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    return all(_close(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    # Where float32 rounds otherwise, single int8 activations move by a step, and deep models amplify that up to the
    # error that int8 itself brings, some percent; a value that goes to the wrong place moves everything.
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool((a - b).norm() <= 0.25 * a.norm())


def _row(candidate: _Candidate) -> FusionRow:
    before, after = candidate.ms or (None, None)
    action: Literal["fused", "kept"] = "kept" if candidate.kept else "fused"
    return FusionRow(candidate.names, candidate.what, action, candidate.kept or "faster", before, after)
