"""The GPU kernels of ``int4_linear`` against the float64 reference, by triton's interpreter."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from tests.interpreted.common import (
    TOLERANCE,
    NoWaiting,
    assert_close,
    guarded,
    memory_starts_as_nan,
    of_numpy,
    same,
    widened,
)
from torch import Tensor

from potstill.ops import int4_linear
from potstill.ops.int4_layout import pack_rows
from potstill.ops.triton import int4_linear as gpu
from potstill.ops.triton import int4_linear_kernel as kernels
from potstill.ops.triton import tiles
from potstill.ops.triton.tiles import Chip, Tile

__all__ = ["memory_starts_as_nan"]  # a fixture of all tests here

pytestmark = of_numpy

SAMPLES = list(int4_linear.samples("test"))
GROUPS = (32, 64, 128)


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles or more each way, and several steps along the inputs."""
    small = dict.fromkeys(tiles.ROWS, Tile(16, 64, 128, 4, 2, 2))
    monkeypatch.setattr(gpu, "TABLE", dict.fromkeys(gpu.TABLE, small))
    monkeypatch.setattr(gpu, "GROUPS_OF_32", {})
    monkeypatch.setattr(gpu, "ROW", Tile(1, 64, 256, 4, 2))
    monkeypatch.setattr(gpu, "FEW", 100)
    monkeypatch.setattr(gpu, "WIDE", 256)
    monkeypatch.setattr(gpu, "ADDED", 32)
    monkeypatch.setattr(tiles, "chip", lambda _: Chip(90, 1))


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step along the inputs is a part of its own."""
    monkeypatch.setattr(tiles, "chip", lambda _: Chip(90, 1000))
    monkeypatch.setattr(tiles, "LEAST_PART", 1)


@pytest.fixture
def slow_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chip", lambda _: Chip(103, 1))


def arguments(
    shape: tuple[int, ...], n: int, group: int, zeros: bool, bias: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """In the layout of GPUs; scales of both signs."""
    random = torch.Generator().manual_seed(shape[-1] * 7919 + n)
    count = -(-shape[-1] // group)
    numbers = torch.randint(0, 16, (n, shape[-1]), generator=random, dtype=torch.uint8)
    return {
        "x": torch.randn(shape, generator=random).to(dtype),
        "weight": pack_rows(numbers),
        "scale": (torch.rand(n, count, generator=random) * 0.1 - 0.03).to(torch.bfloat16),
        "out_features": n,
        "group_size": group,
        "zero": torch.randint(0, 16, (n, count), generator=random, dtype=torch.uint8) if zeros else None,
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
    }


def at_a_wall(x: Tensor) -> Tensor:
    """A copy that ends where a page begins that may not be touched: who reads on there is killed."""
    pages = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    whole = torch.frombuffer(memory, dtype=x.dtype, count=pages // x.element_size())
    return whole[len(whole) - x.numel() :].view(x.shape).copy_(x)


def check(a: dict[str, Any]) -> Tensor:
    """Launches with guards around the rows of x and around all scales and after the weights, and compares."""
    x, around = guarded(a["x"])
    scale, _ = guarded(a["scale"].flatten())
    given = {"x": x, "scale": scale.view_as(a["scale"])}
    if a["weight"].numel():
        given |= {name: at_a_wall(a[name]) for name in ("weight", "zero") if a[name] is not None}
    before = around.clone()
    y = gpu.launch(*int4_linear.positional(**a | given))
    assert same(around, before)
    assert y.dtype == a["x"].dtype
    assert_close(y, int4_linear.reference(**widened(a) | {"scale": a["scale"]}), TOLERANCE[y.dtype], "y")
    return y


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_agrees_with_float64_reference(sample: Any) -> None:
    a = sample.make()
    if a["x"].dim() == 2:  # the interpreter takes some milliseconds for each step of a tile
        a["x"] = a["x"][:17]
    check(int4_linear.lay_out(a, "cuda"))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "k"), [(1, 520), (1, 704), (18, 300), (18, 384)])
def test_steps_and_tiles(m: int, k: int, group: int, zeros: bool) -> None:
    check(arguments((m, k), 70, group, zeros))


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "k"), [(1, 520), (18, 320)])
def test_parts_are_added(m: int, k: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, ...]] = []
    add = kernels.add_kernel

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(**kwargs: Any) -> None:
                launched.append((kwargs["count"], *kwargs["parts"].shape))
                add[grid](**kwargs)

            return run

    monkeypatch.setattr(gpu, "add_kernel", Recorded())
    check(arguments((m, k), 70, group, True))
    assert launched == [(3, 3, m, 70)]


@pytest.mark.usefixtures("slow_int8")
@pytest.mark.parametrize("group", GROUPS)
def test_float16_products_have_the_same_bits(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a = arguments((18, 320), 70, group, True)
    a["x"] = a["x"].sign()  # all integers are 127 or -127: the largest sums that there are
    y = check(a)
    monkeypatch.setattr(tiles, "chip", lambda _: Chip(90, 1))
    assert torch.equal(y, gpu.launch(*int4_linear.positional(**a)))


@pytest.mark.parametrize("m", [1, 17])
def test_float16(m: int) -> None:
    check(arguments((m, 200), 40, 64, True, dtype=torch.float16))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("group", GROUPS)
def test_sums_are_exact(m: int, group: int) -> None:
    """By scales that are powers of 2 every float32 is, too; so the result has the bits of the reference."""
    a = arguments((m, 300), 40, group, True, bias=False)
    a["scale"] = torch.exp2(torch.randint(-3, 3, a["scale"].shape).float()).to(torch.bfloat16)
    assert torch.equal(gpu.launch(*int4_linear.positional(**a)), int4_linear.reference(**a))


@pytest.mark.parametrize("m", [1, 5])
def test_rows_that_no_scale_fits(m: int) -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-31, 1e-45, 0.0):
        a = arguments((m, 100), 20, 32, True)
        a["x"][0] *= 0.0 if abs(value) < 1.0 else 1.0
        a["x"][0, 77] = value
        y = check(a)
        assert bool(y[0].isnan().all()) == (abs(value) == float("inf") or value != value)


@pytest.mark.parametrize("m", [1, 3])
def test_rows_further_apart_than_int32(m: int) -> None:
    stride = 2**30 + 8
    torch.use_deterministic_algorithms(False)  # fills no pages that are not used
    memory = torch.empty(2 * stride + 70, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    a = arguments((m, 70), 20, 32, False, dtype=torch.bfloat16)
    x = memory.as_strided((m, 70), (stride, 1)).copy_(a["x"])
    expected = gpu.launch(*int4_linear.positional(**a))
    assert torch.equal(gpu.launch(*int4_linear.positional(**a | {"x": x})), expected)


def apart(x: Tensor, stride: int) -> Tensor:
    """A copy whose rows lie so far apart."""
    torch.use_deterministic_algorithms(False)  # fills no pages that are not used
    memory = torch.empty((len(x) - 1) * stride + x.shape[1], dtype=x.dtype)
    torch.use_deterministic_algorithms(True)
    return memory.as_strided(x.shape, (stride, 1)).copy_(x)


def test_weights_of_more_than_2_gib() -> None:
    """Their rows and those of x would have 2^30 inputs, of which one part of 128 is computed."""
    a, blocks = arguments((3, 128), 5, 32, False, bias=False), 2**24
    integers, x_scale = gpu.quantize_rows(a["x"])
    weight = apart(a["weight"], blocks * 32)
    common = {"scale": a["scale"], "zero": None, "bias": None, "n": 5, "blocks": blocks, "groups": 4, "span": 2}
    common |= {"parts": None, "GROUP": 32, "INTERPRETED": True, "BN": 16}
    y = torch.empty(3, 5)
    kernels.gemm_kernel[(1, 1)](
        x=apart(integers, blocks * 64), x_scale=x_scale, weight=weight, y=y, m=3, BM=16, ALIGN=4, ORDER=1, EVEN=True,
        HALF=False, **common,
    )  # fmt: skip
    assert_close(y, int4_linear.reference(**a).double(), TOLERANCE[y.dtype], "y")
    row = torch.empty(1, 5)
    kernels.row_kernel[(1, 1)](
        x=a["x"][:1], x_scale=None, weight=weight, y=row, k=128, BLOCKS=2, ALIGN=2, WIDE=128, STAGES=1, **common
    )
    assert_close(row, y[:1].double(), TOLERANCE[y.dtype], "row")


@pytest.mark.parametrize("shape", [(2, 3, 60), (60,), (1, 1, 60), (0, 60), (3, 0), (1, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    y = check(arguments(shape, 20, 32, True))
    assert y.shape == (*shape[:-1], 20)


def test_a_column_stride() -> None:
    a = arguments((3, 120), 20, 32, True)
    check(arguments((3, 60), 20, 32, True) | {"x": a["x"][:, ::2]})


@pytest.mark.parametrize("m", [1, 3])
def test_nothing_waits_for_the_device(m: int) -> None:
    with NoWaiting():
        gpu.launch(*int4_linear.positional(**arguments((m, 100), 20, 32, True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(20, 32)}, r"weight is torch.float32 \[20, 32\]"),
        ({"scale": torch.zeros(20, 2)}, r"scale is torch.float32 .* expected contiguous torch.bfloat16"),
        ({"scale": torch.zeros(2, 20, dtype=torch.bfloat16).t()}, "scale .* expected contiguous"),
        ({"zero": torch.zeros(20, 2, dtype=torch.int8)}, "zero is torch.int8"),
        ({"bias": torch.zeros(21)}, r"bias is torch.float32 \[21\] on cpu, expected contiguous floats \[20\] on cpu"),
        ({"scale": torch.zeros(20, 3, dtype=torch.bfloat16)}, r"scale has shape \[20, 3\], but 20 outputs"),
        ({"weight": torch.zeros(2, 2, 256, dtype=torch.uint8)}, r"packed scale has shape \[20, 2\]"),
    ],
)
def test_wrong_arguments_raise_before_the_launch(change: dict[str, Tensor], message: str) -> None:
    good = arguments((3, 60), 20, 32, True)
    op = sys.modules["potstill.ops.int4_linear"]
    assert torch.equal(op._cuda(*int4_linear.positional(**good)), gpu.launch(*int4_linear.positional(**good)))
    with pytest.raises(ValueError, match=f"int4_linear: .*{message}"):
        op._cuda(*int4_linear.positional(**good | change))


def test_a_packed_weight_is_refused() -> None:
    sample = next(s for s in SAMPLES if s.make()["zero"] is not None).make()
    with pytest.raises(ValueError, match=r"as CPU kernels take it.*laid_out\(weight, n, k, 'cuda'\)"):
        sys.modules["potstill.ops.int4_linear"]._cuda(*int4_linear.positional(**sample))


@triton.jit
def dot4_of(a, b, y, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(y + i, kernels.dot4(tl.load(a + i), tl.load(b + i), True))


def test_four_products_at_once() -> None:
    a, b = (torch.randint(-128, 128, (256, 4), dtype=torch.int8) for _ in range(2))
    y = torch.zeros(256, dtype=torch.int32)
    dot4_of[(1,)](a.view(torch.int32), b.view(torch.int32), y, count=256)
    assert torch.equal(y, (a.int() * b.int()).sum(1).int())


def evaluate(ptx: str, **registers: int) -> int:
    """What PTX of 32-bit instructions leaves in $0."""
    state = {f"${name[1:]}": value for name, value in registers.items()}
    for line in filter(None, (part.strip() for part in ptx.split(";"))):
        instruction, rest = line.split(None, 1)
        names = re.split(r",\s*", rest)
        values = [state[x] if x in state else int(x, 0) for x in names[1:]]
        if instruction == "lop3.b32":  # the table has a bit for each combination of the bits of three numbers
            a, b, c, table = values
            bits = (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1 for i in range(32))
            result = sum(bit << i for i, bit in enumerate(bits))
        else:
            a, b = values
            result = {"sub.u32": a - b, "xor.b32": a ^ b, "shr.u32": a >> b}[instruction]
        state[names[0]] = result & 0xFFFFFFFF
    return state["$0"]


def test_the_instructions_that_unpack_weights() -> None:
    """The interpreter cannot run them; here each does what PTX's manual says."""
    for byte, zero in itertools.product(range(0, 256, 3), range(16)):
        word = bytes((byte, 255 - byte, byte ^ 0x5A, 0xF0))
        shifts = bytes((zero, 15 - zero, zero ^ 5, 15))
        packed = {"_1": int.from_bytes(word, "little"), "_2": int.from_bytes(shifts, "little")}
        for ptx, halves in ((kernels.LOW.value, [x & 15 for x in word]), (kernels.HIGH.value, [x >> 4 for x in word])):
            given = evaluate(ptx, **packed).to_bytes(4, "little")
            assert list(given) == [(x - z) % 256 for x, z in zip(halves, shifts, strict=True)]
