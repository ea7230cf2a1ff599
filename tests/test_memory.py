"""The measurement of the memory that a benchmark's contestants need."""

from __future__ import annotations

import io
import sys
from functools import partial

import pytest
import torch
from rich.console import Console

from potstill.ops import OPS
from potstill.ops.kd_samples import arguments
from potstill.ops.op import Sample
from potstill.report import memory
from potstill.report.memory import Peaks, bench_memory, table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_what_a_call_keeps_only_while_it_runs_counts() -> None:
    size = 24 << 20

    def needs_twice() -> None:
        torch.ones(2 * size, dtype=torch.int8)

    assert 1.9 * size < memory._extra(needs_twice) < 2.3 * size
    kept: list[torch.Tensor] = []

    def replaces() -> None:
        kept.clear()
        kept.append(torch.ones(size, dtype=torch.int8))

    assert memory._extra(replaces) < 0.1 * size  # as it replaces a gradient by the next


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
