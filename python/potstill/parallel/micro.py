"""What a rank of a pipeline does with each micro-batch of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from potstill.parallel.parts import Part
from potstill.transform.observe import Sample

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Kind:
    """What a tensor is, apart from its numbers; ``grad``: whether a gradient goes back to who made it."""

    shape: torch.Size
    dtype: torch.dtype
    grad: bool = False

    @classmethod
    def of(cls, x: Tensor) -> Kind:
        """That of ``x``."""
        return cls(x.shape, x.dtype, x.requires_grad)

    def zeros(self, device: torch.device | str = "cpu") -> Tensor:
        """A new tensor, a leaf."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device, requires_grad=self.grad)


@dataclass
class Job:
    """One step of a rank: inputs and targets of each micro-batch, and what came of them.

    An exception is kept until the step is over, since other ranks wait for this one's messages: zeros go on instead.
    """

    inputs: Sequence[Sample] = ()
    targets: Sequence[Any] = ()
    loss: Loss | None = None
    losses: list[Tensor] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    problem: Exception | None = None
    failed: int = 0  # the number of the micro-batch, from 1

    def begin(self, inputs: Sequence[Sample], targets: Sequence[Any], loss: Loss | None) -> None:
        """The next step; ``loss`` is None where only outputs are wanted."""
        self.inputs, self.targets, self.loss = inputs, targets, loss
        self.losses, self.outputs, self.problem, self.failed = [], [], None, 0

    def output(self) -> Any:
        """That of the batch, on the last rank; None on the others. What goes wrong is kept too."""
        outputs, self.outputs = self.outputs, []
        if not outputs or self.problem is not None:
            return None
        try:
            return joined(outputs)
        except Exception as error:
            self.problem, self.failed = error, len(self.inputs)
            return None

    def mean_loss(self) -> float:
        """Of the micro-batches so far; 0 where there are none."""
        return float(torch.stack(self.losses).mean()) if self.losses else 0.0


class Runner(nn.Module):
    """A stage as torch's schedules call it: with what it has received and a micro-batch's number [1].

    It returns the hidden state for the next stage. The last stage returns its share of the mean loss, or in inference
    zero, and keeps the output: torch passes on tensors only, and takes only one tensor for a target.
    """

    def __init__(self, part: Part, job: Job, device: torch.device, last: bool) -> None:
        super().__init__()
        self.part = part
        self._device = device
        self.kind = Kind(torch.Size(), torch.float32)
        self._job = job
        self._last = last

    def find_kind(self, received: Kind | None) -> Kind:
        """Sets and returns what this stage returns when it receives a tensor of a given kind."""
        output = self.part(None if received is None else received.zeros(self._device), self._job.inputs[0])
        if self._last:
            self.kind = Kind(torch.Size(), torch.float32, torch.is_grad_enabled())
        else:
            self.kind = Kind.of(output)
        return self.kind

    def forward(self, *received: Tensor, index: Tensor) -> Tensor:
        """Never raises an :class:`Exception`: it is kept in the job."""
        number = int(index)
        try:
            output = self.part(received[0] if received else None, self._job.inputs[number])
            return self._finished(output, number) if self._last else self._checked(output)
        except Exception as error:
            if self._job.problem is None:
                self._job.problem, self._job.failed = error, number + 1
            return self.kind.zeros(self._device)

    def _checked(self, hidden: Tensor) -> Tensor:
        if Kind.of(hidden) != self.kind:
            raise ValueError(
                f"Pipeline: a stage returned {Kind.of(hidden)}, and {self.kind} in the first micro-batch of this size; "
                "these must be alike. After freezing or unfreezing parameters make a new Pipeline"
            )
        return hidden.contiguous()

    def _finished(self, output: Any, number: int) -> Tensor:
        job = self._job
        if job.loss is None:
            job.outputs.append(output)
            return self.kind.zeros(self._device)
        loss = job.loss(output, job.targets[number])
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            shown = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"Pipeline.step: loss returned {shown}; expected a scalar that depends on the output")
        job.losses.append(loss.detach().double().reshape(()))
        return loss.reshape(()) / len(job.inputs)


def split(values: Any, rows: int, parts: int, device: torch.device) -> list[Any]:
    """``values`` of each micro-batch, on ``device``: tensors of so many rows are split, all else is in each."""
    leaves, structure = tree_flatten(values)
    moved = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    columns = [
        leaf.chunk(parts) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else [leaf] * parts
        for leaf in moved
    ]
    return [tree_unflatten([column[part] for column in columns], structure) for part in range(parts)]


def joined(outputs: Sequence[Any]) -> Any:
    """The output for the batch from those for its micro-batches, whose tensors have their rows first."""
    flat = [tree_flatten(output)[0] for output in outputs]
    return tree_unflatten([_join(column) for column in zip(*flat, strict=True)], tree_flatten(outputs[0])[1])


def _join(column: Sequence[Any]) -> Any:
    if all(isinstance(x, Tensor) and x.dim() for x in column):
        return torch.cat(list(column))
    if len(column) > 1 and any(x is not None for x in column):
        raise TypeError(
            f"Pipeline: the model's output holds a {type(column[0]).__name__}, which cannot be put together from "
            "micro-batches; return tensors with rows, or None"
        )
    return column[0]
