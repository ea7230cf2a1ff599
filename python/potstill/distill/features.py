"""What the modules inside a model return, by name, while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Patterns = str | Sequence[str]

_FEW = 12  # names that an error lists


class Features:
    """A context in which the outputs of the modules ``names`` of ``model`` are kept: ``features[name]``.

    Of a module that runs several times the last output is kept. On leaving, also by an exception, the model is as it
    was.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with Features(model, ["0"]) as features:
    ...     _ = model(torch.ones(2, 4))
    >>> features["0"].shape, len(model[0]._forward_hooks)
    (torch.Size([2, 3]), 0)
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._found: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._found:
            raise RuntimeError(f"Distiller: the module {name!r} did not run when its model was called; choose another")
        return tensor_of(self._found[name], name)

    def _keeper(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._found[name] = output

        return keep


def tensor_of(output: Any, name: str) -> Tensor:
    """The tensor in a module's output: itself, or the first in a tuple, list or mapping.

    Raises :class:`TypeError` where there is none.
    """
    items = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(items, (tuple, list)):
        items = next((item for item in items if isinstance(item, Tensor)), None)
    if not isinstance(items, Tensor):
        raise TypeError(f"Distiller: the module {name!r} returned a {type(output).__name__} without any tensor")
    return items


def modules_named(model: nn.Module, patterns: Patterns, whose: str) -> list[str]:
    """The names of the modules of ``model`` that fit a pattern, in the model's order.

    A ``*`` stands for anything between two dots, ``?`` and ``[...]`` as in file names: ``encoder.layer.*`` is each of
    the layers, and nothing inside them. Raises :class:`ValueError` for a pattern that no module fits.

    >>> modules_named(nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU())), "*", "student")
    ['0', '1']
    """
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fitting = {name for name in names if _fits(name, pattern)}
        if not fitting:
            near = names if len(names) <= _FEW else get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(
                f"Distiller: no module of the {whose} is named {pattern!r}; a * stands for one part between dots. "
                f"Among its modules are {', '.join(near) or 'none'}"
            )
        found |= fitting
    return [name for name in names if name in found]


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def match_layers(student: Sequence[str], teacher: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs each of the student's layers with a teacher's: evenly spaced, and the last with the last.

    Raises :class:`ValueError` if the student has more.

    >>> match_layers(["a", "b"], ["0", "1", "2", "3", "4", "5"])
    [('a', '2'), ('b', '5')]
    """
    n, m = len(student), len(teacher)
    if n > m:
        raise ValueError(
            f"Distiller: {n} layers of the student ({student[0]} ...) are to learn from {m} of the teacher "
            f"({teacher[0]} ...); give at most as many of the student's"
        )
    return [(name, teacher[(i + 1) * m // n - 1]) for i, name in enumerate(student)]
