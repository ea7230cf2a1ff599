"""What a run ran on: versions, instruction set, threads, and which implementation serves each op."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import potstill
from potstill import _C
from potstill.ops import OPS
from potstill.report.measure import cpu_name

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")


def machine() -> dict[str, Any]:
    """Versions and the facts about this process that speed depends on, ready for JSON.

    >>> machine()["isa"] in machine()["isas"]
    True
    """
    return {
        "potstill": potstill.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "isa": _C.isa(),
        "isas": list(_C.isas()),
        "threads": torch.get_num_threads(),
        "openmp": [Path(path).name for path in openmp_runtimes()],
        "huge_pages": _huge_pages(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries mapped into this process, by path; two of them fight for the cores."""
    if not _MAPS.exists():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def backends() -> list[dict[str, str]]:
    """For every op, device type and dtype: which implementation computes it (``kernel`` or ``reference``), and why."""
    kinds = [("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    kinds += [("cuda", torch.float32)]
    rows = []
    for name, op in sorted(OPS.items()):
        for device, dtype in kinds:
            backend, reason = op.backend(device, dtype)
            rows.append(
                {
                    "op": name,
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": backend,
                    "reason": reason,
                }
            )
    return rows


def _huge_pages() -> str:
    """The kernel's setting for transparent huge pages: always, madvise or never."""
    if not _HUGE_PAGES.exists():
        return "not supported"
    return _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
