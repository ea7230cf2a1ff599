"""What other libraries offer for the same job, one file per library, all behind one protocol.

A *contestant* is a name and a function ``prepare(job) -> Start``, marked by :func:`contestant`. ``prepare`` does what
does not depend on the number of threads (copying, exporting, calibrating, quantising) and never changes the job's
module; ``Start()`` opens a session for ``torch.get_num_threads()`` threads and returns a ``Call``; ``Call()`` runs
``job.module(*job.inputs)`` once and returns its first output, a tensor or an array. A call reads the memory of the
inputs anew each time, so integer inputs may be filled with other data between calls.

A library is imported when :func:`load` asks for its file; one that is not installed or fails is reported with the
reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]
Start = Callable[[], Call]

INT8 = "int8"
"""Linear layers with 8-bit weights, or none; the module is an ``nn.Sequential`` of ``nn.Linear``."""
INT4 = "int4"
"""Linear layers with 4-bit weights, one scale per :data:`GROUP` inputs; the module is as for :data:`INT8`."""
SPARSE = "sparse"
"""One linear layer, of whose weights many are zero; the module is an ``nn.Sequential`` of it."""
MODEL = "model"
"""Whole models; the module takes and returns plain tensors."""
PRUNED = "pruned"
"""As :data:`MODEL`, but blocks of weights are zero, which these contestants make use of."""
TABLES = (INT8, INT4, SPARSE, MODEL, PRUNED)

GROUP = 128
FILES = ("torch_", "dynamic", "torchao_", "ort", "openvino_")
"""The files beside this one, each for one library."""
ON_GPU = ("torch_",)
"""Those whose contestants run on the device of the job's tensors; the others know CPUs only."""
OURS = "ours"
"""The file with potstill itself."""


@dataclass(frozen=True)
class Job:
    """A module in eval mode, the inputs of a call, and others like them: some judge accuracy, some may calibrate."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    data: tuple[tuple[Tensor, ...], ...] = ()
    calibration: tuple[tuple[Tensor, ...], ...] = ()

    def on(self, device: torch.device) -> Job:
        """The same job there; the module itself is moved."""
        inputs, *others = (
            tuple(tuple(x.to(device) for x in batch) for batch in batches)
            for batches in ((self.inputs,), self.data, self.calibration)
        )
        return Job(self.module.to(device), inputs[0], *others)


Prepare = Callable[[Job], Start]


@dataclass(frozen=True)
class Contestant:
    """One way to do a job; ``library`` is the file that it comes from."""

    name: str
    library: str
    tables: tuple[str, ...]
    prepare: Prepare


_FOUND: dict[str, Contestant] = {}


def contestant(name: str, *tables: str) -> Callable[[Prepare], Prepare]:
    """Enters the decorated ``prepare`` under ``name`` in ``tables``."""
    unknown = set(tables) - set(TABLES)
    if unknown or not tables:
        raise ValueError(f"contestant {name!r}: tables are {tables}, expected some of {TABLES}")

    def enter(prepare: Prepare) -> Prepare:
        if name in _FOUND:
            raise ValueError(f"contestant {name!r} is entered twice")
        _FOUND[name] = Contestant(name, prepare.__module__.rpartition(".")[2], tables, prepare)
        return prepare

    return enter


def load(table: str, files: Iterable[str] = (OURS, *FILES)) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants of ``table``, and the files that could not be imported with the reason."""
    missing: dict[str, str] = {}
    for file in files:
        try:
            importlib.import_module(f"{__name__}.{file}")
        except Exception as error:  # a binary package can fail to import in any way
            missing[file] = reason(error)
    wanted = [entry for entry in _FOUND.values() if table in entry.tables and entry.library in files]
    return wanted, missing


def reason(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:200]
