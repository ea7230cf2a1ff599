"""The memory that the contestants of a benchmark need at their peak, each in a process of its own."""

from __future__ import annotations

import ctypes
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from potstill.ops import OPS
from potstill.ops.op import Op, Sample
from potstill.report.bench import contestants

_CHILD = "from potstill.report.memory import _child; _child()"


@dataclass(frozen=True)
class Peaks:
    """Bytes that one call of each contestant needs at its peak, beyond its inputs and the gradients it leaves."""

    op: str
    label: str
    threads: int
    extra: dict[str, int]


def bench_memory(op: Op, samples: Iterable[Sample], threads: int) -> list[Peaks]:
    """Measures each contestant of each sample in a fresh process with ``threads`` threads, from its second call.

    What a library takes at its first call and keeps (compiled code, threads, small buffers) does not count. Each
    ``sample.make`` is sent to other processes, so it must be a function of a module, or a ``partial`` of one. Takes
    seconds per contestant; reads /proc, so on other systems than Linux :class:`RuntimeError` is raised.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"bench_memory: reads /proc, which {sys.platform} lacks; run it on Linux")
    return [
        Peaks(op.name, s.label, threads, {name: _measured(op, s, name, threads) for name in contestants(op, s.make())})
        for s in samples
    ]


def table(title: str, peaks: Sequence[Peaks]) -> Table:
    """One row per sample, in MiB."""
    names = list(dict.fromkeys(name for row in peaks for name in row.extra))
    result = Table(title=title, caption="MiB beyond inputs and gradients", box=box.SIMPLE_HEAD, padding=0)
    result.add_column("shape", no_wrap=True)
    for name in names:
        result.add_column(name, justify="right")
    for row in peaks:
        result.add_row(row.label, *(f"{row.extra[n] / 2**20:.0f}" if n in row.extra else "" for n in names))
    return result


def _measured(op: Op, sample: Sample, contestant: str, threads: int) -> int:
    job = pickle.dumps((op.name, sample.make, contestant, threads))
    done = subprocess.run([sys.executable, "-c", _CHILD], input=job, capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode().strip().splitlines()
        raise RuntimeError(f"bench_memory: {contestant} failed on {sample.label}: {lines[-1] if lines else 'killed'}")
    return int(done.stdout)


def _child() -> None:
    name, make, contestant, threads = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(threads)
    call = contestants(OPS[name], make())[contestant]
    print(_extra(call))


def _extra(call: Callable[[], Any]) -> int:
    call()
    ctypes.CDLL(None).malloc_trim(0)  # else the second call could use what the first has freed
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak begins anew, from a state that holds the first call's gradients
    before = _peak()
    call()
    return _peak() - before


def _peak() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
