"""Teacher and student under plans of their own give the gradients of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from tests import parallel_teacher_runs as runs

from potstill.nn import KDLoss
from potstill.ops import top_k


def test_the_student_learns_what_one_process_would_teach(tmp_path: Path) -> None:
    files = [tmp_path / "0.pt", tmp_path / "1.pt"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel_teacher_runs", str(rank), str(tmp_path / "meeting"), str(file)],
            cwd=Path(runs.__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        complaints = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], complaints
    teacher, student = runs.models()
    tokens, labels = runs.batch()
    log_probs, indices = top_k(teacher(tokens), runs.K, runs.TEMPERATURE)
    loss = KDLoss(temperature=runs.TEMPERATURE)(student(tokens), log_probs, labels, teacher_indices=indices)
    loss.backward()
    for file in files:
        found = torch.load(file)
        assert found["columns"] == runs.CLASSES // 2
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-6, atol=0.0)
        assert found["gradients"].keys() == dict(student.named_parameters()).keys()
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-8, msg=name)
