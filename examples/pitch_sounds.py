"""Frames of sound for distill_pitch.py: tones and sung vowels whose pitch is known, and speech, whose pitch is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from speech_words import ACCENTS, RATE, Utterance, check_espeak, speak
from torch import Tensor

FRAME = 1024  # samples
LOWEST, HIGHEST = 65.0, 1000.0  # Hz

SENTENCES = (
    "The kettle is on the stove and nobody is watching it.",
    "Where did you leave the keys to the old garden shed?",
    "We may arrive a little earlier than you all think!",
    "Seven lazy lions were lying in the morning sun.",
    "Oh no, I believe we are on the wrong railway line.",
    "Do you remember how many boats were in the harbour?",
)
# The first three formants of six vowels, in Hz: round numbers near what phonetics books give for men.
VOWELS = (
    (730, 1090, 2440),
    (530, 1840, 2480),
    (270, 2290, 3010),
    (570, 840, 2410),
    (300, 870, 2240),
    (640, 1190, 2390),
)

Sound = NDArray[np.float64]


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames float32 [count, 1024] of harmonics that fall off at random, in noise, and their pitch in Hz [count]."""
    return _frames(_tone, count, seed)


def vowels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same of sung vowels: pulses with jitter through the resonances of a mouth, and breath."""
    return _frames(_vowel, count, seed)


def speech(count: int, speakers: Sequence[str], seed: int) -> Tensor:
    """Frames float32 [count, 1024] out of what espeak-ng says with these voices, where it is not silent."""
    check_espeak(speakers)
    rng = np.random.default_rng(seed)
    utterances = [
        Utterance(text, f"{rng.choice(ACCENTS)}+{speaker}", int(rng.integers(110, 200)), int(rng.integers(100)))
        for speaker in speakers
        for text in rng.choice(SENTENCES, 3, replace=False).tolist()
    ]
    frames = torch.cat([clip.unfold(0, FRAME, FRAME // 2) for clip in speak(utterances)])
    power = frames.square().mean(-1)
    frames = frames[power > 1e-3 * power.mean()]
    if len(frames) < count:
        raise ValueError(f"{len(utterances)} sentences have {len(frames)} frames, fewer than {count}")
    chosen = frames[torch.from_numpy(rng.permutation(len(frames))[:count])]
    return normalised(torch.stack([_in_noise(frame, rng) for frame in chosen]))


def normalised(frames: Tensor) -> Tensor:
    """Each of mean 0 and standard deviation 1, as CREPE takes them."""
    frames = frames - frames.mean(-1, keepdim=True)
    return frames / frames.std(-1, keepdim=True).clamp(min=1e-8)


def _frames(make: Callable[[Sound, np.random.Generator], Sound], count: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    pitch = LOWEST * (HIGHEST / LOWEST) ** rng.random(count)
    # The pitch glides through the frame and is what is asked for in its middle.
    time = (np.arange(FRAME) - (FRAME - 1) / 2) / RATE
    found = []
    for hertz in pitch:
        glide = rng.uniform(-2.0, 2.0)  # octaves per second
        phase = 2.0 * math.pi * hertz * time * (1.0 + glide * math.log(2.0) * time / 2.0)
        found.append(_in_noise(torch.from_numpy(make(phase, rng)).float(), rng))
    return normalised(torch.stack(found)), torch.from_numpy(pitch).float()


def _tone(phase: Sound, rng: np.random.Generator) -> Sound:
    amplitudes = np.arange(1, 11) ** -rng.uniform(0.5, 3.0)
    return _harmonics(phase, amplitudes * rng.uniform(0.2, 1.0, 10), rng.uniform(0.0, 2.0 * math.pi, 10))


def _vowel(phase: Sound, rng: np.random.Generator) -> Sound:
    hertz = (phase[-1] - phase[0]) / (2.0 * math.pi) * RATE / (FRAME - 1)
    numbers = np.arange(1, max(int(0.45 * RATE / hertz), 1) + 1)
    formants = np.array(VOWELS[rng.integers(len(VOWELS))]) * rng.uniform(0.9, 1.25)
    # A pulse of the vocal folds falls by 12 dB per octave; a resonance of bandwidth b at f has the power
    # 1 / ((1 - (x/f)²)² + (b x / f²)²) at x.
    x = numbers[:, None] * hertz / formants
    resonances = 1.0 / np.sqrt((1.0 - x**2) ** 2 + (rng.uniform(0.05, 0.15) * x) ** 2)
    amplitudes = resonances.prod(-1) / numbers ** rng.uniform(0.0, 1.0)
    jitter = rng.normal(0.0, 0.02, len(numbers))
    voice = _harmonics(phase, amplitudes, jitter * numbers)
    return voice + rng.uniform(0.0, 0.1) * voice.std() * rng.standard_normal(FRAME)


def _harmonics(phase: Sound, amplitudes: Sound, offsets: Sound) -> Sound:
    numbers = np.arange(1, len(amplitudes) + 1)
    rate = np.abs(np.diff(phase)).max() / (2.0 * math.pi)  # of the fundamental, per sample
    below = numbers * rate < 0.5  # of Nyquist's frequency: others would be heard as lower ones
    return (amplitudes[below, None] * np.cos(numbers[below, None] * phase + offsets[below, None])).sum(0)


def _in_noise(frame: Tensor, rng: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(rng.standard_normal(FRAME, dtype=np.float32))
    return frame + frame.std() * 10 ** (-rng.uniform(0.0, 40.0) / 20) * noise
