"""The tiles of the GPU kernels: the table, what a file may change, and how inputs are split."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.ops import int8_linear

pytest.importorskip("triton")

from potstill.ops.triton import tiles
from potstill.ops.triton.tiles import Chip, Tile


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    tiles.table.cache_clear()
    yield
    tiles.table.cache_clear()


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_gpu_and_number_of_rows_has_a_tile() -> None:
    for capability in (80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121):
        for m in (1, 16, 17, 64, 65, 256, 257, 10**6):
            tile = tiles.tile(Chip(capability, 100), m)
            assert tile in tiles.TABLE[tiles.family(capability)].values()
            assert (tile.bm == 16) == (m <= 16)
    assert tiles.shape_class(64) == "64"
    assert tiles.shape_class(65) == "256"
    assert {tiles.products(c)[0] for c in (80, 89, 90, 100, 120)} == {"int8"}
    assert tiles.products(103)[0] == "float16"


def test_int8_products_that_triton_is_too_old_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles.triton, "__version__", "3.7.1")
    assert {c: tiles.products(c)[0] for c in (90, 100, 110, 120)} == {
        90: "int8", 100: "float16", 110: "float16", 120: "int8"
    }  # fmt: skip
    assert "Triton 3.7.1" in tiles.products(100)[1]
    assert tiles.tile(Chip(100, 148), 4096) == tiles.TABLE["sm_103"]["more"]
    monkeypatch.setattr(tiles.triton, "__version__", "3.10.0+git1234")
    assert tiles.products(100)[0] == "int8"


@pytest.mark.parametrize("processors", [1, 40, 108, 132, 1000])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (16, 8192, 28672), (64, 512, 100000), (300, 64, 4112), (1, 1, 0)]
)
def test_parts_cover_all_inputs_once(m: int, n: int, k: int, processors: int) -> None:
    for family in tiles.TABLE.values():
        tile = family[tiles.shape_class(m)]
        parts, span = tiles.split(tile, m, n, k, Chip(90, processors))
        assert span % tile.bk == 0
        assert (parts - 1) * span < max(k, 1) <= max(parts * span, 1)
        assert parts == 1 or span >= tiles.LEAST_PART
        programs = -(-m // tile.bm) * -(-n // tile.bn)
        assert parts == 1 or parts * programs <= 2 * processors


def test_a_file_overrides_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"bm": 64, "bn": 32, "bk": 64, "warps": 2, "stages": 5}
    path = written(tmp_path / "tiles.json", {"sm_90": {"64": mine, "more": mine | {"group": 3}}})
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    assert tiles.tile(Chip(90, 132), 50) == Tile(64, 32, 64, 2, 5, 8)
    assert tiles.tile(Chip(90, 132), 5000).group == 3
    assert tiles.tile(Chip(90, 132), 5) == tiles.TABLE["sm_90"]["16"]
    assert tiles.tile(Chip(80, 108), 50) == tiles.TABLE["sm_80"]["64"]
    monkeypatch.delenv(tiles.VARIABLE)
    tiles.table.cache_clear()
    assert tiles.table() is tiles.TABLE


GOOD = {"bm": 64, "bn": 64, "bk": 64, "warps": 4, "stages": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ([], "expected an object with some of the keys"),
        ({"sm_91": {}}, "sm_91"),
        ({"sm_90": {"100": GOOD}}, "'100'"),
        ({"sm_90": {"64": 7}}, "sm_90, 64 is 7"),
        ({"sm_90": {"64": {"bm": 64}}}, "expected integers for each of"),
        ({"sm_90": {"64": GOOD | {"bm": 64.0}}}, "expected integers"),
        ({"sm_90": {"64": GOOD | {"warps": True}}}, "expected integers"),
        ({"sm_90": {"64": GOOD | {"colour": 1}}}, "colour"),
        ({"sm_90": {"64": GOOD | {"bn": 48}}}, "bn is 48, expected a power of 2 from 16 to 256"),
        ({"sm_90": {"64": GOOD | {"stages": 0}}}, "stages is 0, expected a number from 1 to 8"),
        ({"sm_90": {"16": GOOD}}, "bm is 64, expected a power of 2 from 16 to 16"),
    ],
)
def test_a_wrong_file_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiles.read(written(tmp_path / "tiles.json", content))
    with pytest.raises(ValueError, match="cannot be read"):
        tiles.read(tmp_path / "none.json")


def test_a_gpu_s_way_of_multiplying_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert int8_linear.backend("cuda", torch.float16) == ("kernel", "the cuda kernel takes float16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU {gpu.index}")
    monkeypatch.setattr(tiles, "chip", lambda gpu: Chip((90, 103)[gpu.index], 132))
    why = int8_linear.backend("cuda", torch.float16)[1]
    assert "GPU 0 multiplies as int8: " in why
    assert "GPU 1 multiplies as float16: its int8" in why
