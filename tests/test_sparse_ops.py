"""Packed sparse weights: what they hold, and that no bytes lead a kernel outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.ops import int8_linear, sparse_int8_linear, sparse_linear
from potstill.ops.int8_linear import pack as pack_dense
from potstill.ops.sparse import ROWS, Rows, from_blocks, pack, pack_bits, to_blocks, unpack, unpack_bits


def weight(n: int, k: int, sparsity: float, seed: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    integers = torch.randint(-127, 128, (n, k), generator=random)
    return (integers * (torch.rand(n, k, generator=random) >= sparsity)).to(dtype)


@given(
    n=st.integers(1, 300),
    k=st.integers(1, 900),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    rows=st.sampled_from(ROWS),
    dtype=st.sampled_from([torch.int8, torch.float32]),
    seed=st.integers(0, 99),
)
def test_pack_keeps_every_block(n: int, k: int, sparsity: float, rows: Rows, dtype: torch.dtype, seed: int) -> None:
    w = weight(n, k, sparsity, seed, dtype)
    mask, values = to_blocks(w)
    packed = pack(mask, values, k, rows)
    again, numbers = unpack(packed)
    assert torch.equal(again, mask)
    assert torch.equal(numbers, values)
    assert torch.equal(from_blocks(again, numbers, k), w)
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape[1]), mask)


@given(m=st.integers(1, 70), n=st.integers(1, 200), k=st.integers(1, 900), rows=st.sampled_from(ROWS))
def test_result_is_that_of_the_dense_layer(m: int, n: int, k: int, rows: Rows) -> None:
    w, x, scale = weight(n, k, 0.8, n), torch.randn(m, k), torch.rand(n)
    sparse = sparse_int8_linear(x, pack(*to_blocks(w), k, rows), scale)
    assert torch.equal(sparse, int8_linear(x, pack_dense(w), scale))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_damaged_bytes_raise_or_give_garbage(rows: Rows, dtype: torch.dtype) -> None:
    n, k = 150, 820
    packed = pack(*to_blocks(weight(n, k, 0.7, 0, dtype)), k, rows)
    random = torch.Generator().manual_seed(1)
    op: Any = sparse_int8_linear if dtype == torch.int8 else sparse_linear
    rest = torch.ones(n) if dtype == torch.int8 else n
    messages = []
    for trial in range(150):
        bad = packed.clone()
        end = len(bad) if trial % 3 else 700  # every third in the head and the first slots of the parts
        places = torch.randint(0, end, (20,), generator=random)
        bad[places] = torch.randint(0, 256, (20,), generator=random, dtype=torch.uint8)
        if trial % 5 == 0:
            bad = bad[: int(torch.randint(0, len(bad), (), generator=random))]
        try:
            for m in (1, 20):
                assert op(torch.randn(m, k), bad, rest).shape == (m, n)
        except ValueError as error:
            messages.append(str(error))
    assert all("expected what potstill.ops.sparse.pack makes" in message for message in messages)
    assert 30 < len(messages) < 150  # both ends were there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:32], "no packed sparse weight"),
        (lambda p: p[:-64], "cut off"),
        (lambda p: torch.cat([p, p[:64]]), "longer than it says"),
        (lambda p: p[64:], "no packed sparse weight"),
    ],
)
def test_what_is_wrong_with_a_weight_is_told(change: Any, message: str) -> None:
    packed = pack(*to_blocks(weight(20, 40, 0.5, 0)), 40, "many")
    with pytest.raises(ValueError, match=message):
        sparse_int8_linear(torch.randn(2, 40), change(packed), torch.ones(20))


def test_a_weight_for_other_features_is_refused() -> None:
    packed = pack(*to_blocks(weight(20, 40, 0.5, 0)), 40, "many")
    with pytest.raises(ValueError, match="another number of outputs or inputs"):
        sparse_int8_linear(torch.randn(2, 44), packed, torch.ones(20))
    with pytest.raises(ValueError, match="values of another dtype"):
        sparse_linear(torch.randn(2, 40), packed, 20)
    with pytest.raises(ValueError, match="dtype"):
        sparse_int8_linear(torch.randn(2, 40), packed.to(torch.int32), torch.ones(20))
