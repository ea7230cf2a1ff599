"""Checks the machine code of the built extension: what each object exports, and which instructions it may hold.

    python .ci/symbols.py BUILD_FOLDER EXTENSION

BUILD_FOLDER is where CMake left its objects, EXTENSION the installed ``_C`` library. One wide instruction in an object
that every machine runs, or one weak symbol that the linker may take from the wrong object, is a crash on older CPUs.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

WIDE = {  # what an object must not name
    "dispatch": r"%[yz]mm|%k[0-7]",
    "module": r"%[yz]mm|%k[0-7]",
    "scalar": r"%[yz]mm|%k[0-7]",
    "avx2": r"%zmm|%k[0-7]",
    "avx512": r"\bvpdpbusd",
}
TILE = 24  # sums of the avx512vnni micro-kernel: kRows * kPanelsPerTile


def main() -> int:
    """Prints what is wrong; 1 if anything is."""
    build, extension = Path(sys.argv[1]), Path(sys.argv[2])
    kernels = {p.parents[2].name.removeprefix("kernels_").removesuffix(".dir"): p for p in objects(build, "kernels")}
    shared = {name: path for name in ("dispatch", "module") for path in objects(build, name)}
    errors = [] if "scalar" in kernels else [f"{build}: no objects of the kernels are there"]
    if len(shared) != 2:
        errors.append(f"{build}: expected the objects of dispatch.cpp and module.cpp, found {sorted(shared)}")
    for isa, path in kernels.items():
        errors += exports(isa, path)
    for name, path in (kernels | shared).items():
        errors += instructions(name, path)
    if "avx512vnni" in kernels:
        errors += micro_kernel(kernels["avx512vnni"])
    errors += libraries(extension)
    for error in errors:
        print(f"symbols: {error}", file=sys.stderr)
    if not errors:
        print(f"symbols: {', '.join(sorted(kernels))} and {extension.name} are as they should be")
    return 1 if errors else 0


def objects(build: Path, stem: str) -> list[Path]:
    """The objects that CMake made of ``stem``.cpp."""
    return sorted(build.glob(f"CMakeFiles/*.dir/**/{stem}.cpp.o"))


def output(*command: str | Path) -> str:
    """What a command prints; fails with it."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def exports(isa: str, path: Path) -> Iterator[str]:
    """One global data symbol, and none that another object's copy could replace."""
    symbols = [line.split()[-2:] for line in output("nm", "--defined-only", path).splitlines()]
    found = [f"{kind} {name}" for kind, name in symbols if kind.isupper() or kind == "u"]
    if found not in ([f"D kernels_{isa}"], [f"R kernels_{isa}"]):
        yield f"{path}: exports {found}, expected kernels_{isa} alone"


def instructions(name: str, path: Path) -> Iterator[str]:
    """No instruction that a machine that runs this object may lack."""
    if name in WIDE and (hits := re.findall(rf".*(?:{WIDE[name]}).*", disassembly(path))):
        yield f"{path}: {len(hits)} instructions of another ISA, the first: {hits[0].strip()}"


def disassembly(path: Path) -> str:
    """AT&T syntax, one instruction a line."""
    return output("objdump", "-d", "--no-show-raw-insn", "-M", "att", path)


def micro_kernel(path: Path) -> Iterator[str]:
    """The loop over k of a full tile: every sum stays in a register, so nothing is stored."""
    tiles = [loop for loop in loops(disassembly(path)) if sum("vpdpbusd" in line for line in loop) >= TILE]
    if not tiles:
        yield f"{path}: no loop has the {TILE} vpdpbusd of a full tile"
    for loop in tiles:
        if spills := [line for line in loop if re.match(r"vmov\S+\s+%[xyz]mm.*\)$", line)]:
            yield f"{path}: the micro-kernel spills {len(spills)} registers in each step, the first: {spills[0]}"


def loops(code: str) -> Iterator[list[str]]:
    """The instructions of each innermost loop: from a backward jump's target to the jump."""
    for function in code.split("\n\n"):
        lines = [match.groups() for match in re.finditer(r"^ +([0-9a-f]+):\s+(.*\S)", function, re.MULTILINE)]
        index = {address: i for i, (address, _) in enumerate(lines)}
        ranges = []
        for i, (_, text) in enumerate(lines):
            jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
            if jump and index.get(jump[1], i + 1) <= i:
                ranges.append((index[jump[1]], i))
        for first, last in ranges:
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in ranges):
                yield [text for _, text in lines[first : last + 1]]


def libraries(path: Path) -> Iterator[str]:
    """No libtorch; OpenMP under the name by which torch has already loaded it."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", path))
    if torch := [name for name in needed if re.match(r"lib(torch|c10)", name)]:
        yield f"{path}: needs {torch}; it must not link torch"
    if "libgomp.so.1" not in needed:
        yield f"{path}: needs {needed}; without libgomp.so.1 under that name it would not share torch's threads"


if __name__ == "__main__":
    sys.exit(main())
