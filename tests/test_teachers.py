"""Several teachers as one, and weights that change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.distill_runs import CLASSES, FEATURES, Runner, data, mlp, sgd
from torch import Tensor, nn

from potstill.distill import HardLabels, HiddenStates, SoftTargets, Teachers, schedules


class Says(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits}


def probabilities(count: int = 3, rows: int = 4) -> Tensor:
    return torch.randn(count, rows, CLASSES, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("combine", "weights"), [("mean", None), ("weighted", [1.0, 3.0, 4.0])])
def test_the_softmax_at_the_temperature_is_the_mean_of_probabilities(
    combine: str, weights: Any, temperature: float
) -> None:
    logits = probabilities()
    shares = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    teachers = Teachers([Says(z) for z in logits], combine, weights=weights, temperature=temperature)
    found = (teachers(torch.zeros(4)) / temperature).softmax(-1)
    expected = ((logits / temperature).softmax(-1) * (shares / shares.sum())[:, None, None]).sum(0)
    torch.testing.assert_close(found, expected)


def test_agreement_trusts_each_row_to_those_who_agree() -> None:
    z = probabilities()
    p = z.softmax(-1)
    mean = p.mean(0)
    divergences = [[float(F.kl_div(m.log(), a, reduction="sum")) for a, m in zip(q, mean, strict=True)] for q in p]
    trust = (-torch.tensor(divergences, dtype=torch.float64)).exp()
    expected = (p * (trust / trust.sum(0)).unsqueeze(-1)).sum(0)
    found = Teachers([Says(x) for x in z], "agreement")(torch.zeros(4)).softmax(-1)
    torch.testing.assert_close(found, expected)
    alone = torch.tensor([[0.0, 5.0]])
    two_against_one = Teachers([Says(-alone), Says(-alone), Says(alone)], "agreement")(torch.zeros(1)).softmax(-1)
    plain = Teachers([Says(-alone), Says(-alone), Says(alone)])(torch.zeros(1)).softmax(-1)
    assert float(two_against_one[0, 0]) > float(plain[0, 0]) + 0.1


@pytest.mark.parametrize("combine", ["mean", "agreement"])
def test_classes_that_a_teacher_excludes(combine: str) -> None:
    logits = [torch.tensor([[0.0, -math.inf, -math.inf]]), torch.tensor([[-math.inf, 0.0, -math.inf]])]
    found = Teachers([Says(z) for z in logits], combine)(torch.zeros(1)).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.0]]))


def test_half_precision_teachers_are_widened() -> None:
    z = torch.tensor([[0.0, 3.0]]).half()
    assert Teachers([Says(z), Says(z)])(torch.zeros(1)).dtype == torch.float32


def test_a_student_learns_from_all_and_from_the_layers_of_one() -> None:
    x, y = data(8).tensors
    first, second, student = mlp(seed=9), mlp(seed=8), mlp()
    strategies = [SoftTargets(2.0, 1.0), HiddenStates("0", "models.1.0")]
    run = Runner(Teachers([first, second], temperature=2.0), student, strategies, optimizer=sgd)
    with torch.no_grad():
        mean = ((first(x) / 2).softmax(-1) + (second(x) / 2).softmax(-1)) / 2
        soft = 4 * (mean * (mean.log() - (mlp()(x) / 2).log_softmax(-1))).sum(-1).mean()
        hidden = (mlp()[0](x) - second[0](x)).square().mean()
    before = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    assert run.fit([(x, y)], 1).losses == [pytest.approx(float(soft + hidden), rel=1e-5)]
    assert all(torch.equal(value, before[name]) for name, value in run.teacher.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": []}, "Teachers: models is empty; expected at least one"),
        ({"combine": "median"}, "combine is 'median'; expected one of mean, weighted, agreement"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({"weights": [1.0, 1.0]}, "weights are given, but combine is 'mean'; expected combine='weighted'"),
        ({"combine": "weighted"}, "weights is None; expected a positive number for each of 2 teachers"),
        ({"combine": "weighted", "weights": [1.0]}, r"weights is \[1.0\]; expected"),
        ({"combine": "weighted", "weights": [1.0, -1.0]}, r"weights is \[1.0, -1.0\]; expected"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teachers(**{"models": [mlp(), mlp()], **arguments})


def test_teachers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"the logits are \[2, 4\] and \[2, 3\]; all teachers need the same classes"):
        Teachers([mlp(), nn.Linear(FEATURES, 3)])(torch.zeros(2, FEATURES))

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None: ...

    with pytest.raises(TypeError, match="the teacher 1 returned a NoneType; expected a tensor of logits"):
        Teachers([mlp(), Silent()])(torch.zeros(2, FEATURES))


# --- schedules


def values(schedule: Callable[[int], float], steps: int = 8) -> list[float]:
    return [schedule(step) for step in range(1, steps + 1)]


def test_schedules() -> None:
    assert values(schedules.linear(2.0, 1.0, 5)) == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0, 1.0]
    waves = [1.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(5)] + [1.0] * 3
    assert values(schedules.cosine(2.0, 1.0, 5)) == pytest.approx(waves, abs=1e-15)
    assert values(schedules.after(3, 0.5)) == [0.0] * 3 + [0.5] * 5
    assert values(schedules.until(3, 0.5)) == [0.5] * 3 + [0.0] * 5
    assert values(schedules.linear(0.0, 3.0, 1)) == [3.0] * 8
    for start, end in itertools.product((0.0, 0.1, 0.7), repeat=2):
        for shape in (schedules.linear, schedules.cosine):
            found = values(shape(start, end, 7))
            assert (found[0], found[6]) == (start, end)
            assert min(found) >= 0.0
            assert sorted(found, reverse=end < start) == pytest.approx(found, rel=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(1.0, 0.0, 0), "linear: the number of steps is 0; expected at least 1"),
        (lambda: schedules.cosine(-1.0, 0.0, 3), "cosine: start is -1.0; expected a number of at least 0"),
        (lambda: schedules.linear(1.0, math.nan, 3), "linear: end is nan"),
        (lambda: schedules.after(0), "after: the number of steps is 0"),
        (lambda: schedules.until(3, math.inf), "until: weight is inf"),
    ],
)
def test_schedules_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_strategy_joins_and_another_leaves() -> None:
    batches = [data(8).tensors] * 4
    terms = [(schedules.until(2), HardLabels()), (schedules.after(2, 2.0), SoftTargets(2.0, 1.0))]
    teacher, student = mlp(seed=9), mlp()
    losses = Runner(teacher, student, terms, optimizer=sgd).fit(batches, 1).losses
    again, x = mlp(), data(8).tensors[0]
    alone = Runner(None, again, HardLabels(), optimizer=sgd).fit(batches[:2], 1).losses
    assert losses[:2] == alone
    with torch.no_grad():
        p = (teacher(x) / 2).softmax(-1)
        soft = 4 * (p * (p.log() - (again(x) / 2).log_softmax(-1))).sum(-1).mean()
    assert losses[2] == pytest.approx(2 * float(soft), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_schedules_return_weights(weight: float) -> None:
    student, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.randint(3, (8,)))
    term = (lambda step: 1.0 if step < 3 else weight), HardLabels()
    run = Runner(None, student, [term], optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ValueError, match=r"at step 3 the strategies' weights are \["):
        run.fit([batch] * 5, epochs=1, quiet=True)
