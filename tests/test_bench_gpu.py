"""bench/gpu.py without a GPU: that it runs, sees wrong results, and judges its goals."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu
from on_gpu import parity
from on_gpu.cases import Case
from on_gpu.clock import Clock, Time
from on_gpu.device import Ceilings
from potstill.ops import OPS
from potstill.ops.op import Cost

LIMITS = Ceilings(bytes=1e12, bf16=1e14, f32=1e13, int8=2e14)
CPU = torch.device("cpu")


def row(label: str = "m=1024 k=8192 n=8192", **seconds: float) -> gpu.Row:
    times = {name.replace("_", " "): Time(value, 0.0, 9, True) for name, value in seconds.items()}
    return gpu.Row("int8_linear", label, times, floor=1e-5, bound="int8")


def test_the_rehearsal_runs_every_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(parity, "LARGE", 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--seed", "1"])
    assert gpu.main() == 0
    said = capsys.readouterr().out
    for op in (name for name, op in OPS.items() if "cpu" in op.kernels):
        assert f"parity of {op}" in said
    timed = {"int8_linear", "int4_linear", "semi_sparse_int8_linear", "block_sparse_linear", "add_layer_norm"}
    for op in (*timed, "int8_embedding", "kd_loss", "linear_kd_loss"):
        assert f"│ {op} " in said
    assert "failed" not in said


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "--rehearse" in capsys.readouterr().out


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["add_layer_norm"]

    def spoiled(arguments: dict[str, Any], _: str) -> dict[str, Any]:
        return arguments | {"eps": arguments["eps"] * 2 + 0.1}

    monkeypatch.setattr(parity, "OPS", {"add_layer_norm": op, "int8_embedding": OPS["int8_embedding"]})
    object.__setattr__(op, "lay_out", spoiled)
    try:
        faults = parity.check(CPU, 0, lambda *_: None)
    finally:
        object.__setattr__(op, "lay_out", None)
    assert {fault.op for fault in faults} == {"add_layer_norm"}
    assert any("relative error" in fault.what for fault in faults)


@pytest.mark.parametrize(
    ("given", "exact", "what"),
    [
        ([1.0, 2.0], [1.0, 2.0], ""),
        ([1.0, 2.0], [1.0, 2.0 + 1e-9], ""),
        ([1.0, 2.1], [1.0, 2.0], "relative error"),
        ([1.0, math.nan], [1.0, 2.0], "NaN"),
        ([1.0, math.inf], [1.0, -math.inf], "infinities"),
        ([1.0, 2.0], [1.0, math.inf], "infinities"),
        ([1.0], [1.0, 2.0], "shape"),
    ],
)
def test_differences(given: list[float], exact: list[float], what: str) -> None:
    found = parity.difference(torch.tensor(given), torch.tensor(exact, dtype=torch.float64), 1e-6)
    assert what in found
    assert bool(found) == bool(what)


def test_goals() -> None:
    rivals = {"torch_eager": 2e-5, "quantise,__int_mm,_dequantise": 2e-5}
    eager = gpu.Goal("int8_linear", "m=1024 ", "torch eager", 1.5)
    assert eager.missed(row(ours=1e-5, **rivals)) == ""
    assert "1.33 times" in eager.missed(row(ours=1.5e-5, **rivals))
    assert "nothing to compare" in eager.missed(row(ours=1e-5))
    share = gpu.Goal("int8_linear", "m=1 ", share=0.6)
    assert share.missed(row(ours=1.6e-5)) == ""
    assert "50%" in share.missed(row(ours=2e-5))
    assert gpu.Goal("int8_linear", "", seconds=35e-6).missed(row(ours=36e-6)) == "36 us, wanted 35"
    part = gpu.Goal("int8_linear", "", "product alone", 0.9, without="rounding alone")
    times = {"ours": 3e-5, "product_alone": 2e-5, "rounding_alone": 1e-5}
    assert part.missed(row(**times)) == ""
    assert "0.80 times" in part.missed(row(**times | {"ours": 3.5e-5}))


def test_missed_goals_are_told_for_the_rows_that_they_are_meant_for() -> None:
    assert any("m=4096 " in text for text in gpu.missed([row("m=4096 k=8192 n=8192", ours=1.0, torch_eager=1.0)]))
    assert not list(gpu.missed([row("m=64 k=8192 n=8192", ours=1.0, torch_eager=1.0)]))
    assert not list(gpu.missed([dataclasses.replace(row(), times={}, failed={"ours": "why"})]))


def test_a_contestant_that_fails_is_named_and_the_others_are_timed() -> None:
    def broken() -> Tensor:
        raise RuntimeError("not here\nsecond line")

    case = Case(
        "int8_linear", "m=1", lambda _: (lambda: None, Cost(bytes=1e6), {"rival": broken, "eager": lambda: None})
    )
    found = gpu.timed(case, Clock(CPU), LIMITS)
    assert found.failed == {"rival": "RuntimeError: not here"}
    assert set(found.times) == {"ours", "eager"}
    assert (found.floor, found.bound) == (1e-6, "bytes")
    nothing = gpu.timed(Case("int8_linear", "m=1", lambda _: broken()), Clock(CPU), LIMITS)
    assert nothing.times == {}
    json.dumps(gpu._plain(nothing))


def test_results_are_named_after_the_device() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
