"""Words spoken by espeak-ng, and log-mel features of them: the data set of distill_speech.py, made on this machine.

A speaker is one of espeak-ng's voice variants; every clip has an accent, a speed and a pitch of its own, drawn from a
seed that the clip alone decides. A speaker's clips are one safetensors file, which is made once: an interrupted run
goes on with the next speaker.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import wave
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

RATE = 16000  # samples per second, of everything but what espeak-ng itself says
ESPEAK_RATE = 22050
WINDOW, HOP, MELS = 400, 160, 40  # 25 ms and 10 ms

# fmt: off
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "yes", "no", "up", "down",
    "left", "right", "on", "off", "stop", "go", "open", "close", "forward", "backward",
)
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
TRAINING_SPEAKERS = (
    "m1", "m2", "m3", "m4", "m6", "m7", "m8", "f1", "f2", "f3", "f5", "Alex", "Andy", "Annie", "Gene", "Jacky",
    "Lee", "Marco", "anika", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "edward", "iven",
    "john", "klatt", "klatt2", "max", "Michael", "pablo", "paul", "rob", "robert", "shelby", "travis", "victor",
    "whisper",
)
TEST_SPEAKERS = (
    "m5", "f4", "Alicia", "Denis", "croak", "david", "grandma", "klatt4", "linda", "Mario", "steph2", "whisperf",
)
# fmt: on


class Utterance(NamedTuple):
    """What espeak-ng is asked to say: ``speed`` in words per minute, ``pitch`` from 0 to 99."""

    text: str
    voice: str
    speed: int
    pitch: int


class Clips(NamedTuple):
    """``samples``: int16 at 16 kHz, all clips one after the other; ``lengths`` and ``labels``: int64 [clips]."""

    samples: Tensor
    lengths: Tensor
    labels: Tensor


def spoken_words(folder: Path, speakers: Sequence[str], per_word: int) -> Clips:
    """``per_word`` clips of each of ``WORDS`` by each of the speakers, from ``folder`` or newly synthesised.

    Raises :class:`RuntimeError` if espeak-ng is needed and missing, or does not have the speakers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = json.dumps([WORDS, ACCENTS, per_word, RATE, 1])  # 1: of how clips are drawn and cut, below
    found = {speaker: _read(folder / f"{speaker}.safetensors", recipe) for speaker in speakers}
    missing = [speaker for speaker, clips in found.items() if clips is None]
    if missing:
        check_espeak(missing)
    for speaker in track(missing, f"{len(missing)} speakers", disable=not missing):
        found[speaker] = _speak_words(speaker, per_word)
        _write(folder / f"{speaker}.safetensors", found[speaker], recipe)
    parts = [clips for clips in found.values() if clips is not None]
    return Clips(*(torch.cat(column) for column in zip(*parts, strict=True)))


def check_espeak(speakers: Sequence[str]) -> None:
    """Raises :class:`RuntimeError` if espeak-ng is not installed, or would say nothing in one of the voice variants.

    It takes its usual voice for a variant that it does not have, without a word.
    """
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("the speech is synthesised by espeak-ng, which is not installed: apt-get install espeak-ng")
    listing = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    known = {part.removeprefix("!v/") for line in listing.splitlines() for part in line.split() if "!v/" in part}
    unknown = sorted({*speakers} - known)
    if unknown:
        raise RuntimeError(f"this espeak-ng lacks the voices {', '.join(unknown)}; versions 1.51 and later have them")


def speak(utterances: Sequence[Utterance]) -> list[Tensor]:
    """Each as float32 [samples] at 16 kHz between -1 and 1, without the silence around it."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: the work is done by espeak-ng's processes
        return [trimmed(resample(raw, ESPEAK_RATE, RATE)) for raw in pool.map(_say, utterances)]


def trimmed(samples: Tensor, threshold: float = 0.01, margin: int = RATE // 50) -> Tensor:
    """Without what is below ``threshold`` of the peak at the beginning and the end, but for a margin."""
    loud = (samples.abs() > threshold * samples.abs().max()).nonzero()
    if not len(loud):
        return samples[:0]
    return samples[max(int(loud[0]) - margin, 0) : int(loud[-1]) + margin]


def resample(samples: Tensor, before: int, after: int, width: int = 24) -> Tensor:
    """[samples] at one rate -> float32 at another: band-limited interpolation, a windowed sinc of 2 ``width`` lobes.

    y[n] = sum over k of x[k] h(n before/after - k) with h(t) = c sinc(c t) cos²(pi c t / 2 width), whose cut-off is at
    95 % of the lower of the two Nyquist frequencies (c). The fraction of n before/after repeats after
    ``after`` / gcd outputs: one filter for each is a strided convolution.
    """
    divisor = np.gcd(before, after)
    down, up = int(before // divisor), int(after // divisor)
    filters, left = _filters(down, up, width)
    count = -(-len(samples) * up // down)
    padded = torch.nn.functional.pad(samples, (left, filters.shape[-1] + down))
    found = torch.nn.functional.conv1d(padded[None, None], filters, stride=down)
    return found[0].T.reshape(-1)[:count]


@lru_cache
def _filters(down: int, up: int, width: int) -> tuple[Tensor, int]:
    """[up, 1, taps]: output p of each group of ``up`` from the inputs, of which ``left`` lie before the group's."""
    cutoff = 0.95 * min(1.0, up / down)
    left = int(np.ceil(width / cutoff))
    taps = torch.arange(-left, down + left, dtype=torch.float64)
    distance = torch.arange(up, dtype=torch.float64)[:, None] * down / up - taps
    scaled = cutoff * distance
    window = torch.cos(torch.pi * scaled / (2 * width)).square().masked_fill(scaled.abs() > width, 0.0)
    return (cutoff * torch.sinc(scaled) * window).float()[:, None], left


def placed(clips: Clips, seed: int, snr: tuple[float, float], seconds: float = 1.0) -> Tensor:
    """Each clip somewhere in so many seconds of noise, in a room, at some level: float32 [clips, samples].

    The signal-to-noise ratio is drawn from ``snr``, in dB over the clip's own duration. The noise is, in equal shares
    of the clips, white, falling by 3 dB per octave, or four voices of other clips at once.
    """
    rng = np.random.default_rng(seed)
    size = int(seconds * RATE)
    parts = [part.float() / 32768.0 for part in clips.samples.split(clips.lengths.tolist())]
    found = torch.zeros(len(parts), size)
    for row, part in zip(found, parts, strict=True):
        voice = _in_room(part, rng)[:size]
        begin = rng.integers(size - len(voice) + 1)
        noise = (_white, _pink, partial(_babble, parts))[rng.integers(3)](size, rng)
        level = voice.square().mean().sqrt() * 10 ** (-rng.uniform(*snr) / 20)
        row.copy_(noise * (level / noise.square().mean().sqrt().clamp(min=1e-6)))
        row[begin : begin + len(voice)] += voice
        row.mul_(10 ** (rng.uniform(-12.0, 6.0) / 20))
    return found


def log_mel(samples: Tensor) -> Tensor:
    """[batch, samples] at 16 kHz -> [batch, mels, frames]: logarithm of the power in mel bands, minus its mean.

    Frames of 25 ms every 10 ms under a Hann window. The mean over a clip is its level, which says nothing of the word.
    """
    window = torch.hann_window(WINDOW, dtype=samples.dtype)
    spectrum = torch.stft(samples, WINDOW, HOP, WINDOW, window, center=False, return_complex=True)
    power = mel_filters().to(samples.dtype) @ spectrum.abs().square()
    found = (power + 1e-6).log()
    return found - found.mean((-2, -1), keepdim=True)


@lru_cache
def mel_filters(low: float = 60.0, high: float = 7600.0) -> Tensor:
    """[mels, frequencies]: triangles between points that lie evenly on the mel scale 2595 log10(1 + f/700)."""
    ends = 2595.0 * np.log10(1.0 + np.array([low, high]) / 700.0)
    points = 700.0 * (10.0 ** (np.linspace(*ends, MELS + 2) / 2595.0) - 1.0)
    below, centre, above = points[:-2, None], points[1:-1, None], points[2:, None]
    frequencies = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    rising, falling = (frequencies - below) / (centre - below), (above - frequencies) / (above - centre)
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0.0, None)).float()


def _speak_words(speaker: str, per_word: int) -> Clips:
    rng = np.random.default_rng(zlib.crc32(speaker.encode()))
    labels = torch.arange(len(WORDS)).repeat_interleave(per_word)
    utterances = [
        Utterance(WORDS[label], f"{rng.choice(ACCENTS)}+{speaker}", int(rng.integers(130, 230)), int(rng.integers(100)))
        for label in labels.tolist()
    ]
    clips = [(clip[:RATE] * 32767.0).round().to(torch.int16) for clip in speak(utterances)]
    return Clips(torch.cat(clips), torch.tensor([len(clip) for clip in clips]), labels)


def _say(utterance: Utterance) -> Tensor:
    command = ["espeak-ng", "--stdout", "-v", utterance.voice]
    command += ["-s", str(utterance.speed), "-p", str(utterance.pitch), utterance.text]
    answer = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(BytesIO(answer)) as file:
        if file.getframerate() != ESPEAK_RATE:
            raise RuntimeError(
                f"espeak-ng speaks {utterance.voice} at {file.getframerate()} Hz; expected {ESPEAK_RATE}"
            )
        # Written to a pipe, the header cannot tell the length: the rest of the stream is what was said.
        raw = np.frombuffer(file.readframes(len(answer)), np.int16)
    return torch.from_numpy(raw.astype(np.float32) / 32768.0)


def _read(path: Path, recipe: str) -> Clips | None:
    """None if there is no such file, it was made by another recipe, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            clips = Clips(*(file.get_tensor(name) for name in Clips._fields))
            metadata = file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return None
    return clips if metadata == {"recipe": recipe, "checksum": _checksum(clips)} else None


def _write(path: Path, clips: Clips, recipe: str) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(clips._asdict(), temporary, {"recipe": recipe, "checksum": _checksum(clips)})
    os.replace(temporary, path)


def _checksum(clips: Clips) -> str:
    found = 0
    for tensor in clips:
        found = zlib.crc32(tensor.numpy().tobytes(), found)
    return f"{found:08x}"


def _in_room(part: Tensor, rng: np.random.Generator) -> Tensor:
    """With the reverberation of a room, noise that decays by 60 dB in 0.1 to 0.5 s, much weaker than the voice."""
    decay = rng.uniform(0.1, 0.5)
    time = np.arange(int(decay * RATE)) / RATE
    response = rng.standard_normal(len(time)) * 10 ** (-3.0 * time / decay)
    response *= rng.uniform(0.0, 0.5) / np.linalg.norm(response)
    response[0] = 1.0
    size = len(part) + len(response)
    spectrum = np.fft.rfft(part.numpy(), size) * np.fft.rfft(response, size)
    return torch.from_numpy(np.fft.irfft(spectrum, size)[: len(part)]).float()


def _white(size: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(size, dtype=np.float32))


def _pink(size: int, rng: np.random.Generator) -> Tensor:
    spectrum = np.fft.rfft(rng.standard_normal(size)) / np.sqrt(np.arange(1, size // 2 + 2))
    return torch.from_numpy(np.fft.irfft(spectrum, size)).float()


def _babble(parts: Sequence[Tensor], size: int, rng: np.random.Generator) -> Tensor:
    found = torch.zeros(size)
    for index in rng.integers(len(parts), size=8):  # four at a time: a word lasts half of the second or less
        part = parts[index][:size]
        begin = rng.integers(size - len(part) + 1)
        found[begin : begin + len(part)] += part
    return found
