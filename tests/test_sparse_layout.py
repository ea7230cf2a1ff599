"""The two layouts of sparse int8 weights: packed for CPU kernels, masks and words for GPU kernels."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.nn import SparseLinear
from potstill.ops import sparse_int8_linear
from potstill.ops.sparse import WINDOW, as_windows, check_windows, from_blocks, from_windows, pack, to_blocks
from potstill.ops.sparse_int8_linear import laid_out

OP: Any = sys.modules["potstill.ops.sparse_int8_linear"]


def integers(n: int, k: int, sparsity: float = 0.6) -> Tensor:
    weight = torch.randint(-127, 128, (n, -(-k // 4), 4), dtype=torch.int8)
    weight[torch.rand(n, -(-k // 4)) < sparsity] = 0
    return weight.flatten(1)[:, :k].contiguous()


def layer() -> SparseLinear:
    linear = nn.Linear(300, 33).requires_grad_(False)
    linear.weight[:, 40:260] = 0.0
    return SparseLinear.from_float(linear)


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 128), (33, 300), (3, 0), (0, 8), (16, 129)])
def test_either_layout_is_made_of_the_other(n: int, k: int, sparsity: float) -> None:
    weight = integers(n, k, sparsity)
    windows = as_windows(*to_blocks(weight), k)
    assert windows.dtype == torch.int32
    assert torch.equal(from_blocks(*from_windows(windows, k), k), weight)
    packed = pack(*to_blocks(weight), k, "few")
    assert torch.equal(laid_out(packed, k, "few", "cuda"), windows)
    assert torch.equal(laid_out(windows, k, "few", "cpu"), packed)
    assert laid_out(windows, k, "few", "cuda") is windows
    check_windows("here", windows, n, k)


def test_masks_places_and_words_are_where_they_are_said_to_be() -> None:
    weight = integers(7, 300)
    windows, (mask, values) = as_windows(*to_blocks(weight), 300), to_blocks(weight)
    words = windows[6:].flatten()
    assert len(words) >= len(values) + WINDOW
    for output in range(7):
        for window in range(3):
            bits, place = int(windows[window, output]) & 0xFFFFFFFF, int(windows[3 + window, output])
            for j in range(WINDOW):
                block = window * WINDOW + j
                stored = block < mask.shape[1] and bool(mask[output, block])
                assert bool(bits >> j & 1) == stored
                if stored:
                    rank = bin(bits & ((1 << j) - 1)).count("1")
                    expected = weight[output, block * 4 : block * 4 + 4]
                    assert torch.equal(words[place + rank : place + rank + 1].view(torch.int8), expected)


@pytest.mark.parametrize("wrong", [lambda w: w.long(), lambda w: w[:, 1:], lambda w: w[:5], lambda w: w[0]])
def test_other_tensors_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="as_windows makes"):
        check_windows("here", wrong(as_windows(*to_blocks(integers(7, 300)), 300)), 7, 300)


def test_the_reference_takes_both_and_the_cpu_kernel_only_its_own() -> None:
    weight = integers(20, 300)
    x, scale = torch.randn(3, 300), torch.rand(20)
    windows, packed = as_windows(*to_blocks(weight), 300), pack(*to_blocks(weight), 300, "many")
    expected = sparse_int8_linear.reference(x, packed, scale)
    assert torch.equal(sparse_int8_linear.reference(x, windows, scale), expected)
    with pytest.raises(ValueError, match=r"layout of GPUs, .* laid_out\(weight, k, rows, 'cpu'\)"):
        sparse_int8_linear(x, windows, scale)
    with pytest.raises(ValueError, match=r"is packed, .* but x is on a GPU"):
        OP._cuda(x, packed, scale)


def test_a_layer_lays_out_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type of device that has memory here stands in for a GPU."""
    plain = layer()
    x = torch.randn(4, 300)
    expected, state = plain(x), copy.deepcopy(plain.state_dict())
    monkeypatch.setattr(OP, "ROW_DEVICES", frozenset({"cpu"}))
    moved = copy.deepcopy(plain).to(torch.float32)
    assert moved.weight.dtype == torch.int32
    assert moved.state_dict().keys() == state.keys()
    assert all(torch.equal(moved.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(sparse_int8_linear.reference(x, moved.weight, moved.scale, moved.bias), expected)
    loaded = layer()
    loaded.load_state_dict(state)
    assert torch.equal(loaded.weight, moved.weight)
    torch.testing.assert_close(loaded.to_float().weight, plain.to_float().weight)
    monkeypatch.undo()
    assert torch.equal(moved.to(torch.float32).weight, plain.weight)
    assert torch.equal(moved(x), expected)


@pytest.mark.parametrize("types", [frozenset({"cuda"}), frozenset({"cpu"})])
def test_a_layer_that_was_on_the_meta_device_is_completed_by_a_state(
    types: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OP, "ROW_DEVICES", types)
    whole = layer()
    again = copy.deepcopy(whole).to("meta").to_empty(device="cpu")
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again.weight, whole.weight)
    torch.testing.assert_close(again.to_float().weight, whole.to_float().weight)
