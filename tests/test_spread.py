"""Students and teachers that processes share learn what one process would teach, and any number of them goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import spread_runs as runs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

Ranks = dict[int, list[dict[str, Any]]]


def run_together(world: int, folder: Path) -> list[dict[str, Any]]:
    root = Path(runs.__file__).parents[1]
    command = [sys.executable, "-m", "tests.spread_runs"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(folder)], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        complaints = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * world, complaints
    return [torch.load(folder / f"{world} {rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return {world: run_together(world, folder) for world in (4, 2)}  # two processes go on where four have ended


@pytest.fixture(scope="module")
def alone() -> dict[torch.dtype, dict[str, Any]]:
    return {dtype: runs.trained(dtype=dtype) for dtype in (torch.float32, torch.float64)}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= error * float(value.norm()), name


@pytest.mark.parametrize(("world", "plan"), [(world, plan) for world, plans in runs.PLANS.items() for plan in plans])
def test_the_student_is_that_of_one_process(world: int, plan: str, ranks: Ranks, alone: dict[Any, Any]) -> None:
    expected = alone[torch.float32]
    assert len(expected["losses"]) == runs.STEPS
    for rank in ranks[world]:
        assert rank[plan]["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        close(rank[plan]["state"], expected["state"], 1e-6)


@pytest.mark.parametrize("name", ["teacher", "teacher and student"])
def test_processes_share_the_teacher(name: str, ranks: Ranks, alone: dict[Any, Any]) -> None:
    for rank in ranks[4]:
        assert rank[name]["losses"] == pytest.approx(alone[torch.float32]["losses"], rel=1e-6)
        close(rank[name]["state"], alone[torch.float32]["state"], 1e-6)


def test_the_best_epoch_of_a_shared_student_is_kept(ranks: Ranks) -> None:
    expected = runs.early()
    scores = [score["value"] for score in expected["scores"]]
    assert len(scores) == 1 + scores.index(max(scores)) + 2
    for rank in ranks[2]:
        assert [score["value"] for score in rank["early"]["scores"]] == pytest.approx(scores, rel=1e-5)
        close(rank["early"]["state"], expected["state"], 1e-6)


def rows_of(parts: list[list[Tensor]]) -> list[list[int]]:
    """The rows of each batch in order, from those of each process."""
    return [torch.cat(batch).tolist() for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize(("name", "world"), [*((name, 2) for name in runs.CONTINUED), *((n, 1) for n in runs.LEFT)])
def test_fewer_processes_go_on_where_others_have_ended(
    name: str, world: int, folder: Path, ranks: Ranks, alone: dict[Any, Any]
) -> None:
    found = [runs.go_on(name, "", folder)] if world == 1 else [rank[name] for rank in ranks[world]]
    expected = alone[torch.float64]
    for one in found:
        assert one["losses"] == pytest.approx(expected["losses"], rel=1e-12)
        close(one["state"], expected["state"], 1e-11)
    after = 2 * runs.STOP  # batches: none that was learnt from comes again, and none is left out
    assert rows_of([one["seen"] for one in found]) == rows_of([expected["seen"]])[after:]


def test_a_signal_to_one_process_leaves_a_checkpoint_of_all(ranks: Ranks) -> None:
    assert [rank["interrupted"]["code"] for rank in ranks[2]] == [143, 143]
    first, second = (rank["interrupted"]["saved"] for rank in ranks[2])
    assert first == second >= runs.STOP


def test_what_cannot_be_shared_is_refused(ranks: Ranks) -> None:
    for rank in ranks[2]:
        found = rank["refusals"]
        assert found["part of a layer"].startswith(
            "ValueError: Distiller: a strategy reads layer '1.0.up' of the student, of which tp=2 leaves each process"
        )
        assert found["no sample"].startswith("ValueError: Distiller: parallel is tp=2, which needs sample=next(iter(")
        assert found["pipeline"].startswith("ValueError: Distiller: parallel is pp=2; it spreads models by data, shard")
        assert found["average"].startswith("ValueError: TrainingPlan: ema is 0.9, a copy of the whole student")
        assert found["other number"].startswith("ValueError: Plan: dp=3 needs 3 devices but there are 2; with 2 fit: ")
        assert found["no teacher"].startswith("ValueError: Distiller: teacher_parallel is tp=2, but there is no")
