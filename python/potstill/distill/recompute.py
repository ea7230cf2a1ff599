"""Activations that are computed twice instead of kept (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from potstill.distill.features import Patterns, modules_named


@contextmanager
def recomputed(model: nn.Module, patterns: Patterns) -> Iterator[None]:
    """While it lasts, the modules of ``model`` that fit ``patterns`` keep only their inputs for the backward pass.

    The instances' ``forward`` is replaced and put back; names, hooks and ``state_dict`` are as ever. Random numbers
    (dropout) are the same in both computations. Chen, Xu, Zhang and Guestrin 2016, "Training deep nets with sublinear
    memory cost".

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1)))
    >>> with recomputed(model, "1"):
    ...     model(torch.ones(2, 4)).sum().backward()
    >>> model[1][0].weight.grad.shape, "forward" in vars(model[1])
    (torch.Size([64, 4]), False)
    """
    modules = [model.get_submodule(name) for name in modules_named(model, patterns, "student")] if patterns else []
    found = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module, forward in zip(modules, found, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
