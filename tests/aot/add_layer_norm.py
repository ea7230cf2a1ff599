"""Launches of the GPU kernels of ``add_layer_norm``, and what their machine code must have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tests.aot.code import Launch, recorded, specialised

from potstill.ops.triton import add_layer_norm as host

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """A launch; ``parameters`` is their dtype."""

    dtype: torch.dtype
    sm: int = 90
    features: int = 4096
    parameters: torch.dtype = torch.float32
    residual: bool = True
    rows: int = 1000
    eps: float = 1e-5


def chosen() -> Iterator[Case]:
    """What CI compiles: each dtype and GPU, each number of warps, the longest rows and the longer ones."""
    for dtype in DTYPES:
        yield Case(dtype, parameters=dtype)
        yield Case(dtype, features=16384, parameters=dtype)
    for sm, features in itertools.product((80, 100), (4096, 16384, 20480)):
        yield Case(torch.bfloat16, sm, features)
    for features in (64, 768, 770, 8192, 16383, 20480, 20481):
        yield Case(torch.bfloat16, features=features)
    yield Case(torch.bfloat16, residual=False)
    yield Case(torch.float32, features=16383)


def every() -> Iterator[Case]:
    """What a user can meet."""
    sizes = (33, 64, 128, 770, 768, 1536, 4096, 5120, 8192, 16383, 16384, 20480, 20481)
    for dtype, sm, features in itertools.product(DTYPES, (80, 90, 100, 120), sizes):
        for parameters in dict.fromkeys((torch.float32, dtype)):
            yield Case(dtype, sm, features, parameters)


def launches(case: Case) -> list[Launch]:
    """The kernel with the arguments that the library gives it."""
    x = torch.empty((case.rows, case.features), dtype=case.dtype, device="meta")
    parameter = torch.empty(case.features, dtype=case.parameters, device="meta")
    with recorded(host, ["rows_kernel", "long_rows_kernel"]) as found:
        host.launch(x, x if case.residual else None, parameter, parameter, case.eps)
    return found


def label(kernel: str, case: Case) -> str:
    """The key of its counts."""
    dtype, parameters = (str(d).removeprefix("torch.") for d in (case.dtype, case.parameters))
    alone = "" if case.residual else " alone"
    return f"{kernel} {dtype} sm={case.sm} features={case.features} {parameters} parameters{alone}"


def faults(case: Case, kernel: str, found: dict[str, Any]) -> list[str]:
    """Rows whose addresses allow it are read and written 128 bits at a time."""
    if case.features % 16 or case.features < 256:
        return []
    wrong = [] if found["wide stores"] else ["rows are not stored 128 bits at a time"]
    if set(found["loads"]) != {"128"}:
        wrong.append("rows are not loaded 128 bits at a time")
    return wrong


def recompiled() -> list[str]:
    """Arguments for which triton would nonetheless compile anew."""
    keys = set()
    for change in ({}, {"eps": 1e-12}, {"eps": 1.0}, {"rows": 7}, {"rows": 1}):
        for kernel, arguments in launches(Case(torch.bfloat16)._replace(**change)):
            keys.add(specialised(kernel, arguments, 90)["src"].hash())
    return [] if len(keys) == 1 else [f"rows_kernel is compiled {len(keys)} times for other rows and eps"]
