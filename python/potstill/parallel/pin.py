"""Processes that share a machine's CPU without getting in each other's way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

_NODES = Path("/sys/devices/system/node")
_TASKS = Path("/proc/self/task")


def pin(rank: int, ranks: int) -> list[int]:
    """Keeps this process on its share of the cores that it may use, with as many torch threads; returns the cores.

    Cores are dealt out in the order of their NUMA nodes, in contiguous runs, so that a process has memory near its
    cores where there are at least as many processes as nodes. Threads that run already are moved too. Call it at the
    start of each of ``ranks`` processes. ``bench/bench_processes.py`` compares processes that answer independent inputs
    so with one that has all cores.

    Raises :class:`ValueError` for a rank that is not below ``ranks``, or fewer cores than ranks, and
    :class:`OSError` where the system has no affinity to set.

    >>> shares([0, 1, 2, 3, 4], 2)
    [[0, 1], [2, 3, 4]]
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"pin: rank is {rank} of {ranks}; expected 0 to {ranks - 1}")
    if not hasattr(os, "sched_setaffinity"):
        raise OSError("pin: this system cannot keep a process on cores")
    cores = by_node(os.sched_getaffinity(0))
    if len(cores) < ranks:
        raise ValueError(f"pin: {ranks} ranks need as many cores, but this process may use {len(cores)}; start fewer")
    mine = shares(cores, ranks)[rank]
    for task in _tasks():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(task, mine)
    torch.set_num_threads(len(mine))
    return mine


def _tasks() -> list[int]:
    """The threads of this process; 0 for the one that asks, where the system does not list them."""
    return [int(path.name) for path in _TASKS.iterdir()] if _TASKS.exists() else [0]


def shares(cores: Sequence[int], ranks: int) -> list[list[int]]:
    """Contiguous runs of nearly equal length."""
    count = len(cores)
    return [list(cores[count * r // ranks : count * (r + 1) // ranks]) for r in range(ranks)]


def by_node(cores: Iterable[int]) -> list[int]:
    """The cores, those of one NUMA node side by side."""
    node_of = {core: node for node, members in _nodes() for core in members}
    return sorted(cores, key=lambda core: (node_of.get(core, 0), core))


def _nodes() -> Iterable[tuple[int, list[int]]]:
    for path in sorted(_NODES.glob("node[0-9]*/cpulist")):
        yield int(path.parent.name.removeprefix("node")), numbers(path.read_text())


def numbers(text: str) -> list[int]:
    """What Linux writes as a list of cores.

    >>> numbers("0-2,5")
    [0, 1, 2, 5]
    """
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
