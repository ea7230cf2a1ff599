"""The programs in examples/loops run, and show that the student gains from its teacher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests import loop_runs as runs

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # other people's


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("plain_loop", "sklearn"),
        ("hf_trainer", "transformers"),
        ("lightning_module", "lightning"),
        ("accelerate_loop", "accelerate"),
    ],
)
def test_example_shows_the_gain(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In half of its steps."""
    for needed in {package, "accelerate" if name == "hf_trainer" else "sklearn"}:
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    module = runs.example(name)
    module.STEPS //= 2
    module.main()
    _, *printed = re.split("student (?:alone|distilled):", capsys.readouterr().out)
    alone, distilled = ([float(value) for value in re.findall(r"'accuracy': ([0-9.]+)", part)] for part in printed)
    assert distilled[-1] > alone[-1] + 0.05
