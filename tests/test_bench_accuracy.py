"""The bench of what pruning costs: its grid, its numbers against own computations, its page, and that it runs."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bench_accuracy
from accuracy import grid, mnist, view
from potstill import Prune
from potstill.demo.data import digits

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny() -> grid.Subject:
    """Ten classes that a linear layer before the last one tells apart."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [(x, dense(x).argmax(-1)) for x in torch.randn(4, 32, 16)]

    def agreement(model: nn.Module) -> float:
        return float(torch.stack([(model(x).argmax(-1) == y).float().mean() for x, y in data]).mean())

    return grid.Subject(dense, data, data, lambda m, b: F.cross_entropy(m(b[0]), b[1]), agreement, "2", 60, 1e-2, 0)


def test_the_grid_has_each_pattern_at_each_sparsity_and_2_to_4_once() -> None:
    found = [(c.criterion, c.pattern, c.sparsity) for c in grid.configs(("magnitude", "wanda"), (50, 90), 3)]
    assert len(found) == len(set(found)) == 2 * (2 * 2 + 1)
    assert ("wanda", "1x4", 0.9) in found
    assert ("magnitude", "2:4", 0.5) in found


def test_pruned_is_what_zeroed_weights_give_and_training_brings_some_of_it_back() -> None:
    subject = tiny()
    before = {name: value.clone() for name, value in subject.dense.state_dict().items()}
    row = grid.measure(subject, Prune(0.75, pattern="unstructured"))
    weight = before["0.weight"]
    zeroed = weight * (weight.abs() >= weight.abs().flatten().sort().values[192])  # 192 of 256 go
    hidden = [(F.linear(x, zeroed, before["0.bias"]).relu(), y) for x, y in subject.data]
    right = [(F.linear(h, before["2.weight"], before["2.bias"]).argmax(-1) == y).float().mean() for h, y in hidden]
    assert row["pruned"] == pytest.approx(float(torch.stack(right).mean()))
    assert row["sparsity"] == 0.75
    assert row["pruned"] + 0.05 < row["distilled"] <= 1
    assert all(torch.equal(value, before[name]) for name, value in subject.dense.state_dict().items())


def test_accuracy_is_of_all_test_images() -> None:
    images = bench_accuracy._padded_digits()
    subject = mnist.subject("mnist-mlp", images, seed=1, dense_steps=3, steps=1)
    right = subject.dense(images.normalise(images.test_x)).argmax(-1) == images.test_y
    assert grid.judged(subject, subject.dense) == pytest.approx(100 * float(right.float().mean()))
    assert torch.equal(images.test_x[:, 10:-10, 10:-10], digits().test_x)


def record() -> dict[str, object]:
    rows = [
        {"criterion": name, "pattern": "1x4", "percent": p, "seed": s, "pruned": 90.0 - p / 10 + s, "distilled": 95.0}
        for name in ("magnitude", "wanda")
        for p in (50, 60, 95)
        for s in (0, 2)
    ]
    others = [{**row, "pattern": "unstructured"} for row in rows]
    facts = {"cpu": "a <cpu>", "torch": "2", "threads": 1}
    return {"task": "t", "metric": "accuracy", "dense": [97.0, 98.0], "machine": facts, "rows": rows + others}


def test_means_are_over_seeds() -> None:
    assert view.means(record())["1x4", "wanda"] == {50: (86.0, 95.0), 60: (85.0, 95.0), 95: (81.5, 95.0)}


def test_the_page_needs_no_other_file_and_has_every_mean() -> None:
    html = view.page(record())
    found: list[tuple[str, str]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend((tag, name) for name, _ in attrs)

    Reader().feed(html)
    assert not {name for _, name in found} & {"src", "href"}
    assert html.count("<svg") == 4
    assert html.count("<td>81.500</td>") == 4  # two criteria, two patterns
    assert "a &lt;cpu&gt;" in html


def test_the_command_writes_numbers_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "CRITERIA", ("magnitude", "wanda"))
    paths = [str(tmp_path / name) for name in ("a.json", "a.html")]
    assert not bench_accuracy.main(
        ["--task", "mnist-mlp", "--quick", "--seeds", "1", "--json", paths[0], "--html", paths[1]]
    )
    written = json.loads((tmp_path / "a.json").read_text())
    assert len(written["rows"]) == 2 * (2 * 2 + 1)
    assert written["settings"]["criteria"] == ["magnitude", "wanda"]
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
