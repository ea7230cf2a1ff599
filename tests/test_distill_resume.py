"""A run that is interrupted, killed or repeated ends with the very weights of one that was not."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import distill_runs
from tests.distill_runs import (
    CLASSES,
    EPOCHS,
    Endless,
    Matching,
    StopError,
    Teacher,
    distiller,
    equal,
    loader,
    mlp,
    noisy_validation,
    sgd,
    stop,
    timeless,
    uninterrupted,
)
from torch.utils.data import DataLoader

from potstill.distill import HardLabels, SoftTargets
from potstill.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "kind", ["shuffled", "own generator", "sampler's generator", "augmented", "workers", "length unknown"]
)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_resumed_run_is_bit_identical(kind: str, tmp_path: Path) -> None:
    expected, history = uninterrupted(kind)
    for at, every in ((16, 1), (29, 2), (12, None)):  # an epoch runs the teacher 11 times, in 6 steps
        path = tmp_path / f"{at}.pt"
        with pytest.raises(StopError):
            distiller(Teacher(at, stop), path, checkpoint_every=every).fit(loader(kind), EPOCHS, noisy_validation)
        torch.manual_seed(99)  # the new process's randomness does not matter
        resumed = distiller(None, path, checkpoint_every=every)
        assert timeless(resumed.fit(loader(kind), EPOCHS, noisy_validation)) == timeless(history)
        assert equal(resumed.student, expected)


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    expected, history = uninterrupted()
    stops = 0
    while True:
        run = distiller(Teacher(6, stop), tmp_path / "run.pt", checkpoint_every=1)
        try:
            found = run.fit(loader(), EPOCHS, noisy_validation)
            break
        except StopError:
            stops += 1
    assert stops >= 5
    assert timeless(found) == timeless(history)
    assert equal(run.student, expected)


def test_failure_in_validation_does_not_repeat_the_epoch(tmp_path: Path) -> None:
    expected, history = uninterrupted()
    with pytest.raises(StopError):
        distiller(None, tmp_path / "run.pt", checkpoint_every=6).fit(loader(), EPOCHS, lambda _: stop())
    teacher = Teacher()
    resumed = distiller(teacher, tmp_path / "run.pt", checkpoint_every=6)
    assert timeless(resumed.fit(loader(), EPOCHS, noisy_validation)) == timeless(history)
    assert equal(resumed.student, expected)
    assert teacher.calls == 11 * (EPOCHS - 1)


@pytest.mark.parametrize("moment", ["step", "half written", "written"])
def test_killed_run_resumes(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    result = subprocess.run(
        [sys.executable, distill_runs.__file__, moment, str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert path.with_name("run.pt.tmp").exists() == (moment in {"half written", "written"})
    expected, history = uninterrupted()
    resumed = distiller(None, path, checkpoint_every=1)
    assert timeless(resumed.fit(loader(), EPOCHS, noisy_validation)) == timeless(history)
    assert equal(resumed.student, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    command = [sys.executable, distill_runs.__file__, "again and again", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == distill_runs.KILLS
    expected, history = uninterrupted("augmented", distill_runs.LONG)
    for name in ("run.pt", "run.pt.whole"):
        run = distiller(None, tmp_path / name, checkpoint_every=1)
        assert timeless(run.fit(loader("augmented"), distill_runs.LONG, noisy_validation)) == timeless(history)
        assert equal(run.student, expected)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_finishes_the_step_saves_and_exits(tmp_path: Path) -> None:
    path, found = tmp_path / "run.pt", signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        distiller(Teacher(16, terminate), path).fit(loader(), EPOCHS, noisy_validation)
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is found
    assert len(torch.load(path, weights_only=True)["history"]["losses"]) == 9
    expected, history = uninterrupted()
    again = distiller(None, path)
    assert timeless(again.fit(loader(), EPOCHS, noisy_validation)) == timeless(history)
    assert equal(again.student, expected)


def test_a_handler_of_ones_own_is_called_after_the_step(tmp_path: Path) -> None:
    called: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: called.append(number))
    try:
        history = distiller(Teacher(16, terminate), tmp_path / "run.pt").fit(loader(), 2)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert called == [signal.SIGTERM]
    assert len(history.epochs) == 2


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    path, found = tmp_path / "run.pt", signal.getsignal(signal.SIGINT)
    interrupted = distiller(Teacher(16, interrupt), path)
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(loader(), EPOCHS, noisy_validation)
    assert signal.getsignal(signal.SIGINT) is found
    saved = torch.load(path, weights_only=True)
    assert (len(saved["history"]["losses"]), saved["batches"]) == (9, 6)
    expected, history = uninterrupted()
    for again in (distiller(None, path), interrupted):  # a new process, and the same one
        copied = path.read_bytes()
        assert timeless(again.fit(loader(), EPOCHS, noisy_validation)) == timeless(history)
        assert equal(again.student, expected)
        path.write_bytes(copied)


def test_second_ctrl_c_stops_at_once_and_saves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run = distiller(Teacher(16, lambda: (interrupt(), interrupt())), path)
    with pytest.raises(KeyboardInterrupt):
        run.fit(loader(), EPOCHS, noisy_validation)
    assert len(torch.load(path, weights_only=True)["history"]["losses"]) == 6  # the end of the first epoch


def test_ctrl_c_in_validation_saves_the_epochs_steps(tmp_path: Path) -> None:
    expected, history = uninterrupted()
    with pytest.raises(KeyboardInterrupt):
        distiller(None, tmp_path / "run.pt").fit(loader(), EPOCHS, lambda _: interrupt())
    teacher = Teacher()
    resumed = distiller(teacher, tmp_path / "run.pt")
    assert timeless(resumed.fit(loader(), EPOCHS, noisy_validation)) == timeless(history)
    assert equal(resumed.student, expected)
    assert teacher.calls == 11 * (EPOCHS - 1)


def test_fit_in_another_thread(tmp_path: Path) -> None:
    run = distiller(None, tmp_path / "run.pt")
    thread = threading.Thread(target=run.fit, args=(loader(), 1))
    thread.start()
    thread.join()
    assert (tmp_path / "run.pt").exists()


def test_finished_run_is_not_repeated_but_can_be_extended(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = distiller(None, path).fit(loader(), 1, noisy_validation)
    teacher = Teacher()
    second = distiller(teacher, path)
    assert second.fit(loader(), 1, noisy_validation) == first
    assert teacher.calls == 0
    expected, history = uninterrupted()
    assert timeless(second.fit(loader(), EPOCHS, noisy_validation)) == timeless(history)
    assert equal(second.student, expected)


def test_resume_can_be_declined(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_text("something else")
    distiller(None, path).fit(loader(), EPOCHS, resume=False)
    teacher = Teacher()
    again = distiller(teacher, path)
    assert len(again.fit(loader(), EPOCHS, resume=False).epochs) == EPOCHS
    assert teacher.calls == 11 * EPOCHS


def test_a_strategys_parameters_are_trained_and_resumed(tmp_path: Path) -> None:
    whole = distiller(strategies=[Matching(), HardLabels()])
    whole.fit(loader(), 2)
    assert not torch.equal(whole.strategies[0].map.weight, torch.eye(CLASSES))
    path = tmp_path / "run.pt"
    with pytest.raises(StopError):
        distiller(Teacher(16, stop), path, strategies=[Matching(), HardLabels()], checkpoint_every=1).fit(loader(), 2)
    resumed = distiller(None, path, strategies=[Matching(), HardLabels()], checkpoint_every=1)
    resumed.fit(loader(), 2)
    assert equal(resumed.strategies, whole.strategies)
    assert equal(resumed.student, whole.student)


# --- checkpoints that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": mlp(hidden=9, norm=True)},
            r"student.0.weight is torch.float32 \[8, 6\] in the checkpoint, .*\[9, 6\] here",
        ),
        ({"student": mlp()}, r"student.1.weight is torch.float32 \[8\] in the checkpoint, absent here"),
        ({"student": mlp(norm=True).double()}, r"torch.float64 \[8, 6\] here; .*; and 3 more\. Use"),
        ({"optimizer": sgd}, "optimizer is AdamW in the checkpoint, SGD here"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=0.03)}, r"optimizer.initial_lr\[0\] is 0.02 .* 0.03 here"),
        ({"schedule": "constant"}, "scheduler is CosineAnnealingLR in the checkpoint, NoneType here"),
        ({"strategies": SoftTargets(2.0, 0.7)}, r"strategies\[1\] is 0.5 \* HardLabels.*absent here"),
        ({"strategies": [SoftTargets(3.0, 0.7), (0.5, HardLabels())]}, "temperature=2.0.*temperature=3.0"),
        ({"seed": 4}, "seed is 3 in the checkpoint, 4 here"),
        ({"accumulate": 1}, "accumulate is 2 in the checkpoint, 1 here"),
    ],
)
def test_other_run_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    distiller(None, path).fit(loader(), 1)
    written = path.read_bytes()
    other = distiller(None, path, **changes)
    before = copy.deepcopy(other.student)
    with pytest.raises(CheckpointError, match=message):
        other.fit(loader(), 2)
    assert path.read_bytes() == written
    assert equal(other.student, before)


def test_other_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(StopError):
        distiller(Teacher(6, stop), path, checkpoint_every=1).fit(loader(), 1)
    with pytest.raises(CheckpointError, match="loader's length is 11 in the checkpoint, 5 here"):
        distiller(None, path).fit(list(loader())[:5], 1)
    path.unlink()
    with pytest.raises(StopError):
        distiller(Teacher(6, stop), path, checkpoint_every=1).fit(loader("length unknown"), 1)
    short = DataLoader(Endless(), batch_size=22)
    with pytest.raises(CheckpointError, match="after 4 batches of an epoch, but the loader yields only 2"):
        distiller(None, path).fit(short, 1)


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    distiller(None, path).fit(loader(), 1)
    written = path.read_bytes()
    weights = torch.load(path, weights_only=True)["student"]["0.weight"].numpy().tobytes()
    flipped = bytearray(written)
    flipped[written.index(weights) + 5] ^= 1
    for content, message in (
        (bytes(flipped), "damaged: the checksum of .* is wrong"),
        (written[: len(written) // 2], "damaged or not a checkpoint"),
        (b"", "damaged or not a checkpoint"),
        (pickle.dumps({"format": "potstill.distill/1"}), "damaged or not a checkpoint"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            distiller(None, path).fit(loader(), 2)
        assert path.read_bytes() == content
    torch.save(mlp().state_dict(), path)
    with pytest.raises(CheckpointError, match="not a distillation checkpoint of format"):
        distiller(None, path).fit(loader(), 2)


class Secret:
    pass


class Unsaveable(HardLabels):
    def get_extra_state(self) -> object:
        return Secret()

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("the checkpoint must not have been written")


def test_state_that_could_not_be_read_back_is_refused_when_writing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds .*Secret, which cannot be read back"):
        distiller(None, tmp_path / "run.pt", strategies=Unsaveable(), checkpoint_every=1).fit(loader(), 1)
    assert list(tmp_path.iterdir()) == []
