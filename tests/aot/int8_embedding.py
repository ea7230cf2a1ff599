"""Launches of the GPU kernel of ``int8_embedding``, and what its machine code must have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tests.aot.code import Launch, recorded, specialised

from potstill.ops.triton import int8_embedding as host


class Case(NamedTuple):
    """A launch; ``stride`` is that of the table's rows, if they lie apart."""

    dtype: torch.dtype
    sm: int = 90
    columns: int = 768
    stride: int = 0
    rows: int = 1000
    known: int = 30522
    index: torch.dtype = torch.int64


def chosen() -> Iterator[Case]:
    """What CI compiles: each dtype, GPU, and width of a program."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Case(dtype)
        yield Case(dtype, columns=770)
    for sm in (80, 100):
        yield Case(torch.bfloat16, sm)
    yield Case(torch.bfloat16, columns=64)
    yield Case(torch.bfloat16, stride=4096)
    yield Case(torch.float32, index=torch.int32)


def every() -> Iterator[Case]:
    """What a user can meet."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, sm, columns in itertools.product(dtypes, (80, 90, 100, 120), (5, 64, 96, 192, 300, 768, 770, 4096)):
        yield Case(dtype, sm, columns)


def launches(case: Case) -> list[Launch]:
    """The kernel with the arguments that the library gives it."""
    table = torch.empty((case.known, case.stride or case.columns), dtype=torch.int8, device="meta")
    scale = torch.empty(case.known, device="meta")
    indices = torch.empty(case.rows, dtype=case.index, device="meta")
    with recorded(host, ["gather_kernel"]) as found:
        host.launch(table[:, : case.columns], scale, indices, case.dtype)
    return found


def label(kernel: str, case: Case) -> str:
    """The key of its counts."""
    dtype, index = (str(d).removeprefix("torch.") for d in (case.dtype, case.index))
    return f"{kernel} {dtype} sm={case.sm} columns={case.columns} stride={case.stride} {index}"


def faults(case: Case, kernel: str, found: dict[str, Any]) -> list[str]:
    """Aligned rows are stored 128 bits at a time, and read so many values at once that no thread needs another's."""
    if case.columns % 16:
        return []
    bits, loads = 8 * 16 // case.dtype.itemsize, found["loads"]
    wrong = [] if found["wide stores"] else ["rows are not stored 128 bits at a time"]
    if loads.get("8") or loads.get("16") or not loads.get(str(bits)):
        wrong.append(f"rows are not loaded {bits} bits at a time")
    if case.columns >= 512 and found["shared"]:
        wrong.append("values are exchanged between threads")
    return wrong


def recompiled() -> list[str]:
    """Numbers of rows for which triton would nonetheless compile anew."""
    keys = set()
    for rows, known in ((1000, 30522), (33, 50257), (7, 1001)):
        for kernel, arguments in launches(Case(torch.bfloat16, rows=rows, known=known)):
            keys.add(specialised(kernel, arguments, 90)["src"].hash())
    # Triton itself tells multiples of 16 from other numbers.
    return [] if len(keys) == 1 else [f"gather_kernel is compiled {len(keys)} times for other numbers of rows"]
