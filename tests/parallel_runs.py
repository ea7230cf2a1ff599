"""What the tests of data parallel distillation run under torchrun. As a program: one rank, which runs it all."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distill_runs import CLASSES, Runner, StopError, Teacher, adam, data, mlp, stop
from torch import Tensor, nn

from potstill.distill import Callback, EarlyStopping, HardLabels, HiddenStates, SoftTargets

SIZES = (7, 4, 1, 8, 5, 6)  # of the batches; a process has no row of the third


def batches(ignored: bool = True) -> list[tuple[Tensor, Tensor]]:
    """In float64; in the fourth only the last rows count, which are the second process's."""
    x, y = data(sum(SIZES), torch.float64).tensors
    y = y.clone()
    if ignored:
        y[3], y[12:17] = -100, -100
    return list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def runner(teacher: nn.Module | None = None, **changes: Any) -> Runner:
    """Three strategies, one with a projection; two micro-batches per step."""
    student = mlp().double()
    terms = [SoftTargets(2.0, 0.7), (0.5, HardLabels()), (0.1, HiddenStates("0", "model.0"))]
    torch.manual_seed(5)  # of the projection
    settings = {"optimizer": adam, "accumulate": 2, "clip_grad_norm": 0.5, **changes}
    return Runner((teacher or Teacher()).double(), student, terms, sample=batches()[0], **settings)


def weights(run: Runner) -> list[Tensor]:
    return [p.detach().clone() for p in (*run.student.parameters(), *run.strategies.parameters())]


def trained(**changes: Any) -> dict[str, Any]:
    run = runner(**changes)
    history = run.fit(batches(), 2, lambda _: 0.25)
    return {"losses": history.losses, "weights": weights(run), "terms": [e.terms for e in history.epochs]}


class Breaking(list[Any]):
    """A loader that fails on every process when it is to yield its ninth item."""

    left = 8

    def __iter__(self) -> Any:
        for item in super().__iter__():
            self.left -= 1
            if self.left < 0:
                stop()
            yield item


def resumed(folder: Path, ready: Any) -> dict[str, Any]:
    """Stopped in the second epoch, then continued by all."""
    path = folder / "run.pt"
    try:
        runner(checkpoint=path, checkpoint_every=1).fit(Breaking(batches()), 2, lambda _: 0.25)
    except StopError:
        ready()
        run = runner(checkpoint=path, checkpoint_every=1)
        history = run.fit(batches(), 2, lambda _: 0.25)
        return {"losses": history.losses, "weights": weights(run)}
    raise AssertionError("the run was not stopped")


def interrupted(folder: Path, rank: int) -> dict[str, Any]:
    """The second process gets a signal; both must end at one step, with a checkpoint."""
    path = folder / "interrupted.pt"

    teacher = Teacher(7, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None)
    run = runner(teacher, checkpoint=path)
    try:
        run.fit(batches(), 3)
    except SystemExit as end:
        saved = torch.load(path, weights_only=True) if rank == 0 else None
        return {"code": end.code, "weights": weights(run), "saved": saved and len(saved["history"]["losses"])}
    raise AssertionError("the signal was lost")


class Counting(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def step(self, run: Any) -> None:
        self.steps += 1
        run.stopping = self.steps == 5


def decided(rank: int) -> dict[str, Any]:
    """The processes measure different things, and only the first runs callbacks: they must still agree."""
    scores = iter([[0.1, 0.2], [0.3, 0.1], [0.2, 0.9], [0.1, 0.95], [0.0, 0.99]])
    rule = EarlyStopping(patience=2)
    stopped = runner(early_stopping=rule).fit(batches(), 5, lambda _: next(scores)[rank])
    counting = Counting()
    called = runner(callbacks=[counting]).fit(batches(), 5)
    return {"epochs": [e.validation for e in stopped.epochs], "calls": counting.steps, "steps": called.step}


def outcome(run: Any) -> str:
    try:
        run()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing was raised"


def refusals(rank: int) -> dict[str, str]:
    bad = batches()
    bad[0][0][6, 0] = float("nan")  # the last row: the second process's
    other = [(x, (y + rank) % CLASSES) for x, y in batches(ignored=False)]
    scalar = [(x, torch.tensor(1)) for x, _ in batches()]
    return {
        "nan": outcome(lambda: runner().fit(bad, 1)),
        "other data": outcome(lambda: runner().fit(other, 1)),
        "scalar target": outcome(lambda: Runner(None, nn.Flatten(0), HardLabels()).fit(scalar, 1)),
    }


def noisy() -> dict[str, Any]:
    """With dropout: masks that differ, and weights that do not."""
    torch.manual_seed(2)
    student = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, CLASSES)).double()
    masks: list[Tensor] = []
    student[1].register_forward_hook(lambda _, __, out: masks.append(out.detach() == 0))
    x, y = data(8, torch.float64).tensors
    Runner(None, student, HardLabels(), optimizer=adam).fit([(x, y)] * 3, 1)
    return {"masks": masks, "weights": [p.detach().clone() for p in student.parameters()], "drawn": torch.rand(3)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    first = trained()  # makes the process group itself
    again = trained(ema=0.9)
    rank = dist.get_rank()
    found = {"trained": first, "averaged": again, "resumed": resumed(folder, dist.barrier)}
    found |= {"interrupted": interrupted(folder, rank), "decided": decided(rank), "refusals": refusals(rank)}
    found["noisy"] = noisy()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
