"""A distillation as a file of the user's describes it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from potstill.distill.distiller import Weighted
from potstill.distill.loop import Validate
from potstill.distill.plan import TrainingPlan
from potstill.distill.strategies.strategy import Strategy

FUNCTION = "recipe"
"""The function that a file has."""


@dataclass(frozen=True)
class Recipe:
    """What the command ``potstill distill`` trains: the arguments of :class:`Distiller` and of its ``fit``.

    ``sample`` is an item of the loader, needed where processes share a model or strategies train projections;
    ``checkpoint_every`` so many steps a checkpoint is written, besides those after every epoch.
    """

    teacher: nn.Module | None
    student: nn.Module
    strategies: Strategy | Sequence[Weighted]
    loader: Iterable[Any]
    plan: TrainingPlan
    validate: Validate | None = None
    sample: Any = None
    checkpoint_every: int | None = None

    @classmethod
    def read(cls, where: str) -> Recipe:
        """Calls the function ``recipe`` of a Python file, or a ``module:function``.

        Raises :class:`FileNotFoundError` or :class:`ValueError` where there is none or it returns something else, and
        :class:`RuntimeError` where it raises, from that error.

        >>> Path("small.py").write_text("def recipe():\\n    return 1\\n")
        27
        >>> Recipe.read("small.py")
        Traceback (most recent call last):
        ...
        ValueError: small.py: recipe() returned an object of type int; expected a potstill.distill.Recipe
        """
        found = _function(where)
        name = f"{where}: {FUNCTION}()" if where.endswith(".py") else f"{where}()"
        recipe = _run(where, found)
        if not isinstance(recipe, cls):
            kind = type(recipe).__name__
            raise ValueError(f"{name} returned an object of type {kind}; expected a potstill.distill.Recipe")
        return recipe


def _function(where: str) -> Callable[[], object]:
    module, colon, name = where.partition(":")
    if where.endswith(".py"):
        found, name = _file(where), FUNCTION
    elif colon and module and name:
        found = _module(where, module)
    else:
        raise ValueError(f"{where} is not a recipe; expected a Python file, such as recipe.py, or module:function")
    function = getattr(found, name, None)
    if not callable(function):
        raise ValueError(f"{where} has no function {name}(); it is to return a potstill.distill.Recipe")
    return function  # type: ignore[no-any-return]


def _file(where: str) -> ModuleType:
    path = Path(where)
    if not path.is_file():
        raise FileNotFoundError(f"{where} does not exist, or is not a file; expected a recipe such as recipe.py")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None  # of every name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    _importable(path.resolve().parent)
    _run(where, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return module


def _module(where: str, name: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ValueError(f"{where}: there is no module {name!r} in {os.getcwd()}, nor is one installed")
    found: ModuleType = _run(where, lambda: importlib.import_module(name))
    return found


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _run(where: str, call: Callable[[], Any]) -> Any:
    """What ``call`` returns; its errors are those of the user's code, of which the traceback is needed."""
    try:
        return call()
    except Exception as error:
        raise RuntimeError(f"{where} raised an error of its own, which is above") from error
