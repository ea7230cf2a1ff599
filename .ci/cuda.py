"""Checks the extension of CUDA C++ kernels: what it needs, what it says without a GPU, and its machine code.

    python .ci/cuda.py EXTENSION

EXTENSION is the built ``_CUDA`` library. The disassemblers are those in triton's package.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
GPUS = {"sm_80", "sm_89", "sm_90a", "sm_100a"}
PRODUCTS = 32  # mma.sp of a warp for a tile: 4 times 16 outputs, 4 times 8 rows, 2 steps of inputs
COPIES = 7  # of 16 bytes by a thread for a tile: 2.5 of weights, 4 of x


def main() -> int:
    """Prints what is wrong; 1 if anything is."""
    extension = Path(sys.argv[1]).resolve()
    errors = [*libraries(extension), *refusals(extension)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", "all", extension], cwd=folder, check=True, capture_output=True)
        cubins = {path.suffixes[-2].removeprefix("."): path for path in Path(folder).glob("*.cubin")}
        if cubins.keys() != GPUS:
            errors.append(f"{extension}: has code for {sorted(cubins)}, expected {sorted(GPUS)}")
        for gpu, path in sorted(cubins.items()):
            errors += [f"{gpu}: {wrong}" for wrong in machine_code(path)]
    for error in errors:
        print(f"cuda: {error}", file=sys.stderr)
    if not errors:
        print(f"cuda: {extension.name} for {', '.join(sorted(GPUS))} is as it should be")
    return 1 if errors else 0


def output(*command: str | Path) -> str:
    """What a command prints; fails with it."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def libraries(path: Path) -> Iterator[str]:
    """Neither libtorch nor a library of CUDA that its user would have to install."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", path))
    if wrong := [name for name in needed if re.match(r"lib(torch|c10|cuda|nv)", name)]:
        yield f"{path}: needs {wrong}"


def refusals(path: Path) -> Iterator[str]:
    """It loads where there is no GPU, and says what it cannot take."""
    spec = importlib.util.spec_from_file_location("potstill._CUDA", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.int8_24_linear(*[torch.ones(1)] * 6)
    except ValueError as error:
        if "int8_24_linear: x is not on a CUDA device" not in str(error):
            yield f"{path}: says '{error}' of a tensor on the CPU"
    else:
        yield f"{path}: takes a tensor on the CPU"


def machine_code(cubin: Path) -> Iterator[str]:
    """Sparse products, wide copies past the registers and wide loads; nothing is spilled."""
    usage = output(TOOLS / "cuobjdump", "-res-usage", cubin)
    code = output(TOOLS / "nvdisasm", "-c", cubin)
    (stack,) = re.findall(r"REG:\d+\s+STACK:(\d+)", usage)  # of the one kernel
    if stack != "0" or re.search(r"\b(STL|LDL)\b", code):
        yield f"spills registers, into {stack} bytes"
    products = len(re.findall(r"\bIMMA\.SP\.16864\.S8\.S8\b", code))
    if products != PRODUCTS or products != len(re.findall(r"MMA\b", code)):
        yield f"has {products} sparse products, expected {PRODUCTS} and no others"
    copies = re.findall(r"\bLDGSTS\S*", code)
    if len(copies) < COPIES or not all(re.search(r"\.128\b", x) for x in copies):
        yield f"copies to shared memory by {copies}, expected 16 bytes at a time"
    for instruction in (r"LDSM\.16\.M88\.4", r"LDS\.128", r"STG\.E\.128"):
        if not re.search(rf"\b{instruction}\b", code):
            yield f"has no {instruction}"


if __name__ == "__main__":
    sys.exit(main())
