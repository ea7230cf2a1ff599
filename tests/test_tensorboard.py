"""What the TensorBoard callback writes, read back as TensorBoard reads it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from tests.distill_runs import data, mlp
from torch.utils.data import DataLoader

from potstill.distill import Distiller, HardLabels, SoftTargets, TrainingPlan, schedules
from potstill.distill.callbacks import Callback, Run
from potstill.distill.history import Epoch, History
from potstill.distill.tensorboard import TensorBoard

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = TrainingPlan(epochs=3, lr=0.02)  # 11 steps each
RUN = Run(Distiller(None, mlp(), HardLabels()), PLAN, History())


class Memory(Callback):
    """What a callback sees."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.epochs: dict[int, dict[str, float]] = {}

    def step(self, run: Run) -> None:
        terms = {f"terms/{name}": value for name, value in run.terms.items()}
        self.steps[run.step] = {"loss": run.loss, "lr": run.lr, **terms}

    def epoch(self, run: Run, record: Epoch) -> None:
        self.epochs[record.step] = {f"validation/{name}": value for name, value in record.validation.items()}


class CrashError(Exception):
    """Not an interruption, which would save a checkpoint at once."""


class Crash(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, run: Run) -> None:
        if run.step == self.at:
            raise CrashError


def next_second() -> None:
    """TensorBoard reads the files of a folder in the order of their names, which have the second they were begun."""
    time.sleep(1.0 - time.time() % 1.0)


def fit(*callbacks: Callback, checkpoint: Path | None = None, every: int | None = None) -> None:
    strategies = [HardLabels(), (schedules.linear(1.0, 0.0, 20), SoftTargets())]
    Distiller(mlp(1), mlp(2), strategies).fit(
        DataLoader(data(), batch_size=4, shuffle=True),
        PLAN,
        lambda student: {"size": float(student[0].weight.norm()), "bias": float(student[0].bias.norm())},
        checkpoint=checkpoint,
        checkpoint_every=every,
        callbacks=callbacks,
        quiet=True,
    )


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(memory: Memory) -> dict[str, list[tuple[int, float]]]:
    def rounded(value: float) -> float:
        return float(torch.tensor(value))  # the files hold float32

    rows = [*memory.steps.items(), *memory.epochs.items()]
    tags = dict.fromkeys(tag for _, values in rows for tag in values)
    return {tag: [(step, rounded(values[tag])) for step, values in rows if tag in values] for tag in tags}


def test_writes_every_step_and_epoch(tmp_path: Path) -> None:
    memory = Memory()
    fit(TensorBoard(tmp_path / "run"), memory)
    found = curves(tmp_path / "run")
    assert found == expected(memory)
    assert [step for step, _ in found["loss"]] == list(range(1, 34))
    assert [step for step, _ in found["validation/size"]] == [11, 22, 33]
    assert {tag.split("/")[0] for tag in found} == {"loss", "lr", "terms", "validation"}
    assert sum(tag.startswith("terms/") for tag in found) == 2


@pytest.mark.parametrize("at", [7, 22, 23])  # checkpoints are written after every 4 steps, and after 22
def test_resumed_run_repeats_no_step(tmp_path: Path, at: int) -> None:
    memory = Memory()
    fit(memory)
    with pytest.raises(CrashError):
        fit(TensorBoard(tmp_path / "run"), Crash(at), checkpoint=tmp_path / "run.pt", every=4)
    next_second()
    fit(TensorBoard(tmp_path / "run"), checkpoint=tmp_path / "run.pt", every=4)
    assert curves(tmp_path / "run") == expected(memory)


def test_new_run_in_the_folder_replaces_the_curves(tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        fit(TensorBoard(tmp_path), Crash(30))
    next_second()
    memory = Memory()
    fit(TensorBoard(tmp_path), memory)
    assert curves(tmp_path) == expected(memory)


def test_file_is_closed_after_an_exception(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    with pytest.raises(CrashError):
        fit(board, Crash(7))
    assert [step for step, _ in curves(tmp_path)["loss"]] == list(range(1, 8))
    with pytest.raises(RuntimeError, match="no run has begun"):
        board.step(RUN)


def test_end_without_a_beginning_is_nothing(tmp_path: Path) -> None:
    TensorBoard(tmp_path).end(RUN)
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"TensorBoard: .* pip install tensorboard"):
        TensorBoard(tmp_path)
