"""Trains small students on few labels with every distillation strategy; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
from torch import Tensor, nn

from potstill.demo.data import Images, digits
from potstill.distill import (
    DIST,
    STRATEGIES,
    AttentionRelations,
    AttentionTransfer,
    Contrastive,
    Distiller,
    Gram,
    HardLabels,
    HiddenStates,
    LogitStandardisation,
    Relational,
    Similarity,
    SoftTargets,
    Strategy,
    TrainingPlan,
)

SEEDS = range(5)
CHOICE_SEEDS = range(100, 103)  # other students, other labelled images
LABELS = 100
EPOCHS = 75
BATCH = 50
TEACHER_WIDTH, STUDENT_WIDTH = 64, 16
MAPS = ["maps1", "maps2"]
RELATED = ("query", "key", "value")

# What the strategy is, and its weight beside hard labels: the one of CHOICES with which the student was best on
# training images that it did not see (--weights), over other seeds than the measured ones.
TERMS: dict[str, tuple[Callable[[], Strategy], float]] = {
    "soft_targets": (lambda: SoftTargets(4.0, alpha=1.0), 1.0),
    "logit_standardisation": (lambda: LogitStandardisation(2.0, alpha=1.0), 100.0),
    "dist": (lambda: DIST(4.0), 1000.0),
    "hidden_states": (lambda: HiddenStates([*MAPS, "pooled"]), 1000.0),
    "attention_transfer": (lambda: AttentionTransfer(MAPS), 0.1),
    "attention_relations": (lambda: AttentionRelations(RELATED, heads=4), 1.0),
    "similarity": (lambda: Similarity("pooled"), 1000.0),
    "relational": (lambda: Relational("pooled"), 10.0),
    "contrastive": (lambda: Contrastive("pooled"), 100.0),
    "gram": (lambda: Gram(MAPS), 1.0),
}
CHOICES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


class Net(nn.Module):
    """Two convolutions and one head of attention over the 4 x 4 pixels left, so that every strategy finds its layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.maps2 = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU())
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.pooled = nn.Identity()
        self.classes = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.maps2(self.maps1(x)).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return self.classes(self.pooled((tokens + mixed).mean(1)))


class Loader:
    """Shuffled batches of all of ``x``."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.x[rows], self.y[rows]) for rows in torch.randperm(len(self.y)).split(self.size))


@dataclass
class Lesson:
    """A seed's teacher, the images that its students learn from, and those that they are judged by."""

    seed: int
    teacher: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, images: Images, seed: int, held_out: bool) -> Lesson:
        x, y = images.normalise(images.train_x), images.train_y
        test = images.normalise(images.test_x), images.test_y
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(y), generator=generator)
        # As many of each digit: the first of each in a random order.
        rows = torch.cat([order[y[order] == digit][: LABELS // 10] for digit in range(10)])
        rest = torch.ones(len(y), dtype=torch.bool).index_fill(0, rows, False)
        torch.manual_seed(seed)
        teacher = Net(TEACHER_WIDTH)
        Distiller(None, teacher, HardLabels()).fit(Loader(x, y, 64), plan(10, seed))
        return cls(seed, teacher, (x[rows], y[rows]), (x[rest], y[rest]) if held_out else test)

    def accuracy(self, terms: list[tuple[float, Strategy]]) -> float:
        """Of a student that learns by these terms of the loss."""
        torch.manual_seed(self.seed + 1000)  # every student of a seed starts from the same weights
        student = Net(STUDENT_WIDTH)
        loader = Loader(*self.train, BATCH)
        sample = self.train[0][:2], self.train[1][:2]
        Distiller(self.teacher, student, terms, sample=sample).fit(loader, plan(EPOCHS, self.seed))
        return correct(student, *self.test)


def plan(epochs: int, seed: int) -> TrainingPlan:
    return TrainingPlan(epochs=epochs, lr=1e-2, schedule="constant", clip_grad_norm=None, seed=seed)


def correct(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def interval(differences: list[float]) -> tuple[float, float]:
    """Their mean, and half of the width of its 95 % confidence interval (Student's t)."""
    n = len(differences)
    half = student_t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.fmean(differences), float(half)


def measure(lessons: list[Lesson]) -> dict[str, dict[str, list[float]]]:
    """Test accuracies by strategy, then by "alone" or "with hard labels": one of each seed."""
    found = {"hard_labels": {"alone": [lesson.accuracy([(1.0, HardLabels())]) for lesson in lessons]}}
    for name, (make, weight) in TERMS.items():
        found[name] = {
            "alone": [lesson.accuracy([(weight, make())]) for lesson in lessons],
            "with hard labels": [lesson.accuracy([(1.0, HardLabels()), (weight, make())]) for lesson in lessons],
        }
    return found


def summary(found: dict[str, dict[str, list[float]]]) -> list[dict[str, object]]:
    baseline = found["hard_labels"]["alone"]
    rows: list[dict[str, object]] = []
    for name, ways in found.items():
        for way, accuracies in ways.items():
            row: dict[str, object] = {"strategy": name, "way": way, "accuracies": accuracies}
            row["mean"] = statistics.fmean(accuracies)
            if name != "hard_labels":
                row["weight"] = TERMS[name][1]
                row["difference"], row["half_interval"] = interval(
                    [a - b for a, b in zip(accuracies, baseline, strict=True)]
                )
            rows.append(row)
    return rows


def table(rows: list[dict[str, object]]) -> Table:
    shown = Table("strategy", "", "accuracy %", "difference to hard labels, 95 %", title="scikit-learn digits")
    for row in rows:
        difference = (
            f"{_points(row['difference']):+.1f} ± {_points(row['half_interval']):.1f}" if "weight" in row else ""
        )
        shown.add_row(str(row["strategy"]), str(row["way"]), f"{_points(row['mean']):.1f}", difference)
    return shown


def _points(value: object) -> float:
    assert isinstance(value, float)
    return 100.0 * value


def choose(images: Images, console: Console) -> None:
    """Prints which weight is best beside hard labels, on training images that the student does not see."""
    lessons = [Lesson.of(images, seed, held_out=True) for seed in CHOICE_SEEDS]
    shown = Table("strategy", *(f"{weight:g}" for weight in CHOICES), title="accuracy % by weight")
    for name, (make, _) in TERMS.items():
        means = [
            statistics.fmean(lesson.accuracy([(1.0, HardLabels()), (weight, make())]) for lesson in lessons)
            for weight in CHOICES
        ]
        shown.add_row(name, *(f"{100 * mean:.1f}" for mean in means))
    console.print(shown)


def main() -> int:
    options = _options()
    torch.set_num_threads(1)  # nets so small lose by a second
    console = Console(width=None if sys.stdout.isatty() else 120)
    missing = STRATEGIES.keys() - TERMS.keys() - {"hard_labels"}
    if missing:
        raise SystemExit(f"no row in TERMS for {', '.join(sorted(missing))}")
    images = digits()
    if options.weights:
        choose(images, console)
        return 0
    begin = time.perf_counter()
    lessons = [Lesson.of(images, seed, held_out=False) for seed in SEEDS]
    teachers = [correct(lesson.teacher, *lesson.test) for lesson in lessons]
    rows = summary(measure(lessons))
    console.print(table(rows))
    console.print(f"teachers: {100 * statistics.fmean(teachers):.1f} %; {time.perf_counter() - begin:.0f} s")
    settings = {
        "data": images.name,
        "seeds": list(SEEDS),
        "labelled images": LABELS,
        "test images": len(images.test_y),
        "epochs": EPOCHS,
        "batch": BATCH,
        "teacher": {"width": TEACHER_WIDTH, "parameters": _size(TEACHER_WIDTH), "accuracies": teachers},
        "student": {"width": STUDENT_WIDTH, "parameters": _size(STUDENT_WIDTH)},
        "torch": torch.__version__,
    }
    options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    console.print(f"written to {options.json}")
    return 0


def _size(width: int) -> int:
    return sum(parameter.numel() for parameter in Net(width).parameters())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains small students with every distillation strategy.")
    parser.add_argument("--weights", action="store_true", help="only show which weight suits each strategy best")
    results = Path(__file__).parent / "results" / "strategies-digits.json"
    parser.add_argument("--json", type=Path, default=results, help="where the numbers go (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
