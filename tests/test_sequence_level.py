"""Sequence-level distillation: what the teacher writes is what the student is trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.writers import CLASSES, Writer
from torch import Tensor

from potstill.distill import Distiller, HardLabels, TrainingPlan
from potstill.distill.generate import beam_search, generate
from potstill.distill.sequence_level import teacher_sequences

pytestmark = pytest.mark.usefixtures("one_thread")

STOP = CLASSES - 1


def items(batches: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sources of different lengths, what a decoder reads, and targets that must not matter."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randint(CLASSES, (4, 3 + i), generator=generator),
            torch.randint(CLASSES, (4, 5), generator=generator),
            torch.full((4, 5), 99),
        )
        for i in range(batches)
    ]


@pytest.mark.parametrize("beams", [1, 3])
def test_teacher_translates_each_source(beams: int) -> None:
    teacher, loader = Writer(8, reads_source=True), items()
    found = teacher_sequences(
        teacher, loader, new_tokens=6, prompt_tokens=1, beams=beams, stop=STOP, pad=1, ignore_index=-7
    )
    ended = 0
    for (source, ids, _), (given, x, target) in zip(loader, found, strict=True):
        how: dict[str, Any] = {"inputs": (source,), "stop": STOP, "pad": 1}
        if beams == 1:
            whole = generate(teacher, ids[:, :1], 6, temperature=0.0, **how)
        else:
            whole = beam_search(teacher, ids[:, :1], 6, beams=beams, **how)
        assert torch.equal(given, source)
        assert torch.equal(x, whole[:, : x.shape[1]])
        for row, expected in zip(target.tolist(), whole[:, 1:].tolist(), strict=True):
            last = expected.index(STOP) + 1 if STOP in expected else 6
            assert row == expected[:last] + [-7] * (len(row) - last)
            ended += last < 6
    assert ended


def test_teacher_continues_prompts() -> None:
    teacher, loader = Writer(1), [(ids, target) for _, ids, target in items()]
    found = teacher_sequences(teacher, loader, new_tokens=4)
    for (ids, _), (x, target) in zip(loader, found, strict=True):
        whole = generate(teacher, ids, 4, temperature=0.0)
        assert torch.equal(x, whole[:, :-1])
        assert (target[:, :4] == -100).all()
        assert torch.equal(target[:, 4:], whole[:, 5:])


def test_length_penalty_and_temperature_reach_the_search() -> None:
    teacher, loader = Writer(5), [(torch.randint(CLASSES, (30, 2)), torch.zeros(30, 2, dtype=torch.int64))]
    lengths = []
    for length_penalty in (0.0, 3.0):
        ((_, target),) = teacher_sequences(
            teacher, loader, new_tokens=6, beams=4, stop=STOP, length_penalty=length_penalty
        )
        lengths.append(int((target != -100).sum()))
    assert lengths[0] < lengths[1]
    torch.manual_seed(1)
    ((x, _),) = teacher_sequences(teacher, loader, new_tokens=6, temperature=2.0)
    torch.manual_seed(1)
    assert torch.equal(x, generate(teacher, loader[0][0], 6, temperature=2.0)[:, :-1])


def test_student_learns_to_write_as_the_teacher_does() -> None:
    teacher, student = Writer(3, reads_source=True), Writer(2, reads_source=True)
    loader = items(20)
    learnt = teacher_sequences(teacher, loader, new_tokens=5, prompt_tokens=1, stop=STOP)

    def agreement() -> float:
        same = 0.0
        for source, ids, _ in loader:
            texts = [
                generate(model, ids[:, :1], 5, inputs=(source,), temperature=0.0, stop=STOP)
                for model in (teacher, student)
            ]
            same += float((texts[0] == texts[1]).all(1).float().mean()) / len(loader)
        return same

    before = agreement()
    Distiller(None, student, HardLabels()).fit(learnt, TrainingPlan(epochs=20, lr=0.02))
    assert before < 0.3
    assert agreement() > 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beams": 2, "temperature": 1.0}, "beams is 2 and temperature 1.0"),
        ({"beams": 0}, "beams is 0; it must be at least 1"),
        ({"new_tokens": 0}, "teacher_sequences: new_tokens is 0; it must be at least 1"),
        ({"prompt_tokens": 9}, r"teacher_sequences: the loader yielded ids \[4, 5\]; expected .* 9 tokens"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher_sequences(Writer(reads_source=True), items(), **{"new_tokens": 2, **changes})
