"""The op attention beyond what the registry walk covers; torch's scaled_dot_product_attention is the oracle."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.ops import attention


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 90), st.integers(1, 70), st.booleans())
def test_agrees_with_torch(batch: int, heads: int, queries: int, keys: int, features: int, causal: bool) -> None:
    q = _randn(batch, heads, queries, features)
    k, v = _randn(batch, heads, keys, features), _randn(batch, heads, keys, features)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    torch.testing.assert_close(attention(q, k, v, causal=causal).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (9,), (1,), (5, 9), (5, 1), (3, 1, 9), (2, 1, 1, 9), (2, 3, 5, 9), (1, 3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float64])
def test_masks_of_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = _randn(2, 3, 5, 16), _randn(2, 3, 9, 16), _randn(2, 3, 9, 16)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.8
    if dtype != torch.bool:
        mask = mask.to(dtype) * 3
    full = mask.expand(2, 3, 5, 9)
    expected = F.scaled_dot_product_attention(q, k, v, full if dtype == torch.bool else full.float())
    torch.testing.assert_close(attention(q, k, v, mask), expected.nan_to_num(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 8])
def test_what_a_query_does_not_see_does_not_matter(queries: int) -> None:
    q, k, v = _randn(1, 2, queries, 16), _randn(1, 2, 40, 16), _randn(1, 2, 40, 16)
    mask = torch.arange(40) < 23
    expected = attention(q, k[:, :, :23], v[:, :, :23])
    k[:, :, 23:] = math.nan
    v[:, :, 23:] = 1e30
    assert torch.equal(attention(q, k, v, mask), expected)
    assert not attention(q, k, v, torch.zeros(40, dtype=torch.bool)).any()


def test_views_are_read_where_they_lie() -> None:
    x = _randn(2, 11, 3, 4, 16)  # batch, length, (q, k, v), heads, features: one projection's output
    q, k, v = x.permute(2, 0, 3, 1, 4)
    y = attention(q, k, v)
    assert y.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_torch(causal: bool) -> None:
    def leaves() -> list[Tensor]:
        tensors = (_randn(2, 4, 7, 8), _randn(2, 2, 7, 8) / 2, _randn(2, 2, 7, 5))
        return [x.double().requires_grad_() for x in tensors]

    ours, theirs = leaves(), leaves()
    attention(*ours, causal=causal).square().sum().backward()
    F.scaled_dot_product_attention(*theirs, is_causal=causal, enable_gqa=True).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, None, 0.4, causal), leaves())


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "message"),
    [
        ((3, 4), (3, 4), (3, 4), None, "expected \\[batch, heads, length, features\\]"),
        ((1, 2, 3, 4), (1, 2, 5, 6), (1, 2, 5, 4), None, "\\[1, 2, 5, 6\\]"),
        ((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 6, 4), None, "\\[1, 2, 6, 4\\]"),
        ((1, 4, 3, 4), (1, 3, 5, 4), (1, 3, 5, 4), None, "heads"),
        ((1, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), None, "\\[2, 2, 5, 4\\]"),
        ((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), torch.zeros(4, 5), "mask has shape \\[4, 5\\]"),
        ((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), torch.zeros(4, dtype=torch.bool), "mask has shape"),
        ((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), torch.zeros(5, dtype=torch.int64), "mask is torch.int64"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernel and the reference
def test_wrong_arguments(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], mask: Tensor | None, message: str, dtype: torch.dtype
) -> None:
    tensors = [torch.zeros(shape, dtype=dtype) for shape in (q, k, v)]
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        attention(*tensors, mask)


def test_mixed_dtypes_are_refused() -> None:
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"attention: .*dtype"):
        attention(q, k, k)
