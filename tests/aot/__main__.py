"""Compiles the GPU kernels for GPUs that this machine lacks, and checks their machine code.

    python -m tests.aot [--all | --update] [OP ...]

The arguments of each compilation are those with which the library itself would launch the kernel: it is called with
tensors that have no memory, and what it passes to a kernel is specialised as triton does it at run time. Asserted for
each: nothing spills, shared memory suffices, and what the op's own file beside this one asks for (widths of loads,
matrix instructions); the programs that fit a multiprocessor's registers do not become fewer than in <op>.json, the
committed baseline, nor instructions, exponentials and barriers more; and nothing is compiled anew for another
temperature or the like. ``--all`` compiles every configuration, not just a choice; ``--update`` writes the baselines
anew.

A file of an op has ``chosen()`` and ``every()``: cases, each with ``sm``; ``launches(case)``; ``label(kernel, case)``;
``faults(case, kernel, counts)``; ``recompiled()``: arguments for which a kernel would be compiled anew needlessly.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.aot.code import SHARED_MEMORY, TENSOR_MEMORY
from tests.aot.examine import examine, of

HERE = Path(__file__).parent
OPS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__main__", "code", "examine"))


def faults(op: str, case: Any, kernel: str, found: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    """What is wrong with a kernel's machine code."""
    if "error" in found:
        return ["does not compile"]
    wrong = [f"{found[x]} {x}" for x in ("stack", "local") if found[x]]
    if found["shared"] > SHARED_MEMORY[case.sm]:
        wrong.append(f"{found['shared']} bytes of shared memory")
    if found["tensor"] > TENSOR_MEMORY:
        wrong.append(f"{found['tensor']} columns of tensor memory")
    wrong += of(op).faults(case, kernel, found)
    if baseline is not None:
        if found["programs"] < baseline["programs"]:
            wrong.append(f"{found['programs']} programs fit a multiprocessor's registers, {baseline['programs']} did")
        slack = {"instructions": baseline["instructions"] // 20, "exponentials": 0, "barriers": 0}
        wrong += [f"{found[x]} {x}, were {baseline[x]}" for x, more in slack.items() if found[x] > baseline[x] + more]
    return wrong


def check(op: str, options: argparse.Namespace, pool: ProcessPoolExecutor) -> tuple[int, int]:
    """How many kernels of an op were looked at, and the number of faults."""
    path = HERE / f"{op}.json"
    baseline = json.loads(path.read_text()) if path.exists() and not options.update else {}
    module = of(op)
    cases = list(dict.fromkeys((*module.chosen(), *module.every()) if options.all else module.chosen()))
    problems = list(module.recompiled())
    print("\n".join(problems), end="\n" if problems else "")
    results: dict[str, Any] = {}
    for case, by_label in zip(cases, pool.map(examine, [(op, case) for case in cases]), strict=True):
        for label, (kernel, found) in by_label.items():
            if label in results:
                continue
            results[label] = found
            wrong = faults(op, case, kernel, found, baseline.get(label))
            if label not in baseline and not options.update and not options.all:
                wrong.append(f"not in {path.name}: run with --update")
            problems += wrong
            print(f"{label}: {'; '.join(wrong) or 'good'}  {found}", flush=True)
    if options.update:
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in results.items())
        path.write_text("{\n" + rows + "\n}\n")
    return len(results), len(problems)


def main() -> int:
    """The number of faults, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default: all")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="compile every configuration")
    what.add_argument("--update", action="store_true", help="write the baseline")
    options = parser.parse_args()
    if unknown := set(options.op) - set(OPS):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; expected some of {', '.join(OPS)}")
    start, kernels, wrong = time.monotonic(), 0, 0
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for op in options.op or OPS:
            looked_at, faulty = check(op, options, pool)
            kernels, wrong = kernels + looked_at, wrong + faulty
    print(f"{kernels} kernels, {wrong} faults, {time.monotonic() - start:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
