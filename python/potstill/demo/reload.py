"""Loads a saved student in a process of its own, as a user of the file would."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill import _C
from potstill.checkpoint import load
from potstill.demo.evaluate import logits
from potstill.demo.models import TASKS
from potstill.errors import PotstillError

_COMMAND = "import sys; from potstill.demo.reload import evaluate; evaluate(*sys.argv[1:])"


def in_fresh_process(task: str, checkpoint: Path) -> Tensor:
    """The logits of the student of ``task`` in ``checkpoint``, computed by a new Python.

    The new process uses as many threads and the same instruction set as this one, so that the results agree bit for
    bit.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "logits.safetensors"
        command = [sys.executable, "-c", _COMMAND, task, str(checkpoint), str(outputs)]
        settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "POTSTILL_ISA": _C.isa()}
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PotstillError(f"loading {checkpoint} in a new process failed: {_last_line(done.stderr)}")
        return load_file(outputs)["logits"]


def evaluate(task: str, checkpoint: str, outputs: str) -> None:
    """What the new process does: the logits of the test images, from a student built anew, to the file ``outputs``."""
    chosen = TASKS[task]
    images = chosen.images()
    model = load(chosen.student(), checkpoint)
    save_file({"logits": logits(model, images.normalise(images.test_x))}, outputs)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
