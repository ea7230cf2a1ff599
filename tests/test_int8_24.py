"""The packed weight of the CUDA kernel for 2:4 layers, and when the kernel says that it cannot run.

What the kernel computes is tested without Python, by tests/csrc/int8_24.cpp; its machine code by .ci/cuda.
"""

from __future__ import annotations

import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.ops.cuda import int8_24

SOURCE = Path(__file__).parent / "csrc/int8_24.cpp"
SIZES = [(128, 128), (5, 16), (64, 64), (130, 136), (300, 392)]
PAIRS = torch.tensor([i | j << 2 for i, j in combinations(range(4), 2)], dtype=torch.uint8)


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Random values and indices of a 2:4 weight."""
    random = torch.Generator().manual_seed(n * 1000 + k)
    values = torch.randint(-128, 128, (n, k // 2), generator=random, dtype=torch.int8)
    groups = PAIRS[torch.randint(0, 6, (n, k // 4), generator=random)]
    return values, groups[:, ::2] | groups[:, 1::2] << 4


def dense(values: Tensor, indices: Tensor) -> Tensor:
    """The weight [n, k] with its zeros."""
    n, k = values.shape[0], values.shape[1] * 2
    groups = torch.stack([indices & 15, indices >> 4], dim=2).reshape(n, k // 4)
    places = torch.stack([groups & 3, groups >> 2], dim=2).to(torch.int64)
    w = torch.zeros(n, k // 4, 4, dtype=torch.int8)
    return w.scatter_(2, places, values.view(n, k // 4, 2)).view(n, k)


def padded(w: Tensor) -> Tensor:
    n, k = w.shape
    return torch.nn.functional.pad(w, (0, -k % 128, 0, -n % 128))


def as_multiplied(step: list[int]) -> Tensor:
    """The weights [64, 64] that mma.sp sees in the registers which warps load from a step, by the text of PTX ISA."""
    w = torch.zeros(64, 64, dtype=torch.int8)
    for tile in range(4):
        for lane in range(32):
            group, in_group = lane >> 2, lane % 4
            for i in range(16):  # the kept numbers a0 to a15 of a lane
                row = group if i < 4 or 8 <= i < 12 else group + 8
                first_column = in_group * 8 + (0 if i < 8 else 32)
                chunk = first_column // 4 + i % 4 // 2
                owner = 4 * (row % 8) + (row >= 8) + 2 * (chunk >= 8)  # the lane with its metadata
                metadata = step[2048 + 16 * owner + 4 * tile :][:4]
                nibble = metadata[chunk % 8 // 2] >> 4 * (chunk % 2) & 15
                place = nibble >> 2 if i % 2 else nibble & 3
                value = step[512 * tile + 16 * lane + i]
                w[16 * tile + row, 4 * chunk + place] = value - 256 if value > 127 else value
    return w


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_registers_hold_the_weight(n: int, k: int) -> None:
    values, indices = weight(n, k)
    packed, expected = int8_24.lay_out(values, indices), padded(dense(values, indices))
    assert packed.shape == (expected.shape[0] // 64, expected.shape[1] // 64, 2560)
    assert packed.is_contiguous()
    for block in range(packed.shape[0]):
        for step in range(packed.shape[1]):
            seen = as_multiplied(packed[block, step].tolist())
            assert torch.equal(seen, expected[64 * block :, 64 * step :][:64, :64])


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_packed_as_the_kernel_reads_it(tmp_path: Path) -> None:
    program = tmp_path / "int8_24"
    subprocess.run(["c++", "-std=c++20", "-O0", SOURCE, "-o", program], check=True, timeout=240)
    text = subprocess.run([program, "layout"], check=True, capture_output=True, text=True).stdout
    places = torch.tensor([[int(x) for x in line.split()] for line in text.splitlines()])
    values, indices = weight(256, 256)
    packed = int8_24.lay_out(values, indices)
    assert packed.shape == (4, 4, 2560)
    for block in range(4):
        for step in range(4):
            rows = places[:, 0] + 64 * block
            expected = [values.view(torch.uint8)[rows[:2048], places[:2048, 1] + 32 * step]]
            expected.append(indices[rows[2048:], places[2048:, 1] + 8 * step])
            assert torch.equal(packed[block, step], torch.cat(expected))


def test_weights_that_cannot_be_packed() -> None:
    values, indices = weight(3, 16)
    with pytest.raises(ValueError, match=r"values is torch.int8 \[3, 8\], indices torch.uint8 \[3, 1\]; expected"):
        int8_24.lay_out(values, indices[:, :1])
    with pytest.raises(ValueError, match=r"values is torch.uint8 .*; expected int8 \[out_features, in_features / 2\]"):
        int8_24.lay_out(values.view(torch.uint8), indices)
    for nibble in (0, 5, 0b0001, 0b0111):
        indices[1, 1] = 0x40 | nibble
        with pytest.raises(ValueError, match=rf"not in ascending order, such as {nibble} in output 1"):
            int8_24.lay_out(values, indices)


def test_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert int8_24.why_not(torch.device("cpu")) == "it needs a CUDA device, not cpu"
    monkeypatch.setattr(int8_24, "_is_built", lambda: False)
    assert "build it with -DPOTSTILL_CUDA=ON" in str(int8_24.why_not(gpu))
    monkeypatch.setattr(int8_24, "_is_built", lambda: True)
    for capability in ((7, 5), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert f"cuda:0 has {capability[0]}.{capability[1]}" in str(int8_24.why_not(gpu))
    for capability in ((8, 0), (8, 6), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert int8_24.why_not(gpu) is None


def test_asked_for_where_it_cannot_run_it_says_so() -> None:
    values, indices = weight(3, 16)
    x, scale = torch.ones(2, 16, dtype=torch.int8), torch.ones(3)
    with pytest.raises(RuntimeError, match="int8_24: it needs a CUDA device, not cpu"):
        int8_24.launch(x, torch.ones(2), int8_24.lay_out(values, indices), scale, None, torch.float32)
