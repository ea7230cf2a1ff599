"""2:4 weights: two values and a half byte for each group of four inputs, and what may be in them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from potstill.ops import int8_linear, semi_sparse_int8_linear
from potstill.ops.int8_linear import pack
from potstill.ops.semi_sparse import canonical, from_semi, is_semi, laid_out, to_semi, wrong_numbers, wrong_padding

OP: Any = sys.modules["potstill.ops.semi_sparse_int8_linear"]


def weight(n: int, k: int, kept: int = 2, dtype: torch.dtype = torch.int8) -> Tensor:
    """At most ``kept`` of each four inputs are not zero, at random places."""
    integers = torch.randint(-127, 128, (n, -(-k // 4), 4), dtype=torch.int8)
    integers[torch.rand(integers.shape).argsort(-1) >= kept] = 0
    return integers.flatten(1)[:, :k].contiguous().to(dtype)


@given(
    n=st.integers(0, 40),
    k=st.integers(0, 300),
    kept=st.integers(0, 2),
    dtype=st.sampled_from([torch.int8, torch.float32, torch.bfloat16, torch.float16]),
)
def test_either_form_is_made_of_the_other(n: int, k: int, kept: int, dtype: torch.dtype) -> None:
    w = weight(n, k, kept, dtype)
    values, indices = to_semi(w)
    assert values.dtype == dtype
    assert values.shape == (n, -(-k // 8) * 4)
    assert indices.shape == (n, -(-k // 8))
    assert torch.equal(from_semi(values, indices, k), w)
    assert not wrong_numbers(values, indices)
    assert not wrong_padding(values, indices, k)
    wide = laid_out(values, indices, k, "cuda")
    assert wide[0].shape[1] % 64 == 0
    assert not wrong_numbers(*wide)
    assert not wrong_padding(*wide, k)
    assert torch.equal(from_semi(*wide, k), w)
    again = canonical(*wide, k)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], indices)
    assert laid_out(*wide, k, "cuda")[0] is wide[0]
    assert torch.equal(laid_out(*wide, k, "cpu")[0], values)


def test_each_half_byte_says_where_its_values_belong() -> None:
    w = weight(7, 30)
    values, indices = to_semi(w)
    for row in range(7):
        for group in range(8):
            half = int(indices[row, group // 2]) >> 4 * (group % 2) & 15
            for which, place in enumerate((half & 3, half >> 2)):
                column = 4 * group + place
                assert int(values[row, 2 * group + which]) == (int(w[row, column]) if column < 30 else 0)


def test_what_is_not_2_of_4_is_refused() -> None:
    w = weight(5, 24)
    w[3, 8:11] = 1
    assert not is_semi(w)
    with pytest.raises(ValueError, match="more than two are not zero"):
        to_semi(w)
    assert is_semi(torch.ones(3, 2))
    assert is_semi(torch.tensor([[-0.0, 1.0, -0.0, 2.0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, i: i.fill_(0x40), "not in order"),  # a group with 0, 0
        (lambda v, i: i.fill_(0x14), "not in order"),  # 1, 0
        (lambda v, i: v[2].fill_(-128), "-128"),
        (lambda v, i: v[:, -2:].fill_(1), "beyond the 21 inputs"),
    ],
)
def test_wrong_numbers_are_told(change: Any, message: str) -> None:
    values, indices = to_semi(weight(4, 21))
    change(values, indices)
    assert message in wrong_numbers(values, indices) + wrong_padding(values, indices, 21)
    floats, indices = to_semi(weight(4, 21, dtype=torch.float32))
    floats[1, 1] = float("inf")
    assert "not finite" in wrong_numbers(floats, indices)


@given(m=st.integers(0, 9), n=st.integers(1, 40), k=st.integers(1, 200))
def test_result_is_that_of_the_dense_layer(m: int, n: int, k: int) -> None:
    w, x, scale = weight(n, k), torch.randn(m, k), torch.rand(n)
    dense = int8_linear(x, pack(w), scale)
    assert torch.equal(semi_sparse_int8_linear(x, *to_semi(w), scale), dense)
    wide = laid_out(*to_semi(w), k, "cuda")
    assert torch.equal(semi_sparse_int8_linear(x, *wide, scale), dense)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_are_those_of_the_dense_layer(activation: str) -> None:
    w, scale = weight(12, 30), torch.rand(12)

    def gradients(op: Any, *given: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        x, bias, residual = (torch.randn(s, requires_grad=True) for s in ((5, 30), (12,), (5, 12)))
        op(x, *given, scale, bias, activation, residual).square().sum().backward()
        return [x.grad, bias.grad, residual.grad]

    for mine, expected in zip(
        gradients(semi_sparse_int8_linear, *to_semi(w)), gradients(int8_linear, pack(w)), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "change",
    [
        lambda v, i: (v[:, 2:], i),
        lambda v, i: (v, i[:, 1:]),
        lambda v, i: (v[1:], i),
        lambda v, i: (v, i.short()),
        lambda v, i: laid_out(v, i, 300, "cuda"),
    ],
)
def test_other_tensors_are_refused(change: Any) -> None:
    values, indices = change(*to_semi(weight(7, 30)))
    x, scale = torch.randn(2, 30), torch.ones(7)
    with pytest.raises(ValueError, match="as to_semi makes them"):
        semi_sparse_int8_linear(x, values, indices, scale)
    with pytest.raises(ValueError, match="as to_semi makes them"):
        OP._cuda(x, values, indices, scale)


def test_gpu_kernels_take_long_rows_only() -> None:
    with pytest.raises(ValueError, match=r"need \[7, 64\] and uint8 \[7, 16\], as to_semi"):
        OP._cuda(torch.randn(2, 30), *to_semi(weight(7, 30)), torch.ones(7))
