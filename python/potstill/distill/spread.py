"""A student that a plan has spread over processes, as an optimiser and a checkpoint of any number of them see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from potstill.distill.batch import Batch, mapped
from potstill.distill.features import Features
from potstill.parallel import Plan
from potstill.parallel.gradients import square
from potstill.parallel.layout import layout_of
from potstill.parallel.state import settle
from potstill.parallel.styles import SplitLinear

_ROWS = 2  # of the sample: it is run once for every layer that might be split
_DOC = "docs/parallel.md"


def check(plan: Plan, whose: str, world: int) -> None:
    """Raises :class:`ValueError` for what a Distiller cannot spread, or not over ``world`` processes."""
    plan.check(world)
    for name in ("pipeline", "sequence"):
        if getattr(plan, name) > 1:
            raise ValueError(
                f"Distiller: {whose} is {plan}; it spreads models by data, shard and tensor. A model under "
                f"{name}={getattr(plan, name)} is trained by a loop of your own: see {_DOC}"
            )


def whole_everywhere(plan: Plan | None) -> bool:
    """Whether every process keeps all of the model."""
    return plan is None or (plan.tensor == 1 and not plan.shard)


def spread_(model: nn.Module, plan: Plan, batch: Batch, layers: set[str], whose: str) -> None:
    """Spreads ``model`` in place; ``layers`` are those whose outputs strategies read.

    Raises :class:`ValueError` if a process would see only a part of such an output.
    """
    few = mapped(batch, lambda x: x[:_ROWS] if x.dim() and len(x) == len(batch.target) else x)
    before = _shapes(model, few, layers)
    plan.apply(model, few.kwargs or few.args, device=batch.target.device)
    after = _shapes(model, few, layers)
    cut = [name for name in before if before[name] != after[name]]
    if cut:
        raise ValueError(
            f"Distiller: a strategy reads layer {cut[0]!r} of the {whose}, of which {plan} leaves each process "
            f"{list(after[cut[0]])} of {list(before[cut[0]])}; name a layer whose output is whole, such as the block "
            "around it, or spread the model by data alone"
        )


def _shapes(model: nn.Module, batch: Batch, layers: set[str]) -> dict[str, torch.Size]:
    if not layers:
        return {}
    with torch.no_grad(), Features(model, layers) as found:
        batch.feed(model)
    return {name: found[name].shape for name in sorted(layers)}


class Spread:
    """A ``student`` that is changed in place by :func:`spread_`, and what this process has of it.

    ``parameters`` are plain tensors in the memory of those that are DTensors, in the order that they had before: so
    every optimiser can take them, and a checkpoint numbers them alike under any plan. ``forms``: what the whole
    student's state looks like, for a run that is resumed.
    """

    def __init__(
        self, student: nn.Module, plan: Plan, batch: Batch, layers: set[str], forms: Mapping[str, object]
    ) -> None:
        self.student, self.plan, self.forms = student, plan, dict(forms)
        names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        spread_(student, plan, batch, layers, "student")
        settle(student)
        layout = layout_of(student)
        assert layout.mesh is not None  # apply sets it
        self.replicas = layout.mesh["dp"].get_group()
        self._copies = layout.copies
        self._aliases = dict(_whole_names(student))
        self._local = {p: nn.Parameter(_local(p)) for p in student.parameters() if p.requires_grad}
        self.parameters = [self._local[self._aliases[name]] for name in names]

    def begin(self) -> None:
        """Forgets the gradients."""
        for parameter in self._local:
            parameter.grad = None

    def collect(self) -> None:
        """Gives ``parameters`` the gradients that the student has; a parameter without one gets 0."""
        for parameter, local in self._local.items():
            local.grad = torch.zeros_like(local) if parameter.grad is None else _local(parameter.grad)

    def square(self) -> Tensor:
        """What this process adds to the squared norm of the student's gradient: the sum is over all processes."""
        return square(self.student, self._copies)

    def state(self) -> dict[str, Tensor]:
        """That of the whole student, on the CPU; a collective."""
        return self.plan.full_state_dict(self.student)

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Takes this process's part of :meth:`state`; a collective."""
        self.plan.load_full_state_dict(self.student, whole)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """That of an optimiser of the whole student; a collective.

        Whatever has the shape of a parameter is put in its place, from where :meth:`state` gathers it.
        """
        saved = optimizer.state_dict()
        states = {index: dict(found) for index, found in saved["state"].items()}
        settle(self.student)
        weights = [(local, local.detach().clone()) for local in self._local.values()]
        for key in self._keys(optimizer):
            for local, _ in weights:
                if key in optimizer.state.get(local, ()):
                    local.data.copy_(optimizer.state[local][key])
            whole = self.state()
            for name, index in self._numbers(optimizer).items():
                if key in states.get(index, ()):
                    states[index][key] = whole[name]
        for local, weight in weights:
            local.data.copy_(weight)
        return {**saved, "state": states}

    def load_optimizer(self, optimizer: Optimizer, saved: Mapping[str, Any], whole: Mapping[str, Tensor]) -> None:
        """Takes this process's part of :meth:`optimizer_state`, and of the state ``whole`` of the student."""
        states = {index: dict(found) for index, found in saved["state"].items()}
        names = self._numbers(optimizer)
        held = _held(optimizer)
        found = [(name, states[index]) for name, index in names.items() if index in states]
        keys = {key for name, state in found for key, value in state.items() if _like(value, whole[name])}
        for key in sorted(keys):
            having = {name: state[key] for name, state in found if key in state}
            self.load({**whole, **having})
            for index in {names[name] for name in having}:
                states[index][key] = held[index].detach().clone()
        optimizer.load_state_dict({**saved, "state": states})
        self.load(whole)

    def _numbers(self, optimizer: Optimizer) -> dict[str, int]:
        """The whole student's names of the parameters that the optimiser holds, and their places there."""
        places = {id(p): index for index, p in enumerate(_held(optimizer))}
        found = {name: places.get(id(self._local.get(p))) for name, p in self._aliases.items()}
        return {name: index for name, index in found.items() if index is not None}

    def _keys(self, optimizer: Optimizer) -> list[str]:
        """The names of what the optimiser keeps in the shape of each parameter."""
        found: dict[str, None] = {}
        for local in self._local.values():
            for key, value in optimizer.state.get(local, {}).items():
                if isinstance(value, Tensor) and value.dim() and value.shape != local.shape:
                    raise ValueError(
                        f"Distiller.fit: the optimiser keeps {key!r} of shape {list(value.shape)} for a parameter of "
                        f"{list(local.shape)}; under {self.plan} a checkpoint holds what has the parameter's shape"
                    )
                if _like(value, local):
                    found[key] = None
        return list(found)


def _whole_names(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters by all the names that they have in the student that is not spread."""
    split = [f"{name}." for name, module in student.named_modules() if isinstance(module, SplitLinear)]
    for name, parameter in student.named_parameters(remove_duplicate=False):
        prefix = next((prefix for prefix in split if name.startswith(f"{prefix}layer.")), "")
        yield prefix + name.removeprefix(f"{prefix}layer.") if prefix else name, parameter


def _like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach()
