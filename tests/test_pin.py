"""Processes that are kept on their share of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.parallel.pin import by_node, pin, shares

affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")

PROGRAM = """
import os, sys, torch
from potstill.parallel import pin
mine = pin(int(sys.argv[1]), int(sys.argv[2]))
assert os.sched_getaffinity(0) == set(mine) and torch.get_num_threads() == len(mine)
torch.randn(300, 300) @ torch.randn(300, 300)
tasks = [int(task) for task in os.listdir("/proc/self/task")]
assert all(os.sched_getaffinity(task) <= set(mine) for task in tasks), "a thread runs elsewhere"
print(*mine)
"""


@affinity
def test_processes_share_the_cores_and_none_twice() -> None:
    ranks = min(2, len(os.sched_getaffinity(0)))
    found = []
    for rank in range(ranks):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(rank), str(ranks)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found += map(int, done.stdout.split())
    assert sorted(found) == sorted(os.sched_getaffinity(0))


def test_shares_are_nearly_equal_and_contiguous() -> None:
    for count, ranks in ((7, 3), (8, 3), (64, 5), (2, 2)):
        found = shares(range(count), ranks)
        assert [core for share in found for core in share] == list(range(count))
        lengths = {len(share) for share in found}
        assert max(lengths) - min(lengths) <= 1


def test_cores_of_a_node_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, cores in (("node0", "0-1,4\n"), ("node1", "2-3,5\n")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cores)
    monkeypatch.setattr(sys.modules["potstill.parallel.pin"], "_NODES", tmp_path)
    assert by_node({0, 1, 2, 3, 4, 5}) == [0, 1, 4, 2, 3, 5]
    assert by_node({5, 0, 3}) == [0, 3, 5]


@affinity
def test_wrong_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        pin(2, 2)
    with pytest.raises(ValueError, match="start fewer"):
        pin(0, 10_000)
