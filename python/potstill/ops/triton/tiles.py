"""How the int8 kernels cut matrices into tiles, by GPU and number of rows: one table, which a file may override."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

VARIABLE = "POTSTILL_TILES"
"""The environment variable that names a JSON file of tiles, read at the first launch; see :func:`read`."""


class Tile(NamedTuple):
    """A program computes ``bm`` rows x ``bn`` outputs, ``bk`` inputs at a time, ``stages`` of them under way at once.

    ``warps`` of 32 threads; programs that run together have ``group`` blocks of rows, which read the same weights.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8


class Chip(NamedTuple):
    """A GPU: ``capability`` is 10 times the major version and the minor one; ``processors`` its multiprocessors."""

    capability: int
    processors: int


Table = Mapping[str, Mapping[str, Tile]]

ROWS = {"16": 16, "64": 64, "256": 256, "more": 2**63}
"""The shape classes: up to how many rows each."""

TABLE: Table = {
    "sm_80": {
        "16": Tile(16, 64, 256, 4, 4),
        "64": Tile(64, 64, 128, 4, 4),
        "256": Tile(64, 128, 128, 4, 4),
        "more": Tile(128, 256, 128, 8, 4),
    },
    "sm_86": {
        "16": Tile(16, 64, 128, 4, 4),
        "64": Tile(64, 64, 128, 4, 4),
        "256": Tile(64, 128, 128, 4, 3),
        "more": Tile(128, 128, 128, 8, 4),
    },
    "sm_90": {
        "16": Tile(16, 64, 256, 4, 4),
        "64": Tile(64, 64, 128, 4, 4),
        "256": Tile(64, 128, 128, 4, 4),
        "more": Tile(128, 256, 128, 8, 4),
    },
    "sm_100": {
        "16": Tile(16, 64, 256, 4, 4),
        "64": Tile(64, 64, 128, 4, 4),
        "256": Tile(128, 64, 128, 4, 4),
        "more": Tile(128, 256, 128, 8, 4),
    },
    "sm_103": {
        "16": Tile(16, 64, 128, 4, 4),
        "64": Tile(64, 64, 64, 4, 4),
        "256": Tile(128, 64, 64, 4, 4),
        "more": Tile(128, 128, 64, 8, 4),
    },
}
"""The tiles, of sizes at which no kernel spills (``tests/aot``), by these bounds:

- "16": weights are read once, which is all the time it takes. For the whole bandwidth a multiprocessor must have
  18 KB under way (3.3 TB/s by 700 ns by 1/132 of an H100); a program has 3 stages of 16 KB. Its 80 registers and 60 KB
  let 2 (A100) or 3 run at once. With 16 rows, 16 products for each byte of weights, compute takes a fraction of it.
- "64": as above up to some 40 rows; 64 products a byte. 64 KB, 140 registers: 3 programs at once.
- "256": so small that the usual layer has a program for each multiprocessor: 4096 outputs by 256 rows are 128. They
  read 24 KB from L2 for 2^20 products: at 2048 (A100) or 4096 (H100) a cycle 48 and 96 bytes, of which L2 gives some
  64: up to two thirds of the H100's peak, twice what half the multiprocessors would reach with larger tiles.
- "more": 48 KB for 2^22 products, 48 bytes a cycle on H100 and 24 on A100. 8 warps hold 128 sums in registers each
  thread, so one program runs at a time, with 3 or 4 stages, 144 or 192 KB. Where a program may have only 99 KB
  (sm_86) 128 x 128: 32 KB for 2^21, by 1024 products a cycle 16 bytes.
- sm_100 keeps sums in tensor memory, whose rows are 128: so from 65 rows on 128 x 64 instead of 64 x 128.
- sm_103, and sm_100 with a Triton that is too old for it: int8 becomes float16 on the way to the products; half as many
  inputs at a time, as they take twice the space.
"""

# Inputs that a part has at least: fewer are read sooner than the launch is over that adds the parts.
LEAST_PART = 1024

TENSOR_MEMORY_INT8 = (3, 8)
"""The first Triton whose int8 products use the tensor memory of sm_100; older ones spill sums instead."""


def family(capability: int) -> str:
    """The row of the table for a GPU of this capability.

    >>> family(89), family(90), family(103), family(120)
    ('sm_86', 'sm_90', 'sm_103', 'sm_86')
    """
    if _slow_int8(capability):
        return "sm_103"
    if capability in (80, 87):  # 163 KB of shared memory for a program, those after them 99 KB
        return "sm_80"
    if capability < 90 or capability >= 120:
        return "sm_86"
    return "sm_90" if capability < 100 else "sm_100"


def products(capability: int) -> tuple[str, str]:
    """What int8 numbers are multiplied as on such a GPU, ``"int8"`` or ``"float16"``, and why.

    >>> products(90)
    ('int8', 'its matrix units multiply int8 numbers at full rate')
    """
    slow = _slow_int8(capability)
    return ("float16", slow) if slow else ("int8", "its matrix units multiply int8 numbers at full rate")


def _slow_int8(capability: int) -> str:
    """Why int8 numbers are not multiplied as such; empty if they are."""
    if capability == 103:
        return "its int8 matrix units are a fraction of its float16 ones"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if 100 <= capability < 120 and version < TENSOR_MEMORY_INT8:
        return f"Triton {triton.__version__} multiplies int8 numbers on it as on older GPUs; 3.8 does not"
    return ""


def told() -> str:
    """What this machine's GPUs multiply int8 numbers as; empty if it has none."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    by_gpu = {torch.cuda.get_device_name(gpu): products(chip(gpu).capability) for gpu in gpus}
    return "; ".join(f"{name} multiplies as {what}: {why}" for name, (what, why) in by_gpu.items())


def shape_class(m: int) -> str:
    """The class of a matrix of ``m`` rows."""
    return next(name for name, rows in ROWS.items() if m <= rows)


def tile(chip: Chip, m: int) -> Tile:
    """The tile for ``m`` rows."""
    return table()[family(chip.capability)][shape_class(m)]


def split(tile: Tile, m: int, n: int, k: int, chip: Chip) -> tuple[int, int]:
    """Into how many parts the inputs are split, and how many inputs a part has: a multiple of ``bk``.

    Where there are fewer tiles than multiprocessors, as many parts as give each of them one program, or two where
    weights are read for few rows, if a part then has :data:`LEAST_PART` inputs.

    >>> split(Tile(16, 64, 256, 4, 4), 1, 4096, 4096, Chip(90, 132))
    (4, 1024)
    """
    programs = triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn)
    wanted = chip.processors * (2 if tile.bm == 16 else 1)
    parts = max(1, min(wanted // programs, k // LEAST_PART))
    span = max(1, triton.cdiv(triton.cdiv(k, parts), tile.bk)) * tile.bk
    return max(1, triton.cdiv(k, span)), span


@cache
def chip(device: torch.device) -> Chip:
    """What the driver says of a GPU, asked once."""
    properties = torch.cuda.get_device_properties(device)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


@cache
def table() -> Table:
    """:data:`TABLE`, overridden by the file that the variable names, if it does."""
    path = os.environ.get(VARIABLE)
    return read(Path(path)) if path else TABLE


def read(path: Path) -> Table:
    """:data:`TABLE`, overridden by a file: ``{"sm_90": {"more": {"bm": 128, "bn": 256, ...}}}``.

    ``group`` may be left out. Raises :class:`ValueError` for anything else.
    """
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}: {path} cannot be read as JSON: {error}") from error
    merged = {name: dict(classes) for name, classes in TABLE.items()}
    for name, classes in _entries(path, given, merged):
        for rows, fields in _entries(path, classes, merged[name]):
            merged[name][rows] = _tile(f"{path}, {name}, {rows}", fields, 16 if rows == "16" else None)
    return merged


def _entries(path: Path, given: Any, known: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not isinstance(given, dict) or given.keys() - known.keys():
        what = sorted(given) if isinstance(given, dict) else given
        raise ValueError(f"{VARIABLE}: {path} has {what!r}, expected an object with some of the keys {sorted(known)}")
    return list(given.items())


def _tile(where: str, fields: Any, rows: int | None) -> Tile:
    least = {"bm": rows or 16, "bn": 16, "bk": 32, "warps": 1, "stages": 1, "group": 1}
    most = {"bm": rows or 256, "bn": 256, "bk": 512, "warps": 16, "stages": 8, "group": 64}
    given = {"group": Tile._field_defaults["group"]} | (fields if isinstance(fields, dict) else {})
    if given.keys() != least.keys() or not all(type(value) is int for value in given.values()):
        raise ValueError(f"{VARIABLE}: {where} is {fields!r}, expected integers for each of {list(least)}")
    for name, value in given.items():
        power = name in ("stages", "group") or value & (value - 1) == 0
        if not least[name] <= value <= most[name] or not power:
            kind = "a number" if name in ("stages", "group") else "a power of 2"
            raise ValueError(
                f"{VARIABLE}: {where}: {name} is {value}, expected {kind} from {least[name]} to {most[name]}"
            )
    return Tile(**given)
