"""Which rank does what: the mesh of devices of a plan, and errors that all ranks raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from potstill.parallel.plan import Plan

NAMES = ("pp", "dp", "tp")
"""The dimensions of the mesh, the slowest first: ranks next to each other share a layer, as these talk most."""

_T = TypeVar("_T")


class Place(NamedTuple):
    """What one rank has: a stage of the model, a share of the rows, a share of the positions, a share of each layer."""

    stage: int
    rows: int
    positions: int
    shard: int


def place(plan: Plan, rank: int) -> Place:
    """Where ``rank`` of the plan's devices is.

    >>> from potstill.parallel import Plan
    >>> [place(Plan(data=2, tensor=2), rank) for rank in (0, 3)]
    [Place(stage=0, rows=0, positions=0, shard=0), Place(stage=0, rows=1, positions=0, shard=1)]
    """
    rest, shard = divmod(rank, plan.tensor)
    rest, positions = divmod(rest, plan.sequence)
    stage, rows = divmod(rest, plan.data)
    return Place(stage, rows, positions, shard)


def build(plan: Plan, device: torch.device) -> DeviceMesh:
    """The mesh over all ranks of torch's default group; its dimensions are :data:`NAMES`.

    Raises :class:`RuntimeError` without a process group, and :class:`ValueError` if the plan needs another number of
    ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"Plan: {plan} needs a process group; start the script by torchrun and call "
            'torch.distributed.init_process_group("gloo"), or "nccl" on GPUs'
        )
    plan.check(dist.get_world_size())
    return init_device_mesh(device.type, (plan.pipeline, plan.data * plan.sequence, plan.tensor), mesh_dim_names=NAMES)


def together(run: Callable[[], _T]) -> _T:
    """What ``run`` returns; where it raises on one rank, all ranks raise.

    Every rank of the default group must call it; it costs one small collective.
    """
    problem: Exception | None = None
    found: list[_T] = []
    try:
        found.append(run())
    except Exception as error:
        problem = error
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        raise RuntimeError(f"Plan: rank {failed[0][0]} could not go on, so no rank does: {failed[0][1]}")
    return found[0]


def check_alike(what: str, mine: object) -> None:
    """Raises :class:`RuntimeError` on every rank if ``mine`` is not equal on all of them."""
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    other = [rank for rank, value in enumerate(everyone) if value != everyone[0]]
    if other:
        raise RuntimeError(
            f"Plan: rank {other[0]} has another {what} than rank 0; build the model alike on every rank: the same "
            "configuration, and the same seed or the same file"
        )
