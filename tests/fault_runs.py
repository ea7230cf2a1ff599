"""The run that the tests of faults disturb. As a program, under torchrun: one rank, which may be the one that fails."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.distill_runs import FEATURES, Runner, Teacher, adam, data, mlp
from torch.utils.data import DataLoader

from potstill.distill import HardLabels, HiddenStates, SoftTargets
from potstill.distill.processes import Processes
from potstill.parallel import faults

EPOCHS, BATCH, ACCUMULATE = 8, 6, 2
STEPS = EPOCHS * 4  # 44 rows are 8 batches
MOMENTS = ("teacher", "gradients", "decision", "checkpoint half written", "checkpoint written")
NAME = "run.pt"


def runner(folder: Path, dropout: float, teacher: Teacher | None = None) -> Runner:
    """Two strategies, one with a projection, and a checkpoint after every step."""
    terms = [SoftTargets(2.0, 0.7), (0.5, HardLabels()), (0.1, HiddenStates("0", "model.0"))]
    torch.manual_seed(5)  # of the projection
    return Runner(
        (teacher or Teacher()).double(),
        mlp(dropout=dropout).double(),
        terms,
        sample=(torch.zeros(1, FEATURES, dtype=torch.float64), torch.zeros(1, dtype=torch.long)),
        checkpoint=folder / NAME,
        checkpoint_every=1,
        optimizer=adam,
        accumulate=ACCUMULATE,
    )


def trained(run: Runner) -> dict[str, Any]:
    loader = DataLoader(data(dtype=torch.float64), batch_size=BATCH, shuffle=True)
    history = run.fit(loader, EPOCHS)
    parameters = (*run.student.parameters(), *run.strategies.parameters())
    return {"losses": history.losses, "weights": [p.detach().clone() for p in parameters]}


def fault(seed: int, start: int) -> tuple[int, str, int]:
    """Which rank fails after which start, at the how-manieth of which moments; the same on all ranks."""
    chance = random.Random(1000 * seed + start)
    moment, rank, call = chance.choice(MOMENTS), chance.randrange(2), chance.randint(1, 4)
    return (0 if "checkpoint" in moment else rank), moment, call  # the first rank writes it


def armed(moment: str, call: int, act: Callable[[], None], teacher: Teacher) -> None:
    """Lets ``act`` happen at the ``call``-th of these moments."""
    left = [call]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    def before(owner: Any, name: str) -> None:
        found = getattr(owner, name)

        def changed(*args: Any, **kwargs: Any) -> Any:
            if now():
                act()
            return found(*args, **kwargs)

        setattr(owner, name, changed)

    save = torch.save

    def half(contents: object, file: Any) -> None:
        buffer = io.BytesIO()
        save(contents, buffer)
        if now():
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            act()
        file.write(buffer.getvalue())

    match moment:
        case "teacher":
            teacher.at, teacher.act = call, act
        case "gradients":
            before(Processes, "sum_gradients")
        case "decision":
            before(Processes, "largest")
        case "checkpoint half written":
            torch.save = half
        case "checkpoint written":
            before(os, "replace")


def killed(folder: Path, kills: int, seed: int, dropout: float, *, machine: bool) -> None:
    """The n-th start of the ranks ends by the n-th fault that ``seed`` draws; after these it comes to the end.

    ``machine``: the rank's torchrun goes down with it, as where a machine does.
    """
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    teacher = Teacher()
    failing, moment, call = fault(seed, start)

    def die() -> None:
        with open(folder / "kills", "a") as file:
            file.write(json.dumps([start, rank, moment, call]) + "\n")
        if machine:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if start < kills and rank == failing:
        armed(moment, call, die, teacher)
    found = {**trained(runner(folder, dropout, teacher)), "start": start, "world": int(os.environ["WORLD_SIZE"])}
    torch.save({**found, "batches": teacher.calls - 1}, folder / f"{rank}.pt")


def hanging(folder: Path, seconds: float) -> None:
    """The second rank sleeps; what each then says, and when, is written down."""
    rank = int(os.environ["RANK"])
    teacher = Teacher(5, lambda: time.sleep(seconds) if rank == 1 else None)
    try:
        trained(runner(folder, 0.0, teacher))
    except RuntimeError as error:
        (folder / f"{rank}.json").write_text(json.dumps([str(error), time.time()]))
        raise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--machine", action="store_true")
    parser.add_argument("--hang", type=float)
    given = parser.parse_args()
    torch.set_num_threads(1)
    faults._ANSWER = 1.0  # seconds; one rank of two need not be waited for longer
    if given.hang is not None:
        hanging(given.folder, given.hang)
    else:
        killed(given.folder, given.kills, given.seed, given.dropout, machine=given.machine)


if __name__ == "__main__":
    main()
