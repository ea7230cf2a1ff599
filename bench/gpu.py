"""All that needs a real GPU, in one go of under eight minutes: facts, parity, times; see README.md beside this file.

python bench/gpu.py                       # writes bench/results/<device>.json, prints a short table last
python bench/gpu.py --parity              # only whether the kernels are right
python bench/gpu.py --rehearse            # without a GPU: tiny shapes on the CPU, to see that the script works
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from on_gpu import device as on_device
from on_gpu import parity
from on_gpu.cases import Case, cases
from on_gpu.clock import Clock, Time
from potstill.ops.op import Cost

MINUTES = 7.5
SANITIZER_SECONDS = 90


@dataclass(frozen=True)
class Row:
    """A case: our time and the rivals', and the floor in seconds that ``bound`` sets; ``failed``: rivals and why."""

    op: str
    label: str
    times: dict[str, Time]
    floor: float
    bound: str
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> float:
        """Seconds on the device."""
        return self.times["ours"].device

    def faster(self, rival: str) -> float:
        """How many times as fast as a rival we are."""
        return self.times[rival].device / self.ours


@dataclass(frozen=True)
class Goal:
    """What is wanted of the rows of ``op`` whose labels match the pattern ``label``.

    A ``factor`` to be faster by than ``rival``, the time of the contestant ``without`` taken off ours; or without a
    rival the ``share`` of the ceiling or the ``seconds``.
    """

    op: str
    label: str
    rival: str = ""
    factor: float = 0.0
    without: str = ""
    share: float = 0.0
    seconds: float = 0.0

    def missed(self, row: Row) -> str:
        """How a row that the goal is meant for falls short; empty if it does not."""
        if self.rival:
            absent = [name for name in (self.rival, self.without) if name and name not in row.times]
            if absent:
                return f"nothing to compare with: {', '.join(absent)}"
            found = row.faster(self.rival)
            if self.without:
                found = row.times[self.rival].device / (row.ours - row.times[self.without].device)
            return (
                "" if found >= self.factor else f"{found:.2f} times as fast as {self.rival}, wanted {self.factor:.2f}"
            )
        if self.share:
            found = row.floor / row.ours
            return "" if found >= self.share else f"{found:.0%} of the {row.bound} ceiling, wanted {self.share:.0%}"
        return "" if row.ours <= self.seconds else f"{1e6 * row.ours:.0f} us, wanted {1e6 * self.seconds:.0f}"


GOALS = (
    Goal("int8_linear", r"m=(1024|4096) ", "quantise, _int_mm, dequantise", 1 / 0.72),
    Goal("int8_linear", r"m=(1024|4096) ", "torch eager", 1.5),
    Goal("int8_linear", r"m=(1024|4096) ", "_int_mm alone", 0.9, without="our quantisation alone"),
    Goal("int8_linear", r"m=(1|16) k=8192 n=8192", share=0.6),
    Goal("int4_linear", r"m=1 k=8192 n=8192", seconds=35e-6),
    *(  # nine tenths of what is stored, and a twentieth for the rest
        Goal("block_sparse_linear", rf"m=4096 .* density={density}$", "torch eager", 1 / (density / 0.9 + 0.05))
        for density in (0.1, 0.2, 0.5)
    ),
)


def main() -> int:
    """The number of faults and failed launches, at most 1; a goal that is missed is told, but is no fault."""
    options = _options()
    start = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not options.rehearse and not torch.cuda.is_available():
        console.print("gpu.py: torch sees no GPU here; --rehearse runs tiny shapes on the CPU instead")
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda", None if options.rehearse else 0)
    torch.manual_seed(options.seed)
    facts = on_device.facts(device)
    console.print_json(json.dumps(facts))
    record: dict[str, Any] = {"facts": facts, "seed": options.seed}
    faults = parity.check(device, options.seed, lambda op, n: console.print(f"parity of {op}: {n} samples"))
    record["faults"] = [asdict(fault) for fault in faults]
    for fault in faults:
        console.print(f"[red]WRONG[/red] {fault.op} {fault.label}: {fault.what}", markup=True)
    if options.parity:
        return min(len(faults), 1)
    if device.type == "cuda":
        record["sanitizer"] = _sanitized()
        console.print(f"compute-sanitizer: {record['sanitizer']}")
    clock = Clock(device)
    limits = on_device.ceilings(clock)
    record["ceilings"] = asdict(limits)
    rows, late = [], []
    for case in cases(small=options.rehearse):
        if time.monotonic() - start > 60 * options.minutes:
            late.append(f"{case.op} {case.label}")
            continue
        rows.append(timed(case, clock, limits))
        console.print(line(rows[-1]))
    record |= {"rows": [_plain(row) for row in rows], "not reached": late}
    record["goals missed"] = list(missed(rows))
    record["seconds"] = round(time.monotonic() - start)
    if not options.rehearse:
        path = options.json or Path(__file__).parent / "results" / f"{slug(facts['device'])}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written to {path}")
    console.print(table(facts, rows, limits))
    for text in (*record["goals missed"], *(f"not reached in time: {x}" for x in late)):
        console.print(text)
    uncaught = [row for row in rows if "ours" not in row.times]
    return min(len(faults) + len(uncaught), 1)


def timed(case: Case, clock: Clock, limits: on_device.Ceilings) -> Row:
    """A case's row; a rival that fails is named with its error, and if our own call fails, it too."""
    torch.compiler.reset()
    try:
        ours, cost, rivals = case.make(clock.device)
    except Exception as error:
        return Row(case.op, case.label, {}, 0.0, "", {"ours": _short(error)})
    calls, failed = {}, {}
    for name, call in {"ours": ours, **rivals}.items():
        try:
            call()
            calls[name] = call
        except Exception as error:
            failed[name] = _short(error)
    floor, bound = floor_of(cost, limits)
    return Row(case.op, case.label, clock.compare(calls) if "ours" in calls else {}, floor, bound, failed)


def floor_of(cost: Cost, limits: on_device.Ceilings) -> tuple[float, str]:
    """Seconds that the operations or the bytes take at the measured ceilings, and which of them; floats as bfloat16."""
    by_bound = {
        "int8": cost.int8_ops / (limits.int8 or limits.bf16),
        "bf16": cost.f32_ops / limits.bf16,
        "bytes": cost.bytes / limits.bytes,
    }
    bound = max(by_bound, key=lambda name: by_bound[name])
    return by_bound[bound], bound


def missed(rows: list[Row]) -> Iterator[str]:
    """The goals that rows fall short of."""
    for goal in GOALS:
        for row in rows:
            if row.op == goal.op and row.times and re.match(goal.label, row.label) and (text := goal.missed(row)):
                yield f"goal missed: {row.op} {row.label}: {text}"


def table(facts: dict[str, Any], rows: list[Row], limits: on_device.Ceilings) -> Table:
    """The short table that is printed last."""
    int8 = "no int8" if limits.int8 is None else f"int8 {limits.int8 / 1e12:.0f} TOP/s"
    title = f"{facts['device']}: copies {limits.bytes / 1e12:.2f} TB/s, bf16 {limits.bf16 / 1e12:.0f} TFLOP/s, {int8}"
    shown = Table("op", "shape", title=title)
    for heading in ("us", "of ceiling", "x eager", "x best other", "host us"):
        shown.add_column(heading, justify="right")
    for row in rows:
        if not row.times:
            shown.add_row(row.op, row.label, "failed", "", "", row.failed["ours"], "")
            continue
        others = [name for name in row.times if name not in ("ours", "torch eager") and not name.endswith(" alone")]
        best = min(others, key=lambda name: row.times[name].device, default=None)
        shown.add_row(
            row.op,
            row.label,
            f"{1e6 * row.ours:.1f}",
            f"{row.floor / row.ours:.0%} {row.bound}",
            f"{row.faster('torch eager'):.2f}" if "torch eager" in row.times else "",
            "" if best is None else f"{row.faster(best):.2f} {best}",
            f"{1e6 * row.times['ours'].host:.0f}{'' if row.times['ours'].captured else ' no graph'}",
        )
    return shown


def line(row: Row) -> str:
    """One row while the others run."""
    times = ", ".join(f"{name} {1e6 * t.device:.1f}" for name, t in row.times.items())
    return f"{row.op} {row.label}: {times or 'failed'} us" + "".join(f"; {n}: {why}" for n, why in row.failed.items())


def slug(name: str) -> str:
    """A device's name as a file's.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _sanitized() -> str:
    """What compute-sanitizer says of the parity of one small run, if it is there."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "on_gpu.small"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=SANITIZER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {SANITIZER_SECONDS} s"
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return f"exit code {done.returncode}: {last}"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def _plain(row: Row) -> dict[str, Any]:
    faster = {name: row.faster(name) for name in row.times if name != "ours"}
    return asdict(row) | {"times_faster": faster, "of_ceiling": row.floor / row.ours if row.times else None}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; nothing it prints is a measurement")
    parser.add_argument("--parity", action="store_true", help="check the kernels, time nothing")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin no case after (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of inputs (default: another each time)")
    parser.add_argument("--json", type=Path, help="where the numbers go (default: bench/results/<device>.json)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
