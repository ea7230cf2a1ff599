"""What the tests of spread and of resumed students run on several processes. As a program: one, which runs it all.

A checkpoint that some processes leave after a few steps is continued by fewer.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from potstill.distill import Distiller, EarlyStopping, HardLabels, HiddenStates, SoftTargets, TrainingPlan
from potstill.parallel import Plan

FEATURES, CLASSES, BATCH, EPOCHS = 12, 5, 8, 3
ROWS = {torch.float32: 41, torch.float64: 46}  # of the last batch of an epoch one process has a row, or each
STEPS = EPOCHS * 3  # of two batches each
STOP = 4  # in the second epoch, of which a step is taken then

PLANS = {2: ("", "dp=2", "dp=2,shard", "tp=2"), 4: ("", "dp=2,tp=2", "dp=2,tp=2,shard", "dp=4,shard")}
"""By the number of processes; "": the Distiller is given none."""

LEFT = {"four": "", "four spread": "dp=2,tp=2,shard", "two": "", "two spread": "tp=2", "two shards": "dp=2,shard"}
"""The checkpoints, and the plans under which they are made."""

CONTINUED = {"four": "", "four spread": "dp=2,shard"}
"""Those that two processes continue, and how; and one process continues them all."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def model(width: int, seed: int, dtype: torch.dtype) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = nn.Sequential(*(Block(width) for _ in range(2)))
        return nn.Sequential(nn.Linear(FEATURES, width), blocks, nn.Linear(width, CLASSES)).to(dtype)


def rows(dtype: torch.dtype) -> TensorDataset:
    random = torch.Generator().manual_seed(1)
    count = ROWS[dtype]
    x = torch.randn(count, FEATURES, generator=random, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (count,), generator=random)
    y[::7] = -100
    return TensorDataset(x, y)


def loader(dtype: torch.dtype) -> DataLoader[Any]:
    return DataLoader(rows(dtype), batch_size=BATCH, shuffle=True)


class Breaking:
    """A loader that calls ``act`` when it is to yield the first batch behind those of step ``STOP``."""

    def __init__(self, dtype: torch.dtype, act: Callable[[], None]) -> None:
        self.whole, self.left, self.act = loader(dtype), 2 * STOP, act

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[Any]:
        for item in self.whole:
            self.left -= 1
            if self.left < 0:
                self.act()
            yield item


def stop() -> None:
    raise StopError


class StopError(Exception):
    pass


def distiller(plan: str, dtype: torch.dtype = torch.float32, teacher: str = "", layers: str = "1.*") -> Distiller:
    """Three strategies, one with a projection."""
    torch.manual_seed(5)  # of the projection
    terms = [SoftTargets(2.0, 0.7), (0.5, HardLabels()), (0.1, HiddenStates(layers, layers))]
    plans = {"parallel": plan, "teacher_parallel": teacher}
    parsed = {name: Plan.parse(text) for name, text in plans.items() if text}
    return Distiller(model(24, 1, dtype), model(8, 2, dtype), terms, sample=rows(dtype)[:4], **parsed)


def trained(
    plan: str = "",
    dtype: torch.dtype = torch.float32,
    *,
    teacher: str = "",
    data: Any = None,
    checkpoint: Path | None = None,
    validate: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Losses, the whole student, and the numbers of the rows that this process's student has learnt from."""
    run, seen, every = distiller(plan, dtype, teacher), [], rows(dtype).tensors[0]

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training:
            seen.append((args[0][:, None] == every).all(-1).int().argmax(1))

    handle = run.student.register_forward_pre_hook(note)
    how = TrainingPlan(**{"epochs": EPOCHS, "lr": 0.01, "accumulate": 2, "clip_grad_norm": 0.3, **settings})
    files = {"checkpoint": checkpoint, "checkpoint_every": checkpoint and 1}
    history = run.fit(data or loader(dtype), how, validate, **files)
    handle.remove()
    whole = Plan.parse(plan or "dp=1").full_state_dict(run.student)
    maps = {f"strategies.{name}": p.detach().clone() for name, p in run.strategies.named_parameters()}
    scores = [epoch.validation for epoch in history.epochs]
    return {"losses": history.losses, "state": whole | maps, "seen": seen, "scores": scores}


def leave(name: str, folder: Path) -> None:
    """A checkpoint in the second epoch, of a run that has ended on all processes."""
    try:
        trained(LEFT[name], torch.float64, data=Breaking(torch.float64, stop), checkpoint=folder / f"{name}.pt")
    except StopError:
        return
    raise AssertionError("the run was not stopped")


def go_on(name: str, plan: str, folder: Path) -> dict[str, Any]:
    """The rest of that run, from a copy of the checkpoint, which others need as well."""
    path = folder / f"{name} {dist.get_world_size() if dist.is_initialized() else 1}.pt"
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.copy(folder / f"{name}.pt", path)
    if dist.is_initialized():
        dist.barrier()
    return trained(plan, torch.float64, checkpoint=path)


def score(student: nn.Module) -> float:
    """Largest after the first epoch."""
    return float(student(rows(torch.float32).tensors[0]).square().mean())


def early(plan: str = "") -> dict[str, Any]:
    """The student of the best epoch, not of the last."""
    rule = EarlyStopping(patience=2)
    return trained(plan, validate=score, early_stopping=rule, epochs=4)


def interrupted(folder: Path) -> dict[str, Any]:
    """The second of two processes gets a signal while a step's batches are loaded; both end after that step."""
    path, second = folder / "interrupted.pt", dist.get_rank() == 1
    data = Breaking(torch.float32, lambda: os.kill(os.getpid(), signal.SIGTERM) if second else None)
    data.left -= 1  # one batch earlier: the signal comes in the step, and is held back
    try:
        trained("dp=2,shard", data=data, checkpoint=path)
    except SystemExit as end:
        return {"code": end.code, "saved": len(torch.load(path, weights_only=True)["history"]["losses"])}
    raise AssertionError("the signal was lost")


def refusals() -> dict[str, str]:
    calls: dict[str, Callable[[], Any]] = {
        "part of a layer": lambda: distiller("tp=2", layers="1.*.up"),
        "no sample": lambda: Distiller(None, model(8, 2, torch.float32), HardLabels(), parallel=Plan(tensor=2)),
        "pipeline": lambda: distiller("pp=2"),
        "average": lambda: trained("tp=2", ema=0.9),
        "other number": lambda: distiller("dp=3"),
        "no teacher": lambda: Distiller(
            None, model(8, 2, torch.float32), HardLabels(), teacher_parallel=Plan(tensor=2)
        ),
    }
    return {name: outcome(call) for name, call in calls.items()}


def outcome(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing was raised"


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = (folder / f"meeting of {world}").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {plan: trained(plan) for plan in PLANS[world]}
    for name in [name for name in LEFT if name.split()[0] == {2: "two", 4: "four"}[world]]:
        leave(name, folder)
    if world == 2:
        found |= {name: go_on(name, plan, folder) for name, plan in CONTINUED.items()}
        found |= {"early": early("dp=2,shard"), "refusals": refusals(), "interrupted": interrupted(folder)}
    else:
        found |= {"teacher": trained(teacher="tp=4"), "teacher and student": trained("dp=2,tp=2", teacher="tp=4")}
    torch.save(found, folder / f"{world} {rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
