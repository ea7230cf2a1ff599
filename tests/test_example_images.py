"""The example of images runs from its command, writes its results, and goes on where it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from potstill.report.study import Study

EXAMPLE = Path(__file__).parents[1] / "examples" / "distill_images.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=300)


def test_quick_run_and_a_second_one(tmp_path: Path) -> None:
    command = ("--data", "digits", "--quick", "--out", str(tmp_path))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("*.html")
    study = Study.read(page.with_suffix(".json"))
    assert list(study.rows["teacher"].values) == [0]
    assert study.result("teacher").mean > 50.0
    students = [row for name, row in study.rows.items() if name != "teacher"]
    assert len(students) == 7
    for row in students:
        assert sorted(row.values) == [0, 1]
        assert all(run.curve[-1] == run.value > 10.0 for run in row.runs)  # more than chance
        assert row.parameters is not None
        assert 20 * row.parameters <= (study.rows["teacher"].parameters or 0)
    # Some of the teacher's knowledge is there before the first step, so few steps are enough to see it.
    gain = study.difference("+ parameter distillation")
    assert gain is not None
    assert gain.mean > 5.0

    study.rows.pop("+ features: hidden states")
    missing = study.write(tmp_path).read_bytes()
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert page.read_bytes() != missing
    resumed = Study.read(page.with_suffix(".json"))
    assert sorted(resumed.rows["+ features: hidden states"].values) == [0, 1]
    assert resumed.rows["teacher"] == study.rows["teacher"]


def test_labels_out_of_range() -> None:
    done = run("--data", "digits", "--labels", "2000")
    assert done.returncode == 2
    assert "expected a number from 1 to 1437" in done.stderr
