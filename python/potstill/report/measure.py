"""What this machine can do at most: the ceilings that the benchmarks hold an op's time against."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from potstill import _C
from potstill.ops.op import Cost

_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Level:
    """A memory level: its size for all threads together (None: the main memory) and the speed of reading from it."""

    name: str
    size: int | None
    gbytes_per_s: float


@dataclass(frozen=True)
class Ceilings:
    """The highest rates of ``threads`` threads with the instructions of ``isa``; ``memory`` is nearest first.

    A multiply-add counts as two operations. ``int8_gops`` is the rate of the instruction set's byte dot product, where
    the instruction set allows it with 7-bit activations.
    """

    cpu: str
    isa: str
    threads: int
    int8_gops: float
    f32_gflops: float
    memory: tuple[Level, ...]

    def floor(self, cost: Cost) -> tuple[float, str]:
        """The shortest time in seconds in which ``cost`` can be done, and the name of the ceiling that says so.

        The bytes are read from the first memory level that holds them all.
        """
        level = next(level for level in self.memory if level.size is None or cost.bytes <= level.size)
        times = {
            "int8": cost.int8_ops / (self.int8_gops * 1e9),
            "f32": cost.f32_ops / (self.f32_gflops * 1e9),
            level.name: cost.bytes / (level.gbytes_per_s * 1e9),
        }
        bound = max(times, key=times.__getitem__)
        return times[bound], bound


@dataclass(frozen=True)
class Cache:
    """A level of data cache: bytes of one instance, and how many instances the usable CPUs have."""

    level: int
    size: int
    instances: int


def ceilings(threads: int) -> Ceilings:
    """Measures the machine with ``threads`` threads, in about two seconds.

    Each ceiling is the best of many runs of a few milliseconds: whatever disturbs a run only makes it slower. Raises
    :class:`ValueError` for fewer than one thread, and :class:`RuntimeError` if the operating system does not tell the
    sizes of the caches.
    """
    if threads < 1:
        raise ValueError(f"ceilings: threads is {threads}; expected at least 1")
    with torch_threads(threads):
        return Ceilings(
            cpu=cpu_name(),
            isa=_C.isa(),
            threads=threads,
            int8_gops=_best_rate(lambda repeats, workers: _C.peak_int8(1000 * repeats, workers), threads),
            f32_gflops=_best_rate(lambda repeats, workers: _C.peak_f32(1000 * repeats, workers), threads),
            memory=tuple(_memory(caches(), threads)),
        )


def caches() -> list[Cache]:
    """The data caches of the CPUs that this process may use, nearest first."""
    found: dict[tuple[int, int], set[str]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        for index in (_CPUS / f"cpu{cpu}" / "cache").glob("index*"):
            if _read(index / "type") != "Instruction":
                size = int(_read(index / "size").removesuffix("K")) * 1024
                found.setdefault((int(_read(index / "level")), size), set()).add(_read(index / "shared_cpu_list"))
    if not found:
        raise RuntimeError(f"caches: no cache sizes under {_CPUS}; the benchmarks need a Linux that publishes them")
    return [Cache(level, size, len(shared)) for (level, size), shared in sorted(found.items())]


def cpu_name() -> str:
    """The processor's name, as the operating system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch and potstill use ``threads`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _memory(found: list[Cache], threads: int) -> Iterator[Level]:
    # The geometric mean of two neighbouring levels' sizes lies well beyond the nearer and well within the farther.
    sizes = [cache.size * min(threads, cache.instances) for cache in found]
    for nearer, size, cache in zip(sizes, sizes[1:], found[1:], strict=False):
        yield Level(f"L{cache.level}", size, _read_rate(int((nearer * size) ** 0.5), threads))
    yield Level("DRAM", None, _read_rate(4 * sizes[-1], threads))


def _read_rate(size: int, threads: int) -> float:
    data = torch.ones(size, dtype=torch.int8)
    return _best_rate(lambda repeats, workers: _C.read_memory(data, repeats, workers), threads)


def _best_rate(run: Callable[[int, int], float], threads: int, seconds: float = 0.4) -> float:
    """The best rate of ``run(repeats, threads)`` within ``seconds`` (at least 5 runs), in units of 1e9 per second."""
    repeats = 1
    # Long enough that waking the threads does not count, short enough to go undisturbed now and then. One thread sets
    # the length: where the cores are shared, a wake can take longer than this.
    while _seconds(run, repeats, 1)[1] < 8e-3:
        repeats *= 2
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 5 or time.perf_counter() < end:
        done, elapsed = _seconds(run, repeats, threads)
        rates.append(done / elapsed)
    return max(rates) / 1e9


def _seconds(run: Callable[[int, int], float], repeats: int, threads: int) -> tuple[float, float]:
    start = time.perf_counter()
    done = run(repeats, threads)
    return done, time.perf_counter() - start


def _read(path: Path) -> str:
    return path.read_text().strip()
