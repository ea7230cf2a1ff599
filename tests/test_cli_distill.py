"""The command ``potstill distill``: a recipe becomes a student, on one process or several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import potstill
from potstill import cli
from potstill.distill import Recipe

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "distill_recipe.py"
STEPS = 6

SMALL = """
import torch
from potstill.distill import HardLabels, Recipe, TrainingPlan

def recipe():
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    return Recipe(None, torch.nn.Linear(4, 3), HardLabels(), [(x, y)] * 2, TrainingPlan(epochs=3))
"""

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["distill", *map(str, arguments)])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return path


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The example's first steps on two processes that share both models' layers, and what was printed."""
    folder = tmp_path_factory.mktemp("shared")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    plans = ["--plan", "tp=2", "--teacher-plan", "tp=2"]
    command = [*launch, "-m", "potstill", "distill", str(EXAMPLE), "--out", str(folder), "--steps", str(STEPS), *plans]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POTSTILL_TIMEOUT": "60"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


def test_two_processes_train_the_student_of_one(shared: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = shared
    assert printed == f"{STEPS} steps; the report: {folder / 'report.html'}\n"  # of the first process only
    alone = call(EXAMPLE, "--out", tmp_path, "--steps", STEPS)
    assert alone.exit_code == 0, alone.output
    found, expected = results(folder), results(tmp_path)
    assert (found["processes"], found["plan"], found["teacher"]) == (2, "tp=2", "tp=2")
    assert (expected["processes"], expected["plan"], expected["teacher"]) == (1, "dp=1", "whole")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)  # their teachers differ by rounding
    assert found["epochs"][0]["validation"].keys() == {"accuracy"}
    page = (folder / "report.html").read_text()
    assert "Loss while training" in page
    assert "2: the student tp=2, the teacher tp=2" in page


def test_the_student_can_be_loaded(shared: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import distill_recipe

    student = potstill.load(distill_recipe.network(16), shared[0] / "student.safetensors")
    saved = torch.load(shared[0] / "checkpoint.pt", weights_only=True)["student"]
    assert all(torch.equal(value, saved[name]) for name, value in student.state_dict().items())


def test_a_run_goes_on_or_begins_again(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(small, "--out", out).exit_code == 0
    first = results(out)
    assert len(first["losses"]) == 6
    assert call(small, "--out", out).exit_code == 0
    assert results(out) == first  # nothing was left to be done: even the times are the same
    again = call(small, "--out", out, "--no-resume", "--steps", 3)
    assert again.exit_code == 0, again.output
    assert len(results(out)["losses"]) == 3


def test_a_function_of_a_module(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taught.py").write_text(SMALL.replace("def recipe", "def other"))
    monkeypatch.chdir(tmp_path)
    assert call("taught:other", "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (SMALL, ["--plan", "dp=2"], "Plan: dp=2 needs 2 devices but there are 1; with 1 fit: dp=1"),
        (SMALL, ["--teacher-plan", "tp=4"], "Plan: tp=4 needs 4 devices but there are 1; with 1 fit: dp=1"),
        (SMALL, ["--plan", "x=2"], "Plan: 'x=2' in 'x=2' is not understood"),
        ("", [], "has no function recipe(); it is to return a potstill.distill.Recipe"),
        (
            "def recipe():\n    return 3\n",
            [],
            "recipe() returned an object of type int; expected a potstill.distill.Recipe",
        ),
    ],
)
def test_mistakes_are_one_line(text: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(text)
    result = call(path, "--out", tmp_path / "out", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nothing.py", "nothing.py does not exist, or is not a file"),
        ("json", "json is not a recipe; expected a Python file, such as recipe.py, or module:function"),
        ("no_such:recipe", "no_such:recipe: there is no module 'no_such' in "),
        ("no_such.deep:recipe", "no_such.deep:recipe: there is no module 'no_such.deep' in "),
        ("json:recipe", "json:recipe has no function recipe()"),
    ],
)
def test_a_recipe_that_is_not_there(where: str, message: str) -> None:
    result = call(where)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr


def test_errors_in_a_recipe_keep_their_traceback(tmp_path: Path) -> None:
    path = tmp_path / "failing.py"
    path.write_text("def recipe():\n    return 1 + None\n")
    with pytest.raises(RuntimeError, match=r"failing\.py raised an error of its own") as caught:
        Recipe.read(str(path))
    assert isinstance(caught.value.__cause__, TypeError)


def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "potstill", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, f"potstill {potstill.__version__}\n")
