"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) with float32 sums, a tile of queries at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import _C
from potstill.ops.op import Cost, Kernel, Op, Sample


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    shapes = [list(x.shape) for x in (query, key, value)]
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError(
            f"attention: query, key and value have shapes {shapes}, expected [batch, heads, length, features]"
        )
    batch, heads, queries, features = query.shape
    _, kv_heads, keys, _ = key.shape
    divides = heads % kv_heads == 0 if kv_heads else heads == 0
    expected = [[batch, kv_heads, keys, features], [batch, kv_heads, keys, value.shape[3]]]
    if not divides or shapes[1:] != expected:
        raise ValueError(
            f"attention: key and value have shapes {shapes[1]} and {shapes[2]}; a query of shape {shapes[0]} needs the "
            "same batch and features, heads that divide its own, and as many values as keys"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"attention: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}, expected one dtype"
        )
    if mask is not None:
        _check_mask(mask, (batch, heads, queries, keys))


def _check_mask(mask: Tensor, scores: tuple[int, ...]) -> None:
    lengths = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.dim() > 4 or any(own not in (1, full) for own, full in lengths):
        raise ValueError(f"attention: mask has shape {list(mask.shape)}, expected one that fits {list(scores)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attention: mask is {mask.dtype}, expected bool or a float dtype")


def _weights(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor, float]:
    """The attention weights, the keys of each head, and the scale, in the widest dtype (at least float32)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = _scale(query) if scale is None else scale
    key = _per_head(key.to(wide), query.shape[1])
    scores = (query.to(wide) * scale) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.where(nothing, 0.0, F.softmax(scores, -1)), key, scale


def _scale(query: Tensor) -> float:
    return float(max(query.shape[-1], 1) ** -0.5)


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    _check(query, key, value, mask)
    weights, _, _ = _weights(query, key, mask, scale, causal)
    y = weights @ _per_head(value.to(weights.dtype), query.shape[1])
    return y.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :data:`attention` has a kernel for them, and no gradient is needed, for which torch's keeps less.

    >>> x = torch.zeros(1, 1, 2, 4)
    >>> pays(x, x, x), pays(x.half(), x.half(), x.half()), pays(x, x, x.clone().requires_grad_())
    (True, False, False)
    """
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    kernel = attention.kernels.get(query.device.type)
    return not trains and kernel is not None and query.dtype in kernel.dtypes and query.shape[0] == key.shape[0]


def _empty(query: Tensor, value: Tensor) -> Tensor:
    # The heads of a query lie side by side, where the next layer wants them.
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _empty(query, value)


def _expanded(mask: Tensor, scores: tuple[int, ...]) -> Tensor:
    """The mask as the kernel reads it: of the scores' shape, the last dimension contiguous, bool or float32."""
    if mask.dtype != torch.bool:
        _check_mask(mask, scores)
        mask = mask.float()
    try:
        if mask.dim() == 0 or mask.shape[-1] != scores[-1] or mask.stride(-1) != 1:
            mask = mask.expand(*mask.shape[:-1], scores[-1]).contiguous()
        return mask.expand(scores)
    except RuntimeError:
        _check_mask(mask, scores)
        raise


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    # The kernel's caller checks shapes again; here that would take as long as a small attention.
    if query.dim() != 4 or key.dim() != 4:
        _check(query, key, value, mask)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if mask is not None:
        mask = _expanded(mask, (*query.shape[:3], key.shape[2]))
    y = _empty(query, value)
    _C.attention(query, key, value, mask, _scale(query) if scale is None else scale, causal, y)
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # With weights p and y = p v:  dv = p^T dy,  ds = p (dp - sum(p dp)) where dp = dy v^T,  dq = scale ds k.
    query, key, value, mask = ctx.saved_tensors
    p, k, scale = _weights(query, key, mask, ctx.scale, ctx.causal)
    grad = grad.to(p.dtype)
    dp = grad @ _per_head(value.to(p.dtype), query.shape[1]).transpose(-2, -1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))

    def summed(x: Tensor, like: Tensor) -> Tensor:
        groups = x.reshape(*like.shape[:2], x.shape[1] // max(like.shape[1], 1), *x.shape[2:])
        return groups.sum(2).to(like.dtype)

    grad_query = ((ds @ k) * scale).to(query.dtype)
    grad_key = summed(ds.transpose(-2, -1) @ query.to(p.dtype) * scale, key)
    return grad_query, grad_key, summed(p.transpose(-2, -1) @ grad, value), None, None, None


def _arguments(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    value_features: int | None = None,
    kv_heads: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    batch, heads, queries, keys, features = shape
    random = torch.Generator().manual_seed(features * 7919 + keys)

    def heads_of(length: int, count: int, width: int) -> Tensor:  # as projections give them: heads side by side
        return torch.randn((batch, length, count, width), generator=random).transpose(1, 2).to(dtype)

    kv_heads = heads if kv_heads is None else kv_heads
    return {
        "query": heads_of(queries, heads, features),
        "key": heads_of(keys, kv_heads, features),
        "value": heads_of(keys, kv_heads, features if value_features is None else value_features),
        "mask": None,
        "scale": None,
        "causal": False,
    } | options


def _bool_mask(shape: tuple[int, ...], first: int = 0) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(shape[-1])) < 0.7
    mask[..., :first] = False
    return mask


def _samples(size: str) -> Iterable[Sample]:
    if size == "bench":
        for shape, causal in (
            ((1, 12, 512, 512, 64), True),
            ((1, 12, 128, 128, 64), False),
            ((8, 12, 128, 128, 64), False),
            ((1, 12, 64, 64, 32), False),
            ((1, 6, 197, 197, 64), False),
            ((1, 12, 1, 1024, 64), False),
        ):
            label = f"{list(shape)}{' causal' if causal else ''}"
            yield Sample(label, lambda s=shape, c=causal: _arguments(s, causal=c))  # type: ignore[misc]
        return
    shapes = [
        (1, 1, 1, 1, 1), (2, 3, 7, 5, 4), (1, 2, 13, 129, 64), (1, 2, 1, 70, 33), (2, 1, 67, 16, 16),
        (1, 1, 4, 17, 127), (0, 2, 3, 4, 5), (1, 2, 0, 4, 5), (1, 2, 3, 0, 5), (1, 2, 6, 33, 0), (1, 0, 3, 4, 5),
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for shape in shapes:
            yield Sample(f"{list(shape)} {name}", lambda s=shape, d=dtype: _arguments(s, d))  # type: ignore[misc]
        yield Sample(f"causal {name}", lambda d=dtype: _arguments((1, 2, 21, 21, 24), d, causal=True))  # type: ignore[misc]
        mask = torch.randn(2, 1, 9, 34)
        yield Sample(f"mask {name}", lambda d=dtype, m=mask: _arguments((2, 3, 9, 34, 16), d, mask=m.to(d)))  # type: ignore[misc]
    yield Sample("value of other width", lambda: _arguments((1, 2, 8, 40, 16), value_features=83))
    yield Sample("no value features", lambda: _arguments((1, 2, 8, 40, 16), value_features=0))
    yield Sample("grouped heads", lambda: _arguments((2, 6, 9, 20, 16), kv_heads=2))
    yield Sample("one query, grouped heads", lambda: _arguments((2, 6, 1, 50, 20), kv_heads=3))
    yield Sample("scale", lambda: _arguments((1, 2, 8, 40, 16), scale=3.0))
    yield Sample("bool mask", lambda: _arguments((2, 3, 9, 34, 16), mask=_bool_mask((9, 34))))
    yield Sample("bool mask per batch", lambda: _arguments((2, 3, 9, 34, 16), mask=_bool_mask((2, 1, 1, 34))))
    yield Sample("mask of one column", lambda: _arguments((2, 3, 9, 34, 16), mask=_bool_mask((3, 9, 1))))
    yield Sample("one query, mask", lambda: _arguments((2, 3, 1, 34, 16), mask=_bool_mask((2, 1, 1, 34), 20)))
    yield Sample(
        "nothing to see", lambda: _arguments((1, 2, 9, 34, 16), mask=torch.zeros(1, 1, 9, 1, dtype=torch.bool))
    )
    yield Sample("causal, mask", lambda: _arguments((1, 2, 21, 30, 24), causal=True, mask=_bool_mask((21, 30), 3)))
    yield Sample("scores of 1000", lambda: _arguments((1, 2, 9, 34, 16), scale=300.0))
    yield Sample("nan inf", _with_nan_and_infinities)
    yield Sample("strided features", lambda: _arguments((1, 2, 9, 34, 16)) | {"query": torch.randn(1, 2, 16, 9).mT})


def _with_nan_and_infinities() -> dict[str, Any]:
    arguments = _arguments((1, 3, 9, 34, 16))
    arguments["query"][0, 0, 3, 2] = math.nan
    arguments["query"][0, 1, 4, 2] = math.inf
    arguments["value"][0, 2, 5, 7] = math.nan
    return arguments


def _cost(query: Tensor, key: Tensor, value: Tensor, causal: bool = False, **_: Any) -> Cost:
    pairs = query.shape[:2].numel() * query.shape[2] * key.shape[2] * (0.5 if causal else 1.0)
    memory = query.nbytes + key.nbytes + value.nbytes + _empty(query, value).nbytes
    return Cost(f32_ops=2.0 * pairs * (query.shape[3] + value.shape[3]), bytes=float(memory))


def _rivals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> dict[str, Callable[[], Any]]:
    grouped = key.shape[1] != query.shape[1]

    def eager() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    return {"torch eager": eager}


attention = Op(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, float? scale=None, bool causal=False) "
    "-> Tensor",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": Kernel(_cpu, frozenset({torch.float32, torch.bfloat16}))},
    differentiable=(0, 1, 2),
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3},
    cost=_cost,
    rivals=_rivals,
)
"""``softmax(scale * query @ key^T + mask) @ value`` for each head, as ``F.scaled_dot_product_attention``.

- ``query``: [batch, heads, queries, features], ``key``: [batch, kv_heads, keys, features], ``value``: [batch, kv_heads,
  keys, value_features]; one dtype, float32 or bfloat16 for the kernel (any float dtype for the reference). ``kv_heads``
  divides ``heads``: that many queries' heads in turn share a head of keys and values (Ainslie et al. 2023).
- ``mask``: broadcasts to [batch, heads, queries, keys]; bool, False where a query does not see a key, or floats that
  are added to the scores. It gets no gradient.
- ``scale``: ``features ** -0.5`` if it is None. ``causal``: query i sees the keys up to the i-th.

Returns [batch, heads, queries, value_features] of the query's dtype, whose heads lie side by side in memory:
``y.transpose(1, 2)`` is contiguous. Scores, weights and sums are float32. A query that sees no key gives zeros. Raises
:class:`ValueError` for shapes or dtypes that do not agree.

>>> q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 9, 16)
>>> torch.allclose(attention(q, k, k), F.scaled_dot_product_attention(q, k, k), atol=1e-6)
True
"""
