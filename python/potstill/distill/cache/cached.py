"""A teacher whose outputs are read from files."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import default_collate

from potstill.distill.batch import Batch, TopK
from potstill.distill.cache.examples import Collate, IndexedDataset, checksums, described
from potstill.distill.cache.layout import FLOATS, INDICES, INPUTS, LAYER, LOG_PROBS, LOGITS, Manifest
from potstill.distill.cache.source import Examples, Source, fingerprint, same_inputs
from potstill.distill.cache.store import DamagedError, Store, read_manifest, write_manifest, writing
from potstill.distill.features import Patterns, modules_named
from potstill.errors import CacheError
from potstill.transform.progress import Bar


class CachedTeacher(nn.Module):
    """A frozen teacher's outputs for every example of a data set, computed once, on disk, in place of the teacher.

    ``CachedTeacher(teacher, dataset, folder)`` runs the teacher, in evaluation mode and on the device that it is on,
    over a map-style data set of (input, target) or (input, ..., target) in order, ``batch_size`` examples at a time,
    and writes what is missing in ``folder``. Give it to Distiller as the teacher, with loaders over ``cached.dataset``,
    shuffled as you like. Give a loader's own ``collate_fn`` to :func:`collate_indexed`.

    - ``top_k``: hold the log-probabilities of the k likeliest classes, at ``temperature``, instead of all logits; for
      ``SoftTargets`` at that temperature.
    - ``layers``: names of the teacher's modules, with wildcards, whose outputs are held too, for strategies on layers.
    - ``dtype``: float16, bfloat16 or float32, of everything but the classes' numbers.
    - ``collate``: makes a batch of a list of examples; torch's own unless given. All batches need one shape, except for
      the number of examples.

    A run that was killed goes on after the last whole chunk. Every chunk is checked when it is first read; a damaged
    one is computed again, with a warning. The inputs of every example that is read are compared with those that were
    cached. The inputs are compared, not the targets.

    Raises :class:`CacheError` for a folder that holds another cache or cannot be written, for examples that are not
    those of the cache, or differ whenever they are read, and for values that ``dtype`` does not have.

    >>> from torch.utils.data import DataLoader
    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> data = [(torch.randn(4), 0) for _ in range(10)]
    >>> cached = CachedTeacher(teacher, data, "cache", layers="1", dtype=torch.float32)
    >>> item = next(iter(DataLoader(cached.dataset, batch_size=4, shuffle=True)))
    >>> logits, features = cached.outputs(Batch.of(item))
    >>> torch.allclose(logits, teacher(item.item[0])), features["1"].shape
    (True, torch.Size([4, 8]))
    >>> CachedTeacher.open("cache", data)  # needs no teacher
    CachedTeacher('cache', examples=10, bytes_per_example=48, layers=['1'], dtype=float32)
    """

    def __init__(
        self,
        teacher: nn.Module,
        dataset: Any,
        folder: str | os.PathLike[str],
        *,
        top_k: int | None = None,
        temperature: float = 1.0,
        layers: Patterns = (),
        dtype: torch.dtype = torch.float16,
        batch_size: int = 64,
        collate: Collate | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__()
        _check(dataset, top_k, temperature, dtype, batch_size)
        names = tuple(modules_named(teacher, layers, "teacher"))
        examples = Examples(dataset, collate or default_collate)
        kind = str(dtype).removeprefix("torch.")
        source = Source(teacher, examples, batch_size, top_k, float(temperature), names, kind)
        path = Path(folder)
        with writing(path):
            manifest = read_manifest(path)
            if manifest is None:
                manifest = source.manifest()
                write_manifest(path, manifest)
            else:
                _same(path, manifest, teacher=fingerprint(teacher), **_options(source))
        self._set(Store(path, manifest), examples, source)
        missing = self._store.missing()
        whole = sorted({*range(manifest.chunks)} - {*missing})
        if whole:
            self._compare_some(whole, self._records)
        if missing:
            with writing(path):
                self._fill(source, not whole, quiet)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], dataset: Any, *, collate: Collate | None = None) -> CachedTeacher:
        """A complete cache of ``dataset``, without its teacher.

        Raises :class:`CacheError` if it is not complete, or not of this data set; and later, when what is read turns
        out to be damaged.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        if manifest is None:
            raise CacheError(f"CachedTeacher.open: {path} holds no cache; CachedTeacher(teacher, ...) makes one")
        _same(path, manifest, examples=len(dataset))
        cached = cls.__new__(cls)
        nn.Module.__init__(cached)
        cached._set(Store(path, manifest), Examples(dataset, collate or default_collate), None)
        missing = cached._store.missing()
        if missing:
            raise CacheError(
                f"CachedTeacher.open: {len(missing)} of the {manifest.chunks} chunks are missing in {path}; "
                "CachedTeacher(teacher, ...) with the same arguments as before computes them"
            )
        cached._compare_some(range(manifest.chunks), cached._records)
        return cached

    def outputs(self, batch: Batch) -> tuple[Tensor | TopK, dict[str, Tensor]]:
        """The teacher's output for a batch of ``dataset``, and those of its layers by name, in float32.

        The output is logits, or :class:`TopK`; all on the device of the batch. Raises :class:`CacheError` if the
        batch's inputs are not those that were cached, or the files are damaged and no teacher is there.
        """
        indices = self._indices(batch)
        records = self._records(indices)
        self._compare(batch, indices, records)
        found = {c.name: c.to_tensor(records[c.name]) for c in self._store.manifest.columns[1:]}
        found = {name: tensor.to(batch.target.device) for name, tensor in found.items()}
        features = {name: found[LAYER + name] for name in self._store.manifest.layers}
        if LOGITS in found:
            return found[LOGITS], features
        return TopK(found[LOG_PROBS], found[INDICES], self._store.manifest.temperature), features

    @property
    def bytes_per_example(self) -> int:
        """The size of ``outputs.bin`` is this times the examples."""
        return int(self._store.record.itemsize)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Itself, and something by the name of each layer that is held, so that strategies find those and no other."""
        yield prefix, self
        for name, layer in self._layers.items():
            yield f"{prefix}.{name}" if prefix else name, layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises :class:`TypeError`: outputs are known of the examples of the data set only."""
        raise TypeError("CachedTeacher: it cannot be run on inputs; outputs(batch) reads what is known of a batch")

    def extra_repr(self) -> str:
        """What is held."""
        manifest = self._store.manifest
        options = [f"{str(self._store.folder)!r}", f"examples={manifest.examples}"]
        options.append(f"bytes_per_example={self.bytes_per_example}")
        if manifest.top_k is not None:
            options.append(f"top_k={manifest.top_k}, temperature={manifest.temperature}")
        if manifest.layers:
            options.append(f"layers={list(manifest.layers)}")
        return ", ".join([*options, f"dtype={manifest.dtype}"])

    def _set(self, store: Store, examples: Examples, source: Source | None) -> None:
        self._store = store
        self._examples = examples
        self._source = source  # not a module: the teacher's parameters are not parts of this
        self._layers = {name: nn.Identity() for name in store.manifest.layers}
        self.dataset = IndexedDataset(examples.dataset)

    def _fill(self, source: Source, new: bool, quiet: bool) -> None:
        bar = Bar(quiet=quiet)
        with bar.shown():
            missing = self._store.missing()  # while this process waited, another one may have written them
            for chunk in bar.track(missing, f"teacher's outputs for {self._store.folder.name}"):
                self._store.write(chunk, source.records(self._store.manifest, chunk))
                if new:  # before hours are spent on examples that never come again
                    self._compare_some([chunk], self._store.read)
                    new = False

    def _compare_some(self, chunks: Sequence[int], read: Callable[[NDArray[np.int64]], NDArray[Any]]) -> None:
        """Compares the first and the last example of the chunks with the data set's."""
        span = self._store.manifest.span
        some = [span(chunks[0])[0], span(chunks[-1])[-1]]
        indices = np.array(some)
        self._compare(self._examples.batch(some), indices, read(indices))

    def _records(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        while True:
            try:
                return self._store.read(indices)
            except DamagedError as error:
                if self._source is None:
                    raise
                self._repair(self._source, error.chunk)

    def _repair(self, source: Source, chunk: int) -> None:
        span = self._store.manifest.span(chunk)
        warnings.warn(
            f"CachedTeacher: the examples {span.start} to {span.stop - 1} in {self._store.folder} are damaged, their "
            "checksum is wrong; the teacher computes them again",
            stacklevel=4,
        )
        with writing(self._store.folder):
            self._store.write(chunk, source.records(self._store.manifest, chunk))
        self._store.verify(chunk)

    def _indices(self, batch: Batch) -> NDArray[np.int64]:
        if not isinstance(batch.index, Tensor) or batch.index.dim() != 1:
            raise TypeError(
                "CachedTeacher: the batch does not tell which examples it has; the loader must be made over "
                "cached.dataset, and its collate_fn, if it has its own, by collate_indexed(collate_fn)"
            )
        indices: NDArray[np.int64] = batch.index.cpu().numpy().astype(np.int64)
        count = self._store.manifest.examples
        if len(indices) and not 0 <= indices.min() <= indices.max() < count:
            raise IndexError(f"CachedTeacher: the batch has the examples {indices.tolist()}; the cache has {count}")
        return indices

    def _compare(self, batch: Batch, indices: NDArray[np.int64], records: NDArray[Any]) -> None:
        same_inputs(described(batch, len(indices)), self._store.manifest)
        different = indices[checksums(batch, len(indices)) != records[INPUTS]]
        if len(different):
            raise CacheError(
                f"CachedTeacher: the inputs of {len(different)} of {len(indices)} examples, such as example "
                f"{different[0]}, have other values than when they were cached; a teacher's outputs hold only for the "
                "very inputs that it saw. Take random augmentation out of the data set (or train with the teacher "
                "itself), prepare the examples as before, or cache this data set in another folder"
            )


def _check(dataset: Any, top_k: int | None, temperature: float, dtype: torch.dtype, batch_size: int) -> None:
    if not len(dataset):
        raise ValueError("CachedTeacher: the data set is empty")
    if dtype not in FLOATS.values():
        raise ValueError(f"CachedTeacher: dtype is {dtype}; expected torch.float16, bfloat16 or float32")
    if batch_size < 1:
        raise ValueError(f"CachedTeacher: batch_size is {batch_size}; it must be at least 1")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"CachedTeacher: temperature is {temperature}; expected a positive number")
    if top_k is None and temperature != 1.0:
        raise ValueError(
            f"CachedTeacher: temperature is {temperature}, but logits have none; give top_k too, or leave it out"
        )


def _options(source: Source) -> dict[str, Any]:
    return {
        "examples": len(source.examples.dataset),
        "top_k": source.top_k,
        "temperature": source.temperature,
        "dtype": source.dtype,
        "layers": source.layers,
    }


def _same(folder: Path, manifest: Manifest, **here: Any) -> None:
    there = {name: getattr(manifest, name) for name in here}
    differences = [f"{name} is {there[name]} in it and {here[name]} here" for name in here if there[name] != here[name]]
    if differences:
        raise CacheError(
            f"CachedTeacher: {folder} holds the cache of something else: {'; '.join(differences)}. Use the same "
            "teacher, data set and arguments, give another folder, or delete this one"
        )
