"""What Distiller and TrainingPlan refuse, and what they say then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.distill_runs import Matching, Runner, adam, cosine, distiller, equal, loader, mlp, sgd
from torch import nn

from potstill.distill import HardLabels, SoftTargets

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = mlp()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": None}, ValueError, "SoftTargets learns from a teacher, but teacher is None"),
        ({"strategies": []}, ValueError, "strategies is empty"),
        ({"strategies": ["soft_targets"]}, TypeError, "strategies holds 'soft_targets'; expected a Strategy"),
        ({"strategies": [(-1.0, HardLabels())]}, TypeError, "a tuple of a weight"),
        ({"strategies": [(float("nan"), HardLabels())]}, TypeError, "a tuple of a weight"),
        ({"accumulate": 0}, ValueError, "accumulate is 0; it must be at least 1"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm is 0.0; it must be positive"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"checkpoint_every": 5}, ValueError, "checkpoint_every is 5 and checkpoint is None"),
        ({"checkpoint": "x.pt", "checkpoint_every": 0}, ValueError, "checkpoint_every is 0 and checkpoint is x.pt"),
        ({"checkpoint": "no/such/folder/x.pt"}, FileNotFoundError, "its folder does not exist"),
        ({"student": nn.Identity()}, ValueError, "a parameter that requires a gradient"),
        ({"optimizer": lambda _: sgd(list(mlp().parameters()))}, ValueError, "holds no parameter of the student"),
        ({"optimizer": sgd(list(mlp().parameters()))}, ValueError, "optimizer is SGD; expected one of adamw, adam, s"),
        ({"optimizer": "lion"}, ValueError, "optimizer is 'lion'; expected one of adamw, adam, sgd, or a function"),
        ({"precision": "fp8"}, ValueError, "precision is 'fp8'; expected one of float32, bf16$"),
        ({"schedule": "step"}, ValueError, "schedule is 'step'; expected one of constant, linear, cosine, or"),
        ({"lr": -1.0}, ValueError, "lr is -1.0; expected a number of at least 0"),
        ({"ema": 1.0}, ValueError, "ema is 1.0; expected a decay between 0 and 1"),
        ({"steps": 3}, ValueError, "epochs is 1 and steps is 3; give one of both"),
        (
            {"teacher": SHARED, "student": SHARED},
            ValueError,
            r"holds 0.weight, a parameter of the teacher \(4 in all\)",
        ),
        (
            {"strategies": Matching(), "student": SHARED, "optimizer": lambda _: sgd(list(SHARED.parameters()))},
            ValueError,
            "does not hold the strategies' parameters 0.map.weight, 0.map.bias",
        ),
        ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, TypeError, "waits for a metric"),
        ({"schedule": lambda _: cosine(sgd(list(mlp().parameters())))}, ValueError, "belongs to another optimiser"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    settings = {"teacher": mlp(9), "student": mlp(), "strategies": SoftTargets(), "optimizer": sgd, **changes}
    with pytest.raises(error, match=message):
        Runner(**settings).fit(loader(), 1)


def test_epochs_must_be_positive() -> None:
    with pytest.raises(ValueError, match="epochs is 0; it must be at least 1"):
        distiller().fit(loader(), 0)


def test_optimiser_made_beforehand() -> None:
    student, factory = mlp(), mlp()
    optimizer = adam(list(student.parameters()))
    given = {"optimizer": lambda _: optimizer, "schedule": lambda _: cosine(optimizer)}
    x = Runner(mlp(9), student, SoftTargets(), **given).fit(loader(), 2)
    y = Runner(mlp(9), factory, SoftTargets(), optimizer=adam, schedule=cosine).fit(loader(), 2)
    assert equal(student, factory)
    assert x.losses == y.losses
