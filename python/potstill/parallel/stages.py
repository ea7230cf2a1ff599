"""Where to cut a model into the stages of a pipeline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from potstill.parallel.chains import Call, Chain, chains, watched
from potstill.parallel.parts import Part
from potstill.transform.observe import Sample, watching

_ERROR = 1e-3  # relative, of the stages' output: none is expected, but kernels may add up in another order
_TRIES = 8  # chains of modules, in the order of what their slowest stage takes: some are not all of the data flow


def stages(model: nn.Module, count: int, sample_input: Sample) -> tuple[tuple[str, ...], ...]:
    """The names of the modules of each of ``count`` pipeline stages, so that the slowest stage is as fast as can be.

    ``model`` is run on ``sample_input`` (a tensor, a tuple of positional or a mapping of keyword arguments) a few
    times, in eval mode and without gradients. It can be cut where modules that are called once pass one tensor on to
    the next: between the children of an ``nn.Sequential``, or the layers that a model calls in a loop. What is called
    before them (embeddings) belongs to the first stage, what comes after (a norm, a head) to the last. Modules that no
    stage names, such as rotary embeddings, are part of all of them. The cuts minimise the largest sum of the seconds
    of a stage's modules, and then the sum of squares.

    Under a process group all ranks call this; the first one measures, and all get its answer.

    Raises :class:`ValueError`, on every rank, if the model cannot be cut, or if it would then give other results.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    >>> cut = stages(model, 2, torch.randn(8, 64))
    >>> len(cut), [name for stage in cut for name in stage]
    (2, ['0', '1', '2', '3'])
    """
    if count < 1:
        raise ValueError(f"stages: count is {count}; expected the number of stages, at least 1")
    if not (dist.is_available() and dist.is_initialized()):
        return _stages(model, count, sample_input)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [_stages(model, count, sample_input)]
        except Exception as error:  # the other ranks wait for an answer, whatever has gone wrong
            dist.broadcast_object_list([f"{error}"])
            raise
    dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    answer: tuple[tuple[str, ...], ...] = found[0]
    return answer


def _stages(model: nn.Module, count: int, sample: Sample) -> tuple[tuple[str, ...], ...]:
    whole, output = watched(model, sample)
    names = {module: name for name, module in model.named_modules()}
    found = chains(whole)
    fitting = [chain for chain in found if len(chain.units) >= count]
    if not fitting:
        raise ValueError(_refusal(count, found, names))
    plans = [(chain, *_planned(chain, whole, count)) for chain in fitting]
    plans.sort(key=lambda plan: plan[1])
    problems: list[ValueError] = []
    for chain, _, ends in plans[:_TRIES]:
        cut = _named(chain, ends, whole, names)
        try:
            _check(model, cut, sample, output)
        except ValueError as error:
            problems.append(error)
        else:
            return cut
    raise problems[0]


def _planned(chain: Chain, whole: Call, count: int) -> tuple[float, list[int]]:
    """The seconds of the slowest stage, and the number of units where each stage ends."""
    costs = [sum(call.seconds for call in unit) for unit in chain.units]
    first = {call.module for call in _of_first(chain, whole)}
    costs[0] += sum(call.seconds for call in chain.before if call.module in first)
    costs[-1] += sum(call.seconds for call in chain.after)
    ends = balanced(costs, count)
    everywhere = sum(call.seconds for call in chain.before if call.module not in first)
    return everywhere + max(sum(costs[a:b]) for a, b in zip((0, *ends), ends, strict=False)), ends


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """Where each of ``count`` parts of ``costs`` ends, none empty, so that the largest sum is smallest.

    Of several such cuts that with the smallest sum of squares. Dynamic programming over the parts, O(count * n^2).

    >>> balanced([1, 1, 1, 3, 1, 1], 3)
    [3, 4, 6]
    """
    sums = [0.0, *accumulate(costs)]
    n = len(costs)
    # best[i]: of the first i costs in as many parts as there were rounds, the largest sum, the squares, the ends.
    none: tuple[float, float, list[int]] = (math.inf, math.inf, [])
    best = [(0.0, 0.0, none[2]), *[none] * n]
    for part in range(1, count + 1):
        best = [
            min(
                (
                    (max(best[j][0], sums[i] - sums[j]), best[j][1] + (sums[i] - sums[j]) ** 2, [*best[j][2], i])
                    for j in range(part - 1, i)
                ),
                default=none,
            )
            for i in range(n + 1)
        ]
    return best[n][2]


def _named(found: Chain, ends: Sequence[int], whole: Call, names: dict[nn.Module, str]) -> tuple[tuple[str, ...], ...]:
    spans = zip((0, *ends), ends, strict=False)
    parts = [[call.module for unit in found.units[a:b] for call in unit] for a, b in spans]
    parts[0] = [call.module for call in _of_first(found, whole)] + parts[0]
    parts[-1] += [call.module for call in _only_here(found.after, whole)]
    return tuple(tuple(names[module] for module in dict.fromkeys(part)) for part in parts)


def _of_first(chain: Chain, whole: Call) -> list[Call]:
    """What comes before the chain and need not run on the stages after the first."""
    hidden = chain.units[0][0].given
    return [call for call in _only_here(chain.before, whole) if _can_be_stood_in_for(call, hidden)]


def _can_be_stood_in_for(call: Call, hidden: Tensor | None) -> bool:
    """As :class:`parts.StandIn` does it: by zeros of an embedding's shape, or else by the hidden state."""
    if getattr(call.module, "embedding_dim", None) is not None:
        return True
    return call.returned is not None and hidden is not None and call.returned.shape == hidden.shape


def _only_here(calls: Sequence[Call], whole: Call) -> list[Call]:
    """Those of modules with parameters or buffers that are called in these calls alone."""
    here = Counter(inner.module for call in calls for inner in call.all())
    everywhere = Counter(call.module for call in whole.all())
    return [c for c in calls if here[c.module] == everywhere[c.module] and c.module.state_dict()]


def _check(model: nn.Module, cut: tuple[tuple[str, ...], ...], sample: Sample, expected: Any) -> None:
    """Runs the stages one after the other here."""
    result: Any = None
    with watching(model, ()):
        try:
            for index in range(len(cut)):
                result = Part(model, cut, index, model)(result, sample)
        except Exception as error:
            raise ValueError(
                f"stages: the model runs as a whole, but its stage {index} of {[list(s) for s in cut]} fails: "
                f"{type(error).__name__}: {error}. {_ADVICE}"
            ) from error
    for found, wanted in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        if isinstance(wanted, Tensor) and not torch.allclose(found, wanted, _ERROR, _scale(wanted), equal_nan=True):
            raise ValueError(
                f"stages: cut into {[list(s) for s in cut]} the model returns something else: code between its modules "
                f"reads a value from before a cut (a skip connection?). {_ADVICE}"
            )


def _scale(wanted: Tensor) -> float:
    return _ERROR * float(wanted.detach().double().abs().nan_to_num(0.0).max()) if wanted.numel() else 0.0


_ADVICE = (
    "Make the model an nn.Sequential, or a loop x = layer(x, ...) over an nn.ModuleList whose layers return one tensor "
    "and read of the earlier ones only x"
)


def _refusal(count: int, found: Sequence[Chain], names: dict[nn.Module, str]) -> str:
    longest = max(found, key=lambda chain: len(chain.units), default=None)
    row = [] if longest is None else [names[call.module] for unit in longest.units for call in unit]
    return (
        f"stages: the model cannot be cut into {count}: at most {len(longest.units) if longest else 0} of its modules "
        f"pass one tensor on to each other ({', '.join(row[:8])}{', ...' if len(row) > 8 else ''}), each called once. "
        f"{_ADVICE}, or use fewer stages"
    )
