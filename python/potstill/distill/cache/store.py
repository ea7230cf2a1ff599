"""The files of a cache: written so that a crash loses one chunk at most, read with suspicion."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.distill.cache.layout import Manifest
from potstill.errors import CacheError

MANIFEST, OUTPUTS, CHECKSUMS = "manifest.json", "outputs.bin", "checksums.bin"
_PIECE = 1 << 20
_ENTRY = struct.Struct("<II")


class Store:
    """The files ``outputs.bin``, the records of all examples in order, and ``checksums.bin``, one entry per chunk.

    An entry is the CRC32 of the chunk's bytes and that of the entry itself; both start from the manifest's and the
    chunk's number. It is written, and synchronised, after the chunk: a chunk without a valid one is missing, and one
    that does not agree with it is damaged. Records are read with ``pread``, not through a mapping: the process does not
    grow by the pages that it touched, and a file that was cut or a disk that fails raises an error instead of SIGBUS.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.record = manifest.record
        self._seed = manifest.seed
        self._verified = bytearray(manifest.chunks)
        self._file: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return int(self.manifest.examples * self.record.itemsize)

    def missing(self) -> list[int]:
        """The chunks that were never written, or whose end or checksum was lost."""
        size = _size(self.folder / OUTPUTS)
        try:
            entries = (self.folder / CHECKSUMS).read_bytes()
        except FileNotFoundError:
            entries = b""
        parts = [entries[c * _ENTRY.size : (c + 1) * _ENTRY.size] for c in range(self.manifest.chunks)]
        return [c for c, part in enumerate(parts) if self._checksum(part, c) is None or self._bytes(c).stop > size]

    def write(self, chunk: int, records: NDArray[Any]) -> None:
        """Writes a chunk, then its entry; raises :class:`CacheError` if that cannot be done."""
        contents = records.view(np.uint8).data
        checksum = zlib.crc32(contents, self._salt(chunk))
        entry = _ENTRY.pack(checksum, zlib.crc32(struct.pack("<I", checksum), self._salt(chunk)))
        try:
            _write_at(self.folder / OUTPUTS, self._bytes(chunk).start, contents)
            _write_at(self.folder / CHECKSUMS, chunk * _ENTRY.size, memoryview(entry))
        except OSError as error:
            raise CacheError(
                f"CachedTeacher: chunk {chunk + 1} of {self.manifest.chunks} cannot be written to {self.folder}: "
                f"{error.strerror}. What is written stays, and the same call goes on after it. The cache takes "
                f"{self.nbytes / 1e9:.3g} GB; a smaller top_k, fewer layers or dtype=torch.float16 take less"
            ) from error
        self._verified[chunk] = False

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The records of examples, [n], from verified chunks; raises :class:`DamagedError` if one is not whole."""
        for chunk in np.unique(indices // self.manifest.chunk).tolist():
            if not self._verified[chunk]:
                self.verify(chunk)
        size = self.record.itemsize
        records = np.empty(len(indices), self.record)
        into, descriptor = records.view(np.uint8).data, self._descriptor()
        for row, index in enumerate(indices.tolist()):
            if os.preadv(descriptor, [into[row * size : (row + 1) * size]], index * size) != size:
                raise DamagedError(self, index // self.manifest.chunk)
        return records

    def verify(self, chunk: int) -> None:
        """Reads all of a chunk; raises :class:`DamagedError` if it is not what was written."""
        checksum, span = self._salt(chunk), self._bytes(chunk)
        piece = memoryview(bytearray(min(_PIECE, len(span))))
        for start in range(span.start, span.stop, _PIECE):
            part = piece[: min(_PIECE, span.stop - start)]
            if os.preadv(self._descriptor(), [part], start) != len(part):
                raise DamagedError(self, chunk)
            checksum = zlib.crc32(part, checksum)
        with open(self.folder / CHECKSUMS, "rb") as file:
            entry = os.pread(file.fileno(), _ENTRY.size, chunk * _ENTRY.size)
        if checksum != self._checksum(entry, chunk):
            raise DamagedError(self, chunk)
        self._verified[chunk] = True

    def _checksum(self, entry: bytes, chunk: int) -> int | None:
        if len(entry) < _ENTRY.size:
            return None
        checksum, own = _ENTRY.unpack(entry)
        return checksum if zlib.crc32(entry[:4], self._salt(chunk)) == own else None

    def _salt(self, chunk: int) -> int:
        return zlib.crc32(struct.pack("<Q", chunk), self._seed)

    def _bytes(self, chunk: int) -> range:
        span = self.manifest.span(chunk)
        return range(span.start * self.record.itemsize, span.stop * self.record.itemsize)

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = open(self.folder / OUTPUTS, "rb", buffering=0)  # noqa: SIM115 - closed with this object
            weakref.finalize(self, self._file.close)
        descriptor: int = self._file.fileno()
        return descriptor


class DamagedError(CacheError):
    """A chunk is not what was written."""

    def __init__(self, store: Store, chunk: int) -> None:
        span = store.manifest.span(chunk)
        super().__init__(
            f"{store.folder / OUTPUTS}: the examples {span.start} to {span.stop - 1} are damaged, their checksum is "
            "wrong. Open the cache with its teacher, CachedTeacher(teacher, ...), which computes them again"
        )
        self.chunk = chunk


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in ``folder``; None if there is none. Raises :class:`CacheError` if it is damaged."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"CachedTeacher: {path} cannot be read: {error.strerror}") from error
    return Manifest.parse(text.decode(errors="replace"), path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts it into the folder, whole or not at all; raises :class:`CacheError` if that, or all it needs, cannot be."""
    left = Store(folder, manifest).nbytes - _size(folder / OUTPUTS)
    free = shutil.disk_usage(folder).free
    if left > free:
        raise CacheError(
            f"CachedTeacher: the cache needs {left / 1e9:.3g} GB, but {folder} has {free / 1e9:.3g} GB left "
            f"({manifest.record.itemsize} bytes for each of {manifest.examples} examples); choose another folder, a "
            "smaller top_k, fewer layers or dtype=torch.float16"
        )
    path = folder / MANIFEST
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write_at(temporary, 0, memoryview(manifest.text().encode()), truncate=True)
        os.replace(temporary, path)
        _synchronise(folder)
    except OSError as error:
        raise CacheError(f"CachedTeacher: {path} cannot be written: {error.strerror}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder, and waits until no other process writes into it; raises :class:`CacheError` if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CacheError(f"CachedTeacher: {folder} cannot be made a folder: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # ends with the process, however that ends
        yield
    finally:
        os.close(descriptor)


def _write_at(path: Path, offset: int, contents: memoryview, *, truncate: bool = False) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if truncate else 0), 0o666)
    try:
        while contents:
            written = os.pwrite(descriptor, contents, offset)
            contents, offset = contents[written:], offset + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _synchronise(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
