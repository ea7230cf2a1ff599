import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from potstill import _C
from potstill.ops import OPS, int8_linear
from potstill.ops.op import Cost, Op, Sample
from potstill.report import bench, measure
from potstill.report.bench import EAGER, BenchRow, Results, bench_call_overhead, bench_op, table
from potstill.report.measure import Cache, Ceilings, Level, caches, ceilings, torch_threads
from potstill.timing import Timing

LIMITS = Ceilings("a cpu", "an isa", 1, 100.0, 50.0, (Level("L2", 1000, 80.0), Level("DRAM", None, 10.0)))


def tiny_samples() -> list[Sample]:
    wanted = {"[7, 770] -> 1000 float32", "[9, 64] -> 64 float32"}
    return [sample for sample in int8_linear.samples("test") if sample.label in wanted]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_every_op_can_be_benched(op: Op):
    samples = list(op.samples("bench"))
    assert samples
    assert len({sample.label for sample in samples}) == len(samples)
    arguments = samples[0].make()
    rivals = op.rivals(**arguments)
    assert next(iter(rivals)) == EAGER
    cost = op.cost(**arguments)
    assert cost.int8_ops + cost.f32_ops > 0
    assert cost.bytes > 0
    for rival in rivals.values():
        rival()


def test_bench_op_gives_consistent_rows():
    threads = torch.get_num_threads()
    samples = tiny_samples()
    rows = bench_op(int8_linear, samples, 1, seconds=0.01, limits=LIMITS)
    assert torch.get_num_threads() == threads
    assert [row.label for row in rows] == [sample.label for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        arguments = sample.make()
        assert list(row.rivals) == list(int8_linear.rivals(**arguments))
        assert (row.op, row.threads) == ("int8_linear", 1)
        assert 0 < row.ours.low <= row.ours.median <= row.ours.high
        assert row.times_faster_than(EAGER) == row.rivals[EAGER].median / row.ours.median
        assert (row.floor, row.bound) == LIMITS.floor(int8_linear.cost(**arguments))
        assert row.percent_of_ceiling == pytest.approx(100 * row.floor / row.ours.median)


def test_bench_op_measures_the_ceilings_if_not_given():
    [row] = bench_op(int8_linear, tiny_samples()[:1], 1, seconds=0.01)
    assert 0 < row.percent_of_ceiling < 110


def row(rivals: dict[str, float]) -> BenchRow:
    timings = {name: Timing(seconds, seconds, seconds, 3) for name, seconds in rivals.items()}
    return BenchRow("an op", "m=1", 2, Timing(2e-3, 2e-3, 2e-3, 9), timings, 1e-3, "int8")


def test_ratios_and_best_rival():
    found = row({EAGER: 8e-3, "slow": 5e-3, "fast": 3e-3})
    assert found.times_faster_than(EAGER) == pytest.approx(4)
    assert found.best_rival == "fast"
    assert found.percent_of_ceiling == pytest.approx(50)
    assert row({EAGER: 8e-3}).best_rival is None


def test_unsteady_rows_are_marked():
    unsteady = replace(row({EAGER: 8e-3}), ours=Timing(2e-3, 1e-3, 3e-3, 9))
    assert row({EAGER: 8e-3}).steady
    assert not unsteady.steady
    text = io.StringIO()
    Console(file=text, width=150).print(table("a title", [unsteady]))
    assert "m=1 ~" in text.getvalue()


def timed(seconds: float, spread: float) -> dict[str, Timing]:
    return {name: Timing(seconds, seconds / spread, seconds * spread, 9) for name in ("ours", EAGER)}


@pytest.mark.parametrize(
    ("visits", "expected"),
    [
        ([timed(2.0, 1.0), timed(1.0, 1.0)], 1.0),  # the quiet one of two
        ([timed(3.0, 2.0), timed(2.0, 2.0), timed(1.0, 1.0)], 1.0),  # until steady
        ([timed(4.0, 2.0), timed(3.0, 2.0), timed(2.0, 2.0), timed(5.0, 2.0)], 2.0),  # four at most
    ],
)
def test_visits_end_when_steady(monkeypatch: pytest.MonkeyPatch, visits: list[dict[str, Timing]], expected: float):
    pending = iter(visits)
    monkeypatch.setattr(bench, "compare", lambda *_, **__: next(pending))
    [found] = bench_op(int8_linear, tiny_samples()[:1], 1, limits=LIMITS)
    assert found.ours.median == expected
    assert next(pending, None) is None


def test_table_shows_every_row_and_ratio():
    text = io.StringIO()
    Console(file=text, width=150).print(table("a title", [row({EAGER: 8e-3, "fast": 3e-3}), row({EAGER: 1e-3})]))
    lines = [line for line in text.getvalue().splitlines() if "m=1" in line]
    assert len(lines) == 2
    assert all(cell in lines[0] for cell in (" 2 ", " 8 ", " 3 ", "4.00", "1.50", "50"))
    assert "against torch eager, fast" in text.getvalue()
    assert "0.50" in lines[1]


def test_json_holds_what_was_measured(tmp_path: Path):
    path = tmp_path / "deep" / "results.json"
    found = row({EAGER: 8e-3, "fast": 3e-3})
    Results([LIMITS], [found], {"grad": 1.25}).save(path)
    record = json.loads(path.read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["call_overhead"] == {"grad": 1.25}
    [limits], [written] = record["ceilings"], record["rows"]
    memory = tuple(Level(**level) for level in limits.pop("memory"))
    assert Ceilings(memory=memory, **limits) == LIMITS
    assert written.pop("times_faster") == {EAGER: pytest.approx(4), "fast": pytest.approx(1.5)}
    assert written.pop("percent_of_ceiling") == pytest.approx(50)
    assert written.pop("steady") is True
    ours = Timing(**written.pop("ours"))
    rivals = {name: Timing(**timing) for name, timing in written.pop("rivals").items()}
    assert BenchRow(ours=ours, rivals=rivals, **written) == found


def test_call_overhead_covers_the_grad_modes():
    ratios = bench_call_overhead(seconds=0.02)
    assert list(ratios) == ["grad", "no_grad", "inference_mode"]
    assert all(0.2 < ratio < 20 for ratio in ratios.values())
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("cost", "floor", "bound"),
    [
        (Cost(int8_ops=2e11), 2.0, "int8"),
        (Cost(f32_ops=2e11), 4.0, "f32"),
        (Cost(int8_ops=1.0, bytes=1000), 1.25e-8, "L2"),
        (Cost(int8_ops=1.0, bytes=1001), 1.001e-7, "DRAM"),
    ],
)
def test_floor_is_the_slowest_of_the_ceilings(cost: Cost, floor: float, bound: str):
    assert LIMITS.floor(cost) == (pytest.approx(floor), bound)


def test_ceilings_are_plausible():
    found = ceilings(1)
    assert (found.isa, found.threads) == (_C.isa(), 1)
    assert found.cpu
    assert 0.1 < found.f32_gflops < 1000
    assert 0.1 < found.int8_gops < 4000
    assert [level.size for level in found.memory[:-1]] == sorted(level.size for level in found.memory[:-1])
    assert found.memory[-1].size is None
    assert all(0.5 < level.gbytes_per_s < 2000 for level in found.memory)


def test_ceilings_refuse_no_threads():
    with pytest.raises(ValueError, match="threads is 0; expected at least 1"):
        ceilings(0)


def test_caches_counts_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    described = {  # two cores with two threads each
        0: [("1", "Data", "32K", "0,2"), ("1", "Instruction", "32K", "0,2"), ("2", "Unified", "1024K", "0,2")],
        1: [("1", "Data", "32K", "1,3"), ("1", "Instruction", "32K", "1,3"), ("2", "Unified", "1024K", "1,3")],
    }
    for cpu in range(4):
        for i, values in enumerate([*described[cpu % 2], ("3", "Unified", "32768K", "0-3")]):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{i}"
            folder.mkdir(parents=True)
            for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
                (folder / name).write_text(value + "\n")
    monkeypatch.setattr(measure, "_CPUS", tmp_path)
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert caches() == [Cache(1, 32 << 10, 2), Cache(2, 1 << 20, 2), Cache(3, 32 << 20, 1)]
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda _: {0, 2})
    assert caches()[1] == Cache(2, 1 << 20, 1)


def test_unknown_caches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "_CPUS", tmp_path)
    with pytest.raises(RuntimeError, match="no cache sizes under"):
        caches()


def test_torch_threads_are_restored_after_an_error():
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        with torch_threads(before + 1):
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before
