"""Masks weights of linear layers and convolutions, so that they count as zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from potstill.transform.allocation import erk, ranked, relative, uniform
from potstill.transform.criteria import CRITERIA, Criterion, LayerFacts
from potstill.transform.patterns import Blocks, NofM, parse_pattern
from potstill.transform.patterns import Pattern as Shape
from potstill.transform.prune_facts import Loss, gather
from potstill.transform.prune_layers import Candidate, candidates
from potstill.transform.prune_report import PruneReport, PruneRow
from potstill.transform.prune_trials import by_error
from potstill.transform.swap import Pattern, replace

Scope = Literal["layer", "global", "erk", "error"]


@dataclass(frozen=True)
class Prune:
    """How sparse a model becomes, in which pattern, and which weights go; see :func:`prune_` and docs/pruning.md.

    - ``sparsity``: the share of the weights that become zero, of all layers together: 0.8 if it is not given, or what
      the pattern n:m makes it.
    - ``pattern``: ``"RxC"``, blocks of R outputs by C inputs (``"1x4"``, ``"16x4"``); ``"unstructured"``, single
      weights; ``"n:m"``, n of m consecutive inputs of each output are kept (``"2:4"``).
    - ``criterion``: the name of one in :data:`CRITERIA`, or a :class:`Criterion`.
    - ``scope``: ``"layer"``, the same sparsity in each; ``"global"``, the blocks of all layers ranked together;
      ``"erk"``, sparser the larger a layer is; ``"error"``, by what it does to the model's output, measured.
    - ``balanced``: every row of blocks of a layer loses equally many.
    - ``seed``: of the criterion ``"random"``.

    Raises :class:`ValueError` for values that do not exist or do not go together.

    >>> Prune(pattern="2:4")
    Prune(sparsity=0.5, pattern='2:4', criterion='magnitude', scope='layer', balanced=False, seed=0)
    """

    sparsity: float | None = None
    pattern: str = "1x4"
    criterion: str | Criterion = "magnitude"
    scope: Scope = "layer"
    balanced: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        shape = self.shape
        implied = shape.sparsity if isinstance(shape, NofM) else 0.8
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", implied)
        elif isinstance(shape, NofM) and abs(self.sparsity - implied) > 1e-9:
            raise ValueError(
                f"Prune: sparsity is {self.sparsity}, but {self.pattern!r} makes {implied:.4g} of the weights zero; "
                "leave sparsity out, or choose blocks"
            )
        elif not 0 <= self.sparsity < 1:
            raise ValueError(f"Prune: sparsity is {self.sparsity}, expected 0 <= sparsity < 1")
        if self.scope not in get_args(Scope):
            raise ValueError(f"Prune: scope is {self.scope!r}, expected one of {', '.join(map(repr, get_args(Scope)))}")
        if isinstance(shape, NofM) and self.scope != "layer":
            raise ValueError(
                f"Prune: {self.pattern!r} is as sparse in every layer; scope {self.scope!r} cannot change it"
            )
        self._check_criterion()

    def _check_criterion(self) -> None:
        if not isinstance(self.criterion, Criterion) and self.criterion not in CRITERIA:
            raise ValueError(
                f"Prune: criterion is {self.criterion!r}, expected a Criterion or one of {', '.join(sorted(CRITERIA))}"
            )
        chosen = self.chosen_criterion
        if why := chosen.why_not(self.shape):
            raise ValueError(f"Prune: criterion {chosen.name!r} {why}; got pattern {self.pattern!r}")
        if chosen.per_output and self.scope == "global":
            raise ValueError(
                f"Prune: criterion {chosen.name!r} compares the weights of one output with each other, and scope "
                "'global' those of all layers; use scope 'layer', 'erk' or 'error'"
            )

    @property
    def chosen_criterion(self) -> Criterion:
        """The criterion itself, also where its name was given."""
        return self.criterion if isinstance(self.criterion, Criterion) else CRITERIA[self.criterion]

    @property
    def shape(self) -> Shape:
        """The pattern, taken apart."""
        return parse_pattern(self.pattern)

    @property
    def share(self) -> float:
        """The sparsity, which is a number once the config is made."""
        return cast(float, self.sparsity)


def prune_(
    model: nn.Module,
    config: Prune,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
) -> PruneReport:
    """Masks the least important weights of linear layers and convolutions, in place, and reports every layer.

    - ``data``: for criteria and scopes that look at more than weights: a few batches of inputs, each a tensor, a
      mapping of keyword arguments or a tuple ``(input, ..., target)``; or whatever items ``loss`` takes.
    - ``loss``: for criteria that need gradients: a function of an item of ``data`` that runs ``model`` and returns a
      scalar tensor, for example :meth:`distill.Distiller.loss`.
    - ``include``, ``exclude``: wildcards for dotted names or module types, one or several, as in ``quantize_``.

    A layer becomes an :class:`nn.MaskedLinear` or :class:`nn.MaskedConv2d` with the same parameters, so that training
    goes on with the optimiser there is. Blocks are counted: the sparsity is that share of all blocks, rounded to a
    whole block in each layer, or in each row of blocks where these are balanced. Of a model that has masks already, the
    master weights are scored anew and each layer gets a new mask, so that weights may come back; gradients and inputs
    are those of the model as it is. The model runs in eval mode; training flags, hooks, gradients and random numbers
    are as before. The result depends on weights, data and seed alone. If anything raises, the model is unchanged.

    Quantised layers, tied weights, and modules with hooks, parametrisations or a behaviour of their own are kept, with
    the reason in their row.

    Raises :class:`ValueError` for what the criterion lacks, :class:`ConversionError` if a pattern matches no layer, and
    :class:`PotstillError` if ``data`` yields nothing or the loss is not finite.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> report = prune_(model, Prune(0.75), exclude="2")
    >>> report.sparsity, model[0].sparsity, [row.action for row in report.rows]
    (0.75, 0.75, ['pruned', 'kept'])
    """
    _check(config, data, loss)
    with torch.inference_mode(False), torch.no_grad():
        layers = candidates(model, include, exclude)
        chosen = [layer for layer in layers if not layer.kept]
        facts = gather(model, chosen, config.chosen_criterion.needs, data, loss, config.seed)
        choose = partial(_choose, facts, config)
        counts = _allocate(model, facts, config, data)
        choices = [choose(layer, count) for layer, count in zip(facts, counts, strict=True)]
        for layer, (mask, weight) in zip(facts, choices, strict=True):
            _apply(model, layer, mask, weight)
    return PruneReport(tuple(_row(layer, config.shape) for layer in layers), repr(config))


def _check(config: Prune, data: Iterable[Any] | None, loss: Loss | None) -> None:
    if not isinstance(config, Prune):
        raise TypeError(f"prune_: config is {config!r}, expected a potstill.Prune")
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable | None):
        raise TypeError(
            f"prune_: data is a {type(data).__name__}, expected an iterable of batches; put a single batch in a list"
        )
    name, needs = config.chosen_criterion.name, config.chosen_criterion.needs
    missing = f"criterion {name!r} needs the {needs} of each layer"
    if needs in ("gradient", "squared gradient") and (data is None or loss is None):
        raise ValueError(
            f"prune_: {missing}; pass data, batches to learn from, and loss, a function of a batch that returns the "
            "loss of the model"
        )
    if needs != "nothing" and data is None:
        raise ValueError(f"prune_: {missing}'s inputs; pass data, batches of inputs of the model")
    if config.scope == "error" and data is None:
        raise ValueError("prune_: scope 'error' measures the model's output; pass data, batches of its inputs")
    if config.scope == "error" and needs != "nothing" and isinstance(data, Iterator):
        raise ValueError(
            f"prune_: data can be run over only once, but criterion {name!r} and scope 'error' each need a run; give a "
            "list or a DataLoader"
        )


def _allocate(
    model: nn.Module, facts: Mapping[Candidate, LayerFacts], config: Prune, data: Iterable[Any] | None
) -> list[int]:
    """The number of blocks that each layer loses; n:m has its own."""
    shape, criterion = config.shape, config.chosen_criterion
    if isinstance(shape, NofM) or not facts:
        return [0] * len(facts)
    blocks = {layer: shape.count(layer.mask.shape) for layer in facts}
    if config.scope == "erk":
        return erk([layer.form.weight.shape for layer in facts], list(blocks.values()), config.share)
    if config.scope == "error" and data is not None:
        return by_error(model, list(facts), blocks, config.share, data, partial(_choose, facts, config))
    if config.scope == "global":
        scores = [shape.reduce(criterion.scores(known)) for known in facts.values()]
        return ranked(scores if criterion.comparable else [relative(each) for each in scores], config.share)
    return uniform(list(blocks.values()), config.share)


def _choose(
    facts: Mapping[Candidate, LayerFacts], config: Prune, layer: Candidate, pruned: int
) -> tuple[Tensor, Tensor | None]:
    return config.chosen_criterion.choose(facts[layer], config.shape, pruned, config.balanced)


def _apply(model: nn.Module, layer: Candidate, mask: Tensor, weight: Tensor | None) -> None:
    if weight is not None:
        layer.form.weight.copy_(layer.form.like_weight(weight))
    layer.form.set_mask(mask)
    if layer.form is not layer.site.module:
        replace(model, layer.site.names, layer.form)


def _row(layer: Candidate, shape: Shape) -> PruneRow:
    names, kind = layer.site.names, type(layer.site.module).__name__
    if layer.kept:
        return PruneRow(names, kind, layer.sizes, "kept", layer.kept)
    mask = layer.mask
    kept = shape.reduce(mask) if isinstance(shape, Blocks) else mask
    zeros, left = layer.form.sparsity, int(kept.count_nonzero())
    return PruneRow(names, kind, layer.sizes, "pruned", sparsity=zeros, blocks=kept.numel(), kept_blocks=left)
