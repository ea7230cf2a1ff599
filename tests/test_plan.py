"""What a TrainingPlan promises: schedules, averaged weights, early stopping, precision, recomputation."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distill_runs import CLASSES, FEATURES, StopError, Teacher, data, equal, loader, mlp, noisy_validation, stop
from torch import Tensor, nn

from potstill.distill import (
    Callback,
    Distiller,
    EarlyStopping,
    HardLabels,
    HiddenStates,
    History,
    Run,
    SoftTargets,
    TrainingPlan,
)
from potstill.distill.recompute import recomputed
from potstill.errors import CheckpointError
from potstill.nn import Int8Linear

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(plan: TrainingPlan, validate: Any = None, student: nn.Module | None = None, **how: Any) -> Any:
    """The student and the history of 11 batches an epoch."""
    student = student or mlp()
    history = Distiller(Teacher(), student, SoftTargets(2.0, 0.7)).fit(loader(), plan, validate, **how)
    return student, history


class Rates(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def step(self, run: Run) -> None:
        self.found.append(run.lr)


# --- length and schedule


@pytest.mark.parametrize("steps", [4, 11, 25])
def test_so_many_steps_are_taken(steps: int) -> None:
    _, history = fit(TrainingPlan(steps=steps), lambda _: 0.5)
    assert history.step == steps
    assert [epoch.step for epoch in history.epochs] == [*range(11, steps, 11), steps]
    assert all(epoch.validation == {"value": 0.5} for epoch in history.epochs)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1.0] * 10),
        ("constant", 4, [0.25, 0.5, 0.75] + [1.0] * 7),
        ("linear", 0.0, [1.0 - i / 10 for i in range(10)]),
        ("linear", 0.2, [0.5, 1.0] + [1.0 - i / 8 for i in range(8)]),
        ("cosine", 2, [0.5, 1.0] + [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)]),
    ],
)
def test_schedules(schedule: str, warmup: float, expected: list[float]) -> None:
    used: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            used.append(self.param_groups[0]["lr"])
            super().step(closure)

    plan = TrainingPlan(steps=10, lr=0.3, schedule=schedule, warmup=warmup)
    assert [plan.factor(step, 10) for step in range(10)] == pytest.approx(expected)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("potstill.distill.plan.AdamW", lambda groups, lr, fused: Watched(groups, lr))
    with monkey.context():
        fit(plan)
    monkey.undo()
    assert used == pytest.approx([0.3 * factor for factor in expected])


def test_the_schedule_spans_the_epochs_and_their_groups() -> None:
    rates = Rates()
    fit(TrainingPlan(epochs=2, accumulate=2, schedule="linear", lr=1.0, optimizer="sgd"), callbacks=[rates])
    assert rates.found == pytest.approx([1.0 - i / 12 for i in range(1, 13)])


def test_a_schedule_needs_to_know_how_long_the_run_is() -> None:
    run = Distiller(None, mlp(), HardLabels())
    with pytest.raises(ValueError, match="the loader does not say how long it is; give steps instead of epochs"):
        run.fit(loader("length unknown"), TrainingPlan(epochs=1))
    assert run.fit(loader("length unknown"), TrainingPlan(epochs=1, schedule="constant", warmup=3)).step == 11
    assert run.fit(loader("length unknown"), TrainingPlan(steps=15)).step == 15


def test_a_longer_run_continues_only_if_its_schedule_allows(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fit(TrainingPlan(epochs=1, schedule="constant"), checkpoint=path)
    student, history = fit(TrainingPlan(epochs=2, schedule="constant"), checkpoint=path)
    whole, expected = fit(TrainingPlan(epochs=2, schedule="constant"))
    assert history.losses == expected.losses
    assert equal(student, whole)
    path.unlink()
    fit(TrainingPlan(epochs=1), checkpoint=path)
    with pytest.raises(CheckpointError, match="steps of the schedule is 11 in the checkpoint, 22 here"):
        fit(TrainingPlan(epochs=2), checkpoint=path)


def test_weight_decay_spares_biases_and_norms() -> None:
    student = mlp(norm=True)
    optimizer = TrainingPlan(steps=1, weight_decay=0.3).make_optimizer(list(student.parameters()))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in student.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "4.weight": 0.3,
        "4.bias": 0.0,
    }


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adamw", torch.optim.AdamW, {}),
        ("adam", torch.optim.Adam, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_optimisers_by_name(name: str, kind: Any, options: dict[str, float]) -> None:
    student, _ = fit(TrainingPlan(epochs=1, optimizer=name, lr=0.01, weight_decay=0.0, schedule="constant"))
    own = TrainingPlan(epochs=1, optimizer=lambda p: kind(p, lr=0.01, weight_decay=0.0, **options), schedule="constant")
    other, _ = fit(own)
    torch.testing.assert_close(student.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


# --- averaged weights


def averaged(decay: float, steps: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The student of a run, and the mean that the definition gives."""
    student = mlp(norm=True)
    means: dict[str, Tensor] = {}

    class Average(Callback):
        def step(self, run: Run) -> None:
            kept = min(decay, run.step / (9.0 + run.step))
            for name, x in run.distiller.student.state_dict().items():
                if run.step == 1 or not x.is_floating_point():
                    means[name] = x.clone()
                else:
                    means[name] = kept * means[name] + (1.0 - kept) * x

    Distiller(None, student, HardLabels()).fit(
        loader(), TrainingPlan(steps=steps, ema=decay, lr=0.05), callbacks=[Average()]
    )
    return student, means


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_student_ends_with_the_averaged_weights(decay: float) -> None:
    student, expected = averaged(decay, 25)
    torch.testing.assert_close(dict(student.state_dict()), expected, rtol=1e-5, atol=1e-6)
    plain = mlp(norm=True)
    Distiller(None, plain, HardLabels()).fit(loader(), TrainingPlan(steps=25, lr=0.05))
    assert not equal(plain, student)


def test_validation_sees_the_averaged_weights_and_training_goes_on_from_its_own(tmp_path: Path) -> None:
    seen: list[nn.Module] = []
    plan = TrainingPlan(epochs=2, ema=0.9)
    student, history = fit(plan, lambda model: seen.append(copy.deepcopy(model)) or 0.0)
    assert equal(seen[1], student)
    _, plain = fit(TrainingPlan(epochs=2))
    assert history.losses == plain.losses
    for at in (7, 15):
        path = tmp_path / f"{at}.pt"
        with pytest.raises(StopError):
            Distiller(Teacher(at, stop), mlp(), SoftTargets(2.0, 0.7)).fit(
                loader(), plan, checkpoint=path, checkpoint_every=1
            )
        resumed, again = fit(plan, checkpoint=path)
        assert again.losses == history.losses
        assert equal(resumed, student)


# --- early stopping


def scores(values: list[float]) -> Any:
    found = iter(values)
    return lambda _: {"score": next(found)}


@pytest.mark.parametrize(
    ("values", "larger", "epochs", "best"),
    [
        ([1.0, 3.0, 2.0, 2.5, 9.0], True, 4, 2),
        ([5.0, 3.0, 4.0, 3.0, 0.0], False, 4, 2),
        ([1.0, 2.0, 3.0, 4.0, 5.0], True, 5, 5),
        ([math.nan, 1.0, math.nan, 0.5, 2.0], True, 4, 2),
    ],
)
def test_early_stopping(values: list[float], larger: bool, epochs: int, best: int, tmp_path: Path) -> None:
    rule = EarlyStopping("score", patience=2, larger_is_better=larger)
    plan = TrainingPlan(epochs=5, early_stopping=rule, schedule="constant")
    kept: list[nn.Module] = []

    class Keep(Callback):
        def epoch(self, run: Run, record: Any) -> None:
            kept.append(copy.deepcopy(run.distiller.student))

    path = tmp_path / "run.pt"
    student, history = fit(plan, scores(values), callbacks=[Keep()], checkpoint=path)
    assert len(history.epochs) == epochs
    assert equal(student, kept[best - 1])
    again, same = fit(plan, checkpoint=path)  # a run that has stopped is complete
    assert same.losses == history.losses
    assert len(same.epochs) == epochs
    assert equal(again, student)


def test_early_stopping_must_find_its_metric() -> None:
    plan = TrainingPlan(epochs=2, early_stopping=EarlyStopping("accuracy"))
    with pytest.raises(ValueError, match="metric is 'accuracy', but validate returned score; name one of these"):
        fit(plan, scores([1.0]))
    with pytest.raises(ValueError, match="patience is 0"):
        EarlyStopping(patience=0)


# --- precision and memory


def test_bf16_runs_models_under_autocast_and_keeps_parameters(tmp_path: Path) -> None:
    student, teacher = mlp(hidden=64), mlp(seed=9, hidden=64)
    kinds: dict[str, torch.dtype] = {}
    student[0].register_forward_hook(lambda _, __, out: kinds.update(student=out.dtype))
    teacher[0].register_forward_hook(lambda _, __, out: kinds.update(teacher=out.dtype))
    plan = TrainingPlan(epochs=3, precision="bf16", lr=0.02)
    losses = Distiller(teacher, student, [SoftTargets(2.0, 0.7), HardLabels()]).fit(loader(), plan).losses
    assert kinds == {"student": torch.bfloat16, "teacher": torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    exact = Distiller(mlp(seed=9, hidden=64), mlp(hidden=64), [SoftTargets(2.0, 0.7), HardLabels()])
    expected = exact.fit(loader(), TrainingPlan(epochs=3, lr=0.02)).losses
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.05)


def test_a_quantised_teacher_is_not_autocast() -> None:
    teacher = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES))
    teacher[1] = Int8Linear.from_float(teacher[1])
    kinds: list[torch.dtype] = []
    teacher[0].register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    Distiller(teacher, mlp(), SoftTargets()).fit(loader(), TrainingPlan(steps=1, precision="bf16"))
    assert kinds == [torch.float32]


class Blocks(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(FEATURES, 64), nn.Dropout(0.2), nn.GELU(), nn.Linear(64, FEATURES))  # noqa: E731
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def kept_numbers(student: nn.Module, patterns: Any) -> int:
    """How many numbers the forward pass keeps for the backward pass."""
    count = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal count
        count += x.numel() if not isinstance(x, nn.Parameter) else 0
        return x

    with recomputed(student, patterns), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        student(torch.ones(32, FEATURES)).sum()
    return count


def test_recomputation_gives_the_same_gradients_from_less_memory() -> None:
    students = []
    for patterns in ((), "blocks.*"):
        torch.manual_seed(0)
        student, teacher = Blocks(), Blocks()
        strategies = [SoftTargets(), HiddenStates("blocks.*")]
        plan = TrainingPlan(epochs=1, recompute=patterns)
        history = Distiller(teacher, student, strategies).fit(loader(), plan)
        students.append((student, history.losses))
    assert students[0][1] == students[1][1]
    assert equal(students[0][0], students[1][0])
    assert "forward" not in vars(students[1][0].blocks[0])
    assert kept_numbers(Blocks(), "blocks.*") < 0.2 * kept_numbers(Blocks(), ())
    with pytest.raises(ValueError, match="no module of the student is named 'layers"):
        fit(TrainingPlan(epochs=1, recompute="layers.*"))


# --- callbacks and records


class Recorder(Callback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[Any] = []
        self.stop_at = stop_at

    def begin(self, run: Run) -> None:
        self.events.append(("begin", run.step))

    def step(self, run: Run) -> None:
        self.events.append(("step", run.step, run.loss, sum(run.terms.values())))
        run.stopping = run.step == self.stop_at

    def epoch(self, run: Run, record: Any) -> None:
        self.events.append(("epoch", record.epoch, run.distiller.student.training))

    def end(self, run: Run) -> None:
        self.events.append(("end", run.step))


def test_callbacks_are_called_in_order(tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "run.pt"
    plan = TrainingPlan(epochs=1, schedule="constant")
    _, history = fit(plan, callbacks=[recorder], checkpoint=path)
    kinds = [event[0] for event in recorder.events]
    assert kinds == ["begin", *["step"] * 11, "epoch", "end"]
    assert [event[2] for event in recorder.events if event[0] == "step"] == history.losses
    assert all(e[2] == pytest.approx(e[3]) for e in recorder.events if e[0] == "step")
    assert recorder.events[-2] == ("epoch", 1, False)
    again = Recorder()
    fit(TrainingPlan(epochs=2, schedule="constant"), callbacks=[again], checkpoint=path)
    assert again.events[0] == ("begin", 11)
    assert again.events[1][:2] == ("step", 12)


def test_a_callback_ends_the_run_and_end_is_called_after_an_exception() -> None:
    recorder = Recorder(stop_at=14)
    _, history = fit(TrainingPlan(epochs=5), callbacks=[recorder], validate=noisy_validation)
    assert [epoch.step for epoch in history.epochs] == [11, 14]
    assert recorder.events[-2:] == [("epoch", 2, False), ("end", 14)]
    failing = Recorder()
    with pytest.raises(StopError):
        Distiller(Teacher(5, stop), mlp(), SoftTargets()).fit(loader(), TrainingPlan(epochs=1), callbacks=[failing])
    assert failing.events[-1] == ("end", 4)


def test_each_strategys_share_of_the_loss_is_recorded() -> None:
    strategies = [SoftTargets(2.0, 1.0), (0.5, HardLabels()), (0.25, HardLabels(label_smoothing=0.1))]
    history = Distiller(Teacher(), mlp(), strategies).fit(loader(), TrainingPlan(epochs=1, accumulate=2))
    terms = history.epochs[0].terms
    assert list(terms) == ["SoftTargets", "HardLabels 1", "HardLabels 2"]
    assert sum(terms.values()) == pytest.approx(history.epochs[0].loss)
    assert min(terms.values()) > 0.0
    assert History.from_dict(history.to_dict()) == history


def test_a_loop_of_ones_own_gets_the_same_gradient() -> None:
    x, y = data(8).tensors
    teacher, student, wrapped = Teacher().train(), mlp(), nn.Sequential()
    wrapped.add_module("module", student)
    distiller = Distiller(teacher, student, [SoftTargets(2.0, 0.7), HiddenStates("0", "model.0")], sample=(x, y))
    distiller.loss((x, y)).backward()
    found = [p.grad.clone() for p in distiller.parameters()]
    assert len(found) == 4 + 2  # the projection's are among them
    assert teacher.training
    for p in distiller.parameters():
        p.grad = None
    distiller.loss((x, y), student=wrapped).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(distiller.parameters(), found, strict=True))
    distiller.loss((x, torch.full_like(y, -100))).backward()  # only the hint counts
    Distiller(teacher, student, SoftTargets()).loss((x, torch.full_like(y, -100))).backward()  # nothing does
    for p in distiller.parameters():
        p.grad = None
    plan = TrainingPlan(steps=1, optimizer="sgd", clip_grad_norm=None)
    distiller.fit([(x, y)], plan)
    assert all(torch.equal(p.grad, g) for p, g in zip(distiller.parameters(), found, strict=True))


def test_the_teacher_is_swapped_to_int8_within_a_bound() -> None:
    item = torch.randn(64, 512), torch.randint(CLASSES, (64,))
    teacher = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, CLASSES))
    student = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    strategies = [SoftTargets(), HiddenStates("1")]
    swapped = Distiller(teacher, student, strategies, sample=item, teacher_error=0.05)
    found = swapped.int8_teacher
    assert found is not None
    assert found.used
    assert set(found.errors) == {"output", "1"}
    assert swapped.teacher is found.model
    assert not any(isinstance(module, Int8Linear) for module in teacher.modules())
    assert swapped.fit([item], TrainingPlan(steps=2)).step == 2
    kept = Distiller(teacher, student, strategies, sample=item, teacher_error=1e-6)
    assert kept.teacher is teacher
    with pytest.raises(ValueError, match=r"teacher_error is 0.05, which needs a teacher that is run, and sample="):
        Distiller(teacher, student, SoftTargets(), teacher_error=0.05)
