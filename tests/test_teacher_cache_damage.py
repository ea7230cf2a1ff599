"""A teacher's outputs on disk: killed writers, damaged files, full disks"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import subprocess
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import cache_runs
from tests.cache_runs import CHUNK, FILES, MOMENTS, ROWS, Counted, cache, rows
from torch import Tensor

from potstill.distill import Batch
from potstill.distill.batch import TopK
from potstill.distill.cache import CachedTeacher, store
from potstill.errors import CacheError

pytestmark = pytest.mark.usefixtures("one_thread")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read(cached: CachedTeacher) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.randperm(ROWS)
    output, features = cached.outputs(Batch((rows().tensors[0][order],), {}, order, order))
    assert isinstance(output, TopK)
    back = order.argsort()
    return output.log_probs[back], output.indices[back], features["layers.1"][back]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed cache, which nobody changes."""
    folder = tmp_path_factory.mktemp("whole")
    cache(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    for name, contents in files(whole).items():
        (tmp_path / name).write_bytes(contents)
    return tmp_path


@pytest.fixture
def said() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


# --- killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """The folders that the program below leaves, and the numbers that it tells about them."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, cache_runs.__file__, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_killed_at_any_moment(whole: Path, killed: tuple[Path, dict[str, list[int]]]) -> None:
    folder, chunks = killed[0] / "often", killed[1]["chunks"]
    assert chunks == sorted(chunks)
    assert len({*chunks}) >= 3, "it was killed at different moments, and went on"
    teacher = Counted()
    cached = cache(folder, teacher)
    assert teacher.examples <= ROWS + 2 - CHUNK * chunks[-1]
    assert files(folder) == files(whole)
    assert all(map(torch.equal, read(cached), read(CachedTeacher.open(whole, rows()))))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_this_moment(moment: str, whole: Path, killed: tuple[Path, dict[str, list[int]]]) -> None:
    folder, early = killed[0] / moment, moment.startswith("manifest")
    assert files(folder) != files(whole)
    assert ("manifest.json" in files(folder)) == (not early)
    teacher = Counted()
    cache(folder, teacher)
    assert files(folder) == files(whole)
    assert teacher.examples == (2 + ROWS if early else ROWS - 2 * CHUNK)


def test_two_processes_at_once(whole: Path, killed: tuple[Path, dict[str, list[int]]]) -> None:
    folder, seen = killed
    assert sum(seen["twice"]) == ROWS + 2
    assert min(seen["twice"]) <= 2, "one waits for the other, and has nothing left to do"
    assert files(folder / "twice") == files(whole)


# --- damaged


def flips(contents: bytes) -> Iterator[tuple[int, bytes]]:
    """The same contents with one bit flipped, at either end and at 20 other places."""
    for place in [0, len(contents) - 1, *random.Random(0).sample(range(len(contents)), 20)]:
        changed = bytearray(contents)
        changed[place] ^= 1 << place % 8
        yield place, bytes(changed)


def test_a_flipped_bit_in_the_outputs(whole: Path, copy: Path, said: list[warnings.WarningMessage]) -> None:
    expected = read(CachedTeacher.open(whole, rows()))
    path, contents = copy / "outputs.bin", (whole / "outputs.bin").read_bytes()
    for place, changed in flips(contents):
        path.write_bytes(changed)
        chunk = place // (len(contents) // ROWS) // CHUNK
        first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, ROWS) - 1
        with pytest.raises(
            CacheError, match=f"the examples {first} to {last} are damaged, their checksum is wrong. Open"
        ):
            read(CachedTeacher.open(copy, rows()))
        teacher = Counted()
        assert all(map(torch.equal, read(cache(copy, teacher)), expected))
        assert teacher.examples == last + 1 - first
        assert f"the examples {first} to {last} in {copy} are damaged" in str(said[-1].message)
        assert path.read_bytes() == contents


def test_a_flipped_bit_in_the_checksums(whole: Path, copy: Path) -> None:
    path, contents = copy / "checksums.bin", (whole / "checksums.bin").read_bytes()
    for _, changed in flips(contents):
        path.write_bytes(changed)
        with pytest.raises(
            CacheError, match=r"1 of the 10 chunks are missing in .*; CachedTeacher\(teacher, ...\) with"
        ):
            CachedTeacher.open(copy, rows())
        teacher = Counted()
        cache(copy, teacher)
        assert 0 < teacher.examples <= CHUNK
        assert files(copy) == files(whole)


def test_a_flipped_bit_in_the_manifest(whole: Path, copy: Path) -> None:
    path, contents = copy / "manifest.json", (whole / "manifest.json").read_bytes()
    for place in range(len(contents)):
        changed = bytearray(contents)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(
            CacheError, match=r"is damaged or not the manifest of a cache. If this is a cache, delete tha"
        ):
            store.read_manifest(copy)
    with pytest.raises(CacheError, match="delete that one file and give the teacher"):
        CachedTeacher.open(copy, rows())
    with pytest.raises(CacheError, match="delete that one file and give the teacher"):
        cache(copy)
    path.unlink()
    teacher = Counted()
    cache(copy, teacher)
    assert teacher.examples == 2, "one batch, for the shapes; the chunks are still those of this manifest"
    assert files(copy) == files(whole)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut(name: str, share: float, whole: Path, copy: Path) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, int(share * size))
    with pytest.raises(CacheError, match="is damaged or not" if name == "manifest.json" else "chunks are missing"):
        CachedTeacher.open(copy, rows())
    if name != "manifest.json":
        teacher = Counted()
        cache(copy, teacher)
        assert teacher.examples >= ROWS * (1 - share) - CHUNK
        assert files(copy) == files(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone(name: str, whole: Path, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(
        CacheError, match="holds no cache" if name == "manifest.json" else "10 of the 10 chunks are miss"
    ):
        CachedTeacher.open(copy, rows())
    cache(copy)
    assert files(copy) == files(whole)


def test_a_file_that_is_cut_while_it_is_read(copy: Path) -> None:
    cached = CachedTeacher.open(copy, rows())
    read(cached)
    os.truncate(copy / "outputs.bin", 100)
    with pytest.raises(CacheError, match="are damaged"):
        read(cached)


def test_chunks_that_were_exchanged(whole: Path, copy: Path, said: list[warnings.WarningMessage]) -> None:
    for name, size in (
        ("outputs.bin", CHUNK * CachedTeacher.open(whole, rows()).bytes_per_example),
        ("checksums.bin", 8),
    ):
        old = (whole / name).read_bytes()
        (copy / name).write_bytes(old[size : 2 * size] + old[:size] + old[2 * size :])
    teacher = Counted()
    read(cache(copy, teacher))
    assert teacher.examples == 2 * CHUNK
    assert files(copy) == files(whole)


def test_the_outputs_of_another_teacher(whole: Path, copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    cache(other, Counted(seed=1))
    for name in FILES[1:]:
        (copy / name).write_bytes((other / name).read_bytes())
    with pytest.raises(CacheError, match="10 of the 10 chunks are missing"):
        CachedTeacher.open(copy, rows())
    (copy / "checksums.bin").write_bytes((whole / "checksums.bin").read_bytes())
    with pytest.raises(CacheError, match="are damaged"):
        CachedTeacher.open(copy, rows())


def test_a_chunk_that_cannot_be_made_whole(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = bytearray((copy / "outputs.bin").read_bytes())
    contents[CHUNK * len(contents) // ROWS] ^= 1
    (copy / "outputs.bin").write_bytes(contents)
    cached = cache(copy)
    monkeypatch.setattr(store, "_write_at", lambda *_, **__: None)  # a disk that forgets
    with pytest.warns(UserWarning, match="computes them again"), pytest.raises(CacheError, match="are damaged"):
        read(cached)


MANIFESTS: list[Callable[[dict[str, Any]], Any]] = [
    lambda m: [],
    lambda m: None,
    lambda m: {**m, "format": "potstill.cache/2"},
    lambda m: {**m, "examples": -1},
    lambda m: {**m, "examples": 1e3},
    lambda m: {**m, "chunk": 0},
    lambda m: {**m, "chunk": True},
    lambda m: {**m, "top_k": "2"},
    lambda m: {**m, "dtype": "float8"},
    lambda m: {**m, "layers": ["../x"]},
    lambda m: {**m, "columns": m["columns"][:-1]},
    lambda m: {**m, "columns": [{**m["columns"][0], "shape": [2**40]}, *m["columns"][1:]]},
    lambda m: {**m, "columns": [{**m["columns"][0], "dtype": "object"}, *m["columns"][1:]]},
    lambda m: {name: value for name, value in m.items() if name != "teacher"},
]


@pytest.mark.parametrize("change", MANIFESTS)
def test_manifests_that_are_none(change: Callable[[dict[str, Any]], Any], copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CacheError, match="is damaged or not the manifest of a cache"):
        CachedTeacher.open(copy, rows())


# --- disks


def test_a_disk_that_is_full(whole: Path, tmp_path: Path) -> None:
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (whole / "outputs.bin").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, free[1]))
    try:
        with pytest.raises(
            CacheError, match=r"chunk 5 of 10 cannot be written to .*: File too large. What is written st"
        ):
            cache(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    teacher = Counted()
    cache(tmp_path, teacher)
    assert teacher.examples == ROWS - 4 * CHUNK
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("call", range(0, 12))
def test_whatever_write_fails_nothing_is_lost(
    call: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write = [0], os.pwrite

    def full(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CacheError, match="No space left on device"):
            cache(tmp_path)
    teacher = Counted()
    cache(tmp_path, teacher)
    assert teacher.examples == ROWS - CHUNK * (max(call - 1, 0) // 2) + (2 if call == 0 else 0)
    assert {name: contents for name, contents in files(tmp_path).items() if name in FILES} == files(whole)


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(10, 5, 5))
    with pytest.raises(
        CacheError, match=r"the cache needs 8.4e-06 GB, but .* has 5e-09 GB left \(28 bytes for each of 3"
    ):
        cache(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CacheError, match="file cannot be made a folder: File exists"):
        cache(tmp_path / "file")
    with pytest.raises(CacheError, match="cannot be made a folder: Not a directory"):
        cache(tmp_path / "file/inside")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(CacheError, match="holds no cache; CachedTeacher"):
        CachedTeacher.open(tmp_path, rows())
