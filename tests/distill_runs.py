"""The training runs that the tests of distillation watch. Run as a program, it trains until it kills itself."""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from potstill.distill import Distiller, HardLabels, History, SoftTargets, Strategy, TrainingPlan

FEATURES, CLASSES, ROWS = 6, 4, 44
EPOCHS = 3


def data(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(CLASSES, (rows,), generator=generator))


def mlp(seed: int = 0, hidden: int = 8, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        layers = (nn.Linear(FEATURES, hidden), middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, CLASSES))
        return nn.Sequential(*layers)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def timeless(history: History) -> dict[str, Any]:
    record = history.to_dict()
    for epoch in record["epochs"]:
        del epoch["seconds"]
    return record


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Draws on all three global generators whenever a row is read, as data augmentation does."""

    def __init__(self) -> None:
        self.rows = data()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[index]
        return x + 0.1 * torch.randn(FEATURES) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y


def loader(kind: str = "shuffled") -> Any:
    """11 batches of 4."""
    match kind:
        case "shuffled":
            return DataLoader(data(), batch_size=4, shuffle=True)
        case "own generator":
            return DataLoader(data(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
        case "sampler's generator":
            sampler = RandomSampler(data(), replacement=True, generator=torch.Generator().manual_seed(5))
            return DataLoader(data(), batch_size=4, sampler=sampler)
        case "augmented":
            return DataLoader(Noisy(), batch_size=4, shuffle=True)
        case "workers":
            return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2)
        case "length unknown":
            return DataLoader(Endless(), batch_size=4)
    raise ValueError(kind)


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        rows = data()
        return (rows[index] for index in torch.randperm(ROWS).tolist())


class Teacher(nn.Module):
    """Calls ``act`` when it is run for the ``at``-th time."""

    def __init__(self, at: int | None = None, act: Any = None) -> None:
        super().__init__()
        self.model = mlp(seed=9, hidden=16)
        self.at, self.act, self.calls = at, act, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.act()
        return self.model(x)


class StopError(Exception):
    pass


def stop() -> None:
    raise StopError


class Runner:
    """A distiller with all that its runs need, so that a test says each thing once; what is left out is not done."""

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        strategies: Any,
        *,
        sample: Any = None,
        checkpoint: Path | None = None,
        checkpoint_every: int | None = None,
        callbacks: Any = (),
        **plan: Any,
    ) -> None:
        self.distiller = Distiller(teacher, student, strategies, sample=sample)
        self.teacher, self.student, self.strategies = teacher, student, self.distiller.strategies
        self.files = {"checkpoint": checkpoint, "checkpoint_every": checkpoint_every, "callbacks": callbacks}
        self.plan = {"schedule": "constant", "clip_grad_norm": None, **plan}

    def fit(self, loader: Any, epochs: int | None = None, validate: Any = None, **how: Any) -> History:
        return self.distiller.fit(loader, TrainingPlan(epochs=epochs, **self.plan), validate, **self.files, **how)


def distiller(teacher: nn.Module | None = None, checkpoint: Path | None = None, **changes: Any) -> Runner:
    """A student with dropout and batch normalisation, stateful optimiser and scheduler, 2 micro-batches per step."""
    settings: dict[str, Any] = {
        "student": mlp(dropout=0.3, norm=True),
        "strategies": [SoftTargets(2.0, 0.7), (0.5, HardLabels(label_smoothing=0.1))],
        "optimizer": adam,
        "schedule": cosine,
        "accumulate": 2,
        "clip_grad_norm": 0.5,
        "seed": 3,
    }
    return Runner(teacher or Teacher(), checkpoint=checkpoint, **{**settings, **changes})


def noisy_validation(student: nn.Module) -> dict[str, float]:
    """Draws random numbers, as making an iterator of a validation loader does."""
    noise = torch.randn(16, FEATURES)
    return {"mean": float(student(noise).mean()), "drawn": random.random()}


def uninterrupted(kind: str = "shuffled", epochs: int = EPOCHS) -> tuple[nn.Module, History]:
    whole = distiller()
    history = whole.fit(loader(kind), epochs, noisy_validation)
    return whole.student, history


class Matching(Strategy):
    """Matches the teacher's logits after a linear map that is learnt with the student."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(CLASSES, CLASSES)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(CLASSES))
            self.map.bias.zero_()

    def forward(self, outputs: Any) -> Tensor:
        return (self.map(outputs.student_logits) - outputs.teacher_logits).square().mean()


def be_killed(moment: str, path: str) -> None:
    """The program that the test above runs: it dies in the second epoch, at the given moment of a checkpoint."""
    torch.set_num_threads(1)  # as the run that resumes this one: sums depend on the number
    teacher = Teacher(17, lambda: arm[moment]())
    save = torch.save

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(contents: object, file: Any) -> None:
        buffer = io.BytesIO()
        save(contents, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        kill()

    arm: dict[str, Any] = {
        "step": kill,
        "half written": lambda: setattr(torch, "save", half),
        "written": lambda: setattr(os, "replace", kill),
    }
    distiller(teacher, Path(path), checkpoint_every=1).fit(loader(), EPOCHS, noisy_validation)


KILLS = 20
LONG = 25  # epochs


def be_killed_again_and_again(path: str) -> None:
    """The run of LONG epochs in child processes, each killed at a random moment and followed by the next."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    assert _child(path + ".whole", None)
    whole, kills = time.perf_counter() - begin, 0
    chance = random.Random(4)
    while not _child(path, chance.uniform(0.0, 1.6 * whole / KILLS) if kills < KILLS else None):
        kills += 1
    print(kills)


def _child(path: str, seconds: float | None) -> bool:
    """Whether a child came to the end of the run; it has so many seconds."""
    pid = os.fork()
    if not pid:
        try:
            distiller(None, Path(path), checkpoint_every=1).fit(loader("augmented"), LONG, noisy_validation)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # of a child that has ended already nothing is killed
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed")
    return os.WIFEXITED(status)


if __name__ == "__main__":
    if sys.argv[1] == "again and again":
        be_killed_again_and_again(sys.argv[2])
    else:
        be_killed(*sys.argv[1:])
