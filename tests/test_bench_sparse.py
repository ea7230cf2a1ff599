"""What ``potstill bench sparse`` measures, and what it says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from potstill.cli import app
from potstill.ops import OPS
from potstill.ops.sparse import from_blocks, unpack
from potstill.report import plot, sparse


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("pattern", ["1x4", "unstructured"])
def test_samples_are_one_layer_as_sparse_as_asked(pattern: sparse.Pattern, weights: sparse.Weights) -> None:
    op = OPS["sparse_int8_linear" if weights == "int8" else "sparse_linear"]
    many, few = (sample.make() for sample in sparse.samples(3, 128, 256, 0.8, pattern, weights))
    dense = from_blocks(*unpack(many["weight"]), 128)
    units = (dense.view(-1, 4) != 0).any(-1) if pattern == "1x4" else dense != 0
    assert 1 - units.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(dense, from_blocks(*unpack(few["weight"]), 128))
    torch.testing.assert_close(op(**many), op(**few))


def test_break_even_is_the_first_rise_through_one() -> None:
    assert sparse.break_even([(0.9, 2.0), (0.5, 0.5), (0.7, 1.5)]) == pytest.approx(0.6)
    assert sparse.break_even([(0.5, 1.1), (0.9, 2.0)]) is None
    assert "faster than torch eager at every" in sparse.verdict([(0.5, 1.1), (0.9, 2.0)], "torch eager")
    assert "slower than torch eager at every" in sparse.verdict([(0.5, 0.1), (0.9, 0.2)], "torch eager")


def test_lines_over_uneven_places_and_their_reference() -> None:
    chart = plot.lines("t", "x", "y", [plot.Line("a", [1.0, 2.0, 3.0], 0)], where=(0.5, 0.7, 1.1), reference=2.0)
    found = re.search(r'<polyline points="([^"]+)"', chart)
    assert found is not None
    points = [tuple(map(float, point.split(","))) for point in found[1].split()]
    (left, _), (middle, level), (right, _) = points
    assert (middle - left) * 2 == pytest.approx(right - middle, abs=0.3)
    assert right == pytest.approx(plot.WIDTH - 14, abs=0.1)
    assert ">0.6</text>" in chart
    across = f'x1="{left:g}" y1="{level:g}" x2="{right:g}" y2="{level:g}" class="axis"'
    assert across in chart


def test_the_command_writes_a_page_with_a_curve_for_each_number_of_rows(tmp_path: Path) -> None:
    page, record = tmp_path / "sparse.html", tmp_path / "sparse.json"
    command = ["bench", "sparse", "--m", "1", "--m", "3", "--k", "32", "--n", "16", "--html", str(page)]
    done = CliRunner().invoke(app, [*command, "--json", str(record), "--sparsity", "0.9", "--sparsity", "0.5"])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.count("<polyline") == 2
    assert "1 row<" in text
    assert "3 rows<" in text
    rows = json.loads(record.read_text())["rows"]
    for m in (1, 3):
        for percent in (50, 90):
            orders = [row for row in rows if row["label"].startswith(f"m={m} k=32 n=16 {percent / 100:g} ")]
            best = min(orders, key=lambda row: row["ours"]["median"])
            speedup = best["rivals"]["int8_linear"]["median"] / best["ours"]["median"]
            assert f"{percent}%: {speedup:.2f} (" in text
