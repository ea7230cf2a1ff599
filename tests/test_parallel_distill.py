"""Two processes under torchrun train the very student that one process trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import parallel_runs as runs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.parallel_runs", str(folder)]
    root = Path(runs.__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def same(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


@pytest.mark.parametrize(("name", "changes"), [("trained", {}), ("averaged", {"ema": 0.9})])
def test_the_student_is_that_of_one_process(name: str, changes: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    expected = runs.trained(**changes)
    assert len(expected["losses"]) == 6
    same(name, ranks)
    for rank in ranks:
        assert rank[name]["losses"] == pytest.approx(expected["losses"], rel=1e-12)
        close(rank[name]["weights"], expected["weights"])
        assert rank[name]["terms"] == [pytest.approx(terms, rel=1e-12) for terms in expected["terms"]]


def test_a_run_of_two_processes_resumes(ranks: list[dict[str, Any]]) -> None:
    same("resumed", ranks)
    for rank in ranks:
        assert rank["resumed"]["losses"] == rank["trained"]["losses"]
        assert all(map(torch.equal, rank["resumed"]["weights"], rank["trained"]["weights"]))


def test_a_signal_to_one_process_ends_both_at_the_same_step(ranks: list[dict[str, Any]]) -> None:
    same("interrupted", ranks)
    assert [rank["interrupted"]["code"] for rank in ranks] == [143, 143]
    assert ranks[0]["interrupted"]["saved"] == 3  # the sixth batch ends the third step: the signal came at its second


def test_processes_decide_alike(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["decided"] for rank in ranks)
    assert first["epochs"] == second["epochs"] == [{"value": score} for score in (0.1, 0.3, 0.2, 0.1)]
    assert (first["steps"], second["steps"]) == (5, 5)
    assert (first["calls"], second["calls"]) == (5, 0)


def test_errors_are_raised_on_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["refusals"]
        assert found["nan"].startswith("FloatingPointError: Distiller.fit: step 1: batch 1 of epoch 1: the loss is nan")
        assert found["other data"].startswith(
            "RuntimeError: Distiller.fit: the loaders of the processes yield different"
        )
        assert found["scalar target"].startswith("ValueError: Distiller: ")


def test_random_numbers_differ_inside_models_and_nowhere_else(ranks: list[dict[str, Any]]) -> None:
    same("noisy", ranks)
    first, second = (rank["noisy"] for rank in ranks)
    assert torch.equal(first["drawn"], second["drawn"])
    masks = [*first["masks"], *second["masks"]]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
