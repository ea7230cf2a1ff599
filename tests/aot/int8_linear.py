"""Launches of the GPU kernels of ``int8_linear``, and what their machine code must have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tests.aot.code import Launch, recorded, specialised

from potstill.ops.activation import ACTIVATIONS
from potstill.ops.int8_linear import ALIGNED
from potstill.ops.triton import int8_linear as host
from potstill.ops.triton import quantize_rows, tiles

GPUS = (80, 90, 100, 103, 120)
ROWS = (16, 64, 256, 4096)  # of each shape class
WIDE, NARROW = 65536, 4096  # outputs: enough for all multiprocessors, and so few that the inputs are split
PROCESSORS = 132
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# How a GPU multiplies tiles of 64 rows and more, and smaller ones.
MATRIX = {80: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 103: "UTCHMMA", 120: "IMMA"}
SMALL_MATRIX = dict.fromkeys(GPUS, "IMMA") | {103: "HMMA"}


class Case(NamedTuple):
    """A launch of one kernel. ``rest``: with a bias and a residual."""

    kernel: str
    m: int = 4096
    sm: int = 90
    dtype: str = "bfloat16"
    n: int = WIDE
    k: int = 4096
    activation: str = "silu"
    rest: bool = True
    factor: bool = False

    @property
    def label(self) -> str:
        default = Case("")._asdict()
        return " ".join(
            f"{k}={v}" for k, v in self._asdict().items() if k in ("m", "sm") or (k != "kernel" and v != default[k])
        )


def chosen() -> Iterator[Case]:
    """What CI compiles: every tile of the usual GPUs with what takes most registers, and one of each other kind."""
    for m, sm in itertools.product(ROWS, (80, 90, 100)):
        yield Case("gemm_kernel", m, sm)
    for sm in (80, 90, 100):
        yield Case("gemm_kernel", sm=sm, dtype="float32", activation="gelu")
        yield Case("gemm_kernel", sm=sm, n=65003, k=4097, activation="gelu")  # nothing but the integers is aligned
        yield Case("gemm_kernel", sm=sm, activation="none", rest=False)
        yield Case("gemm_kernel", sm=sm, n=65003, activation="none", rest=False)
        yield Case("gemm_kernel", 64, sm, n=NARROW)
        yield Case("fused_kernel", 1, sm)
    for sm in (103, 120):
        yield Case("gemm_kernel", sm=sm)
    yield Case("gemm_kernel", 16, 103)
    yield Case("gemm_kernel", dtype="float16")
    yield Case("gemm_kernel", k=4112)  # no multiple of a tile's inputs
    yield Case("fused_kernel", 4, factor=True)
    yield Case("fused_kernel", 1, n=NARROW)
    yield Case("fused_kernel", 1, n=1, k=1)
    yield Case("fused_kernel", 1, k=4097)
    yield from _of_rows(90)
    yield Case("add_kernel", 64, n=NARROW)
    yield Case("add_kernel", 64, n=4093)


def _of_rows(sm: int) -> Iterator[Case]:
    for k, dtype in itertools.product((768, 4096, 16384, 20000), DTYPES):
        yield Case("quantize_rows_kernel", sm=sm, k=k, dtype=dtype)
    yield Case("quantize_rows_kernel", sm=sm, factor=True)
    yield Case("quantize_rows_kernel", sm=sm, k=4097)


def every() -> Iterator[Case]:
    """Every tile with every activation, and the sizes that are compiled differently."""
    sizes = ((WIDE, 4096), (WIDE, 4112), (65003, 4096), (65003, 4097))
    for sm, dtype, activation, rest in itertools.product(GPUS, DTYPES, ACTIVATIONS, (True, False)):
        for m, (n, k) in itertools.product(ROWS, sizes):
            if dtype != "float16" or (n, k) == sizes[0]:
                yield Case("gemm_kernel", m, sm, dtype, n, k, activation, rest)
        for m, (n, k) in itertools.product((1, 4), sizes):
            yield Case("fused_kernel", m, sm, dtype, n, min(k, 16384 // m), activation, rest)
    for sm in GPUS:
        for m, dtype in itertools.product(ROWS[:2], DTYPES):
            yield Case("gemm_kernel", m, sm, dtype, NARROW)
            yield Case("add_kernel", m, sm, dtype, NARROW, activation="gelu")
        yield from _of_rows(sm)


def launches(case: Case) -> list[Launch]:
    """The launch of the case's kernel with the arguments that the library gives it."""
    dtype, n, k = DTYPES[case.dtype], case.n, case.k

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    chip, tiles.chip = tiles.chip, lambda _: tiles.Chip(case.sm, PROCESSORS)  # type: ignore[assignment]
    try:
        with (
            recorded(quantize_rows, ["quantize_rows_kernel"]) as first,
            recorded(host, ["fused_kernel", "gemm_kernel", "add_kernel"]) as second,
        ):
            host.launch(
                empty(case.m, k),
                empty(n, -(-k // ALIGNED) * ALIGNED, dtype=torch.int8),
                empty(n, dtype=torch.float32),
                empty(n) if case.rest else None,
                case.activation,
                empty(case.m, n) if case.rest else None,
                empty(k, dtype=torch.float32) if case.factor else None,
            )
    finally:
        tiles.chip = chip
    return [(kernel, arguments) for kernel, arguments in first + second if kernel.fn.__name__ == case.kernel]


def label(kernel: str, case: Case) -> str:
    """The key of a kernel's counts."""
    return f"{kernel} {case.label}"


def faults(case: Case, kernel: str, found: dict[str, Any]) -> list[str]:
    """Operands reach the matrix units by copies of 128 bits and unpermuted; whatever is aligned is 128 bits wide."""
    wrong = []
    if kernel in ("gemm_kernel", "fused_kernel"):
        expected = (SMALL_MATRIX if case.m <= 16 else MATRIX)[case.sm]
        if expected not in found["matrix"]:
            wrong.append(f"no {expected}")
        # What a program rounds itself is little, and may be copied as it comes.
        if not found["wide copies"] or (found["narrow copies"] and kernel == "gemm_kernel") or "8" in found["loads"]:
            wrong.append("integers are not loaded 128 bits at a time")
        if kernel == "gemm_kernel" and case.activation == "none" and not case.rest and case.sm != 103:
            many = found["permutes"] > (0 if case.n % 16 == 0 else _apart(case))
            wrong += [f"{found['permutes']} permutations of bytes"] if many else []
        if case.n % 16 == 0 and not found["wide stores"]:
            wrong.append("results are not stored 128 bits at a time")
    if (
        kernel == "quantize_rows_kernel"
        and case.k % 16 == 0
        and (set(found["loads"]) != {"128"} or not found["wide stores"])
    ):
        wrong.append("rows are not loaded and stored 128 bits at a time")
    return wrong


def _apart(case: Case) -> int:
    """How many permutations take results apart that are stored one by one: at most one for each of a thread's."""
    tile = tiles.tile(tiles.Chip(case.sm, PROCESSORS), case.m)
    return tile.bm * tile.bn // (tile.warps * 32)


def recompiled() -> list[str]:
    """Sizes that vary from call to call, and for which triton would nonetheless compile anew."""
    wrong = []
    for name, m, changes in (
        ("gemm_kernel", 33, ({"m": 20}, {"m": 64}, {"k": 8192}, {"n": 131072})),
        ("gemm_kernel", 400, ({"m": 257}, {"m": 100000})),
        ("fused_kernel", 3, ({"m": 4}, {"k": 1024})),
        ("quantize_rows_kernel", 17, ({"m": 64}, {"k": 4112 - 32})),
    ):
        base = Case(name, m)
        key = _key(base)
        wrong += [f"{name} m={m} is compiled anew for {c}" for c in changes if _key(base._replace(**c)) != key]
    narrow = Case("add_kernel", 64, n=NARROW)
    if _key(narrow) != _key(narrow._replace(m=20, k=2048)):
        wrong.append("add_kernel is compiled anew for another number of parts")
    return wrong


def _key(case: Case) -> str:
    [(kernel, arguments)] = launches(case)
    return str(specialised(kernel, arguments, case.sm)["src"].hash())
