"""Launches of the GPU kernels of ``int4_linear``, and what their machine code must have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tests.aot.code import Launch, recorded, specialised

from potstill.ops.triton import int4_linear as host
from potstill.ops.triton import quantize_rows as rows_host
from potstill.ops.triton import tiles

GPUS = (80, 86, 90, 100, 103, 120)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROCESSORS = 132
KERNELS = ("row_kernel", "gemm_kernel", "add_kernel")


class Case(NamedTuple):
    """A launch with ``m`` rows; ``zero``: with zero points."""

    m: int
    sm: int = 90
    group: int = 32
    zero: bool = True
    dtype: str = "bfloat16"
    n: int = 8192
    k: int = 8192

    @property
    def label(self) -> str:
        default = Case(0)._asdict()
        return " ".join(f"{k}={v}" for k, v in self._asdict().items() if k in ("m", "sm") or v != default[k])


def chosen() -> Iterator[Case]:
    """What CI compiles: each tile, the group sizes of some, and sizes that no vector divides."""
    for sm, m in itertools.product((80, 90, 100), (1, 16, 64, 256, 4096)):
        yield Case(m, sm)
    for m, group in itertools.product((1, 4096), (64, 128)):
        yield Case(m, group=group)
        yield Case(m, group=group, zero=False)
    yield Case(1, dtype="float32")
    yield Case(8, n=1024)
    for m in (1, 16, 4096):
        yield Case(m, k=8136)
        yield Case(m, zero=False)
    yield Case(4096, 103)


def every() -> Iterator[Case]:
    """What a user can meet."""
    for sm, m, group, zero in itertools.product(GPUS, (1, 16, 64, 256, 4096), (32, 64, 128), (False, True)):
        for k in (8192, 8136):
            yield Case(m, sm, group, zero, k=k)
    for sm, dtype in itertools.product(GPUS, DTYPES):
        yield Case(1, sm, dtype=dtype)
        yield Case(1, sm, dtype=dtype, n=1024)
        yield Case(16, sm, dtype=dtype, n=1024)


def launches(case: Case) -> list[Launch]:
    """The kernels that the library launches for a case, each with its arguments, without those of ``int8_linear``."""
    dtype, n, groups = DTYPES[case.dtype], case.n, -(-case.k // case.group)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    chip, tiles.chip = tiles.chip, lambda _: tiles.Chip(case.sm, PROCESSORS)
    try:
        with recorded(rows_host, ["quantize_rows_kernel"]), recorded(host, KERNELS) as found:
            host.launch(
                empty(case.m, case.k),
                empty(n, -(-case.k // 64) * 32, dtype=torch.uint8),
                empty(n, groups, dtype=torch.bfloat16),
                n,
                case.group,
                empty(n, groups, dtype=torch.uint8) if case.zero else None,
                empty(n),
            )
    finally:
        tiles.chip = chip
    return found


def label(kernel: str, case: Case) -> str:
    """The key of a kernel's counts."""
    return f"{kernel} {case.label}"


MATRIX = {80: {"IMMA"}, 86: {"IMMA"}, 90: {"IGMMA"}, 100: {"IMMA", "UTCIMMA"}, 103: {"HMMA", "UTCHMMA"}, 120: {"IMMA"}}


def faults(case: Case, kernel: str, found: dict[str, Any]) -> list[str]:
    """Weights are copied 128 bits at a time, four bytes of them are unpacked at once, and matrix units multiply."""
    if kernel == "add_kernel":
        return []
    wrong = []
    if not found["wide copies"]:
        wrong.append("weights are not copied 128 bits at a time")
    if kernel == "gemm_kernel":
        if not found["matrix"] or not found["matrix"].keys() <= MATRIX[case.sm]:
            wrong.append(f"its matrix instructions are {found['matrix']}, expected {' or '.join(MATRIX[case.sm])}")
        if found["permutes"] > 100 and case.sm != 103:  # for one packed in a loop of bytes it has hundreds
            wrong.append(f"{found['permutes']} permutations of bytes")
    elif found["matrix"] or found["permutes"] > 80:
        wrong.append(f"{found['matrix']}, {found['permutes']} permutations of bytes: products are not four at once")
    return wrong


def recompiled() -> list[str]:
    """Numbers of rows for which triton would nonetheless compile anew."""
    wrong = []
    for cases in ([Case(m) for m in (257, 1000, 1024, 4099)], [Case(m, n=1024) for m in (2, 5, 16)]):
        keys: dict[str, set[str]] = {}
        for case in cases:
            for kernel, arguments in launches(case):
                keys.setdefault(kernel.fn.__name__, set()).add(specialised(kernel, arguments, 90)["src"].hash())
        wrong += [f"{name} is compiled anew for another number of rows" for name, k in keys.items() if len(k) > 1]
    return wrong
