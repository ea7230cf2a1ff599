"""Launches of the GPU kernels of ``semi_sparse_int8_linear``, and what their machine code must have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tests.aot.code import Launch, recorded, specialised

from potstill.ops.semi_sparse import ALIGNED, UNIT, rounded_up
from potstill.ops.triton import quantize_rows, tiles
from potstill.ops.triton import semi_sparse_int8_linear as host

GPUS = (80, 90, 100, 103, 120)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PROCESSORS = 132
MATRIX = {80: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 103: "UTCHMMA", 120: "IMMA"}  # of more than 16 rows
SMALL_MATRIX = dict.fromkeys(GPUS, "IMMA") | {103: "HMMA"}


class Case(NamedTuple):
    """A launch for m rows, n outputs and k inputs."""

    m: int = 16
    sm: int = 90
    dtype: str = "bfloat16"
    n: int = 65536
    k: int = 4096
    activation: str = "silu"

    @property
    def label(self) -> str:
        default = Case()._asdict()
        return " ".join(f"{k}={v}" for k, v in self._asdict().items() if k in ("m", "sm") or v != default[k])


def chosen() -> Iterator[Case]:
    """What CI compiles."""
    for m, sm in itertools.product((1, 16, 64), (80, 90, 100)):
        yield Case(m, sm)
    yield Case(64, 103)
    yield Case(64, 120)
    yield Case(64, dtype="float32", activation="gelu")
    yield Case(1, n=4096)  # split over the inputs
    yield Case(16, n=4096)
    yield Case(16, n=65003, k=4097)


def every() -> Iterator[Case]:
    """Every tile, aligned and not."""
    sizes = ((65536, 4096), (65003, 4097), (4096, 4096), (65536, 768))
    for sm, dtype, m, (n, k) in itertools.product(GPUS, DTYPES, (1, 4, 16, 64), sizes):
        yield Case(m, sm, dtype, n, k)


def launches(case: Case) -> list[Launch]:
    """The launch with the arguments that the library gives it."""
    dtype, n, width = DTYPES[case.dtype], case.n, rounded_up(case.k, ALIGNED)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    chip, tiles.chip = tiles.chip, lambda _: tiles.Chip(case.sm, PROCESSORS)  # type: ignore[assignment]
    try:
        with (
            recorded(quantize_rows, ["quantize_rows_kernel"]),
            recorded(host, ["semi_kernel", "fused_semi_kernel", "add_kernel"]) as found,
        ):
            values = empty(n, width // 2, dtype=torch.int8)
            indices = empty(n, width // UNIT, dtype=torch.uint8)
            scale, bias, residual = empty(n, dtype=torch.float32), empty(n), empty(case.m, n)
            host.launch(empty(case.m, case.k), values, indices, scale, bias, case.activation, residual)
    finally:
        tiles.chip = chip
    return [(kernel, arguments) for kernel, arguments in found if kernel.fn.__name__ != "add_kernel"]


def label(kernel: str, case: Case) -> str:
    """The key of a kernel's counts."""
    return f"{kernel} {case.label}"


def faults(case: Case, kernel: str, found: dict[str, Any]) -> list[str]:
    """Weights come 16 bytes at a time, whatever the sizes, and the expanded tile goes to the matrix units.

    Narrower ones are the float rows of the fused kernel, and on sm_103 the words of indices of half as many inputs.
    """
    expected = (SMALL_MATRIX if case.m <= 16 else MATRIX)[case.sm]
    wrong = [] if expected in found["matrix"] else [f"no {expected}"]
    if not found["wide copies"]:
        wrong.append("no copies of 16 bytes")
    if found["narrow copies"] and kernel == "semi_kernel" and case.sm != 103:
        wrong.append(f"{found['narrow copies']} copies of less than 16 bytes")
    return wrong


def recompiled() -> list[str]:
    """Sizes that vary from call to call, and for which triton would nonetheless compile anew."""
    base = _key(Case(40))
    return [
        f"semi_kernel is compiled anew for {c}"
        for c in ({"m": 64}, {"k": 8192}, {"n": 131072})
        if _key(Case(40)._replace(**c)) != base
    ]


def _key(case: Case) -> str:
    [(kernel, arguments)] = launches(case)
    return str(specialised(kernel, arguments, case.sm)["src"].hash())
