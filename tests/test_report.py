"""The HTML page, its charts, and the words that go with them."""

from __future__ import annotations

import copy
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from potstill import _C
from potstill.report import plot, render
from potstill.report.machine import backends, machine
from potstill.transform import quantize_

HOSTILE = """<script>alert("x")</script><img src=x onerror='y'>&"""


def timing(seconds: float) -> dict[str, float]:
    return {"median": seconds, "low": seconds, "high": seconds, "repeats": 9}


def model(title: str, accuracy: float, size: int, one: float, many: float) -> dict[str, Any]:
    return {
        "title": title,
        "accuracy": accuracy,
        "loss": 0.05,
        "parameters": size // 4,
        "bytes": size,
        "file": "x.safetensors",
        "architecture": "Sequential()",
        "latency": {"1": timing(one), "256": timing(many)},
    }


@pytest.fixture
def record() -> dict[str, Any]:
    curve = [{"seconds": 1.0, "train_loss": 0.3, "accuracy": 90.0 + e, "loss": 0.5 / (e + 1)} for e in range(5)]
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    report = quantize_(layers, exclude="2", only_if_faster=False, sample_input=torch.randn(64, 256))
    return {
        "task": "mnist",
        "seed": 3,
        "images": {"name": "MNIST", "source": "somewhere", "train": 600, "test": 100, "shift": 2},
        "machine": machine(),
        "models": {
            "teacher": model("Teacher", 99.41, 6_700_000, 8e-4, 32e-3),
            "plain": model("Student, no teacher", 98.03, 470_000, 4e-5, 5e-4) | {"latency": None},
            "distilled": model("Student, distilled", 98.52, 470_000, 4e-5, 5e-4),
            "int8": model("Student, distilled, int8", 98.49, 125_000, 3.2e-5, 2e-4),
        },
        "distillation": {
            "temperature": 4.0,
            "alpha": 0.9,
            "gain": {"points": 0.49, "standard_error": 0.11, "only_with": 9, "only_without": 2},
        },
        "training": {"teacher": curve, "plain": curve, "distilled": curve[:1]},
        "quantize": report.to_dict(),
        "reload": {"identical": True, "accuracy": 98.49, "loss": 0.05},
        "seconds": 12.0,
    }


class Balance(HTMLParser):
    """Raises where a tag closes that is not the innermost open one."""

    VOID = ("meta", "br", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def charts(html: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)]


def test_page_is_well_formed_and_alone(record: dict[str, Any]) -> None:
    html = render.page(record)
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    assert not balance.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|//\w|url\(|@import|\ssrc=|\shref=", html)


def test_page_shows_the_numbers_of_the_record(record: dict[str, Any]) -> None:
    html = render.page(record)
    for text in ("99.41 %", "98.03 %", "98.52 %", "98.49 %", "6.7 MB", "125 kB", "1,675,000", "800 µs", "32 ms"):
        assert text in html
    assert "54 times smaller on disk" in html  # 6.7 MB / 125 kB = 53.6
    assert "160 times faster on 256 images (25.0 times on one)" in html
    assert "1.25 / 2.50" in html  # int8 against float32
    assert record["machine"]["cpu"] in html
    assert "seed 3" in html


def test_page_follows_the_record(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    other["models"]["int8"]["accuracy"] = 12.34
    other["reload"] = {"identical": False, "accuracy": 11.11, "loss": 1.0}
    html = render.page(other)
    assert "12.34 %" in html
    assert "98.49 %" not in html
    assert "not the same; accuracy 11.11 %" in html


def test_hostile_names_are_escaped(record: dict[str, Any]) -> None:
    record["models"]["int8"]["title"] = HOSTILE
    record["models"]["int8"]["architecture"] = HOSTILE
    record["images"]["name"] = HOSTILE
    record["machine"]["cpu"] = HOSTILE
    record["quantize"]["layers"][0]["reason"] = HOSTILE
    html = render.page(record)
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html
    assert all("onerror" not in element.attrib for chart in charts(html) for element in chart.iter())


def test_layers_of_a_real_report() -> None:
    net = nn.Sequential()
    net.add_module("<b>bold</b>", nn.Linear(64, 48))
    net.add_module("kept", nn.Linear(48, 32))
    report = quantize_(net, exclude="kept", only_if_faster=False, sample_input=torch.randn(16, 64))
    html = render.layers(report.to_dict())
    assert "<b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "48 × 64" in html
    assert "excluded by kept" in html
    assert f"{report.rows[0].snr_db:.1f}" in html
    assert report.measured in html
    assert "1 of 2 layers converted" in html


@pytest.mark.parametrize(
    ("points", "error", "words"),
    [(0.5, 0.1, "more than two standard errors;"), (0.1, 0.1, "may be chance"), (-0.5, 0.1, "the teacher did harm")],
)
def test_gain_in_words(record: dict[str, Any], points: float, error: float, words: str) -> None:
    record["distillation"]["gain"] |= {"points": points, "standard_error": error}
    assert words in render.gain_in_words(record)
    assert f"{points:+.2f} ± {error:.2f}" in render.page(record)


def test_terminal_shows_the_same(record: dict[str, Any]) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    render.show(record, console)
    text = console.export_text()
    for word in ("98.49", "125 kB", "160.00", "2.50", "excluded by 2", "bit for bit the same"):
        assert word in text


def test_bars_are_in_proportion() -> None:
    data = [plot.Bar("one", 10.0, "10 µs", 0), plot.Bar("two", 5.0, "5 µs", 1), plot.Bar("none", 0.0, "0", 2)]
    chart = ET.fromstring(plot.bars("Title", "µs", data))
    widths = [float(rect.attrib["width"]) for rect in chart.iter("rect")]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert widths[2] == 1.0  # still visible
    assert chart.attrib["aria-label"] == "Title: one: 10 µs; two: 5 µs; none: 0"


def test_text_of_charts_stays_inside(record: dict[str, Any]) -> None:
    found = charts(render.page(record))
    assert len(found) == 6
    for chart in found:
        height = float(chart.attrib["viewBox"].split()[3])
        for text in chart.iter("text"):
            x, width = float(text.attrib["x"]), 6.6 * len(text.text or "")
            start = {"start": x, "middle": x - width / 2, "end": x - width}[text.attrib["text-anchor"]]
            assert start >= -1
            assert start + width <= plot.WIDTH + 1
            assert 0 < float(text.attrib["y"]) < height


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [0.0, -3.0], [1e-9, 2e-9], [99.1, 99.12]])
def test_lines_of_unusual_values(values: list[float]) -> None:
    chart = ET.fromstring(plot.lines("T", "epoch", "y", [plot.Line("a", values, 0)]))
    (line,) = chart.iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == len(values)
    assert all(0 <= x <= plot.WIDTH for x, _ in points)
    order = sorted(range(len(values)), key=values.__getitem__)
    heights = [-points[index][1] for index in order]
    assert heights == sorted(heights)


def test_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        plot.lines("T", "epoch", "y", [plot.Line("a", [1.0, float("nan")], 0)])


@given(
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.floats(1e-6, 1e6),
    st.integers(2, 8),
)
def test_ticks_enclose_the_values_evenly(low: float, span: float, count: int) -> None:
    if span < 1e-6 * abs(low):
        span = 1e-6 * abs(low)
    high = low + span
    marks = plot.ticks(low, high, count)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-6 * step
    assert marks[-1] >= high - 1e-6 * step
    assert 2 <= len(marks) <= count + 2
    assert all(b - a == pytest.approx(step, rel=1e-3) for a, b in pairwise(marks))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.99996e-3, "1000 µs"), (1.5, "1.5 s"), (281.4, "281 s"), (0.0123, "12.3 ms"), (3e-8, "0.03 µs")],
)
def test_seconds(value: float, text: str) -> None:
    assert render.seconds(value) == text


def test_machine_tells_what_the_extension_tells() -> None:
    facts = machine()
    assert facts["isas"] == list(_C.isas())
    assert facts["isa"] == _C.isa()
    assert facts["threads"] == torch.get_num_threads()
    assert all("omp" in path for path in facts["openmp"])
    assert {row["op"] for row in backends()} >= {"int8_linear"}
