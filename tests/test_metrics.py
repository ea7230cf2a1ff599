"""Metrics of a student: the definitions, over all rows of a loader, by numpy and scipy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, nn

from potstill.distill import Distiller, HardLabels, TrainingPlan
from potstill.distill.metrics import Metric, accuracy, agreement, bits_per_token, perplexity

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, CLASSES, SIZES = 5, 7, (8, 3, 1, 8)


def items(ignored: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Four batches of unequal size and difficulty: a mean of the batches' means is another number."""
    found = [(torch.randn(n, WIDTH), torch.randint(CLASSES, (n,))) for n in SIZES]
    if ignored:
        found[0][1][2:] = -100
        found[2][1][:] = -100  # a whole batch
    return found


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, CLASSES))


def answers(net: nn.Module, loader: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets of the rows that count."""
    net.eval()
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        z = net(x)
    net.train()
    return z[y != -100].double().numpy(), y[y != -100].numpy()


def expected(student: np.ndarray, teacher: np.ndarray, target: np.ndarray) -> dict[str, float]:
    nats = -log_softmax(student, -1)[np.arange(len(target)), target].mean()
    return {
        "accuracy": float((student.argmax(-1) == target).mean()),
        "agreement": float((student.argmax(-1) == teacher.argmax(-1)).mean()),
        "kl": float(rel_entr(softmax(teacher, -1), softmax(student, -1)).sum(-1).mean()),
        "perplexity": math.exp(nats),
        "bits_per_token": nats / math.log(2),
    }


def everything(loader: Any, teacher: nn.Module, **options: int) -> list[Metric]:
    return [
        accuracy(loader, **options),
        agreement(loader, teacher, **options),
        perplexity(loader, **options),
        bits_per_token(loader, **options),
    ]


@pytest.mark.parametrize("ignored", [False, True])
def test_values_over_unequal_batches(ignored: bool) -> None:
    loader, student, teacher = items(ignored), model(1), model(2)
    z, y = answers(student, loader)
    known, _ = answers(teacher, loader)
    found = {}
    for metric in everything(loader, teacher):
        found |= metric(student)
    assert found == pytest.approx(expected(z, known, y), rel=1e-6)
    assert found["accuracy"] == expected(z, known, y)["accuracy"]  # a ratio of two counts, so exactly
    batches = [accuracy([batch])(student)["accuracy"] for batch in loader if (batch[1] != -100).any()]
    assert found["accuracy"] != pytest.approx(np.mean(batches))


def test_tokens_keywords_and_another_ignored_label() -> None:
    class Tokens(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = model(seed)

        def forward(self, hidden: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(hidden * scale)}

    loader = []
    for n, length in ((2, 4), (1, 6)):
        target = torch.randint(CLASSES, (n, length))
        target[:, 2] = -1
        loader.append(({"hidden": torch.randn(n, length, WIDTH), "scale": torch.full((1,), 2.0)}, target))
    student, teacher = Tokens(1), Tokens(2)
    flat = [(2.0 * inputs["hidden"].flatten(0, 1), target.flatten()) for inputs, target in loader]
    flat = [(x, y.masked_fill(y == -1, -100)) for x, y in flat]
    z, y = answers(student.net, flat)
    known, _ = answers(teacher.net, flat)
    found = {}
    for metric in everything(loader, teacher, ignore_index=-1):
        found |= metric(student)
    assert found == pytest.approx(expected(z, known, y), rel=1e-6)


def test_both_models_are_run_in_evaluation_mode_and_left_as_they_were() -> None:
    loader, student, teacher = items(), model(1).train(), model(2).train()
    student[1].eval()
    for metric in everything(loader, teacher):
        assert metric(student) == metric(student)  # dropout would differ
    assert [m.training for m in student] == [True, False, True, True]
    assert all(m.training for m in teacher.modules())
    assert all(p.grad is None for p in student.parameters())


def test_half_precision_logits_are_summed_in_full() -> None:
    x = torch.randn(3000, CLASSES) * 4
    loader = [(x, torch.randint(CLASSES, (3000,)))]

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16()

    z = x.bfloat16().double().numpy()
    nats = -log_softmax(z, -1)[np.arange(3000), loader[0][1].numpy()].mean()
    assert perplexity(loader)(Half())["perplexity"] == pytest.approx(math.exp(nats), rel=1e-6)


def test_hopeless_model_has_infinite_perplexity() -> None:
    loader = [(torch.tensor([[1000.0, 0.0]]), torch.tensor([1]))]
    assert perplexity(loader)(nn.Identity()) == {"perplexity": math.inf}
    assert bits_per_token(loader)(nn.Identity())["bits_per_token"] == pytest.approx(1000 / math.log(2))


def test_class_that_both_rule_out_costs_nothing() -> None:
    x = torch.tensor([[0.3, -math.inf, 1.0]])
    assert agreement([(x, torch.tensor([0]))], nn.Identity())(nn.Identity()) == {"agreement": 1.0, "kl": 0.0}


def test_as_validate_of_a_run() -> None:
    loader, student = items(), model(1)
    metrics = everything(loader, model(2))
    history = Distiller(None, student, HardLabels()).fit(
        loader, TrainingPlan(epochs=2), lambda net: {k: v for metric in metrics for k, v in metric(net).items()}
    )
    last = {k: v for metric in metrics for k, v in metric(student).items()}
    assert history.epochs[-1].validation == last
    assert list(last) == ["accuracy", "agreement", "kl", "perplexity", "bits_per_token"]


@pytest.mark.parametrize("metric", everything(iter(()), nn.Identity()))
def test_nothing_that_counts_is_an_error(metric: Metric) -> None:
    with pytest.raises(ValueError, match="no row that counts"):
        metric(nn.Identity())


def test_only_ignored_targets_are_an_error() -> None:
    loader = [(torch.randn(2, 3), torch.full((2,), -100))]
    with pytest.raises(ValueError, match="accuracy: the loader yielded no row that counts"):
        accuracy(loader)(nn.Identity())


@pytest.mark.parametrize(
    "target", [torch.zeros(4, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3)]
)
def test_targets_that_do_not_fit_are_an_error(target: Tensor) -> None:
    for metric in everything([(torch.randn(3, CLASSES), target)], nn.Identity()):
        with pytest.raises(ValueError, match=r"logits have shape \[3, 7\] and the target .* class numbers"):
            metric(nn.Identity())


def test_teacher_of_other_classes_is_an_error() -> None:
    loader = [(torch.randn(3, CLASSES), torch.zeros(3, dtype=torch.int64))]
    with pytest.raises(ValueError, match=r"teacher's logits have shape \[3, 9\], the student's \[3, 7\]"):
        agreement(loader, nn.Linear(CLASSES, 9))(nn.Identity())
