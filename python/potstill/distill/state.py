"""Checkpoints of a training run: written whole or not at all, read with suspicion."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from potstill.errors import CheckpointError

_FORMAT = "potstill.distill/2"
_KEYS = {
    "settings",
    "student",
    "strategies",
    "optimizer",
    "scheduler",
    "average",
    "best",
    "history",
    "batches",
    "seconds",
    "terms",
    "stopped",
    "epoch_start",
    "now",
}
_SHOWN = 5


def write(path: Path, contents: Mapping[str, Any]) -> None:
    """Replaces the file at ``path`` in one step, so that whatever happens a whole checkpoint lies there.

    Raises :class:`CheckpointError`, and leaves the old file, if something in ``contents`` is not a plain value that
    ``torch.load(weights_only=True)`` reads back.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": _FORMAT, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(temporary)
        if unsafe:
            raise CheckpointError(
                f"{path}: the state of the student, optimiser, scheduler or a strategy holds {', '.join(unsafe)}, "
                "which cannot be read back safely; their state_dict() may hold tensors, numbers, strings and containers"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself
    finally:
        os.close(directory)


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a checkpoint, its tensors on the CPU, for a run with the same ``settings``.

    Raises :class:`CheckpointError` if the file is damaged, is something else, or was written with other settings.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        contents = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({error}); delete it to start again") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong; delete it to start again")
    if not isinstance(contents, dict) or contents.get("format") != _FORMAT or not contents.keys() >= _KEYS:
        raise CheckpointError(f"{path} is not a distillation checkpoint of format {_FORMAT}; choose another path")
    differences = _differences(contents["settings"], settings)
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(
            f"{path} was written by another run: {'; '.join(differences[:_SHOWN])}{more}. Use the same arguments to "
            "continue it, or delete the file or pass resume=False to start again"
        )
    return contents


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    names = [*saved, *(name for name in current if name not in saved)]
    return [
        f"{name} is {saved.get(name, 'absent')} in the checkpoint, {current.get(name, 'absent')} here"
        for name in names
        if saved.get(name, "absent") != current.get(name, "absent")
    ]
