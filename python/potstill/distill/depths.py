"""Which of a teacher's layers a student with fewer of them takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distill.batch import Batch
from potstill.distill.features import tensor_of
from potstill.distill.loop import mode

LAYERS = ("even", "first", "last", "average", "influence")


def stacks(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[int, int]]:
    """The stacks of layers that both models have, by name -> the student's and the teacher's depth."""
    # Stacks inside stacks (a layer's own list) follow their layer; only their depths must then agree.
    theirs = dict(teacher.named_modules())
    found: dict[str, tuple[int, int]] = {}
    for name, module in student.named_modules():
        other = theirs.get(name)
        if not name or any(name.startswith(outer + ".") for outer in found):
            continue
        if _is_stack(module) and other is not None and _is_stack(other) and type(module[0]) is type(other[0]):
            found[name] = len(module), len(other)
    return found


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
        return False
    return all(type(item) is type(module[0]) for item in module)


def choose(name: str, n: int, m: int, layers: str | Sequence[int], teacher: nn.Module, sample: Any) -> list[list[int]]:
    """For each of ``n`` layers of a student the ones it is made from, of ``m``; see ``initialise``."""
    if not isinstance(layers, str):
        return [[i] for i in _given(name, n, m, layers)]
    if layers not in LAYERS:
        raise ValueError(f"initialise: layers is {layers!r}; expected one of {', '.join(LAYERS)}, or layer numbers")
    if n > m:
        raise ValueError(f"initialise: the student's {name} has {n} layers, the teacher's {m}; it must have no more")
    even = [(i + 1) * m // n - 1 for i in range(n)]
    if layers == "first":
        return [[i] for i in range(n)]
    if layers == "last":
        return [[i] for i in range(m - n, m)]
    if layers == "average":
        return [list(range(first, last + 1)) for first, last in zip([0, *(i + 1 for i in even)], even, strict=False)]
    if layers == "influence" and n < m:
        influence = _influence(teacher, name, m, sample)
        return [[i] for i in sorted(influence.topk(n).indices.tolist())]
    return [[i] for i in even]


def _given(name: str, n: int, m: int, layers: Sequence[int]) -> Sequence[int]:
    if len(layers) != n or not all(0 <= i < m for i in layers):
        raise ValueError(
            f"initialise: layers is {list(layers)}; the student's {name} needs {n} numbers from 0 to {m - 1}"
        )
    return layers


def _influence(teacher: nn.Module, name: str, depth: int, sample: Any) -> Tensor:
    if sample is None:
        raise ValueError("initialise: layers='influence' is measured on a batch; pass one as sample=next(iter(loader))")
    changes: dict[int, Tensor] = {}

    def watch(i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            before = tensor_of((*args, *kwargs.values()), f"{name}.{i}")
            after = tensor_of(output, f"{name}.{i}")
            if before.shape != after.shape:
                raise ValueError(
                    f"initialise: {name}.{i} changes the shape of its input from {list(before.shape)} to "
                    f"{list(after.shape)}; its influence is not defined: choose the layers in another way"
                )
            axis = 1 if before.dim() == 4 else -1
            changes[i] = 1.0 - F.cosine_similarity(before.float(), after.float(), dim=axis).mean()

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode(teacher, training=False))
        for i in range(depth):
            layer = teacher.get_submodule(f"{name}.{i}")
            stack.callback(layer.register_forward_hook(watch(i), with_kwargs=True).remove)
        Batch.of(sample).to(next(teacher.parameters()).device).feed(teacher)
    if len(changes) < depth:
        raise ValueError(f"initialise: not every layer of the teacher's {name} ran on the sample; choose by number")
    return torch.stack([changes[i] for i in range(depth)])


def sources(name: str, chosen: Mapping[str, list[list[int]]]) -> list[str]:
    """The names of the teacher's tensors that the student's tensor ``name`` is made from."""
    for stack, layers in chosen.items():
        if name.startswith(stack + "."):
            index, _, rest = name[len(stack) + 1 :].partition(".")
            return [f"{stack}.{j}.{rest}" for j in layers[int(index)]]
    return [name]


def pattern(name: str, chosen: Mapping[str, list[list[int]]]) -> str:
    """The name with ``*`` for the layer's number: the same for all layers of a stack.

    >>> pattern("blocks.3.weight", {"blocks": [[1]]})
    'blocks.*.weight'
    """
    for stack in chosen:
        if name.startswith(stack + "."):
            return f"{stack}.*.{name[len(stack) + 1 :].partition('.')[2]}"
    return name
