"""Studies of repeated runs: their intervals against scipy's, what is kept on disk, and what the page shows."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import scipy.stats
from rich.console import Console

from potstill.errors import PotstillError
from potstill.report import plot
from potstill.report.intervals import interval, paired, student_t
from potstill.report.study import Study

ALONE = {0: 93.0, 1: 93.4, 2: 92.7, 3: 93.9, 4: 93.1}
TAUGHT = {4: 94.0, 3: 94.1, 2: 93.5, 1: 94.6, 7: 80.0}
HOSTILE = """<script>alert("x")</script>&"""


def study(**arguments: object) -> Study:
    found = Study("MNIST: 1,000 labels", metric="test accuracy", unit="%", **arguments)
    found.add("teacher", seed=0, value=99.0, parameters=400_000, about="all images")
    for name, values in (("alone", ALONE), ("taught", TAUGHT)):
        for seed, value in values.items():
            found.add(name, seed=seed, value=value, curve=[value - 30, value - 3, value - 1, value], parameters=12_345)
    found.baseline = "alone"
    return found


@pytest.mark.parametrize("degrees", [*range(1, 41), 99, 100, 1000, 1001])
def test_student_t(degrees: int) -> None:
    assert student_t(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-10)


def test_student_t_needs_a_degree() -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        student_t(0)


def test_interval() -> None:
    values = list(ALONE.values())
    found = interval(values)
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high, found.count) == (pytest.approx(expected.low), pytest.approx(expected.high), 5)


def test_differences_are_paired_by_seed() -> None:
    common = [1, 2, 3, 4]  # in another order, and each has a seed of its own
    expected = scipy.stats.ttest_rel([TAUGHT[s] for s in common], [ALONE[s] for s in common]).confidence_interval(0.95)
    for found in (paired(TAUGHT, ALONE), study().difference("taught")):
        assert found is not None
        assert (found.low, found.high, found.count) == (pytest.approx(expected.low), pytest.approx(expected.high), 4)


def test_one_seed_has_no_interval() -> None:
    one = interval([1.5])
    assert (one.mean, one.half, one.low, one.high) == (1.5, None, 1.5, 1.5)
    assert study().verdict("teacher") == "no interval"
    assert "99.00 (one seed)" in study().page()
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("values", "larger", "verdict"),
    [
        ([2.0, 2.1, 1.9], True, "better"),
        ([2.0, 2.1, 1.9], False, "worse"),
        ([-2.0, -2.1, -1.9], True, "worse"),
        ([-2.0, -2.1, -1.9], False, "better"),
        ([2.0, -2.1, 1.9], True, "not told apart"),
        ([0.0, 0.0, 0.0], True, "not told apart"),
    ],
)
def test_verdict(values: list[float], larger: bool, verdict: str) -> None:
    found = Study("t", metric="m", larger_is_better=larger)
    for seed, value in enumerate(values):
        found.add("base", seed=seed, value=5.0)
        found.add("other", seed=seed, value=5.0 + value)
    assert found.verdict("other") == ""
    found.baseline = "base"
    assert (found.verdict("other"), found.verdict("base")) == (verdict, "")


def test_what_add_refuses() -> None:
    found = study()
    with pytest.raises(ValueError, match="has seed 3 already"):
        found.add("alone", seed=3, value=1.0, parameters=12_345)
    with pytest.raises(ValueError, match=r"parameters=1 .* before 12345"):
        found.add("alone", seed=9, value=1.0, parameters=1)
    for value, curve in ((float("nan"), []), (1.0, [float("inf")])):
        with pytest.raises(ValueError, match="finite"):
            found.add("alone", seed=9, value=value, curve=curve, parameters=12_345)
    assert not found.done("alone", 9)
    found.baseline = "nobody"
    with pytest.raises(ValueError, match="no row 'nobody', but 'teacher', 'alone', 'taught'"):
        found.page()
    with pytest.raises(ValueError, match="add\\(\\) a run first"):
        Study("t", metric="m").page()
    with pytest.raises(ValueError, match="letter or digit"):
        Study("...", metric="m")
    with pytest.raises(ValueError, match="folder"):
        found.write()


def test_written_and_read(tmp_path: Path) -> None:
    written = study(settings={"widths": (8, 16)})
    written.note("Said once.")
    written.note("Said once.")
    page = written.write(tmp_path / "new")
    assert page.name == "mnist-1-000-labels.html"
    read = Study.read(page.with_suffix(".json"))
    assert read.page() == written.page() == page.read_text()
    assert (read.settings, read.notes) == ({"widths": [8, 16]}, ["Said once."])
    assert [path.suffix for path in sorted(page.parent.iterdir())] == [".html", ".json"]


def test_continued(tmp_path: Path) -> None:
    first = Study("t", metric="m", settings={"epochs": 3}, folder=tmp_path)
    first.add("a", seed=0, value=1.0)  # and the program dies here
    again = Study("t", metric="m", settings={"epochs": 3}, folder=tmp_path)
    assert (again.done("a", 0), again.done("a", 1), again.done("b", 0)) == (True, False, False)
    again.add("a", seed=1, value=2.0)
    assert Study("t", metric="m", settings={"epochs": 3}, folder=tmp_path).rows["a"].values == {0: 1.0, 1: 2.0}
    assert len(again.machines) == 1


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"title": "T!"}, "title 't'"),
        ({"settings": {"epochs": 4}}, "settings {'epochs': 3}"),
        ({"metric": "error"}, "metric 'm'"),
        ({"larger_is_better": False}, "larger_is_better True"),
    ],
)
def test_other_studies_are_refused(tmp_path: Path, other: dict[str, object], named: str) -> None:
    arguments = {"title": "t", "metric": "m", "settings": {"epochs": 3}, "folder": tmp_path}
    Study(**arguments).add("a", seed=0, value=1.0)
    with pytest.raises(PotstillError, match=named):
        Study(**(arguments | other))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "title": "t"}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(PotstillError, match=r"t\.json"):
        Study("t", metric="m", folder=tmp_path)


def test_damaged_rows_are_refused(tmp_path: Path) -> None:
    path = study().write(tmp_path).with_suffix(".json")
    record = json.loads(path.read_text())
    del record["rows"][1]["runs"][0]["value"]
    path.write_text(json.dumps(record))
    with pytest.raises(PotstillError, match="not the JSON file of a study"):
        Study.read(path)


def test_table() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(study().table())
    text = console.file.getvalue()
    gain = study().difference("taught")
    assert gain is not None
    for part in ("more is better", "12,345", f"{gain.mean:+.2f} ± {gain.half:.2f}", "baseline", "94.60 (seed 1)"):
        assert part in text
    assert "92.70 (seed 2)" in text  # the worst of the baseline
    assert "seeds 0 to 4" in text
    assert "seeds 1, 2, 3, 4, 7" in text


def test_less_may_be_better() -> None:
    found = Study("t", metric="loss", larger_is_better=False)
    for seed, value in enumerate([0.5, 0.1, 0.9]):
        found.add("a", seed=seed, value=value)
    page = found.page()
    assert "less is better" in page
    assert page.index("(seed 1)") < page.index("(seed 2)")  # the best first


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href")]


def test_page_is_one_file_and_escapes() -> None:
    found = Study(f"a {HOSTILE}", metric=HOSTILE, unit=HOSTILE, settings={HOSTILE: HOSTILE})
    for seed in range(2):
        found.add(HOSTILE, seed=seed, value=seed, curve=[seed] * 4, about=HOSTILE)
    found.baseline = HOSTILE
    found.note(HOSTILE)
    tags = Tags()
    tags.feed(found.page())
    assert "script" not in tags.seen
    assert tags.links == []
    assert tags.seen.count("svg") == 3  # one row alone: no chart of differences


def test_dots_show_value_whiskers_and_seeds() -> None:
    data = [plot.Dot("a", 2.0, 1.0, 3.0, "2 ± 1", 0, [1.5, 2.5]), plot.Dot("b", 4.0, 4.0, 4.0, "4", 1)]
    chart = ET.fromstring(plot.dots("T", "x", data, reference=0.0))
    across = [
        line for line in chart.iter("line") if line.get("class") == "line s0" and line.get("y1") == line.get("y2")
    ]
    (low, high) = (float(across[0].attrib[key]) for key in ("x1", "x2"))
    marks = [float(path.attrib["transform"][len("translate(") :].split()[0]) for path in chart.iter("path")]
    seeds = [float(line.attrib["x1"]) for line in chart.iter("line") if line.get("class") == "seed"]
    (zero,) = (float(line.attrib["x1"]) for line in chart.iter("line") if line.get("class") == "axis")
    unit = high - marks[0]
    assert (low, zero) == (pytest.approx(marks[0] - unit, abs=0.2), pytest.approx(marks[0] - 2 * unit, abs=0.2))
    assert marks[1] == pytest.approx(marks[0] + 2 * unit, abs=0.2)
    assert seeds == pytest.approx([marks[0] - unit / 2, marks[0] + unit / 2], abs=0.2)
    assert [text.text for text in chart.iter("text")].count("2 ± 1") == 1


def test_curves_have_bands() -> None:
    line = plot.Line("a", [1.0, 2.0, 4.0], 0, [(0.0, 2.0), (1.0, 3.0), (4.0, 4.0)])
    chart = ET.fromstring(plot.lines("T", "epoch", "y", [line], where=range(5, 8)))
    (band,), (curve,) = chart.iter("polygon"), chart.iter("polyline")
    around = [tuple(map(float, point.split(","))) for point in band.attrib["points"].split()]
    points = [tuple(map(float, point.split(","))) for point in curve.attrib["points"].split()]
    upper, lower = around[:3], around[:2:-1]
    for (x, y), (up_x, up), (low_x, low), half in zip(points, upper, lower, (1.0, 1.0, 0.0), strict=True):
        assert x == up_x == low_x
        assert (up, low) == (
            pytest.approx(y - half * (points[0][1] - points[1][1]), abs=0.2),
            pytest.approx(2 * y - up),
        )
    texts = [text.text for text in chart.iter("text")]
    assert "5" in texts
    assert "7" in texts
    assert "8" not in texts


@pytest.mark.parametrize(("points", "marks"), [(16, 16), (17, 9), (100, 15)])
def test_long_curves_are_not_marked_everywhere(points: int, marks: int) -> None:
    chart = ET.fromstring(plot.lines("T", "epoch", "y", [plot.Line("a", list(range(points)), 0)]))
    assert len(list(chart.iter("path"))) == marks + 1  # and one in the legend


def test_curves_end_where_the_shortest_run_does() -> None:
    found = Study("t", metric="m")
    for seed, curve in enumerate([[1.0, 2.0], [3.0, 4.0, 5.0], [5.0, 6.0, 7.0]]):
        found.add("a", seed=seed, value=curve[-1], curve=curve)
    page = found.page()
    assert "a: from 3 to 4" in page
    (band,) = re.findall(r'polygon points="([^"]*)"', page)
    heights = [float(point.split(",")[1]) for point in band.split()]
    unit = (heights[3] - heights[0]) / (5.0 - 1.0)  # at the first epoch: from the greatest seed to the least
    assert [(heights[0] - height) / unit for height in heights] == pytest.approx([0, 1, -3, -4], abs=0.02)
