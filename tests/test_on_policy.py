"""On-policy distillation: who writes what, what counts, and that an interrupted run writes the same again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.distill_runs import StopError, equal, stop, timeless
from tests.writers import CLASSES, Writer, counted
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from potstill.distill import Batch, Distiller, HardLabels, SoftTargets, TrainingPlan
from potstill.distill.generate import generate
from potstill.distill.on_policy import OnPolicy
from potstill.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = 6


def texts(rows: int = 4 * BATCHES, tokens: int = 9) -> TensorDataset:
    ids = torch.randint(CLASSES, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return TensorDataset(ids[:, :-1], ids[:, 1:])


class Drawn:
    """Draws each batch when it is asked for."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        ids, target = texts().tensors
        for _ in range(BATCHES):
            rows = torch.randint(len(ids), (4,), generator=self.generator)
            yield ids[rows], target[rows]


def loader(kind: str = "shuffled") -> Any:
    own = torch.Generator().manual_seed(5)
    match kind:
        case "shuffled":
            return DataLoader(texts(), batch_size=4, shuffle=True)
        case "own generator":
            return Drawn(own)
        case "sampler's generator":
            batches = list(Drawn(own))
            return DataLoader(batches, batch_size=None, sampler=RandomSampler(batches, generator=own))
        case "batch sampler's generator":
            sampler = BatchSampler(RandomSampler(texts(), generator=own), 4, drop_last=False)
            return DataLoader(texts(), batch_sampler=sampler)
        case "drawn":
            return Drawn()
    raise ValueError(kind)


class Successor(nn.Module):
    """After token i comes i + 1."""

    def __init__(self, classes: int = 30) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.classes = classes

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * F.one_hot((ids + 1) % self.classes, self.classes).float()


def test_target_is_the_token_after_the_input() -> None:
    ids = torch.tensor([[3, 4, 20], [7, 8, 20]])
    items = OnPolicy([(ids, ids)], Successor(), new_tokens=4, prompt_tokens=2, temperature=0.0)
    ((found, target),) = items
    assert found.tolist() == [[3, 4, 5, 6, 7], [7, 8, 9, 10, 11]]
    assert target.tolist() == [[-100, 5, 6, 7, 8], [-100, 9, 10, 11, 12]]
    assert torch.equal(Successor()(found).argmax(-1)[:, 1:], target[:, 1:])  # what the logits there predict


def test_whole_rows_are_prompts_and_what_lies_behind_stop_does_not_count() -> None:
    ids = torch.tensor([[3, 4], [6, 7]])
    ((found, target),) = OnPolicy([(ids, ids)], Successor(), new_tokens=9, temperature=0.0, stop=9, pad=1)
    assert found.tolist() == [[3, 4, 5, 6, 7, 8], [6, 7, 8, 9, 1, 1]]
    assert target.tolist() == [[-100, 5, 6, 7, 8, 9], [-100, 8, 9, -100, -100, -100]]


def test_translation_is_written_from_its_source() -> None:
    student, source = Writer(reads_source=True), torch.randint(CLASSES, (5, 4))
    begin = torch.zeros(5, 3, dtype=torch.int64)
    item = (source, begin, torch.ones(5, 3, dtype=torch.int64))
    ((given, ids, target),) = OnPolicy([item], student, new_tokens=4, prompt_tokens=1, temperature=0.0)
    assert torch.equal(given, source)
    whole = generate(student, begin[:, :1], 4, inputs=(source,), temperature=0.0)
    assert torch.equal(ids, whole[:, :-1])
    assert torch.equal(target, whole[:, 1:])
    assert torch.equal(Batch.of((given, ids, target)).feed(student).argmax(-1), target)


def test_share_of_the_items_is_written() -> None:
    item = (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    for share, low, high in ((0.0, 0, 0), (0.3, 230, 370), (1.0, 1000, 1000)):
        items = list(OnPolicy([item] * 1000, Successor(), new_tokens=1, share=share))
        passed = sum(found is item for found in items)
        assert low <= 1000 - passed <= high
    coins = []
    for _ in range(2):
        torch.manual_seed(4)
        coins.append([found is item for found in OnPolicy([item] * 50, Successor(), new_tokens=1, share=0.5)])
    assert coins[0] == coins[1]


def test_student_writes_as_it_is_at_that_moment() -> None:
    student = Writer(1)
    items = iter(OnPolicy(loader(), student, new_tokens=6, prompt_tokens=2, temperature=0.0))
    first, _ = next(items)
    assert torch.equal(first, generate(Writer(1), first[:, :2], 6, temperature=0.0)[:, :-1])
    student.load_state_dict(Writer(2).state_dict())
    second, _ = next(items)
    assert torch.equal(second, generate(Writer(2), second[:, :2], 6, temperature=0.0)[:, :-1])
    assert not torch.equal(second, generate(Writer(1), second[:, :2], 6, temperature=0.0)[:, :-1])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_loss_is_the_divergence_at_the_written_tokens(divergence: str) -> None:
    teacher, student = Writer(1), Writer(2)
    strategy = SoftTargets(temperature=1.0, alpha=1.0, divergence=divergence)
    distiller = Distiller(teacher, student, strategy)
    torch.manual_seed(7)
    loss = distiller.loss(next(iter(OnPolicy(loader(), student, new_tokens=5, prompt_tokens=3))))
    loss.backward()
    found = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    torch.manual_seed(7)
    rows = next(iter(loader()))[0][:, :3]
    torch.rand(())  # the coin
    whole = generate(student, rows, 5)
    total = torch.zeros(())
    for place in range(3, 8):  # the distribution of each written token, given all before it
        p, q = (model(whole[:, :place])[:, -1].softmax(-1) for model in (teacher, student))
        p = p.detach()
        middle = (p + q) / 2
        terms = {
            "forward_kl": p * (p / q).log(),
            "reverse_kl": q * (q / p).log(),
            "jsd": (p * (p / middle).log() + q * (q / middle).log()) / 2,
        }
        total = total + terms[divergence].sum()
    expected = total / (4 * 5)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-4)
    for mine, theirs in zip(found, [p.grad for p in student.parameters() if p.grad is not None], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)


def cross_entropy_of_samples(teacher: nn.Module, student: nn.Module) -> float:
    ids = generate(student, torch.zeros(500, 1, dtype=torch.int64), 8)
    with torch.no_grad():
        return float(F.cross_entropy(teacher(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_student_learns_to_write_what_the_teacher_finds_likely() -> None:
    teacher, student = Writer(1), Writer(2)
    before = cross_entropy_of_samples(teacher, student)
    start = [(torch.zeros(16, 1, dtype=torch.int64), torch.zeros(16, 1, dtype=torch.int64))] * 60
    strategy = SoftTargets(temperature=1.0, alpha=1.0, divergence="reverse_kl")
    student.train()
    Distiller(teacher, student, strategy).fit(OnPolicy(start, student, new_tokens=8), TrainingPlan(epochs=1, lr=0.02))
    assert student.training
    own = cross_entropy_of_samples(teacher, teacher)
    assert cross_entropy_of_samples(teacher, student) - own < 0.2 * (before - own)


# --- resumption


class Dropping(Writer):
    """With dropout, which must be off while it writes."""

    def forward(self, *ids: Tensor) -> Tensor:
        return F.dropout(super().forward(*ids), 0.3, self.training)


class Failing(Writer):
    def __init__(self, at: int | None) -> None:
        super().__init__(8)
        self.at, self.calls = at, 0

    def forward(self, *ids: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            stop()
        return super().forward(*ids)


def run(kind: str, share: float, checkpoint: Path | None = None, at: int | None = None) -> tuple[nn.Module, Any, int]:
    """Trains, and says how many tokens the student has read while it wrote."""
    student = Dropping(3)
    strategy = SoftTargets(temperature=1.0, alpha=0.9, divergence="jsd")
    items = OnPolicy(loader(kind), student, new_tokens=5, prompt_tokens=3, share=share, stop=CLASSES - 1)
    plan = TrainingPlan(epochs=3, lr=0.02, accumulate=2, seed=3)
    files: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint, "checkpoint_every": 1}
    with counted(student) as widths:
        history = Distiller(Failing(at), student, strategy).fit(items, plan, **files)
    return student, history, sum(widths)


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("shuffled", 0.5),
        ("shuffled", 1.0),
        ("drawn", 0.5),
        ("own generator", 1.0),
        ("sampler's generator", 1.0),
        ("batch sampler's generator", 1.0),
    ],
)
def test_resumed_run_is_bit_identical(kind: str, share: float, tmp_path: Path) -> None:
    expected, history, read = run(kind, share)
    for at in (4, 11, 16):  # an epoch runs the teacher 6 times, in 3 steps
        path = tmp_path / f"{at}.pt"
        with pytest.raises(StopError):
            run(kind, share, path, at)
        torch.manual_seed(99)  # the new process's randomness does not matter
        resumed, again, read_again = run(kind, share, path)
        assert timeless(again) == timeless(history)
        assert equal(resumed, expected)
        assert read_again < read * (1 - (at - 2) / 18) * 1.2  # nothing was written twice


def test_skipped_items_are_loaded_but_not_written() -> None:
    student = Writer()
    torch.manual_seed(2)
    whole = [item[0][:, :2] for item in OnPolicy(loader(), student, new_tokens=3, prompt_tokens=2)]
    torch.manual_seed(2)
    with counted(student) as widths:
        rest = OnPolicy(loader(), student, new_tokens=3, prompt_tokens=2).skip(4)
        assert widths == []
    torch.manual_seed(77)  # what is drawn now no longer decides which items come
    found = [item[0][:, :2] for item in rest]
    assert len(found) == 2
    assert all(map(torch.equal, found, whole[4:]))


def test_loader_that_can_skip_is_asked_to() -> None:
    class Skipping:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("asked to load everything")

        def skip(self, items: int) -> list[Any]:
            return [(torch.full((1, 1), items), torch.zeros(1, 1, dtype=torch.int64))]

    ((ids, _),) = OnPolicy(Skipping(), Successor(), new_tokens=1).skip(7)
    assert ids.tolist() == [[7]]


def test_shorter_loader_is_noticed() -> None:
    with pytest.raises(CheckpointError, match="7 items of an epoch were consumed, but the loader yields only 6"):
        OnPolicy(loader(), Writer(), new_tokens=1).skip(7)


def test_length_is_the_loaders() -> None:
    assert len(OnPolicy(loader(), Writer(), new_tokens=1)) == BATCHES
    with pytest.raises(TypeError):
        len(OnPolicy(iter([]), Writer(), new_tokens=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.5}, "OnPolicy: share is 1.5; expected a number from 0 to 1"),
        ({"new_tokens": 0}, "OnPolicy: new_tokens is 0; it must be at least 1"),
        ({"prompt_tokens": 0}, "OnPolicy: prompt_tokens is 0; it must be at least 1"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnPolicy(loader(), Writer(), **{"new_tokens": 1, **changes})


def test_labels_are_still_learnt_from_items_that_pass() -> None:
    student = Writer(3)
    items = OnPolicy(loader(), student, new_tokens=3, share=0.0)
    torch.manual_seed(0)
    passed = Distiller(None, student, HardLabels()).loss(next(iter(items)))
    torch.manual_seed(0)
    assert torch.equal(passed, Distiller(None, student, HardLabels()).loss(next(iter(loader()))))
