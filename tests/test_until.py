"""distill_until: when it goes on, with whom, when it ends, and that it can be continued."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from potstill.distill import SoftTargets, TrainingPlan
from potstill.distill import until as module
from potstill.distill.until import Search, distill_until
from potstill.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = TrainingPlan(steps=4, lr=0.01)


class Loader:
    """Always the same rows; counts what it gives, and may fail at one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.items = [(torch.randn(32, 4, generator=generator), torch.zeros(32, dtype=torch.int64)) for _ in range(4)]
        self.given, self.fail_at = 0, fail_at

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for item in self.items:
            self.given += 1
            if self.given == self.fail_at:
                raise KeyboardInterrupt
            yield item


def model(units: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 3))


with torch.random.fork_rng():
    torch.manual_seed(7)
    TEACHER, HELD_OUT = model(32), torch.randn(256, 4)


@torch.no_grad()
def error(student: nn.Module) -> float:
    own, wanted = (net(HELD_OUT).log_softmax(1) for net in (student, TEACHER))
    return float(F.kl_div(own, wanted, reduction="batchmean", log_target=True))


def search(target: float, *units: int, **options: Any) -> Search:
    loader = options.pop("loader", None) or Loader()
    validate = options.pop("validate", error)
    options = {"larger_is_better": False, "quiet": True} | options
    plan = options.pop("plan", PLAN)
    students: list[Callable[[], nn.Module]] = [lambda n=n: model(n) for n in units]
    return distill_until(TEACHER, students, lambda: SoftTargets(alpha=1.0), loader, plan, validate, target, **options)


def scores(*values: float) -> Callable[[nn.Module], float]:
    """A validate that gives these scores; each round of one epoch asks twice: in the run, and at its end."""
    left = iter(values)
    return lambda student: next(left)


def shape(found: Search) -> list[tuple[int, int]]:
    return [(trial.student, trial.round) for trial in found.trials]


def test_a_student_that_is_good_at_once_is_not_trained() -> None:
    loader = Loader()
    found = search(1e-9, 32, 4, loader=loader)
    assert shape(found) == [(0, 0)]
    assert found.reached
    assert found.trials[0].steps == 0
    assert found.trials[0].parameters == sum(p.numel() for p in model(32).parameters())
    assert loader.given == 1  # the sample
    assert error(found.student) == found.best.score == 0.0
    assert not found.student.training


def test_larger_students_come_when_training_does_not_suffice() -> None:
    found = search(1e-9, 2, 6, 32, rounds=1)
    assert shape(found) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert found.reached
    assert [trial.steps for trial in found.trials] == [0, 4, 0, 4, 0]


@pytest.mark.parametrize(
    ("given", "expected", "best"),
    [
        ([9, 8, 8, 7, 7, 6, 6], [(0, 0), (0, 1), (0, 2), (0, 3)], 6.0),  # it gets better, and has had its rounds
        ([9, 8, 8, 8, 8], [(0, 0), (0, 1), (0, 2)], 8.0),  # no better than before
        ([9, 10, 10], [(0, 0), (0, 1)], 9.0),  # worse
        ([9, float("nan"), float("nan")], [(0, 0), (0, 1)], 9.0),
        ([9, 5, 5], [(0, 0), (0, 1)], 5.0),  # good enough
    ],
)
def test_a_student_goes_on_while_it_gets_better(
    given: list[float], expected: list[tuple[int, int]], best: float
) -> None:
    found = search(5.0, 4, rounds=3, validate=scores(*given))
    assert shape(found) == expected
    assert found.best.score == best
    assert found.reached == (best <= 5.0)


def test_a_larger_score_may_be_better() -> None:
    found = search(0.5, 4, rounds=3, validate=scores(0.1, 0.4, 0.4, 0.6, 0.6), larger_is_better=True)
    assert shape(found) == [(0, 0), (0, 1), (0, 2)]
    assert found.best.score == 0.6


def test_the_best_weights_are_returned() -> None:
    seen: list[Tensor] = []

    def validate(student: nn.Module) -> float:
        seen.append(student[0].weight.clone())
        return [9.0, 8.0, 8.0, 8.5, 8.5][len(seen) - 1]

    found = search(1.0, 4, rounds=3, validate=validate)
    assert found.best.round == 1
    assert torch.equal(found.student[0].weight, seen[2])
    assert not torch.equal(seen[2], seen[4])


def test_each_round_has_another_seed() -> None:
    class Shuffled(Loader):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            order = torch.randperm(4).tolist()
            self.orders = [*getattr(self, "orders", []), order]
            return iter([self.items[i] for i in order])

    loader = Shuffled()
    search(0.0, 2, loader=loader, rounds=2, validate=scores(9, 8, 8, 7, 7))
    expected = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected.append(torch.randperm(4).tolist())
    assert loader.orders[1:] == expected


def test_the_time_is_up() -> None:
    class Slow(Loader):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for item in super().__iter__():
                module.time.sleep(0.1)
                yield item

    loader = Slow()
    found = search(0.0, 2, 4, loader=loader, plan=TrainingPlan(epochs=100, schedule="constant"), seconds=0.6)
    assert shape(found) == [(0, 0), (0, 1)]
    assert 1 <= found.trials[1].steps < 12
    assert not found.reached
    assert sum(trial.seconds for trial in found.trials) >= 0.6


def test_a_metric_among_several() -> None:
    found = search(5.0, 4, validate=lambda student: {"loss": 9.0, "error": 4.0}, metric="error")
    assert found.best.score == 4.0
    with pytest.raises(ValueError, match="validate returned loss, error; metric is 'accuracy'"):
        search(5.0, 4, validate=lambda student: {"loss": 9.0, "error": 4.0}, metric="accuracy")


def test_an_interrupted_search_is_continued(tmp_path: Path) -> None:
    straight, whole = tmp_path / "straight", tmp_path / "whole"
    straight.mkdir()
    whole.mkdir()
    expected = search(1e-9, 2, 6, rounds=2, folder=straight)
    loader = Loader(fail_at=2 * (1 + 4) - 1)  # the sample, the first round, and some of the second
    with pytest.raises(KeyboardInterrupt):
        search(1e-9, 2, 6, rounds=2, folder=whole, loader=loader)
    assert sorted(path.name for path in whole.iterdir()) == [
        "student0-round0.pt",
        "student0-round1.pt",
        "student0-round2.run.pt",
    ]
    loader = Loader()
    found = search(1e-9, 2, 6, rounds=2, folder=whole, loader=loader)
    assert [(t.student, t.round, t.steps, t.score) for t in found.trials] == [
        (t.student, t.round, t.steps, t.score) for t in expected.trials
    ]
    for name, tensor in expected.student.state_dict().items():
        assert torch.equal(tensor, found.student.state_dict()[name])
    again = Loader()
    assert search(1e-9, 2, 6, rounds=2, folder=whole, loader=again).trials == found.trials
    assert again.given == 2  # a sample for each student: nothing is trained
    assert not list(whole.glob("*.run.pt"))


def test_a_finished_search_may_go_further(tmp_path: Path) -> None:
    first = search(1e-9, 2, rounds=1, folder=tmp_path)
    second = search(1e-9, 2, 32, rounds=1, folder=tmp_path)
    assert second.trials[:2] == first.trials
    assert second.reached


def test_a_folder_of_another_search(tmp_path: Path) -> None:
    search(1e-9, 2, rounds=1, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"student0-round0.pt is of another search: plan was .*; choose another"):
        search(1e-9, 2, rounds=1, folder=tmp_path, plan=TrainingPlan(steps=5))
    with pytest.raises(CheckpointError, match="is of another student"):
        search(1e-9, 3, rounds=1, folder=tmp_path)
    (tmp_path / "student0-round1.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"student0-round1.pt is damaged or not a trial"):
        search(1e-9, 2, rounds=1, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ()}, "students is empty"),
        ({"target": float("nan")}, "target is nan"),
        ({"rounds": 0}, "rounds is 0"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"folder": "nowhere"}, "folder is nowhere"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    target, units = options.pop("target", 1.0), options.pop("units", (4,))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        search(target, *units, **options)


def test_the_table() -> None:
    found = search(5.0, 4, rounds=1, validate=scores(9, 4, 4))
    console = Console(width=100, file=io.StringIO())
    console.print(found.table())
    text = console.file.getvalue()
    assert "value 5: reached" in text
    assert "initialised" in text
    rows = [line for line in text.splitlines() if "│" in line]
    assert len(rows) == 2


def test_the_callers_randomness_stays() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    search(1e-9, 2, rounds=1)
    assert torch.equal(torch.rand(3), expected)
