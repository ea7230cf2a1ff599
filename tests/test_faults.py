"""Ranks that die or hang: the others say so, and the run comes to the end that it would have had."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests import fault_runs as runs

from potstill.parallel import faults
from potstill.parallel.meeting import meet

KILLS, SEED = 4, 27  # four moments, two of each rank
ROOT = Path(runs.__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = pytest.mark.usefixtures("one_thread")


def torchrun(folder: Path, *arguments: object, restarts: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, started again so often; a rank that is to end has 5 seconds for it."""
    folder.mkdir(exist_ok=True)
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), "--shutdown-timeout", "5"]
    command = [*TORCHRUN, *launch, "-m", "tests.fault_runs", str(folder), *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False, env=environment)


def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_run_whose_ranks_are_killed_again_and_again_ends_as_if_none_had_been(tmp_path: Path) -> None:
    undisturbed = torchrun(tmp_path / "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    disturbed = torchrun(tmp_path / "disturbed", "--kills", KILLS, "--seed", SEED, restarts=KILLS)
    assert disturbed.returncode == 0, disturbed.stderr
    kills = [json.loads(line) for line in (tmp_path / "disturbed" / "kills").read_text().splitlines()]
    assert [start for start, *_ in kills] == list(range(KILLS))
    for found, expected in zip(results(tmp_path / "disturbed"), results(tmp_path / "undisturbed"), strict=True):
        assert found["start"] == KILLS
        assert len(found["losses"]) == runs.STEPS
        assert found["losses"] == expected["losses"]
        assert all(map(torch.equal, found["weights"], expected["weights"]))
    assert "rank 1 does not answer; it has died, hangs, or has stopped" in disturbed.stderr


def test_the_machine_that_is_left_goes_on_alone(tmp_path: Path) -> None:
    """Two torchruns with a rank each, of which one is killed with its rank; without the dropout, whose masks depend on
    the number of processes."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", f"localhost:{port}"]
    program = ["-m", "tests.fault_runs", str(folder), "--kills", "1", "--seed", "172", "--machine", "--dropout", "0"]
    nodes = []
    # The first started has the lower number, hence the first rank; it waits for the second one, which holds the store.
    for host in ("false", "true"):
        how = ["--rdzv-conf", f"is_host={host},last_call_timeout=5,keep_alive_interval=1"]
        command = [*TORCHRUN, *launch, *how, *program]
        nodes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True))
    try:
        complaints = [node.communicate(timeout=120)[1] for node in nodes]
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [-9, 0], complaints
    found = torch.load(folder / "0.pt")
    assert (found["start"], found["world"]) == (1, 1)
    assert found["batches"] == 8 * runs.EPOCHS - 2  # those of the first step were not repeated
    (tmp_path / "alone").mkdir()
    expected = runs.trained(runs.runner(tmp_path / "alone", 0.0))
    assert len(found["losses"]) == runs.STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    for a, b in zip(found["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_a_rank_that_hangs_is_named_by_the_others_in_time(tmp_path: Path) -> None:
    ended = torchrun(tmp_path / "hang", "--hang", 7, POTSTILL_TIMEOUT="2")
    assert ended.returncode != 0
    (first, at), (second, later) = (json.loads((tmp_path / "hang" / f"{rank}.json").read_text()) for rank in range(2))
    checkpoint = tmp_path / "hang" / runs.NAME
    assert first.startswith(f"Distiller.fit: step 2: batch 3 of epoch 1 (the last good checkpoint is {checkpoint}): ")
    assert "rank 0 of 2 waited for the others in vain: rank 1 does not answer; it has died, hangs, or" in first
    assert "torchrun --max-restarts" in first
    assert "POTSTILL_TIMEOUT" in first
    assert (
        "rank 1 of 2 waited for the others in vain: rank 0 does not answer" in second
    )  # when it wakes, nobody is left
    assert at < later


def together(*calls: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(calls)

    def run(place: int) -> None:
        try:
            found[place] = calls[place]()
        except RuntimeError as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_ranks_that_are_started_again_do_not_wait_for_the_dead() -> None:
    store, time = dist.HashStore(), timedelta(seconds=10)

    def start(ranks: int, of: int) -> list[Any]:
        return together(*(lambda rank=rank: meet(store, rank, of, time) for rank in range(ranks)))

    store.set("rank 1", "dead")  # by a rank that was killed before anybody answered
    first = start(3, 3)
    again = start(2, 2)
    assert all(isinstance(place, str) for place in first + again), (first, again)
    assert len(set(first)) == len(set(again)) == 1
    assert first[0] != again[0]


def test_ranks_that_do_not_come_are_named() -> None:
    store, time = dist.HashStore(), timedelta(seconds=0.3)
    first, second = together(lambda: meet(store, 0, 4, time), lambda: meet(store, 1, 4, time))
    assert str(first).startswith("rank 0 of 4 waited in vain for rank 2, 3 at the start")
    assert str(second).startswith("this rank waited in vain for rank 0, or another that it waits for, at the start")


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf"])
def test_patience_is_a_positive_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_TIMEOUT", given)
    with pytest.raises(ValueError, match=f"POTSTILL_TIMEOUT is '{given}'; expected a positive number of seconds"):
        faults.timeout()
    assert faults.timeout(3.0) == timedelta(seconds=3)
    with pytest.raises(ValueError, match=r"timeout is -1\.0; expected"):
        faults.timeout(-1.0)
