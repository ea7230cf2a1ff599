"""Int8MultiheadAttention against nn.MultiheadAttention: the same meaning of every argument, up to int8 error."""

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantizing import snr
from torch import Tensor, nn

import potstill
from potstill.errors import CheckpointError
from potstill.nn import Int8Embedding, Int8Linear, Int8MultiheadAttention
from potstill.transform.observe import unfused

E, HEADS, BATCH, QUERIES, KEYS = 48, 4, 3, 7, 9


@pytest.fixture(autouse=True)
def _slow_path() -> Iterator[None]:
    """Torch's fast path gives NaN for rows that see nothing, its plain path zeros; the module follows the plain one."""
    with unfused():
        yield


def pair(**options: Any) -> tuple[nn.MultiheadAttention, Int8MultiheadAttention]:
    attention = nn.MultiheadAttention(options.pop("embed_dim", E), HEADS, **options).eval()
    for parameter in attention.parameters():
        if parameter.dim() == 1:  # torch starts biases at zero
            nn.init.normal_(parameter, std=0.5)
    return attention, Int8MultiheadAttention.from_float(attention)


def same(expected: Any, given: Any, decibels: float = 30.0) -> None:
    for e, g in zip(expected, given, strict=True):
        assert (e is None) == (g is None)
        if e is not None:
            assert (e.shape, e.dtype) == (g.shape, g.dtype)
            assert torch.equal(e.isnan(), g.isnan())
            assert snr(e.nan_to_num(), g.nan_to_num()) > decibels


def inputs(batch_first: bool, width: int = E) -> tuple[Tensor, Tensor]:
    query, key = torch.randn(BATCH, QUERIES, width), torch.randn(BATCH, KEYS, width)
    return (query, key) if batch_first else (query.transpose(0, 1), key.transpose(0, 1))


def masks(queries: int, keys: int) -> dict[str, dict[str, Any]]:
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[0, -3:] = padding[2, 0] = True
    causal = torch.triu(torch.ones(queries, keys, dtype=torch.bool), 1)
    each = torch.rand(BATCH * HEADS, queries, keys) < 0.3
    each[..., 0] = False
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(BATCH, keys)},
        "causal": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(queries, keys)},
        "each head": {"attn_mask": each},
        "both": {"attn_mask": causal, "key_padding_mask": padding & (torch.arange(keys) > 0)},
        "hint": {"attn_mask": causal, "is_causal": True},
        "hint and padding": {
            "attn_mask": causal,
            "is_causal": True,
            "key_padding_mask": padding & (torch.arange(keys) > 0),
        },
        "a query sees nothing": {"attn_mask": (torch.arange(queries) == 2)[:, None].expand(queries, keys)},
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", masks(1, 1))
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
def test_masks_and_weights(name: str, weights: dict[str, bool], batch_first: bool) -> None:
    attention, fast = pair(batch_first=batch_first)
    query, key = inputs(batch_first)
    mask = masks(QUERIES, QUERIES)[name] | weights
    same(attention(query, query, query, **mask), fast(query, query, query, **mask))
    mask = masks(QUERIES, KEYS)[name] | weights
    same(attention(query, key, key, **mask), fast(query, key, key, **mask))


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True},
     {"kdim": 24, "vdim": 40}, {"vdim": 33, "bias": False}, {"embed_dim": 20},
     {"embed_dim": 68, "add_zero_attn": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("batch_first", [True, False])
def test_options(options: dict[str, Any], batch_first: bool) -> None:
    attention, fast = pair(batch_first=batch_first, **options)
    query, key = inputs(batch_first, attention.embed_dim)
    key, value = key[..., : attention.kdim], key.flip(-1)[..., : attention.vdim]
    for mask in (masks(QUERIES, KEYS)["both"], {"need_weights": False}):
        same(attention(query, key, value, **mask), fast(query, key, value, **mask))
        if attention.kdim == attention.vdim == attention.embed_dim:
            same(attention(query, key, key, **mask), fast(query, key, key, **mask))
    same(attention.state_dict().values(), fast.to_float().state_dict().values(), 38)
    assert fast.to_float().state_dict().keys() == attention.state_dict().keys()


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first: bool) -> None:
    attention, fast = pair(batch_first=batch_first, add_zero_attn=True)
    query, key = torch.randn(QUERIES, E), torch.randn(KEYS, E)
    padding = torch.arange(KEYS) > 6
    each = torch.randn(HEADS, QUERIES, KEYS)
    for options in ({}, {"average_attn_weights": False}, {"need_weights": False}, {"attn_mask": each}):
        same(
            attention(query, query, query, **{**options, "attn_mask": None}),
            fast(query, query, query, **{**options, "attn_mask": None}),
        )
        same(attention(query, key, key, **options), fast(query, key, key, **options))
        if "attn_mask" not in options:
            options = options | {"key_padding_mask": padding}
            same(attention(query, key, key, **options), fast(query, key, key, **options))


def test_dropout_only_while_training() -> None:
    attention, fast = pair(batch_first=True, dropout=0.5)
    x = torch.randn(BATCH, QUERIES, E)
    assert torch.equal(fast(x, x, x)[0], fast(x, x, x)[0])
    for need_weights in (True, False):
        for module in (attention.train(), fast.train()):
            first = module(x, x, x, need_weights=need_weights)[0]
            assert not torch.equal(first, module(x, x, x, need_weights=need_weights)[0])
    weights = fast(x, x, x, average_attn_weights=False)[1]
    assert 0.3 < (weights == 0).float().mean() < 0.7
    assert Int8MultiheadAttention.from_float(attention).training


def test_gradients_reach_the_inputs() -> None:
    attention, fast = pair(batch_first=True)
    query, key = inputs(True)
    upstream = torch.randn(BATCH, QUERIES, E)
    found = []
    for module in (fast.to_float(), fast):
        leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
        module(leaves[0], leaves[1], leaves[1], need_weights=False)[0].backward(upstream)
        found.append([leaf.grad for leaf in leaves])
    same(*found)
    assert not any(p.requires_grad for p in fast.parameters())
    assert attention.in_proj_weight.grad is None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2, 5, E + 1), {}, r"ending in \[48, 48, 48\]"),
        ((2, 2, 5, E), {}, "two or three dimensions"),
        ((2, 5, E), {"attn_mask": torch.ones(4, 5)}, r"attn_mask is torch.float32 \[4, 5\], expected .* \[5, 5\]"),
        ((2, 5, E), {"attn_mask": torch.ones(5, 5, dtype=torch.int64)}, "attn_mask is torch.int64"),
        ((2, 5, E), {"key_padding_mask": torch.ones(5, dtype=torch.bool)}, r"expected bool or float \[2, 5\]"),
        ((2, 5, E), {"is_causal": True}, "is_causal is a hint about attn_mask"),
    ],
)
def test_what_does_not_agree_is_named(arguments: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    _, fast = pair(batch_first=True)
    x = torch.randn(arguments)
    with pytest.raises(ValueError, match=message):
        fast(x, x, x, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_batches_that_differ_and_nested_tensors_are_refused() -> None:
    _, fast = pair(batch_first=True)
    x, y = torch.randn(2, 5, E), torch.randn(3, 5, E)
    with pytest.raises(ValueError, match=r"the same batch in dimension 0"):
        fast(x, y, y)
    nested = torch._nested_tensor_from_mask(x, torch.arange(5).expand(2, 5) < torch.tensor([[3], [5]]))
    with pytest.raises(ValueError, match="nested"):
        fast(nested, nested, nested)


@pytest.mark.parametrize("options", [{}, {"kdim": 24, "add_bias_kv": True}])
def test_state_loads_and_copies_agree(options: dict[str, Any]) -> None:
    _, fast = pair(batch_first=True, **options)
    x, key = torch.randn(BATCH, QUERIES, E), torch.randn(BATCH, KEYS, fast.kdim)
    arguments = (x, key, torch.randn(BATCH, KEYS, fast.vdim))
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    fresh = Int8MultiheadAttention(**fast.config()).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(*arguments)[0], fast(*arguments)[0])
    if not options:
        assert fast.state_dict()["in_proj.weight"].shape == (3 * E, E)


def test_saves_and_loads_into_the_float_model(tmp_path: Path) -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict(
            {"tokens": nn.Embedding(30, E), "mix": nn.MultiheadAttention(E, HEADS), "out": nn.Linear(E, 4)}
        )

    def output(model: nn.ModuleDict) -> Tensor:
        x = model["tokens"](torch.arange(12).view(4, 3))
        return model["out"](model["mix"](x, x, x)[0])

    changed = model()
    changed["tokens"] = Int8Embedding.from_float(changed["tokens"])
    changed["mix"] = Int8MultiheadAttention.from_float(changed["mix"])
    changed["out"] = Int8Linear.from_float(changed["out"])
    potstill.save(changed, tmp_path / "model")
    loaded = potstill.load(model(), tmp_path / "model")
    assert torch.equal(output(loaded), output(changed))
    assert torch.equal(output(potstill.load(loaded, tmp_path / "model")), output(changed))
    other = model()
    other["mix"] = nn.MultiheadAttention(E, HEADS, batch_first=True)
    with pytest.raises(CheckpointError, match=r"'mix' is a MultiheadAttention .* the file has int8_multihead"):
        potstill.load(other, tmp_path / "model")
    with torch.no_grad():
        changed["mix"].in_proj.scale[3] = -1
    potstill.save(changed, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"mix.in_proj.scale has values that are negative"):
        potstill.load(model(), tmp_path / "model")


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
def test_compiles_whole() -> None:
    _, fast = pair(batch_first=True)
    query, key = inputs(True)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for arguments in ((query, query, query), (query, key, key)):
        same(fast(*arguments), compiled(*arguments), 100)
        same(fast(*arguments, need_weights=False), compiled(*arguments, need_weights=False), 100)
    dynamic = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
    mask = masks(QUERIES, QUERIES)["both"]
    same(fast(query, query, query, **mask), dynamic(query, query, query, **mask), 100)


def test_bfloat16_and_autocast() -> None:
    attention, fast = pair(batch_first=True)
    x = torch.randn(BATCH, QUERIES, E)
    expected = attention(x, x, x, need_weights=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(x, x, x, need_weights=False, key_padding_mask=torch.zeros(BATCH, QUERIES, dtype=torch.bool))[0]
    assert y.dtype == torch.bfloat16
    assert snr(expected, y) > 28
    low = fast.bfloat16()(x.bfloat16(), x.bfloat16(), x.bfloat16(), need_weights=False)[0]
    assert low.dtype == torch.bfloat16
    assert snr(expected, low) > 28


def test_other_classes_are_refused() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    with pytest.raises(ValueError, match="Mine is no plain"):
        Int8MultiheadAttention.from_float(Mine(E, HEADS))
    with pytest.raises(ValueError, match="positive multiple"):
        Int8MultiheadAttention(E, 5)
