"""Distillation: exact gradients, an untouched teacher, honest errors."""

from __future__ import annotations

import copy
import json
import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.distill_runs import (
    CLASSES,
    FEATURES,
    Runner,
    StopError,
    Teacher,
    adam,
    data,
    distiller,
    equal,
    loader,
    mlp,
    sgd,
    stop,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from potstill.distill import STRATEGIES, Epoch, HardLabels, History, SoftTargets, Strategy, register
from potstill.nn import Int8Linear

pytestmark = pytest.mark.usefixtures("one_thread")


# --- gradient accumulation


class SquaredLogits(Strategy):
    """Counts every row, also those that the other strategies ignore."""

    needs_teacher = False

    def forward(self, outputs: Any) -> Tensor:
        return outputs.student_logits.square().sum(-1).mean()

    def rows(self, target: Tensor) -> int:
        return len(target)


def gradient(sizes: list[int], target: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    x = data(8, dtype).tensors[0]
    student, teacher = mlp().to(dtype), mlp(seed=9).to(dtype)
    batches = list(zip(x.split(sizes), target.split(sizes), strict=True))
    strategies = [SoftTargets(3.0, 0.6, label_smoothing=0.1), (0.5, HardLabels()), (0.1, SquaredLogits())]
    one_step = Runner(teacher, student, strategies, optimizer=sgd, accumulate=len(sizes))
    history = one_step.fit(batches, 1)
    assert history.step == 1
    return torch.cat([p.grad.flatten() for p in student.parameters()]), history.losses[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("sizes", [[1] * 8, [3, 3, 2], [5, 1, 2]])
@pytest.mark.parametrize("ignored", [[], [0, 1, 2, 6]])
def test_micro_batches_give_the_gradient_of_one_batch(
    dtype: torch.dtype, tolerance: float, sizes: list[int], ignored: list[int]
) -> None:
    target = data(8).tensors[1].clone()
    target[ignored] = -100
    expected, expected_loss = gradient([8], target, dtype)
    found, loss = gradient(sizes, target, dtype)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert loss == pytest.approx(expected_loss, abs=tolerance)


def test_a_group_without_rows_takes_no_step() -> None:
    x, y = data(8).tensors
    ignored = torch.full_like(y, -100)
    student = mlp()
    history = Runner(None, student, HardLabels(), optimizer=sgd).fit([(x, ignored), (x, y), (x, ignored)], 1)
    alone = mlp()
    Runner(None, alone, HardLabels(), optimizer=sgd).fit([(x, y)], 1)
    assert history.step == 1
    assert equal(student, alone)
    with pytest.raises(ValueError, match="epoch 1 had 1 batches but no target that counts"):
        Runner(None, student, HardLabels(), optimizer=sgd).fit([(x, ignored)], 1)


def test_tail_of_an_epoch_is_a_smaller_group() -> None:
    history = distiller(accumulate=4).fit(loader(), 2)
    assert [epoch.step for epoch in history.epochs] == [3, 6]


# --- teacher and student


def test_teacher_and_modes_are_untouched(tmp_path: Path) -> None:
    teacher, student = mlp(seed=9, dropout=0.5, norm=True), mlp(dropout=0.1, norm=True)
    teacher[1].eval()
    teacher[0].weight.requires_grad_(False)
    student.eval()
    before = copy.deepcopy(teacher)
    modes: set[tuple[bool, bool]] = set()
    teacher.register_forward_hook(lambda module, _, __: modes.add((module[3].training, torch.is_grad_enabled())))
    student.register_forward_hook(lambda module, _, __: modes.add((module[3].training, torch.is_grad_enabled())))
    path = tmp_path / "run.pt"
    Runner(teacher, student, SoftTargets(), optimizer=sgd, checkpoint=path).fit(loader(), 1)
    assert modes == {(False, False), (True, True)}
    assert equal(teacher, before)
    assert [m.training for m in teacher.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in teacher.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module.training for module in student.modules())
    saved = torch.load(path, weights_only=True)
    assert saved["student"].keys() == student.state_dict().keys()
    assert not any(torch.equal(teacher[0].weight, value) for value in saved["student"].values())


def test_modes_are_restored_after_a_failure() -> None:
    teacher = Teacher(3, stop).train()
    run = distiller(teacher, student=mlp().eval())
    with pytest.raises(StopError):
        run.fit(loader(), 1)
    assert teacher.model.training
    assert not run.student.training


def test_int8_teacher() -> None:
    teacher = mlp(seed=9, hidden=32)
    fast = copy.deepcopy(teacher)
    fast[0], fast[4] = Int8Linear.from_float(fast[0]), Int8Linear.from_float(fast[4])
    before = copy.deepcopy(fast)
    losses = []
    for one in (teacher, fast):
        student = mlp(hidden=16)
        losses.append(Runner(one, student, SoftTargets(2.0, 1.0), optimizer=adam).fit(loader(), 10).epochs)
    assert losses[1][-1].loss < 0.5 * losses[1][0].loss
    assert losses[1][-1].loss == pytest.approx(losses[0][-1].loss, rel=0.2)
    assert equal(fast, before)


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    from sklearn.datasets import load_digits  # not at the top: the killed program does without it

    bunch = load_digits()
    x, y = torch.from_numpy(bunch.data).float() / 16, torch.from_numpy(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return TensorDataset(x[:1200], y[:1200]), x[1200:], y[1200:]


def test_student_learns_digits_from_the_teacher_alone(digits: tuple[TensorDataset, Tensor, Tensor]) -> None:
    train, x, y = digits

    def accuracy(model: nn.Module) -> float:
        return float((model(x).argmax(-1) == y).float().mean())

    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    student = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    batches = DataLoader(train, batch_size=60, shuffle=True)
    taught = Runner(None, teacher, HardLabels(), optimizer=adam).fit(batches, 15, accuracy)
    assert taught.epochs[-1].validation["value"] > 0.94
    history = Runner(teacher, student, SoftTargets(3.0, alpha=1.0), optimizer=adam).fit(batches, 15, accuracy)
    assert history.epochs[-1].loss < 0.1 * history.epochs[0].loss
    assert history.epochs[-1].validation["value"] > 0.88  # chance is 0.1; the student saw no label
    with torch.no_grad():
        agreement = (student(x).argmax(-1) == teacher(x).argmax(-1)).float().mean()
    assert agreement > 0.9


# --- strategies


def first_loss(strategies: Any) -> float:
    batches = [data(8).tensors]
    return Runner(mlp(seed=9), mlp(), strategies, optimizer=sgd).fit(batches, 1).losses[0]


def test_the_loss_is_the_weighted_sum_of_the_strategies() -> None:
    soft, hard = first_loss(SoftTargets()), first_loss([HardLabels()])
    x, y = data(8).tensors
    with torch.no_grad():
        assert hard == pytest.approx(float(nn.functional.cross_entropy(mlp()(x), y)), rel=1e-6)
    assert first_loss([(2, SoftTargets()), (0.25, HardLabels())]) == pytest.approx(2 * soft + 0.25 * hard, rel=1e-6)
    assert first_loss([SoftTargets(), (3.0, HardLabels())]) == pytest.approx(soft + 3 * hard, rel=1e-6)


def test_soft_targets_is_hintons_loss_also_of_sequences() -> None:
    x = torch.randn(2, 5, FEATURES)
    y = torch.randint(CLASSES, (2, 5))
    y[0, :3] = -1
    teacher, student = mlp(seed=9), mlp()
    run = Runner(teacher, student, SoftTargets(3.0, 0.8, ignore_index=-1), optimizer=sgd)
    with torch.no_grad():
        s, t = mlp()(x)[y != -1], teacher(x)[y != -1]
    soft = nn.functional.kl_div((s / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean")
    expected = 0.8 * 9 * soft + 0.2 * nn.functional.cross_entropy(s, y[y != -1])
    assert run.fit([(x, y)], 1).losses == [pytest.approx(float(expected), rel=1e-5)]


def test_a_teacher_that_no_strategy_needs_is_not_run() -> None:
    teacher = Teacher()
    Runner(teacher, mlp(), HardLabels(), optimizer=sgd).fit(loader(), 1)
    assert teacher.calls == 0


def test_strategies_are_registered_by_name() -> None:
    assert STRATEGIES["soft_targets"] is SoftTargets
    assert STRATEGIES["hard_labels"] is HardLabels
    with pytest.raises(ValueError, match="'soft_targets' is already the strategy SoftTargets"):
        register("soft_targets")(SoftTargets)
    for strategy in (SoftTargets(2.0, 0.3, ignore_index=7, label_smoothing=0.2), HardLabels(ignore_index=3)):
        assert type(strategy)(**strategy.config()).config() == strategy.config()


# --- loaders, inputs and outputs


class Named(nn.Module):
    """Takes and returns what it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)
        self.output = output

    def forward(self, first: Tensor, second: Tensor) -> Any:
        return self.output(self.linear(first + second))


Pair = namedtuple("Pair", ["first", "second"])


class Attribute:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "inputs",
    [
        lambda a, b: (a, b),
        lambda a, b: ((a, b),),
        lambda a, b: ([a, b],),
        lambda a, b: (Pair(a, b),),
        lambda a, b: ({"second": b, "first": a},),
    ],
)
@pytest.mark.parametrize(
    "output",
    [
        lambda logits: logits,
        lambda logits: {"loss": None, "logits": logits},
        Attribute,
        lambda logits: (logits, "more"),
    ],
)
def test_inputs_and_outputs(inputs: Any, output: Any) -> None:
    x, y = data(8).tensors
    batches = [(*inputs(x, x + 1), y)]
    history = Runner(Named(output), Named(output), SoftTargets(), optimizer=adam).fit(batches, 20)
    assert history.epochs[-1].loss < history.epochs[0].loss


@pytest.mark.parametrize("output", [lambda _: None, lambda logits: {"x": logits}, lambda _: (), lambda _: "text"])
def test_outputs_without_logits(output: Any) -> None:
    x, y = data(8).tensors
    for teacher, student, name in ((Named(output), Named(lambda o: o), "teacher"), (mlp(), Named(output), "student")):
        run = Runner(teacher, student, SoftTargets(), optimizer=sgd)
        batch = (x, x, y) if name == "teacher" else ({"first": x, "second": x}, y)
        if name == "student":
            run = Runner(None, student, HardLabels(), optimizer=sgd)
        with pytest.raises(TypeError, match=f"the {name} returned a .*; expected a tensor of logits"):
            run.fit([batch], 1)


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        (torch.zeros(3), "a Tensor"),
        ((torch.zeros(3),), r"a tuple of \(Tensor\)"),
        ([torch.zeros(3), 4], r"a list of \(Tensor, int\)"),
        ({"input": torch.zeros(3)}, "a dict"),
    ],
)
def test_items_without_a_target(item: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=f"the loader yielded {shown}; it must yield"):
        Runner(None, mlp(), HardLabels(), optimizer=sgd).fit([item], 1)


def test_empty_and_exhausted_loaders() -> None:
    run = Runner(None, mlp(), HardLabels(), optimizer=sgd)
    with pytest.raises(ValueError, match="no batch in epoch 1; it must not be empty"):
        run.fit([], 1)
    with pytest.raises(ValueError, match=r"no batch in epoch 2; .*iterable again .*not an iterator"):
        run.fit(iter([data(8).tensors]), 2)


def test_length_may_be_unknown() -> None:
    assert [epoch.step for epoch in distiller(accumulate=1).fit(loader("length unknown"), 2).epochs] == [11, 22]


# --- optimiser, seeds, validation, history


def test_seed_decides_and_the_callers_randomness_is_kept() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    expected = [draw() for _ in range(3)]
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    found, students = [draw()], []
    for seed in (3, 3, 4):
        run = distiller(seed=seed)
        run.fit(loader("augmented"), 1)
        students.append(run.student)
        found.append(draw())
    assert found[:3] == expected
    assert equal(students[0], students[1])
    assert not equal(students[0], students[2])


def test_validate_is_called_in_evaluation_mode() -> None:
    run = distiller()
    seen = []

    def validate(student: nn.Module) -> Tensor:
        seen.append((student is run.student, student[3].training, torch.is_grad_enabled()))
        student.train()  # a careless callback changes nothing
        return torch.tensor(len(seen) / 2)

    trained = []
    run.student[3].register_forward_hook(lambda module, _, __: trained.append(module.training))
    history = run.fit(loader(), 2, validate)
    assert seen == [(True, False, False)] * 2
    assert trained == [True] * 22
    assert [epoch.validation for epoch in history.epochs] == [{"value": 0.5}, {"value": 1.0}]


def test_history_is_a_plain_record() -> None:
    run = distiller(schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 6, gamma=0.1))
    history = run.fit(loader(), 2, lambda _: {"accuracy": np.float32(0.5), "loss": torch.tensor(2.0)})
    assert history.step == len(history.losses) == 12
    assert [epoch.loss for epoch in history.epochs] == [
        pytest.approx(sum(history.losses[:6]) / 6),
        pytest.approx(sum(history.losses[6:]) / 6),
    ]
    assert [epoch.lr for epoch in history.epochs] == [pytest.approx(0.002), pytest.approx(0.0002)]
    assert all(epoch.seconds > 0 for epoch in history.epochs)
    assert history.epochs[0] == Epoch(
        epoch=1,
        step=6,
        loss=history.epochs[0].loss,
        lr=0.02 * 0.1,
        seconds=history.epochs[0].seconds,
        validation={"accuracy": 0.5, "loss": 2.0},
        terms=history.epochs[0].terms,
    )
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history


def test_clip_grad_norm() -> None:
    student, limit = mlp(), 1e-3
    Runner(None, student, HardLabels(), optimizer=sgd, clip_grad_norm=limit).fit([data(8).tensors], 1)
    norm = torch.cat([p.grad.flatten() for p in student.parameters()]).norm()
    assert float(norm) == pytest.approx(limit, rel=1e-3)
    before = mlp().state_dict()
    moved = torch.cat([(value - before[name]).flatten() for name, value in student.state_dict().items()]).norm()
    assert float(moved) == pytest.approx(0.1 * limit, rel=1e-2)


def test_sparse_gradients() -> None:
    student = nn.Sequential(nn.Embedding(20, CLASSES, sparse=True))
    ids, y = torch.tensor([1, 1, 7]), torch.tensor([0, 1, 2])
    before = student[0].weight.detach().clone()
    Runner(None, student, HardLabels(), optimizer=lambda p: torch.optim.SparseAdam(p, lr=0.1)).fit([(ids, y)], 1)
    changed = (student[0].weight.detach() != before).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 7]


class PerRow(Strategy):
    needs_teacher = False

    def forward(self, outputs: Any) -> Tensor:
        return outputs.student_logits.square().mean(-1)


def test_a_term_must_be_a_scalar() -> None:
    with pytest.raises(ValueError, match=r"PerRow returned a tensor of shape \[8\]; expected a scalar"):
        Runner(None, mlp(), PerRow(), optimizer=sgd).fit([data(8).tensors], 1)


class RootOfZero(Strategy):
    """A finite value with an infinite gradient."""

    needs_teacher = False

    def forward(self, outputs: Any) -> Tensor:
        return (outputs.student_logits - outputs.student_logits.detach()).square().sum().sqrt()


def test_non_finite_loss_stops_before_the_update(tmp_path: Path) -> None:
    x, y = data(8).tensors
    bad = x.clone()
    bad[3, 2] = float("inf")
    path, student = tmp_path / "run.pt", mlp()
    run = Runner(mlp(seed=9), student, SoftTargets(), optimizer=adam, checkpoint=path, checkpoint_every=2)
    where = r"step 3: batch 3 of epoch 1 \(the last good checkpoint is .*run.pt\): the loss is nan \(SoftTargets nan\)"
    with pytest.raises(FloatingPointError, match=where):
        run.fit([(x, y), (x, y), (bad, y)], 1)
    good = mlp()
    Runner(mlp(seed=9), good, SoftTargets(), optimizer=adam).fit([(x, y), (x, y)], 1)
    assert equal(student, good)
    saved = torch.load(path, weights_only=True)
    assert len(saved["history"]["losses"]) == 2
    assert all(torch.equal(saved["student"][name], value) for name, value in good.state_dict().items())


def test_non_finite_gradient_stops_before_the_update() -> None:
    student = mlp()
    where = r"step 1: batch 1 of epoch 1: the loss is 0 \(RootOfZero 0\) and the norm of its gradient nan"
    with pytest.raises(FloatingPointError, match=where):
        Runner(None, student, RootOfZero(), optimizer=sgd).fit([data(8).tensors], 1)
    assert equal(student, mlp())


def test_progress_bar_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    distiller().fit(loader(), 1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    distiller().fit(loader(), 1, quiet=True)
    assert capsys.readouterr() == ("", "")
    for kind, count in (("shuffled", "22/22"), ("length unknown", "22/?")):
        history = distiller().fit(loader(kind), 2)
        out, shown = capsys.readouterr()
        assert out == ""
        for text in ("epoch 2/2", count, f"loss {history.losses[-1]:.4f}", "batches/s"):
            assert text in shown
