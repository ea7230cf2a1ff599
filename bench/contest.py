"""Lets contestants run the same module on the same inputs, checks what they compute, and times them together."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from peers import Call, Contestant, Job, Start, reason
from peers.torch_ import calling
from potstill.report.measure import torch_threads
from potstill.timing import Timing, compare

_TASKS = Path("/proc/self/task")
_STEADY = 1.5
_SLOW = 8  # times the fastest: timed once instead of with the others
_SLOW_SECONDS = 0.02


@dataclass(frozen=True)
class Entry:
    """What one contestant did: its time, and its error against the float32 module, or the reason why it has none.

    ``error`` is the L2 norm of the difference of the outputs over the norm of the float32 output; ``cosine`` is the
    mean cosine between vectors (the last dimension) of the two.
    """

    name: str
    timing: Timing | None = None
    error: float | None = None
    cosine: float | None = None
    reason: str = ""

    @property
    def snr_db(self) -> float:
        """The error in decibels; infinite without one."""
        return -20 * math.log10(self.error) if self.error else math.inf


def prepared(contestants: Iterable[Contestant], job: Job) -> tuple[dict[str, Start], list[Entry]]:
    """The contestants that can do ``job``, ready to start, and those that cannot, with the reason."""
    starts: dict[str, Start] = {}
    failed = []
    with torch.no_grad(), hushed():
        for contestant in contestants:
            try:
                starts[contestant.name] = contestant.prepare(job)
            except Exception as error:  # whatever a library raises is a result
                failed.append(Entry(contestant.name, reason=reason(error)))
    return starts, failed


def contest(
    starts: Mapping[str, Start], check: Callable[[Call], tuple[float, float]], threads: int, seconds: float
) -> list[Entry]:
    """Times the started contestants in turn with ``threads`` threads for about ``seconds``, in two visits.

    ``check`` gives a call's error and cosine.

    Up to two more visits follow while the machine is not calm; the visit with the shorter times counts. What takes
    more than eight times as long as the fastest (and over 20 ms) is timed alone, once.
    """
    calls: dict[str, Call] = {}
    entries: dict[str, Entry] = {}
    slow: dict[str, Timing] = {}
    torch.compiler.reset()  # or it would stop compiling after a few layers of one class
    with torch_threads(threads), torch.inference_mode():
        for name, start in starts.items():
            try:
                with hushed():
                    calls[name] = start()
                error, cosine = check(calls[name])
                entries[name] = Entry(name, error=error, cosine=cosine)
            except Exception as raised:  # whatever a library raises is a result
                calls.pop(name, None)
                entries[name] = Entry(name, reason=reason(raised))
        once = {name: _once(call) for name, call in calls.items()}
        bound = max(_SLOW_SECONDS, _SLOW * min(once.values(), default=0.0))
        for name in [name for name, value in once.items() if value > bound]:
            del calls[name]
            slow[name] = Timing(once[name], once[name], once[name], 1)
        times = quietest(calls, seconds) | slow
    return [replace(entry, timing=times.get(name)) for name, entry in entries.items()]


def quietest(calls: Mapping[str, Call], seconds: float, visits: int = 2, most: int = 4) -> dict[str, Timing]:
    """The calmest of ``visits`` comparisons, and of up to ``most`` while none has been steady."""
    best: dict[str, Timing] = {}
    for visit in range(most):
        if visit >= visits and steady(best.values()):
            break
        times = compare(calls, seconds=seconds / visits, rounds=9, block=1e-2, before=settle)
        best = min(times, best or times, key=_typical)
    return best


def steady(timings: Iterable[Timing]) -> bool:
    """Whether no timing's quartiles lie more than a factor of 1.5 apart."""
    return all(timing.high <= _STEADY * timing.low for timing in timings)


def checker(job: Job) -> Callable[[Call], tuple[float, float]]:
    """Compares a call with the job's module on each of the job's data, or on its inputs if there are none.

    The data are written into the inputs in turn, which keep their own values afterwards.
    """
    own = tuple(x.clone() for x in job.inputs)
    batches = job.data or (own,)

    def outputs(call: Call) -> Tensor:
        found = []
        for batch in batches:
            for x, value in zip(job.inputs, batch, strict=True):
                x.copy_(value)
            found.append(torch.as_tensor(call()).cpu().double().flatten(0, -2))
        for x, value in zip(job.inputs, own, strict=True):
            x.copy_(value)
        return torch.cat(found)

    with torch.no_grad():
        expected = outputs(calling(job.module, job.inputs)())

    def check(call: Call) -> tuple[float, float]:
        found = outputs(call)
        cosine = torch.cosine_similarity(found, expected, dim=-1)
        return float((found - expected).norm() / expected.norm()), float(cosine.mean())

    return check


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keeps progress bars, warnings and log lines of other libraries off the terminal."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def versions() -> dict[str, str]:
    """Of everything that takes part and is installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("potstill", "torch", "torchao", "onnxruntime", "openvino", "nncf", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def settle(limit: float = 0.2) -> None:
    """Waits until no other thread of this process runs, at most for ``limit`` seconds.

    The threads of some runtimes spin for tens of milliseconds after a call, on a core that the next contestant needs.
    """
    me = threading.get_native_id()
    end = time.perf_counter() + limit
    while time.perf_counter() < end and any(_running(task) for task in _TASKS.iterdir() if int(task.name) != me):
        time.sleep(1e-3)


def _running(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except FileNotFoundError:  # it has ended
        return False


def _once(call: Call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _typical(times: Mapping[str, Timing]) -> float:
    return statistics.geometric_mean(timing.median for timing in times.values())
