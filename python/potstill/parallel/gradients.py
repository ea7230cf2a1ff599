"""The norm of the gradients of a model that is spread over ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from potstill.parallel.styles import SplitLinear

_TINY = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm


def copies(part: nn.Module, mesh: DeviceMesh) -> dict[str, int]:
    """How many ranks have the same numbers of each parameter of ``part``; a collective over the pipeline's stages."""
    names = [name for name, _ in part.named_parameters()]
    stages: list[list[str]] = [names]
    if mesh["pp"].size() > 1:
        stages = [[] for _ in range(mesh["pp"].size())]
        dist.all_gather_object(stages, names, group=mesh["pp"].get_group())
    holders = Counter(name for stage in stages for name in stage)
    inside = [f"{name}.layer." for name, module in part.named_modules() if isinstance(module, SplitLinear)]
    found = {}
    for name, parameter in part.named_parameters():
        shares = mesh["tp"].size() if name.startswith(tuple(inside)) else 1
        if isinstance(parameter, DTensor):
            sharded = (i for i, placement in enumerate(parameter.placements) if not placement.is_replicate())
            shares *= math.prod(parameter.device_mesh.size(dim) for dim in sharded)
        found[name] = mesh["dp"].size() * mesh["tp"].size() * holders[name] // shares
    return found


@torch.no_grad()
def square(part: nn.Module, copied: Mapping[str, int]) -> Tensor:
    """What this rank adds to the squared norm of the whole model's gradients, in float64; see :func:`copies`."""
    total = torch.zeros((), dtype=torch.float64, device=next(part.parameters()).device)
    for name, parameter in part.named_parameters():
        if parameter.grad is not None:
            total += _local(parameter.grad).double().square().sum() / copied[name]
    return total


@torch.no_grad()
def clip(part: nn.Module, copied: Mapping[str, int], max_norm: float) -> Tensor:
    """Scales the gradients of ``part`` so that those of the whole model have at most ``max_norm``; returns what it was.

    ``copied``: from :func:`copies`. One collective over all ranks.
    """
    squares = square(part, copied)
    dist.all_reduce(squares)
    norm = squares.sqrt()
    scale = (max_norm / (norm + _TINY)).clamp(max=1.0)
    for parameter in part.parameters():
        if parameter.grad is not None:
            _local(parameter.grad).mul_(scale)
    return norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
