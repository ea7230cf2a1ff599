"""Launches of the GPU kernel of ``block_sparse_linear``, and what its machine code must have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tests.aot.code import Launch, recorded, specialised

from potstill.ops.block_sparse import SIZES
from potstill.ops.triton import block_sparse_linear as host

GPUS = (80, 86, 90, 100, 103, 120)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROWS = (16, 64, 4096)  # of each tile
MATRIX = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}  # of more than 16 rows


class Case(NamedTuple):
    """A launch for m rows, n outputs and k inputs, of whose blocks a fifth are stored."""

    m: int = 4096
    sm: int = 90
    size: int = 64
    dtype: str = "bfloat16"
    n: int = 4096
    k: int = 4096
    activation: str = "silu"
    weights: str = ""

    @property
    def label(self) -> str:
        default = Case()._asdict()
        return " ".join(f"{k}={v}" for k, v in self._asdict().items() if k in ("m", "sm", "size") or v != default[k])


def chosen() -> Iterator[Case]:
    """What CI compiles."""
    for m, sm in itertools.product(ROWS, (80, 90, 100)):
        yield Case(m, sm)
    for sm in (80, 90, 100):
        yield Case(4096, sm, 128)
        yield Case(4096, sm, 16)
        yield Case(4096, sm, 128, "float32", activation="gelu")
    yield Case(size=32)
    yield Case(size=32, n=4093, k=4097)
    yield Case(16, dtype="float32")
    yield Case(dtype="float16")
    yield Case(weights="float32")  # under autocast
    yield Case(size=128, n=4093, k=4097)


def every() -> Iterator[Case]:
    """Every tile, aligned and not."""
    for m, sm, size, dtype, (n, k) in itertools.product(ROWS, GPUS, SIZES, DTYPES, ((4096, 4096), (4093, 4097))):
        yield Case(m, sm, size, dtype, n, k)


def launches(case: Case) -> list[Launch]:
    """The launch with the arguments that the library gives it."""
    dtype, n, k, size = DTYPES[case.dtype], case.n, case.k, case.size

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, blocks = -(-n // size), n * k // (5 * size * size)
    with recorded(host, ["block_sparse_kernel"]) as found:
        host.launch(
            empty(case.m, k),
            empty(blocks, size, size, dtype=DTYPES[case.weights or case.dtype]),
            *(empty(count, dtype=torch.int32) for count in (blocks, rows + 1, rows)),
            n,
            empty(n),
            case.activation,
            empty(case.m, n),
        )
    return found


def label(kernel: str, case: Case) -> str:
    """The key of a kernel's counts."""
    return f"{kernel} {case.label}"


def faults(case: Case, kernel: str, found: dict[str, Any]) -> list[str]:
    """Operands reach the matrix units by copies of 128 bits, where sizes are aligned; results of few rows are few."""
    wrong = []
    expected = "HMMA" if case.m <= 16 else MATRIX[case.sm]
    if expected not in found["matrix"]:
        wrong.append(f"no {expected}")
    if case.k % 16 == 0 and not found["wide copies"]:
        wrong.append("operands are not loaded 128 bits at a time")
    if case.m > 16 and case.n % 16 == 0 and not found["wide stores"]:
        wrong.append("results are not stored 128 bits at a time")
    return wrong


def recompiled() -> list[str]:
    """Sizes that vary from call to call, and for which triton would nonetheless compile anew."""
    base = _key(Case(400))
    return [
        f"block_sparse_kernel is compiled anew for {c}"
        for c in ({"m": 100}, {"k": 8192}, {"n": 8192})
        if _key(Case(400)._replace(**c)) != base
    ]


def _key(case: Case) -> str:
    [(kernel, arguments)] = launches(case)
    return str(specialised(kernel, arguments, case.sm)["src"].hash())
