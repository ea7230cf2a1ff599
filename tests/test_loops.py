"""Distiller in other people's training loops: the weights are those that fit gives for the same plan."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import loop_runs as runs
from tests.loop_runs import BATCH, EPOCHS, ROWS, Weights, distiller, fitted, linear, loader, plan

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # other people's

STEPS = EPOCHS * ROWS // BATCH


def close(found: Weights, expected: Weights, start: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.allclose(value, start[name], atol=0.05) for name, value in expected.items())  # it has moved


def warmed(steps: int) -> Any:
    """Trainer's default."""
    from transformers import get_linear_schedule_with_warmup

    return lambda optimizer: get_linear_schedule_with_warmup(optimizer, 0, steps)


def test_plain_loop() -> None:
    expected = fitted(distiller(STEPS), loader(), plan(linear(STEPS)))
    trained = distiller(STEPS)
    start = runs.weights(trained)
    runs.example("plain_loop").train(trained, loader(), STEPS, lambda student: "")
    close(runs.weights(trained), expected, start)


def test_accumulation_in_a_plain_loop() -> None:
    """As docs/loops.md does it: micro-batches of 7, 7, 7 and 3 rows, two to a step, on strategies of both kinds."""
    steps = 2 * EPOCHS
    expected = fitted(distiller(steps), loader(7), plan(accumulate=2))
    trained = distiller(steps)
    start, batches = runs.weights(trained), list(loader(7))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=runs.LR)
    for step in range(1, steps + 1):
        group = batches[:2] if step % 2 else batches[2:]
        rows = [int((target != -100).sum()) for _, target in group]
        optimizer.zero_grad()
        for item, count in zip(group, rows, strict=True):
            (trained.loss(item, step=step) * count / sum(rows)).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
    close(runs.weights(trained), expected, start)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate: int) -> None:
    pytest.importorskip("accelerate")
    steps = STEPS // accumulate
    expected = fitted(distiller(steps), loader(), plan(accumulate=accumulate))
    close(runs.in_accelerate(steps, accumulate), expected, runs.weights(distiller(steps)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate: int) -> None:
    pytest.importorskip("lightning")
    steps = STEPS // accumulate
    expected = fitted(distiller(steps), loader(), plan(linear(steps), accumulate))
    close(runs.in_lightning(steps, accumulate), expected, runs.weights(distiller(steps)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ignored", [False, True])
def test_trainer(ignored: bool, accumulate: int, tmp_path: Path) -> None:
    """Micro-batches differ in the rows that count; where all count, a strategy on layers takes part."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    steps, rows = EPOCHS * (5 if accumulate == 1 else 3), runs.texts(19, ignored)  # the last batch has 3
    trained = runs.text_distiller(steps, not ignored)
    start = runs.weights(trained)
    reference, batches = runs.text_distiller(steps, not ignored), runs.text_batches(rows, BATCH)
    expected = fitted(reference, batches, plan(warmed(steps), accumulate))
    trainer = runs.in_trainer(trained, rows, tmp_path, accumulate)
    close(runs.weights(trained), expected, start)
    if not ignored:
        ((inputs, labels),) = runs.text_batches(rows, len(rows))
        with torch.no_grad():
            logits = trained.student.eval()(**inputs).logits
        assert trainer.evaluate()["eval_loss"] == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, labels))
        )


KINDS = {"accelerate": ("accelerate",), "lightning": ("lightning",), "transformers": ("transformers", "accelerate")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, in every loop whose packages are there."""
    kinds = [kind for kind, packages in KINDS.items() if all(map(importlib.util.find_spec, packages))]
    found = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everyone = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    everyone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.loop_runs", str(found), *kinds],
            cwd=Path(__file__).parents[1],
            env=os.environ | everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        complaints = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(complaints)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind: str, request: pytest.FixtureRequest) -> None:
    """They end with the same weights: those of one process with batches twice as large, projections included."""
    for package in KINDS[kind]:
        pytest.importorskip(package)
    steps, schedule, made, batches = runs.TWO_PROCESSES, "constant", distiller(runs.TWO_PROCESSES), loader(2 * BATCH)
    if kind == "lightning":
        schedule = linear(steps)
    if kind == "transformers":
        schedule = warmed(steps)
        made, batches = runs.text_distiller(steps, False), runs.text_batches(runs.texts(ROWS, True), 2 * BATCH)
    start = runs.weights(made)
    expected = fitted(made, batches, plan(schedule))
    folder = request.getfixturevalue("folder")
    first, second = (torch.load(folder / f"{kind}.{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    close(first, expected, start)
