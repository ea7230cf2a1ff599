"""Compiles a launch of a GPU kernel for a GPU that this machine lacks, and counts what its machine code has."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}  # bytes a program may have

TENSOR_MEMORY = 512  # columns that a program may have, from sm_100 on; where it asks for more, triton compiles a trap

Launch = tuple[Any, dict[str, Any]]  # a kernel and its arguments by name


@contextmanager
def recorded(host: Any, names: Sequence[str]) -> Iterator[list[Launch]]:
    """Within it the kernels ``names`` of the module ``host`` are not launched but appended to the list it yields."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def record(*args: Any, **kwargs: Any) -> None:
                found.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs))

            return record

    kernels = {name: getattr(host, name) for name in names}
    try:
        for name, kernel in kernels.items():
            setattr(host, name, Recorder(kernel))
        yield found
    finally:
        for name, kernel in kernels.items():
            setattr(host, name, kernel)


def specialised(kernel: Any, arguments: dict[str, Any], sm: int) -> dict[str, Any]:
    """What triton would compile at such a launch; see ``JITFunction.run``."""
    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return {"src": source, "target": target, "options": options.__dict__}


def compiled(kernel: Any, arguments: dict[str, Any], sm: int) -> dict[str, Any]:
    """Counts of the machine code, or the compiler's complaint under ``"error"``."""
    try:
        return _measured(triton.compile(**specialised(kernel, arguments, sm)))
    except triton.CompilationError as error:
        return {"error": str(error)}


def _measured(binary: Any) -> dict[str, Any]:
    """``hinted``: loads with a hint to the cache, by width. ``copies``: from global to shared memory, by width."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
        code = _output(TOOLS / "nvdisasm", "-c", file.name)
    registers, stack = (int(x) for x in re.findall(r"REG:(\d+)\s+STACK:(\d+)", usage)[0])
    hinted = re.findall(r"\bLDG\.E\.E[LF]\S*", code)
    return {
        "registers": registers,
        "programs": 65536 // (-(-registers // 8) * 8 * 32 * binary.metadata.num_warps),
        "stack": stack,
        "local": _count(r"(?:STL|LDL)\b", code),
        "shared": binary.metadata.shared,
        "tensor": getattr(binary.metadata, "tmem_size", 0),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "exponentials": _count(r"MUFU\.EX2", code),
        "barriers": _count(r"BAR\.SYNC", code),
        "wide loads": sum(".128" in x for x in hinted),
        "half loads": sum(".64" in x for x in hinted),
        "narrow loads": sum(".128" not in x and ".64" not in x for x in hinted),
        "wide stores": _count(r"STG\.E\S*\.128", code),
        "matrix": {name: _count(rf"{name}\b", code) for name in _MATRIX if _count(rf"{name}\b", code)},
        "wide copies": _count(r"LDGSTS\.E\S*\.128", code) + _count(r"UTMALDG", code),
        "narrow copies": _count(r"LDGSTS", code) - _count(r"LDGSTS\.E\S*\.128", code),
        "loads": _loads(code),
        "permutes": _count(r"PRMT\b", code),
    }


# int8: IMMA (sm_80), IGMMA (sm_90), UTCIMMA (sm_100); floats: HMMA, HGMMA, UTCHMMA
_MATRIX = ("IMMA", "IGMMA", "UTCIMMA", "HMMA", "HGMMA", "UTCHMMA")


def _loads(code: str) -> dict[str, int]:
    """Bits -> how many loads from global memory to registers have that width."""
    widths = [re.search(r"\.(128|64|[US]16|[US]8)\b", x) for x in re.findall(r"\bLDG\.E\S*", code)]
    bits = [int(re.sub(r"\D", "", w[1])) if w else 32 for w in widths]
    return {str(b): bits.count(b) for b in sorted(set(bits), reverse=True)}


def _count(pattern: str, code: str) -> int:
    return len(re.findall(rf"\b{pattern}", code))


def _output(*command: Any) -> str:
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True).stdout
