"""What the GPU is, and the rates that it reaches with plain torch: the ceilings of the kernels."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from on_gpu.clock import Clock
from potstill.ops.triton import tiles


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy, read and written; multiply-adds counted as two per second of large matrices."""

    bytes: float
    bf16: float
    f32: float
    int8: float | None


def facts(device: torch.device) -> dict[str, Any]:
    """Device, versions, and how int8 numbers are multiplied on it."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("triton", "bitsandbytes", "torchao", "liger-kernel")},
    }
    if device.type != "cuda":
        return found | {"device": "none: a rehearsal on the CPU"}
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return found | {
        "device": properties.name,
        "capability": capability,
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "int8 products": " because ".join(tiles.products(capability)),
    }


def ceilings(clock: Clock) -> Ceilings:
    """Measured: a copy of 1 GiB, and products of square matrices that fill the device for milliseconds."""
    small = not clock.on_gpu
    n, size = (128, 1 << 16) if small else (8192, 1 << 30)
    a, b = (torch.empty(size, dtype=torch.int8, device=clock.device) for _ in range(2))
    calls = {"bytes": lambda: b.copy_(a)}
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        x = torch.randn(n, n, device=clock.device, dtype=dtype)
        calls[name] = lambda x=x: x @ x  # type: ignore[misc]
    q = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=clock.device)
    try:
        torch._int_mm(q, q.t())
        calls["int8"] = lambda: torch._int_mm(q, q.t())
    except RuntimeError:  # not on this device
        pass
    times = {name: time.device for name, time in clock.compare(calls, rounds=15).items()}
    rate = {name: 2.0 * n**3 / times[name] for name in ("bf16", "f32", "int8") if name in times}
    return Ceilings(2.0 * size / times["bytes"], rate["bf16"], rate["f32"], rate.get("int8"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
