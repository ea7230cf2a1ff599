"""Compiles the GPU kernels for GPUs that this machine lacks, and checks their machine code.

    python tests/aot.py [--all | --update]

The arguments of each compilation are those with which the library itself would launch the kernel: it is called with
tensors that have no memory, and what it passes to a kernel is specialised as triton does it at run time. Asserted for
each: nothing spills, shared memory suffices, rows are read and written 128 bits at a time if they are aligned; and
the programs that fit a multiprocessor's registers do not become fewer than in aot.json, the committed baseline, nor
instructions, exponentials and barriers more; and nothing is compiled anew for another temperature or the like.
``--all`` compiles every configuration, not just a choice; ``--update`` writes the baseline anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from potstill.ops.kd_loss import Options
from potstill.ops.triton import kd_loss as host

BASELINE = Path(__file__).with_suffix(".json")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a program may have

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv", "dkd", "soft_ce", "mse")
REST = ("tail", "renormalize", "partial")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = ("kd_loss_kernel", "topk_kernel", "count_kernel")


class Case(NamedTuple):
    """A launch: ``kind`` is a divergence, "labels" (alpha = 0) or what is assumed of a top-k teacher's rest."""

    kind: str
    dtype: str = "bfloat16"
    sm: int = 90
    classes: int = 32000
    teacher: str | None = None  # dtype, if another
    teacher_classes: int | None = None
    alpha: float = 0.7
    temperature: float = 2.0
    smoothing: float = 0.1
    beta: float = 0.5
    ignore_index: int = -100
    gradient: bool = True
    in_place: bool = False

    @property
    def label(self) -> str:
        default = Case("")._asdict()
        return " ".join(
            f"{k}={v}" for k, v in self._asdict().items() if k in ("kind", "dtype", "sm") or v != default[k]
        )

    @property
    def aligned(self) -> bool:
        return self.classes % 8 == 0 and (self.teacher_classes or self.classes) % 8 == 0


def chosen() -> Iterator[Case]:
    """What CI compiles: every divergence with both usual dtypes and as each of its programs, and each special case."""
    for kind, dtype in itertools.product((*DIVERGENCES, *REST), ("bfloat16", "float32")):
        yield Case(kind, dtype)
    for kind, sm in itertools.product(("forward_kl", "jsd", "tail"), (80, 100)):
        yield Case(kind, sm=sm)
    for kind in DIVERGENCES:
        yield Case(kind, classes=32064, teacher_classes=32000)
    for kind in (*DIVERGENCES, *REST):
        yield Case(kind, alpha=1.0)
        yield Case(kind, gradient=False)
    for kind in ("forward_kl", "jsd", "tail"):
        yield Case(kind, classes=50257)
        yield Case(kind, classes=1000)
    yield Case("labels")
    yield Case("forward_kl", "float16")
    yield Case("forward_kl", temperature=3.0)
    yield Case("forward_kl", in_place=True)
    yield Case("forward_kl", "bfloat16", teacher="float32")
    yield Case("forward_kl", "float32", teacher="bfloat16")
    yield Case("tail", in_place=True)


def every() -> Iterator[Case]:
    """What a user can meet, with one of each kind of size."""
    kinds = (*DIVERGENCES, "labels", *REST)
    for kind, dtype, sm, classes in itertools.product(
        kinds, ("bfloat16", "float32"), SHARED_MEMORY, (32000, 50257, 1000)
    ):
        for alpha, gradient in ((0.7, True), (1.0, True), (0.7, False)):
            yield Case(kind, dtype, sm, classes, alpha=alpha, gradient=gradient)
    for kind, sm in itertools.product(kinds, SHARED_MEMORY):
        for smaller, larger in ((32000, 32064), (32000, 50257)):
            yield Case(kind, sm=sm, classes=smaller, teacher_classes=larger)
            yield Case(kind, sm=sm, classes=larger, teacher_classes=smaller)
        for student, teacher in itertools.permutations(DTYPES, 2):
            yield Case(kind, student, sm, teacher=teacher)
        for temperature in (1.0, 3.0, 4.0):
            yield Case(kind, sm=sm, temperature=temperature)
        yield Case(kind, "float16", sm)
        yield Case(kind, sm=sm, smoothing=0.0)
        yield Case(kind, sm=sm, in_place=True)


def launches(case: Case) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that the library launches for a case, each with its arguments."""
    rows, k = 64, 64
    top_k = case.kind in REST
    student = torch.empty((rows, case.classes), dtype=DTYPES[case.dtype], device="meta")
    shape = (rows, k if top_k else case.teacher_classes or case.classes)
    teacher = torch.empty(shape, dtype=DTYPES[case.teacher or case.dtype], device="meta")
    options = Options(
        target=torch.empty(rows, dtype=torch.int64, device="meta"),
        teacher_indices=torch.empty(shape, dtype=torch.int64, device="meta") if top_k else None,
        divergence=case.kind if case.kind in DIVERGENCES else "forward_kl",
        rest=case.kind if top_k else "tail",
        temperature=case.temperature,
        alpha=0.0 if case.kind == "labels" else case.alpha,
        label_smoothing=case.smoothing,
        beta=case.beta,
        ignore_index=case.ignore_index,
        need_grad=case.gradient,
    )
    found: list[tuple[Any, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def record(*args: Any, **kwargs: Any) -> None:
                found.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs))

            return record

    kernels = {name: getattr(host, name) for name in KERNELS}
    try:
        for name, kernel in kernels.items():
            setattr(host, name, Recorder(kernel))
        if case.in_place:
            host.launch_in_place(student, teacher, options)
        else:
            host.launch(student, teacher, *options)
    finally:
        for name, kernel in kernels.items():
            setattr(host, name, kernel)
    return found


def specialised(kernel: Any, arguments: dict[str, Any], sm: int) -> dict[str, Any]:
    """What triton would compile at such a launch; see ``JITFunction.run``."""
    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return {"src": source, "target": target, "options": options.__dict__}


def recompiled() -> list[str]:
    """Arguments that users change all the time, and for which triton would nonetheless compile anew."""
    wrong = []
    for kind in ("forward_kl", "jsd", "tail"):
        base = Case(kind, temperature=3.0)
        sources = {}
        for change in (
            {}, {"temperature": 5.5}, {"alpha": 0.2}, {"smoothing": 0.3}, {"beta": 0.2}, {"classes": 50304},
            {"ignore_index": 0}, {"ignore_index": 1}, {"ignore_index": 32},
        ):  # fmt: skip
            for kernel, arguments in launches(base._replace(**change)):
                key = specialised(kernel, arguments, 90)["src"].hash()
                if sources.setdefault(kernel.fn.__name__, key) != key:
                    wrong.append(f"{kernel.fn.__name__} {kind} is compiled anew for {change}")
    return wrong


def measured(binary: Any) -> dict[str, Any]:
    """Counts of the machine code. Loads of rows are those with a hint to the cache, as no others have one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
        code = _output(TOOLS / "nvdisasm", "-c", file.name)
    registers, stack = (int(x) for x in re.findall(r"REG:(\d+)\s+STACK:(\d+)", usage)[0])
    rows = re.findall(r"\bLDG\.E\.E[LF]\S*", code)
    return {
        "registers": registers,
        "programs": 65536 // (-(-registers // 8) * 8 * 32 * binary.metadata.num_warps),
        "stack": stack,
        "local": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": binary.metadata.shared,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "exponentials": len(re.findall(r"\bMUFU\.EX2", code)),
        "barriers": len(re.findall(r"\bBAR\.SYNC", code)),
        "wide loads": sum(".128" in x for x in rows),
        "half loads": sum(".64" in x for x in rows),
        "narrow loads": sum(".128" not in x and ".64" not in x for x in rows),
        "wide stores": len(re.findall(r"\bSTG\.E\S*\.128", code)),
    }


def _output(*command: Any) -> str:
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True).stdout


def faults(case: Case, kernel: str, found: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    """What is wrong with a kernel's machine code."""
    if "error" in found:
        return ["does not compile"]
    wrong = [f"{found[x]} {x}" for x in ("stack", "local") if found[x]]
    if found["shared"] > SHARED_MEMORY[case.sm]:
        wrong.append(f"{found['shared']} bytes of shared memory")
    if kernel != "count_kernel" and case.aligned:
        half = found["half loads"] and case.teacher is None  # with two dtypes the smaller one's are
        if found["narrow loads"] or half or not found["wide loads"]:
            wrong.append("rows are not loaded 128 bits at a time")
        if case.gradient and not found["wide stores"] and case.teacher is None:
            wrong.append("nor stored")
    if baseline is not None:
        if found["programs"] < baseline["programs"]:
            wrong.append(f"{found['programs']} programs fit a multiprocessor's registers, {baseline['programs']} did")
        slack = {"instructions": baseline["instructions"] // 20, "exponentials": 0, "barriers": 0}
        wrong += [f"{found[x]} {x}, were {baseline[x]}" for x, more in slack.items() if found[x] > baseline[x] + more]
    return wrong


def examine(case: Case) -> dict[str, dict[str, Any]]:
    """Kernel's name and case -> counts."""
    by_label = {}
    for kernel, arguments in launches(case):
        name = kernel.fn.__name__
        label = f"{name} sm={case.sm}" if name == "count_kernel" else f"{name} {case.label}"
        try:
            by_label[label] = measured(triton.compile(**specialised(kernel, arguments, case.sm)))
        except triton.CompilationError as error:
            by_label[label] = {"error": str(error)}
    return by_label


def main() -> int:
    """The number of faults, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="compile every configuration")
    what.add_argument("--update", action="store_true", help="write the baseline")
    options = parser.parse_args()
    start = time.monotonic()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() and not options.update else {}
    cases = list(dict.fromkeys((*chosen(), *every()) if options.all else chosen()))
    results: dict[str, Any] = {}
    again = recompiled()
    wrong = len(again)
    for problem in again:
        print(problem)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case, by_label in zip(cases, pool.map(examine, cases), strict=True):
            for label, found in by_label.items():
                if label in results:
                    continue  # the count of rows, the same for all
                known = baseline.get(label)
                problems = faults(case, label.partition(" ")[0], found, known)
                if known is None and not options.update and not options.all:
                    problems.append(f"not in {BASELINE.name}: run with --update")
                wrong += len(problems)
                results[label] = found
                print(f"{label}: {'; '.join(problems) or 'good'}  {found}", flush=True)
    if options.update:
        BASELINE.write_text(
            "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in results.items()) + "\n}\n"
        )
    print(f"{len(results)} kernels, {wrong} faults, {time.monotonic() - start:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
