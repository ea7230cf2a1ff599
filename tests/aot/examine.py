"""What the processes of a check run: the launches of one case, compiled."""

from __future__ import annotations

import importlib
from typing import Any

from tests.aot.code import compiled


def of(op: str) -> Any:
    """The file of an op."""
    return importlib.import_module(f"tests.aot.{op}")


def examine(task: tuple[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> kernel's name and counts, for all that a case launches."""
    op, case = task
    launches = of(op).launches(case)
    names = [kernel.fn.__name__ for kernel, _ in launches]
    counts = [compiled(kernel, arguments, case.sm) for kernel, arguments in launches]
    return {of(op).label(name, case): (name, found) for name, found in zip(names, counts, strict=True)}
