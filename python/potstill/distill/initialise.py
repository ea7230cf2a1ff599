"""Parameter distillation: the student starts from its teacher's own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from potstill.distill.batch import Batch
from potstill.distill.features import tensor_of
from potstill.distill.loop import mode

LAYERS = ("even", "first", "last", "average", "influence")


@dataclass(frozen=True)
class Initialisation:
    """Where a student's parameters came from.

    ``layers`` has, for each stack of layers by name, the teacher's layers that each of the student's was made from;
    ``copied`` the student's tensors -> the teacher's; ``left`` those that stayed as they were -> why.
    """

    layers: dict[str, list[list[int]]]
    copied: dict[str, list[str]]
    left: dict[str, str]
    parameters: int
    parameters_copied: int

    def table(self) -> Table:
        """The map for people: a line per stack of layers, and one per tensor that was left."""
        share = 100 * self.parameters_copied / max(self.parameters, 1)
        table = Table("student", "from the teacher", title=f"{share:.1f} % of the student's numbers are the teacher's")
        for name, sources in self.layers.items():
            for i, chosen in enumerate(sources):
                table.add_row(f"{name}.{i}", ", ".join(f"{name}.{j}" for j in chosen))
        for name, why in self.left.items():
            table.add_row(name, f"left as it was: {why}")
        return table


def initialise(
    student: nn.Module, teacher: nn.Module, layers: str | Sequence[int] = "even", sample: Any = None
) -> Initialisation:
    """Copies the teacher's parameters and buffers into a student of the same family that has fewer layers.

    A tensor is copied where the teacher has one of the same name and shape. Stacks of layers (an ``nn.ModuleList`` or
    ``nn.Sequential`` whose items are of one class) may be shorter in the student; ``layers`` says which of the
    teacher's it takes:

    - "even": evenly spaced, its last from the last; "first" and "last": so many from either end;
    - "average": each is the mean of the teacher's layers from the previous even one's successor to its own;
    - "influence": those that change their input most (1 - cosine of a token's, or a pixel's, features before and
      after: Men et al. 2024, ShortGPT), in their order; measured on ``sample``, an item of a loader;
    - a sequence of the teacher's layer numbers.

    Returns the map, with everything that could not be copied, and why. Raises :class:`ValueError` where the choice does
    not fit, or nothing at all could be copied. The models keep their devices and dtypes.

    >>> def model(depth): return nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth))))
    >>> student, teacher = model(2), model(6)
    >>> initialise(student, teacher).layers
    {'1': [[2], [5]]}
    >>> torch.equal(student[1][0].weight, teacher[1][2].weight)
    True
    """
    stacks = _stacks(student, teacher)
    chosen = {name: _choose(name, *depths, layers, teacher, sample) for name, depths in stacks.items()}
    own, given = student.state_dict(), teacher.state_dict()
    copied: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    for name, tensor in own.items():
        sources = _sources(name, chosen)
        why = _unfit(tensor, sources, given)
        if why:
            left[name] = why
            continue
        with torch.no_grad():
            tensor.copy_(_mean([given[source] for source in sources]))
        copied[name] = sources
    if not copied:
        raise ValueError(
            f"initialise: no tensor of the student ({_few(own)}) has a namesake of its shape in the teacher "
            f"({_few(given)}); both must be of one family"
        )
    count = sum(tensor.numel() for tensor in own.values())
    return Initialisation(chosen, copied, left, count, sum(own[name].numel() for name in copied))


def _stacks(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[int, int]]:
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


def _choose(name: str, n: int, m: int, layers: str | Sequence[int], teacher: nn.Module, sample: Any) -> list[list[int]]:
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


def _sources(name: str, chosen: Mapping[str, list[list[int]]]) -> list[str]:
    for stack, layers in chosen.items():
        if name.startswith(stack + "."):
            index, _, rest = name[len(stack) + 1 :].partition(".")
            return [f"{stack}.{j}.{rest}" for j in layers[int(index)]]
    return [name]


def _unfit(tensor: Tensor, sources: Sequence[str], given: Mapping[str, Tensor]) -> str:
    for source in sources:
        if source not in given:
            return f"the teacher has no {source}"
        if given[source].shape != tensor.shape:
            return f"its shape is {list(tensor.shape)}, the teacher's {list(given[source].shape)}"
    return ""


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if not tensors[0].is_floating_point():
        return tensors[-1]  # counters, and tables of positions: the same in all
    return torch.stack([tensor.float() for tensor in tensors]).mean(0)


def _few(names: Mapping[str, Any]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
