"""The stages of the demo, from training the teacher to the written report."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from potstill.checkpoint import save
from potstill.demo.data import Batches, Images
from potstill.demo.evaluate import BATCHES, gain, latencies, logits, parameters, score
from potstill.demo.models import TASKS, Task, Training
from potstill.demo.reload import in_fresh_process
from potstill.distill import Distiller, HardLabels, History, SoftTargets, Strategy, TrainingPlan
from potstill.report.machine import machine
from potstill.report.render import page
from potstill.transform import Int8, quantize_

_TITLES = {
    "teacher": "Teacher",
    "plain": "Student, no teacher",
    "distilled": "Student, distilled",
    "int8": "Student, distilled, int8",
}


def run(task: str, out: Path, seed: int, console: Console) -> dict[str, Any]:
    """Runs every stage of ``task`` (``mnist`` or ``digits``), and returns what ``out/report.json`` holds.

    Next to it are written ``report.html``, made from the same numbers, and the four models. Training goes on where an
    earlier run into ``out`` was interrupted, and is not repeated where that was complete; ``seed`` decides the initial
    weights, the order of the images and their shifts.
    """
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    _say(console, 1, "reading the images")
    bench = _Bench(TASKS[task], TASKS[task].images(), out, seed)
    soft = SoftTargets(temperature=4.0, alpha=0.9)
    models, histories = bench.train_all(soft, console)
    _say(console, 5, "converting the student to int8, saving, loading in a new process")
    models["int8"] = copy.deepcopy(models["distilled"])
    quantized = quantize_(models["int8"], Int8(), only_if_faster=True, sample_input=bench.test_x[: max(BATCHES)])
    outputs = {name: logits(model, bench.test_x) for name, model in models.items()}
    described = {name: bench.describe(name, model, outputs[name]) for name, model in models.items()}
    described["int8"]["parameters"] = described["distilled"]["parameters"]  # int8 layers hold them padded and packed
    again = in_fresh_process(task, out / described["int8"]["file"])
    _say(console, 6, "measuring")
    times = latencies({name: models[name] for name in ("teacher", "distilled", "int8")}, bench.test_x)
    target = bench.images.test_y
    record = {
        "task": task,
        "seed": seed,
        "images": bench.describe_images(),
        "machine": machine(),
        "models": {name: about | {"latency": times.get(name)} for name, about in described.items()},
        "distillation": {
            "temperature": soft.temperature,
            "alpha": soft.alpha,
            "gain": gain(outputs["distilled"], outputs["plain"], target),
        },
        "training": {
            name: [{"seconds": e.seconds, "train_loss": e.loss, **e.validation} for e in history.epochs]
            for name, history in histories.items()
        },
        "quantize": quantized.to_dict(),
        "reload": {"identical": torch.equal(again, outputs["int8"]), **score(again, target)},
        "seconds": time.perf_counter() - begin,
    }
    (out / "report.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    (out / "report.html").write_text(page(record))
    return record


def _say(console: Console, stage: int, what: str) -> None:
    console.print(f"[bold]{stage}/6[/] {what}")


@dataclass(frozen=True)
class _Bench:
    """What all stages of a run share."""

    task: Task
    images: Images
    out: Path
    seed: int

    @cached_property
    def test_x(self) -> Tensor:
        return self.images.normalise(self.images.test_x)

    def train_all(self, soft: SoftTargets, console: Console) -> tuple[dict[str, nn.Module], dict[str, History]]:
        """The teacher, the student without a teacher and the distilled student, and how their training went."""
        task = self.task
        stages: list[tuple[str, str, Callable[[], nn.Module], Training, Strategy]] = [
            ("teacher", "training the teacher", task.teacher, task.teacher_training, HardLabels()),
            ("plain", "training the student without the teacher", task.student, task.student_training, HardLabels()),
            ("distilled", "distilling the same student from the teacher", task.student, task.student_training, soft),
        ]
        models: dict[str, nn.Module] = {}
        histories: dict[str, History] = {}
        for number, (name, what, build, training, strategy) in enumerate(stages, start=2):
            _say(console, number, what)
            teacher = models["teacher"] if strategy.needs_teacher else None
            models[name], histories[name] = self.train(name, build, training, teacher, strategy)
        return models, histories

    def train(
        self,
        name: str,
        build: Callable[[], nn.Module],
        training: Training,
        teacher: nn.Module | None,
        strategy: Strategy,
    ) -> tuple[nn.Module, History]:
        """A model of the seed's initial weights, trained; the run is kept in ``<name>.pt``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = build()
        batches = Batches(self.images, training.batch, self.task.shift)
        plan = TrainingPlan(epochs=training.epochs, lr=training.lr, warmup=0.3, clip_grad_norm=None, seed=self.seed)
        checkpoint = self.out / f"{name}.pt"
        history = Distiller(teacher, model, strategy).fit(batches, plan, self._validate, checkpoint=checkpoint)
        return model.eval(), history

    def _validate(self, model: nn.Module) -> dict[str, float]:
        return score(logits(model, self.test_x), self.images.test_y)

    def describe(self, name: str, model: nn.Module, outputs: Tensor) -> dict[str, Any]:
        """Saves the model to ``<name>.safetensors`` and says what it is: size, and how good its test outputs are."""
        path = self.out / f"{name}.safetensors"
        save(model, path)
        return {
            "title": _TITLES[name],
            **score(outputs, self.images.test_y),
            "parameters": parameters(model),
            "bytes": path.stat().st_size,
            "file": path.name,
            "architecture": str(model),
        }

    def describe_images(self) -> dict[str, Any]:
        """Where the images are from, how many there are, and how they are shifted."""
        images = self.images
        return {
            "name": images.name,
            "source": images.source,
            "train": len(images.train_y),
            "test": len(images.test_y),
            "shift": self.task.shift,
        }
