"""The state of all randomness that a training run draws on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Chance:
    """The global generators of torch (and of ``device``), numpy and ``random``, and the generators of a loader.

    The state is a dictionary of plain numbers, tuples and tensors, so that ``torch.load(weights_only=True)`` reads it.

    >>> chance = Chance(torch.device("cpu"))
    >>> state = chance.state()
    >>> first = random.random(), float(np.random.rand()), float(torch.rand(()))
    >>> chance.restore(state)
    >>> first == (random.random(), float(np.random.rand()), float(torch.rand(())))
    True
    """

    def __init__(self, device: torch.device, loader: object = None) -> None:
        self._device = device
        self.generators = _generators(loader)

    def seed(self, seed: int) -> None:
        """Seeds the global generators; a loader's own generators are the caller's."""
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs."""
        name, key, *rest = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
            "numpy": (name, torch.from_numpy(np.asarray(key, dtype=np.int64)), *rest),
            "python": random.getstate(),
            "generators": [generator.get_state() for generator in self.generators],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Puts every generator back to where it was."""
        torch.set_rng_state(state["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["device"], self._device)
        name, key, *rest = state["numpy"]
        np.random.set_state((name, key.numpy(), *rest))
        random.setstate(state["python"])
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restores on leaving what was found on entering."""
        found = self.state()
        try:
            yield
        finally:
            self.restore(found)


def _generators(loader: object) -> list[torch.Generator]:
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    owners = (loader, getattr(loader, "sampler", None), sampler)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
