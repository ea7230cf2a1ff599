"""The command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import potstill
from potstill import _C, cli
from potstill.errors import ConversionError
from potstill.ops import OPS, kd_samples, linear_kd_samples
from potstill.report import bench
from potstill.report.measure import Ceilings, Level


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short timings, and ceilings that are not measured."""
    slow = bench.bench_op

    def fast(*args: Any, **kwargs: Any) -> Any:
        return slow(*args, **kwargs, seconds=0.01)

    monkeypatch.setattr(bench, "bench_op", fast)
    monkeypatch.setattr(
        cli, "ceilings", lambda threads: Ceilings("cpu", _C.isa(), threads, 100.0, 50.0, (Level("DRAM", None, 10.0),))
    )


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"potstill {potstill.__version__}\n")


def test_info_tells_the_truth() -> None:
    result = call("info")
    assert result.exit_code == 0
    assert ", ".join(_C.isas()) in result.stdout
    assert torch.__version__ in result.stdout
    assert f"{torch.get_num_threads()} (torch" in result.stdout
    for op in OPS.values():
        assert op.name in result.stdout
        for dtype in (torch.float32, torch.float16):
            assert op.backend("cpu", dtype)[1] in result.stdout


@pytest.mark.usefixtures("quick")
def test_bench_linear(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    result = call("bench", "linear", "--m", "1", "--m", "3", "--k", "40", "--n", "24", "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["label"] for row in rows] == ["m=1 k=40 n=24", "m=3 k=40 n=24"]
    for row in rows:
        assert row["label"] in result.stdout
        assert row["ours"]["median"] > 0
        assert "torch eager" in row["rivals"]


@pytest.mark.usefixtures("quick")
def test_bench_kd_loss(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = ("--rows", "4", "--classes", "11", "--classes", "12", "--temperature", "3", "--threads", "1")
    result = call("bench", "kd-loss", *arguments, "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["label"] for row in rows] == ["rows=4 classes=11 T=3", "rows=4 classes=12 T=3"]
    assert all(row["op"] == "kd_loss" for row in rows)


@pytest.mark.usefixtures("quick")
def test_bench_linear_kd_loss(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = ("--rows", "4", "--hidden", "8", "--hidden", "9", "--classes", "11", "--threads", "2")
    result = call("bench", "linear-kd-loss", *arguments, "--json", str(path))
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    labels = ["rows=4 hidden=8 classes=11", "rows=4 hidden=9 classes=11"]
    assert [row["label"] for row in record["rows"]] == labels
    assert all(row["op"] == "linear_kd_loss" for row in record["rows"])
    assert all(label in result.stdout for label in labels)
    assert record["memory"] == []
    assert "memory" not in result.stdout


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(("weights", "rival"), [("int8", "int8_linear"), ("float", "torch eager")])
def test_bench_sparse(tmp_path: Path, weights: str, rival: str) -> None:
    path = tmp_path / "rows.json"
    arguments = ("--m", "3", "--k", "40", "--n", "24", "--sparsity", "0.9", "--sparsity", "0.5", "--weights", weights)
    result = call("bench", "sparse", *arguments, "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["label"].split()[3:] for row in rows] == [
        [part, order] for part in ("0.9", "0.5") for order in ("many", "few")
    ]
    assert all({"torch eager", "torch CSR", rival} <= set(row["rivals"]) for row in rows)
    best = [min(rows[i : i + 2], key=lambda row: row["ours"]["median"])["label"].split()[-1] for i in (0, 2)]
    assert f"faster order at 0.5: {best[1]}, 0.9: {best[0]}" in result.stdout
    assert f"than {rival}" in result.stdout


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("sizes", [("kd-loss",), ("linear-kd-loss", "--hidden", "8")], ids=lambda sizes: sizes[0])
def test_bench_with_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, ...]) -> None:
    for samples in (kd_samples, linear_kd_samples):
        monkeypatch.setattr(samples, "can_compile", lambda _: False)  # which takes many seconds
    path = tmp_path / "rows.json"
    result = call("bench", *sizes, "--rows", "256", "--classes", "8000", "--memory", "--json", str(path))
    assert result.exit_code == 0, result.output
    [peaks] = json.loads(path.read_text())["memory"]
    assert peaks["op"] == sizes[0].replace("-", "_")
    logits = 256 * 8000 * 4
    assert {"ours", "torch eager"} <= set(peaks["extra"])
    assert peaks["extra"]["torch eager"] > 3.5 * logits
    # kd_loss needs none; here all rows are one chunk, on both sides, and malloc may keep half as much again.
    assert peaks["extra"]["ours"] < 3.0 * logits
    assert f"peak memory of {peaks['op']}" in result.stdout
    assert f"{peaks['extra']['torch eager'] / 2**20:.0f}" in result.stdout


@pytest.mark.parametrize("make", [cli._linear(2, 8, 4), cli._logits(2, 8, 1.5)], ids=lambda sample: sample.label)
def test_samples_fit_their_op(make: Any) -> None:
    op = OPS["int8_linear" if "k=" in make.label else "kd_loss"]
    result = op(**make.make())
    assert torch.isfinite(result if isinstance(result, torch.Tensor) else result[0]).all()


@pytest.mark.parametrize(
    "arguments",
    [("bench", "linear", "--m", "0"), ("info", "--nothing"), ("bench", "kd-loss", "--classes", "x"), ("no",)],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


@pytest.mark.usefixtures("quick")
def test_error_of_the_user_is_one_line() -> None:
    result = call("bench", "kd-loss", "--rows", "2", "--classes", "3", "--temperature", "-1")
    assert result.exit_code == 2
    assert result.stderr.startswith("potstill: kd_loss: temperature is -1")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [ConversionError("what"), ValueError("what"), FileNotFoundError("what")])
def test_errors_of_ours_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "machine", fail)
    result = call("info")
    assert (result.exit_code, result.stderr) == (2, "potstill: what\n")


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "machine", fail)
    assert isinstance(call("info").exception, ZeroDivisionError)
