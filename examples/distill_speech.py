"""Spoken words in noise: what a network with 1/26 of its teacher's parameters gains by each way of distilling.

    apt-get install espeak-ng
    python examples/distill_speech.py                    # 24 words, 720 of 5,760 clips labelled, 5 seeds
    python examples/distill_speech.py --labels 5760
    python examples/distill_speech.py --quick            # under a minute: only to see it run

The data set is made here: espeak-ng speaks 24 commands and digits in 52 voices, seven accents, at all speeds and
pitches, which are put into rooms and noise (see speech_words.py). The voices of the test clips are not those of the
training clips. The teacher, a residual network over log-mel features, has learned from all training clips with their
labels; its outputs for them are computed once. The student has a few of the labels. Each row of the table adds one
thing to training it on these alone: the teacher's probabilities, its parameters to start from, or its features.

An interrupted run goes on where it was: the clips, the teacher, its outputs and every result are kept in the folder
``--out``, which in the end also holds the page with the table, intervals and curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from speech_words import MELS, TEST_SPEAKERS, TRAINING_SPEAKERS, WORDS, log_mel, placed, spoken_words
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, Subset, TensorDataset

from potstill.distill import (
    CachedTeacher,
    Distiller,
    HardLabels,
    HiddenStates,
    Similarity,
    SoftTargets,
    Strategy,
    TrainingPlan,
    initialise,
)
from potstill.report.study import Study

BATCH, POINTS = 64, 10  # of the curves
SNR = (0.0, 25.0)  # dB


@dataclass(frozen=True)
class Setting:
    """``per_word``: clips of each word by each speaker; the speakers are the first so many."""

    training_speakers: int = len(TRAINING_SPEAKERS)
    test_speakers: int = len(TEST_SPEAKERS)
    per_word: int = 6
    teacher_steps: int = 1200
    steps: int = 1500


QUICK = Setting(training_speakers=8, test_speakers=3, per_word=2, teacher_steps=60, steps=60)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*convolution(width, width, 5), nn.ReLU(), *convolution(width, width, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Network(nn.Module):
    """Log-mel features [n, mels, 1, frames] to logits: convolutions in time, the mels are their channels.

    Height 1, so that a layer's output is a map [n, channels, height, width] to the strategies that compare layers.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.BatchNorm2d(MELS), *convolution(MELS, width, 9, stride=4), nn.ReLU())
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.words = nn.Linear(width, len(WORDS))

    def forward(self, x: Tensor) -> Tensor:
        return self.words(self.blocks(self.stem(x)).mean((2, 3)))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    layer = nn.Conv2d(inputs, outputs, (1, size), (1, stride), (0, size // 2), bias=False)
    return layer, nn.BatchNorm2d(outputs)


def teacher_network() -> Network:
    return Network(width=80, blocks=6)


def student_network() -> Network:
    return Network(width=20, blocks=2)


@dataclass(frozen=True)
class Way:
    """A row of the table: the clips that the student sees, what it learns from them, and what it starts from."""

    sees: str
    strategies: list[Strategy | tuple[float, Strategy]]
    unlabelled: bool = False
    initialised: bool = False


def ways(labels: int, total: int) -> dict[str, Way]:
    """The rows by name; strategies may have parameters, so each run has its own."""
    seen = f"{labels:,} labelled clips"
    soft, hints, similarity = SoftTargets(), HiddenStates("blocks.*"), Similarity("blocks.*")
    found = {
        "student alone": Way(seen, [HardLabels()]),
        "+ probability distillation": Way(f"{seen}, the teacher's outputs for them", [soft]),
        "+ parameter distillation": Way(f"{seen}, the teacher's parameters to start from", [HardLabels()], False, True),
        "+ features: hidden states": Way(f"{seen}, the teacher's maps of them", [HardLabels(), hints]),
        "+ features: similarity": Way(f"{seen}, the teacher's maps of them", [HardLabels(), (300.0, similarity)]),
        "+ probabilities, parameters, hidden states": Way(
            f"{seen}, the teacher's outputs, maps and parameters", [soft, hints], False, True
        ),
    }
    if labels < total:
        # With alpha=1 the labels, which the loader yields all the same, count for nothing.
        found["+ probability distillation, without any label"] = Way(
            f"all {total:,} clips, no label, the teacher's outputs for them", [SoftTargets(alpha=1.0)], True
        )
    return found


@dataclass(frozen=True)
class Words:
    """Features float32 [clips, mels, 1, frames] and labels int64 [clips]."""

    training: TensorDataset
    test_x: Tensor
    test_y: Tensor

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """In per cent of the test clips; the model is in evaluation mode."""
        found = torch.cat([model(part).argmax(-1) for part in self.test_x.split(500)])
        return 100 * float((found == self.test_y).float().mean())


def prepare(folder: Path, setting: Setting) -> Words:
    """The clips, spoken or read from the folder, and their features."""
    voices = TRAINING_SPEAKERS[: setting.training_speakers], TEST_SPEAKERS[: setting.test_speakers]
    training, test = (spoken_words(folder, speakers, setting.per_word) for speakers in voices)
    train_x, test_x = (features(placed(clips, seed, SNR)) for seed, clips in enumerate((training, test)))
    return Words(TensorDataset(train_x, training.labels), test_x, test.labels)


def features(samples: Tensor) -> Tensor:
    return torch.cat([log_mel(part) for part in samples.split(500)]).unsqueeze(2)


class Experiment:
    """Trains teacher and students, and keeps what the teacher says of the training clips in ``folder``."""

    def __init__(self, words: Words, setting: Setting, folder: Path) -> None:
        self.words, self.setting = words, setting
        self.teacher = self._teacher(folder / "teacher.pt").eval()
        # Of 6 blocks these are the ones that 2 blocks of the student are paired with.
        layers = ("blocks.2", "blocks.5")
        self.cached = CachedTeacher(self.teacher, words.training, folder / "teacher-outputs", layers=layers)

    def _teacher(self, path: Path) -> nn.Module:
        """Trained on all training clips, from where the checkpoint is: nothing is left to do if that is the end."""
        torch.manual_seed(0)
        model = teacher_network()
        distiller = Distiller(None, model, HardLabels())
        self._train(distiller, self.words.training, self.setting.teacher_steps, 0, 4e-3, checkpoint=path)
        return model

    def student(self, way: Way, labels: int, seed: int) -> tuple[nn.Module, list[float]]:
        """Trained, with its accuracy after each part of the training; the seed decides which clips are labelled."""
        data = self.cached.dataset
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        torch.manual_seed(seed)
        model = student_network()
        sample = next(iter(DataLoader(Subset(data, order[: min(labels, 500)]), batch_size=500)))
        if way.initialised:
            initialise(model, self.teacher, sample=sample, widths="project")
        distiller = Distiller(self.cached, model, way.strategies, sample=sample)
        seen = Subset(data, order if way.unlabelled else order[:labels])
        return model, self._train(distiller, seen, self.setting.steps, seed, 1e-2)

    def _train(
        self,
        distiller: Distiller,
        data: Subset | TensorDataset,
        steps: int,
        seed: int,
        lr: float,
        checkpoint: Path | None = None,
    ) -> list[float]:
        epoch = -(-steps // POINTS) * BATCH  # clips from one point of the curve to the next
        loader = DataLoader(data, BATCH, sampler=Passes(len(data), epoch))
        plan = TrainingPlan(steps=steps, lr=lr, warmup=0.1, seed=seed)
        history = distiller.fit(loader, plan, self.words.accuracy, checkpoint=checkpoint)
        return [epoch.validation["value"] for epoch in history.epochs]


class Passes(Sampler[int]):
    """So many indices below ``size``, in shuffled passes without end: the last of an iteration may be cut short."""

    def __init__(self, size: int, count: int) -> None:
        self._size, self._count = size, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        passes = -(-self._count // self._size)
        yield from torch.cat([torch.randperm(self._size) for _ in range(passes)])[: self._count].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=720, help="how many the student has (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("distilled-speech"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few clips, steps and at most 2 seeds: only to see it run")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks as small as these do not gain from a second
    setting = QUICK if options.quick else Setting()
    folder = options.out / "quick" if options.quick else options.out
    words = prepare(folder / "clips", setting)
    total = len(words.training)
    labels = min(options.labels, total)

    experiment = Experiment(words, setting, folder)
    study = Study(
        f"Spoken words: {labels:,} labelled clips",
        metric="test accuracy",
        unit="%",
        settings={"labelled clips": labels, "words": len(WORDS), "signal to noise, dB": SNR, **asdict(setting)},
        folder=folder,
    )
    if not study.done("teacher", 0):
        value, about = words.accuracy(experiment.teacher), f"all {total:,} clips with their labels"
        study.add("teacher", seed=0, value=value, parameters=size(experiment.teacher), about=about)
    for seed in range(min(options.seeds, 2) if options.quick else options.seeds):
        for name, way in ways(labels, total).items():
            if not study.done(name, seed):
                model, curve = experiment.student(way, labels, seed)
                study.add(name, seed=seed, value=curve[-1], curve=curve, parameters=size(model), about=way.sees)
    study.baseline = "student alone"
    study.note(
        f"espeak-ng speaks {len(WORDS)} words; the {setting.test_speakers} voices of the test clips are not among the "
        f"{setting.training_speakers} of the training clips. A residual network teaches a narrower and shallower one. "
        "Each row adds something of the teacher to training the student on its labelled clips; below its name stands "
        "what it sees. The rows of a seed share the choice of labelled clips, the initial weights (but where these "
        "come from the teacher) and the number of steps. The weights after the last step count: nothing is chosen by "
        "the test clips."
    )
    page = study.write()
    Console().print(study.table(), f"\n{page}")


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
