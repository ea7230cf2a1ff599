"""The measurement of the memory that a benchmark's contestants need."""

from __future__ import annotations

import io
import subprocess
import sys
from functools import partial

import pytest
from rich.console import Console

from potstill.ops import OPS
from potstill.ops.kd_samples import arguments
from potstill.ops.op import Sample
from potstill.report import memory
from potstill.report.memory import Peaks, bench_memory, table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


_CALLS = """
import torch
from potstill.report.memory import _extra

kept = []

def replaces():
    kept.clear()
    kept.append(torch.ones(40 << 20, dtype=torch.int8))

print(_extra(lambda: len(torch.ones(80 << 20, dtype=torch.int8))), _extra(replaces))
"""


def test_what_a_call_needs_only_while_it_runs_counts() -> None:
    done = subprocess.run([sys.executable, "-c", _CALLS], capture_output=True, text=True, check=True)
    temporary, replaced = map(int, done.stdout.split())
    assert 79 << 20 < temporary < 90 << 20
    assert replaced < 4 << 20  # as a step replaces the gradient of the one before


def test_failure_names_the_contestant() -> None:
    wrong = Sample("wrong", partial(arguments, (2, 5), temperature=-1.0))
    with pytest.raises(RuntimeError, match=r"ours failed on wrong: ValueError: kd_loss: temperature is -1.0"):
        memory._measured(OPS["kd_loss"], wrong, "ours", 1)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RuntimeError, match="win32 lacks"):
        bench_memory(OPS["kd_loss"], [], 1)


def test_table() -> None:
    text = io.StringIO()
    rows = [Peaks("op", "m=1", 2, {"ours": 3 << 20, "eager": 12 << 20}), Peaks("op", "m=2", 2, {"ours": 5 << 20})]
    Console(file=text, width=100).print(table("a title", rows))
    first, second = (line.split() for line in text.getvalue().splitlines() if "m=" in line)
    assert first == ["m=1", "3", "12"]
    assert second == ["m=2", "5"]
    assert "a title" in text.getvalue()
