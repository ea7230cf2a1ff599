"""Prunes in rounds, with training in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from potstill.transform.patterns import NofM
from potstill.transform.prune import Prune, prune_
from potstill.transform.prune_facts import Loss
from potstill.transform.prune_report import PruneReport
from potstill.transform.swap import Pattern

Train = Callable[[nn.Module, PruneReport], object]


def prune_iteratively_(
    model: nn.Module,
    config: Prune,
    train: Train,
    *,
    rounds: int = 5,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
) -> list[PruneReport]:
    """Calls :func:`prune_` and then ``train(model, report)`` in each round, in place; returns the reports.

    Round i of n prunes to the sparsity 1 - (1 - s)^(i/n), so that each removes the same share of what is left; the last
    one to that of ``config``. A weight that was pruned may come back in a later round. After Han et al. 2015, "Learning
    both Weights and Connections for Efficient Neural Networks". The other arguments are those of :func:`prune_`, whose
    errors it raises too; ``data`` is run over in each round.

    Raises :class:`ValueError` for a pattern n:m, which has one sparsity, and fewer rounds than one, and
    :class:`TypeError` for an iterator as ``data``.

    >>> model = nn.Sequential(nn.Linear(64, 32))
    >>> reports = prune_iteratively_(model, Prune(0.75), lambda model, report: None, rounds=2)
    >>> [report.sparsity for report in reports]
    [0.5, 0.75]
    """
    check_in_steps("prune_iteratively_", config, data)
    if rounds < 1:
        raise ValueError(f"prune_iteratively_: rounds is {rounds}; it must be at least 1")
    reports = []
    for number in range(1, rounds + 1):
        sparsity = config.share if number == rounds else 1.0 - (1.0 - config.share) ** (number / rounds)
        now = replace(config, sparsity=sparsity)
        reports.append(prune_(model, now, data, loss=loss, include=include, exclude=exclude))
        train(model, reports[-1])
    return reports


def check_in_steps(caller: str, config: Prune, data: Iterable[Any] | None) -> None:
    """Raises what a pruning in several steps cannot do with its arguments, under the name of ``caller``."""
    if not isinstance(config, Prune):
        raise TypeError(f"{caller}: config is {config!r}, expected a potstill.Prune")
    if isinstance(config.shape, NofM):
        raise ValueError(
            f"{caller}: pattern {config.pattern!r} has one sparsity, which cannot rise; call prune_ once, or choose "
            "blocks"
        )
    if isinstance(data, Iterator):
        raise TypeError(f"{caller}: data can be run over only once, but is needed again; give a list or a DataLoader")
