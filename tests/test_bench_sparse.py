"""What ``potstill bench sparse`` measures, and what it says of it."""

from __future__ import annotations

import re

import pytest
import torch

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


def test_lines_with_a_fractional_step() -> None:
    chart = plot.lines("t", "x", "y", [plot.Line("a", [1.0, 2.0, 3.0], 0)], first=0.5, step=0.2)
    found = re.search(r'<polyline points="([^"]+)"', chart)
    assert found is not None
    left, middle, right = (float(point.split(",")[0]) for point in found[1].split())
    assert middle - left == pytest.approx(right - middle, abs=0.2)
    assert right == pytest.approx(plot.WIDTH - 14, abs=0.1)
    assert ">0.7</text>" in chart
