"""A distillation on two processes of which one is killed again and again, beside the same without.

    python bench/bench_faults.py [--kills 20] [--seed 0]

Which rank is killed, and where (in the teacher, before gradients are summed, before a decision of all, in the middle of
a checkpoint, before its file gets its name), is drawn. ``torchrun --max-restarts`` starts both again. Exits with 1 if
losses and weights at the end are not, bit for bit, those of the run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder, "undisturbed"), Path(folder, "disturbed")
        alone = run(undisturbed, 0, options.seed)
        seconds = run(disturbed, options.kills, options.seed)
        kills = [json.loads(line) for line in (disturbed / "kills").read_text().splitlines()]
        for start, rank, moment, call in kills:
            print(f"start {start:2}: rank {rank} killed at its {call}. {moment}")
        same = all(equal(disturbed / f"{rank}.pt", undisturbed / f"{rank}.pt") for rank in range(2))
    print(
        f"{len(kills)} kills of {options.kills}, {(seconds - alone) / max(len(kills), 1):.1f} s for each; "
        f"{seconds:.0f} s in all, {alone:.0f} s without; the end is {'the same' if same else 'NOT the same'}"
    )
    sys.exit(0 if same and len(kills) == options.kills else 1)


def run(folder: Path, kills: int, seed: int) -> float:
    """Seconds of the run."""
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", str(kills), "--shutdown-timeout", "5", "-m", "tests.fault_runs", str(folder)]
    begin = time.perf_counter()
    arguments = ["--kills", str(kills), "--seed", str(seed)]
    subprocess.run([*launch, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def equal(a: Path, b: Path) -> bool:
    """Whether two ranks have had the same losses, and ended with the same weights."""
    first, second = torch.load(a), torch.load(b)
    same = first["losses"] == second["losses"]
    return same and all(map(torch.equal, first["weights"], second["weights"]))


if __name__ == "__main__":
    main()
