"""Times calls on a GPU: interleaved, from cold caches, without what launching them costs the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
ROUNDS = 25
WARM_UP = 3


@dataclass(frozen=True)
class Time:
    """Seconds of one call on the device, the median of ``rounds``; ``host``: of its launch alone, where it was taken.

    ``captured``: whether a CUDA graph held the call; ``why_not`` says why it did not.
    """

    device: float
    host: float
    rounds: int
    captured: bool
    why_not: str = ""


class Clock:
    """Of one device; on the CPU it only rehearses, by the wall clock.

    Before each call memory twice as large as the L2 cache is overwritten: a layer of a model finds its weights in
    memory, not in the cache where its last call left them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 0
        self._flushed = torch.empty(max(size, 1), dtype=torch.int8, device=device)

    def compare(self, calls: Mapping[str, Call], rounds: int = ROUNDS) -> dict[str, Time]:
        """Each call once in every round, in an order that turns; a call that fails raises."""
        if not self.on_gpu:
            return {name: Time(_wall(call), 0.0, 1, False) for name, call in calls.items()}
        hosts = {name: self._host(call) for name, call in calls.items()}
        ready = {name: self._captured(call) for name, call in calls.items()}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(rounds):
            events = {name: self._launch(ready[name][0]) for name in order}
            torch.cuda.synchronize(self.device)
            for name, (begin, end) in events.items():
                taken[name].append(begin.elapsed_time(end) / 1e3)
            order.reverse()
        return {
            name: Time(statistics.median(taken[name]), hosts[name], rounds, not ready[name][1], ready[name][1])
            for name in calls
        }

    def _launch(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        self._flushed.zero_()  # it keeps the device busy, so that what follows is queued when its turn comes
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        return begin, end

    def _host(self, call: Call) -> float:
        for _ in range(WARM_UP):  # compiles, chooses algorithms, fills the allocator
            call()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(10):
            call()
        spent = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return spent / 10

    def _captured(self, call: Call) -> tuple[Call, str]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            return call, str(error).splitlines()[0][:120]
        graph.replay()
        return graph.replay, ""


def _wall(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
