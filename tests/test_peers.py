"""The benches against other libraries: their protocol, without any of the libraries."""

import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import contest
import peers
import standings
import zeros
from peers import INT8, MODEL, SPARSE, Contestant, Job, Start
from potstill.timing import Timing


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_FOUND", {})


def job() -> Job:
    return Job(nn.Sequential(nn.Linear(16, 8)).requires_grad_(False), (torch.randn(4, 16),))


def scaled(factor: float) -> peers.Prepare:
    def prepare(given: Job) -> Start:
        return lambda: lambda: factor * given.module(*given.inputs)

    return prepare


def no_session(given: Job) -> Start:
    def start() -> peers.Call:
        raise OSError("no session")

    return start


def refuses(given: Job) -> Start:
    raise NotImplementedError("only odd shapes\nand more")


def test_a_contest_times_checks_and_gives_reasons():
    given = job()
    fakes = {"fp32": scaled(1.0), "off": scaled(1.25), "refuses": refuses, "no session": no_session}
    starts, failed = contest.prepared([Contestant(name, "fake", (INT8,), f) for name, f in fakes.items()], given)
    assert [(entry.name, entry.reason) for entry in failed] == [("refuses", "NotImplementedError: only odd shapes")]
    threads = torch.get_num_threads()
    found = {e.name: e for e in contest.contest(starts, contest.checker(given), 1, seconds=0.01)}
    assert torch.get_num_threads() == threads
    assert list(found) == ["fp32", "off", "no session"]
    assert (found["fp32"].error, found["fp32"].cosine) == (0.0, pytest.approx(1.0))
    assert found["off"].error == pytest.approx(0.25, abs=1e-6)
    assert found["off"].snr_db == pytest.approx(12.04, abs=0.01)
    assert found["no session"].reason == "OSError: no session"
    assert found["no session"].timing is None
    assert all(found[name].timing.median > 0 for name in ("fp32", "off"))


def test_a_slow_contestant_is_timed_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contest, "_SLOW_SECONDS", 0.0)
    monkeypatch.setattr(contest, "_SLOW", 1.0)
    given = job()
    starts, _ = contest.prepared([Contestant(f"peer {i}", "fake", (INT8,), scaled(1.0)) for i in range(3)], given)
    found = contest.contest(starts, contest.checker(given), 1, seconds=0.01)
    assert sorted(entry.timing.repeats > 1 for entry in found) == [False, False, True]


def test_accuracy_is_judged_on_all_data():
    table = nn.Embedding(4, 3).requires_grad_(False)
    inputs = (torch.tensor([1]),)
    given = Job(table, inputs, data=((torch.tensor([2]),), (torch.tensor([3]),)))
    error, cosine = contest.checker(given)(lambda: table(inputs[0]) * (1 if inputs[0] == 2 else -1))
    assert (inputs[0].item(), cosine) == (1, pytest.approx(0.0, abs=1e-6))
    assert error == pytest.approx(float(2 * table.weight[3].norm() / table.weight[2:].norm()))


@pytest.mark.usefixtures("registry")
def test_load_reports_a_missing_library(monkeypatch: pytest.MonkeyPatch):
    broken = types.ModuleType("peers.broken_")
    monkeypatch.setitem(sys.modules, "peers.broken_", broken)
    peers.contestant("a peer", INT8)(scaled(1.0))
    monkeypatch.setitem(sys.modules, "peers.absent_", None)  # importing it raises
    found, missing = peers.load(INT8, files=(__name__.rpartition(".")[2], "absent_"))
    assert list(missing)[-1] == "absent_"
    assert "ModuleNotFoundError" in missing["absent_"]
    assert [entry.name for entry in found] == ["a peer"]
    assert peers.load(MODEL, files=("broken_",)) == ([], {})


@pytest.mark.usefixtures("registry")
def test_contestants_are_entered_once_and_in_known_tables():
    peers.contestant("a peer", INT8)(scaled(1.0))
    with pytest.raises(ValueError, match="'a peer' is entered twice"):
        peers.contestant("a peer", MODEL)(scaled(1.0))
    with pytest.raises(ValueError, match=r"tables are \('int7',\), expected some of"):
        peers.contestant("another", "int7")
    with pytest.raises(ValueError, match="expected some of"):
        peers.contestant("another")


def test_our_own_contestants_compute_the_layer():
    given = job()
    found, missing = peers.load(INT8, files=(peers.OURS, "torch_", "dynamic"))
    assert missing == {}
    plain = [entry for entry in found if "compile" not in entry.name]
    assert {"potstill int8", "torch fp32", "torch bf16"} <= {entry.name for entry in plain}
    starts, failed = contest.prepared(plain, given)
    assert failed == []
    with torch.inference_mode():
        errors = {name: contest.checker(given)(start())[0] for name, start in starts.items()}
    assert all(error < 0.05 for error in errors.values()), errors


def entry(name: str, milliseconds: float | None, **more: object) -> contest.Entry:
    timing = None if milliseconds is None else Timing(1e-3 * milliseconds, 1e-3, 1e-3, 9)
    return contest.Entry(name, timing, **more)


def row(ours: float) -> standings.Row:
    entries = (
        entry("potstill int8", ours, error=0.01, cosine=0.999),
        entry("torch fp32", 8.0, error=0.0, cosine=1.0),
        entry("a peer", 3.0, error=0.02, cosine=0.99),
        entry("absent", None, reason="ImportError: none"),
    )
    return standings.Row(INT8, "m=1", 2, entries, floor=1e-3, bound="int8")


def test_ratio_is_ours_against_the_fastest_other():
    won, lost = row(2.0), row(4.0)
    assert (won.ours, won.peer, won.ratio) == ("potstill int8", "a peer", pytest.approx(1.5))
    assert lost.ratio == pytest.approx(0.75)
    alone = standings.Row(INT8, "m=1", 1, (entry("potstill int8", 1.0), entry("absent", None)))
    assert (alone.peer, alone.ratio) == (None, None)


def test_tables_show_wins_losses_and_reasons():
    text = io.StringIO()
    console = Console(file=text, width=120)
    rows = [row(2.0), row(4.0)]
    console.print(standings.duels("duels", rows), standings.field("field", rows), standings.columns(row(2.0)))
    shown = text.getvalue()
    duel = [line for line in shown.splitlines() if line.strip().startswith("m=1")]
    assert all(cell in duel[0] for cell in ("1.50", "50 int8", "a peer"))
    assert all(cell in duel[1] for cell in ("0.75", "25 int8"))
    assert "geometric mean 1.06 x the best peer; slower on 1 of 2" in shown
    [theirs] = [line.split() for line in shown.split("field")[1].splitlines() if line.strip().startswith("a peer")][:1]
    assert theirs[2:] == ["1.06", "1", "of", "2", "0.0200"]
    assert shown.count("ImportError: none") == 2
    assert "34.0" in shown  # the decibels of an error of 0.02


def test_tokens_per_second():
    text = io.StringIO()
    Console(file=text, width=120).print(standings.columns(row(2.0), "tokens/s"))
    [ours] = [line.split() for line in text.getvalue().splitlines() if "potstill" in line]
    assert ours[2:5] == ["500.0", "4.00", "1.50"]


def test_json_holds_what_was_measured(tmp_path: Path):
    path = tmp_path / "deep" / "peers.json"
    standings.save(path, [row(2.0)], {"ort": "ImportError: none"}, verdicts=["faster"])
    record = json.loads(path.read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert (record["missing"], record["verdicts"]) == ({"ort": "ImportError: none"}, ["faster"])
    [found] = record["rows"]
    assert (found["ours"], found["peer"], found["ratio"]) == ("potstill int8", "a peer", pytest.approx(1.5))
    assert found["entries"][3] == {
        "name": "absent", "timing": None, "error": None, "cosine": None, "reason": "ImportError: none"
    }  # fmt: skip
    assert found["entries"][0]["timing"]["median"] == 2e-3


def test_layers_with_zeros_are_as_sparse_as_asked_and_all_contestants_compute_them():
    found, missing = peers.load(SPARSE, files=(peers.OURS, "torch_", "dynamic"))
    assert missing == {}
    assert {"potstill sparse many", "potstill sparse few", zeros.DENSE, "torch CSR"} <= {one.name for one in found}
    for layer in zeros.layers([(3, 64, 32)]):
        given = layer.job()
        weight = given.module[0].weight
        units = (weight.view(-1, 4) != 0).any(1) if layer.pattern == "1x4" else weight != 0
        assert 1 - units.float().mean().item() == pytest.approx(layer.sparsity, abs=0.01)
        starts, failed = contest.prepared(found, given)
        assert failed == []
        with torch.inference_mode():
            errors = {name: contest.checker(given)(start())[0] for name, start in starts.items()}
        assert all(error < 0.05 for error in errors.values()), errors
        assert zeros.cost(given).int8_ops == pytest.approx(2 * 3 * 4 * int((weight.view(-1, 4) != 0).any(1).sum()))


def sparse_row(layer: zeros.Layer, seconds: dict[str, float]) -> standings.Row:
    return standings.Row(SPARSE, layer.label, 2, tuple(entry(name, 1e3 * value) for name, value in seconds.items()))


def test_where_zeros_pay_is_told_per_pattern_against_the_best_peer_and_our_dense_layer():
    layers = zeros.layers([(1, 64, 32)])
    rows = [
        sparse_row(layer, {
            "potstill sparse many": 3.0,
            "potstill sparse few": 1.0 - layer.sparsity + 0.5 * (layer.pattern == "unstructured"),
            zeros.DENSE: 0.05,
            "a peer": 0.35,
            "another": 9.0,
        })
        for layer in layers
    ]  # fmt: skip
    assert {(row.ours, row.peer) for row in rows} == {("potstill sparse few", "a peer")}
    [(pattern, course), (other, never)] = zeros.courses(layers, rows, zeros.PEER)
    assert (pattern, other) == ("1x4", "unstructured")
    assert dict(course.points) == pytest.approx({0.5: 0.7, 0.8: 1.75, 0.9: 3.5, 0.95: 7.0})
    assert set(course.orders) == {"few"}
    assert zeros.verdicts([(pattern, course), (other, never)]) == [
        "m=1 k=64 n=32 1x4, threads: 2: faster than the best peer from a sparsity of 0.59 on",
        "m=1 k=64 n=32 unstructured, threads: 2: slower than the best peer at every sparsity measured",
    ]
    text = io.StringIO()
    Console(file=text, width=120).print(zeros.table(zeros.courses(layers, rows, zeros.DENSE)))
    [line] = [line for line in text.getvalue().splitlines() if " 1x4 " in line]
    assert line.split()[4:9] == ["2", "0.10", "0.25", "0.50", "1.00"]
    pages = dict(zeros.pages([(pattern, course), (other, never)]))
    assert {name: page.count("<polyline") for name, page in pages.items()} == {"1x4": 1, "unstructured": 1}
    assert "times as fast as the best peer" in pages["1x4"]
    assert zeros.courses(layers, rows[1:], "a peer that is not there") == []
    assert len(zeros.courses(layers, rows[1:], zeros.PEER)[0][1].points) == 3
