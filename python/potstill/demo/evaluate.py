"""What the demo measures of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.timing import Timing, compare

BATCHES = (1, 256)
"""Images per call when latency is measured: one, and a throughput-sized batch."""

_VISITS = 3
_SECONDS = 0.5  # of timing, per batch size and visit


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output [n, classes] for ``x`` [n, ...], computed in evaluation mode, 1000 rows at a time.

    >>> logits(nn.Linear(4, 3), torch.zeros(5, 4)).shape
    torch.Size([5, 3])
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(rows) for rows in torch.split(x, 1000)])
    finally:
        model.train(training)


def score(outputs: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracy in percent, and the mean cross-entropy.

    >>> score(torch.tensor([[0.0, 9.0], [0.0, 9.0]]), torch.tensor([1, 0]))["accuracy"]
    50.0
    """
    right = int((outputs.argmax(dim=1) == target).sum())
    return {"accuracy": 100 * right / len(target), "loss": float(F.cross_entropy(outputs, target))}


def gain(with_teacher: Tensor, without: Tensor, target: Tensor) -> dict[str, float]:
    """The difference of two models' accuracies in points, with the standard error of a paired comparison.

    With b and c the numbers of images that only the one and only the other gets right, the difference is (b - c) / n,
    and its standard error sqrt(b + c - (b - c)^2 / n) / n, as in McNemar's test (1947).

    >>> target = torch.tensor([0, 0, 1, 1])
    >>> outputs = torch.eye(2)[[0, 0, 1, 0]], torch.eye(2)[[0, 1, 0, 0]]
    >>> gain(*outputs, target)["points"]
    50.0
    """
    n = len(target)
    first, second = (outputs.argmax(dim=1) == target for outputs in (with_teacher, without))
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    error = (b + c - (b - c) ** 2 / n) ** 0.5 / n
    return {"points": 100 * (b - c) / n, "standard_error": 100 * error, "only_with": b, "only_without": c}


def latencies(models: Mapping[str, nn.Module], x: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> images per call -> seconds per call (median, quartiles), all models timed interleaved.

    Of three visits the one with the shortest times counts: whatever else the machine does only makes them longer.
    """
    result: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in models}
    with torch.inference_mode():
        for size in BATCHES:
            calls = {name: partial(model, x[:size]) for name, model in models.items()}
            visits = [compare(calls, seconds=_SECONDS, rounds=101) for _ in range(_VISITS)]
            for name, timing in min(visits, key=_total).items():
                result[name][str(size)] = asdict(timing)
    return result


def _total(times: Mapping[str, Timing]) -> float:
    # The logarithm, since the slowest model must not outweigh the others.
    return sum(math.log(timing.median) for timing in times.values())


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())
