"""Data parallelism: replicas of the model, whole or with their parameters sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from potstill.parallel.micro import Loss
from potstill.parallel.pipeline import Pipeline
from potstill.transform.observe import Sample, run
from potstill.transform.swap import sites

_TOLERANCE = 1e-5


def spread(model: nn.Module, mesh: DeviceMesh, shard: bool) -> None:
    """Averages gradients over ``mesh``, a block at a time; with ``shard``, a rank keeps its share of each parameter.

    Both are torch's FSDP2 (``fully_shard``, and ``replicate`` of the same engine), which knows layers that are split
    by tensor. The model keeps its names; buffers are left as they are.
    """
    for block in units(model):
        _wrap(block, mesh, shard)
    _wrap(model, mesh, shard)


class ReplicatedPipeline(Pipeline):
    """A pipeline of which there are replicas: gradients and the loss are averaged over ``replicas`` after each step.

    With ``shard`` a replica keeps its share of the parameters of each block (see :func:`spread`), whose gradients are
    averaged in the step; what is in no block is whole.
    """

    def __init__(self, *args: Any, replicas: DeviceMesh, shard: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._replicas = replicas
        blocks = units(self.module) if shard else []
        for block in blocks:
            fully_shard(block, mesh=replicas)
        sharded = {id(parameter) for block in blocks for parameter in block.parameters()}
        self._whole = [p for p in self.module.parameters() if id(p) not in sharded]

    def step(self, inputs: Sample, target: Any, loss: Loss) -> float:
        """As :meth:`Pipeline.step`, with the inputs and targets of this replica."""
        mine = super().step(inputs, target, loss)
        average([p.grad for p in self._whole if p.grad is not None], self._replicas)
        total = torch.tensor(mine, dtype=torch.float64, device=self.device)
        average([total], self._replicas)
        return float(total)


def average(values: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Replaces each value by its mean over ``mesh``; one collective for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for value in values:
        local = value.to_local() if isinstance(value, DTensor) else value
        by_dtype.setdefault(local.dtype, []).append(local)
    for group in by_dtype.values():
        flat = torch.cat([value.flatten() for value in group])
        dist.all_reduce(flat, group=mesh.get_group())
        parts = (flat / mesh.size()).split([value.numel() for value in group])
        for value, part in zip(group, parts, strict=True):
            value.copy_(part.view_as(value))


def _wrap(module: nn.Module, mesh: DeviceMesh, shard: bool) -> None:
    if shard:
        fully_shard(module, mesh=mesh)
    else:
        replicate(module, mesh=mesh)


def units(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are gathered at once: the blocks of the outermost lists.

    A block that shares a parameter with a module outside it is left to the model as a whole.
    """
    found: list[nn.Module] = []
    for site in sites(model, (nn.ModuleList, nn.Sequential)):
        if site.ancestors and any(isinstance(a, nn.ModuleList | nn.Sequential) for a in site.ancestors):
            continue
        found += [block for block in site.module.children() if _is_block(block)]
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [block for block in dict.fromkeys(found) if _alone(block, owners)]


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _alone(block: nn.Module, owners: dict[int, int]) -> bool:
    inside: dict[int, int] = {}
    for _, parameter in block.named_parameters(remove_duplicate=False):
        inside[id(parameter)] = inside.get(id(parameter), 0) + 1
    return all(owners[key] == count for key, count in inside.items())


def check_positions(model: nn.Module, sample: Sample, parts: int) -> None:
    """Raises :class:`ValueError` if ``model`` gives for pieces of a sequence another result than for the whole.

    Positions are dimension 1 of the tensors of ``sample`` and of the outputs.
    """
    length = {x.shape[1] for x in tree_leaves(sample) if isinstance(x, Tensor) and x.dim() > 1}
    if len(length) != 1 or next(iter(length)) % parts:
        raise ValueError(
            f"Plan: sequence={parts} needs sample tensors of one length in dimension 1, a multiple of {parts}; "
            f"got {sorted(length)}"
        )
    whole = [x for x in tree_leaves(run(model, sample)) if isinstance(x, Tensor)]
    pieces = []
    for part in range(parts):
        piece = tree_map(lambda x, i=part: x.chunk(parts, 1)[i] if isinstance(x, Tensor) and x.dim() > 1 else x, sample)
        pieces.append([x for x in tree_leaves(run(model, piece)) if isinstance(x, Tensor)])
    for position, expected in enumerate(whole):
        found = [piece[position] for piece in pieces]
        together = torch.cat(found, 1) if expected.dim() > 1 else None
        if together is None or together.shape != expected.shape or not _close(together, expected):
            raise ValueError(
                f"Plan: sequence={parts} divides positions among devices, but this model relates them to each other "
                "(as attention does); use sequence=1"
            )


def _close(found: Tensor, expected: Tensor) -> bool:
    error = (found.double() - expected.double()).norm()
    return bool(error <= _TOLERANCE * expected.double().norm())
