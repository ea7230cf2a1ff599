"""The GPU kernels, on machines without a GPU: what they compute, and the machine code they become."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = sorted(path for path in (HERE / "interpreted").glob("*.py") if path.stem != "common")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as triton is either interpreted or compiled from its import on."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE.parent,
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.parametrize("path", INTERPRETED, ids=lambda path: path.stem)
def test_kernels_agree_with_the_reference_when_interpreted(path: Path) -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout.splitlines()[-1]


def test_machine_code() -> None:
    done = run("-m", "tests.aot")
    assert done.returncode == 0, done.stdout + done.stderr
