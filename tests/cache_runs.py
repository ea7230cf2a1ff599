"""What the tests of cached teachers share. Run as a program, it fills caches and is killed at that."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from potstill.distill import Batch, CachedTeacher
from potstill.distill.batch import TopK
from potstill.distill.cache import store

ROWS, FEATURES, CLASSES = 300, 6, 5
FILES = ("manifest.json", "outputs.bin", "checksums.bin")
CHUNK = 32  # 16 batches of 2
MOMENTS = ["manifest half written", "manifest written", "chunk half written", "chunk written", "entry half written"]


class Counted(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(FEATURES, 9), nn.ReLU(), nn.Linear(9, CLASSES))
        self.examples = 0

    def forward(self, x: Tensor) -> Tensor:
        self.examples += len(x)
        return self.layers(x)


def rows() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(ROWS, FEATURES, generator=generator), torch.zeros(ROWS, dtype=torch.long))


def cache(folder: Path, teacher: nn.Module | None = None) -> CachedTeacher:
    return CachedTeacher(teacher or Counted(), rows(), folder, top_k=2, layers="layers.1", batch_size=2)


Read = tuple[Tensor, Tensor | TopK, dict[str, Tensor]]


def loader(cached: CachedTeacher, **options: Any) -> Any:
    return DataLoader(cached.dataset, **{"batch_size": 4, "shuffle": True, **options})


def everything(cached: CachedTeacher, **options: Any) -> Read:
    """All examples, read shuffled, in the order of the data set."""
    indices, outputs, features = [], [], []
    for item in loader(cached, **options):
        batch = Batch.of(item)
        output, found = cached.outputs(batch)
        assert batch.index is not None
        indices.append(batch.index)
        outputs.append(output)
        features.append(found)
    order = torch.cat(indices)
    assert order.tolist() != sorted(order.tolist())
    back = order.argsort()
    layers = {name: torch.cat([found[name] for found in features])[back] for name in features[0]}
    if isinstance(outputs[0], TopK):
        top = TopK(
            torch.cat([o.log_probs for o in outputs])[back],
            torch.cat([o.indices for o in outputs])[back],
            outputs[0].temperature,
        )
        return order[back], top, layers
    return order[back], torch.cat(outputs)[back], layers


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(act: Callable[[], object]) -> int:
    """A copy of this process, which acts and ends."""
    process = os.fork()
    if not process:
        try:
            act()
        finally:
            os._exit(0)
    return process


def killed_often(folder: Path) -> Iterator[int]:
    """How many chunks are whole after each time; each time it is killed in the middle of one of its first writes.

    Which one is drawn, not when: on a busy machine any time may be too early, or too late.
    """
    luck = random.Random(4)
    for _ in range(12):
        calls, share = luck.randint(1, 6), luck.random()
        os.waitpid(child(lambda: killed_at(folder, calls, share)), 0)  # noqa: B023  # runs before the next draw
        manifest = store.read_manifest(folder)
        yield 0 if manifest is None else manifest.chunks - len(store.Store(folder, manifest).missing())


def killed_at(folder: Path, call: int, share: float) -> None:
    """Fills a cache, and dies when it has written so much of what this call of ``pwrite`` should write."""
    write, calls = os.pwrite, [0]

    def pwrite(descriptor: int, contents: Any, offset: int) -> int:
        calls[0] += 1
        if calls[0] == call:
            write(descriptor, bytes(contents)[: int(len(contents) * share)], offset)
            kill()
        return write(descriptor, contents, offset)

    os.pwrite = pwrite
    cache(folder)


def killed_once(folder: Path, moment: str) -> None:
    write, replace = os.pwrite, os.replace
    half = {"manifest half written": 1, "chunk half written": 6, "entry half written": 7}
    calls = [0]

    def pwrite(descriptor: int, contents: Any, offset: int) -> int:
        calls[0] += 1
        if calls[0] == half.get(moment):
            write(descriptor, bytes(contents)[: len(contents) // 2], offset)
            kill()
        if calls[0] == 7 and moment == "chunk written":
            kill()
        return write(descriptor, contents, offset)

    def act() -> None:
        os.pwrite = pwrite
        os.replace = kill if moment == "manifest written" else replace
        cache(folder)

    _, status = os.waitpid(child(act), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def twice(folder: Path) -> list[int]:
    """How many examples each of two teachers has seen."""
    end, begin = os.pipe()

    def act() -> None:
        teacher = Counted()
        cache(folder, teacher)
        os.write(begin, f"{teacher.examples}\n".encode())

    for process in [child(act), child(act)]:
        os.waitpid(process, 0)
    return [int(line) for line in os.read(end, 100).split()]


def program(folder: Path) -> None:
    torch.set_num_threads(1)  # what forks may have no other
    chunks = list(killed_often(folder / "often"))
    for moment in MOMENTS:
        killed_once(folder / moment, moment)
    print(json.dumps({"chunks": chunks, "twice": twice(folder / "twice")}))


if __name__ == "__main__":
    program(Path(sys.argv[1]))
