"""realise_: which layer takes the place of a pruned one, and that it is the faster one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import potstill
from potstill import Prune, prune_, realise_
from potstill.nn import BlockSparseLinear, Int8Linear, MaskedLinear, SparseConv2d, SparseLinear
from potstill.nn.sparse import Weights
from potstill.ops import block_sparse_linear, sparse_linear
from potstill.timing import compare
from potstill.transform import realise


def mlp(k: int = 512, n: int = 512) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(k, n), nn.ReLU(), nn.Linear(n, 10)).eval()


def test_what_was_pruned_computes_the_same() -> None:
    model, x = mlp(), torch.randn(64, 512)
    prune_(model, Prune(sparsity=0.8))
    expected = model(x)
    report = realise_(model, x, weights="float", only_if_faster=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [row.action for row in report.rows] == ["sparse float"] * 2
    assert all(isinstance(model[i], SparseLinear) for i in (0, 2))
    assert report.bytes_after < 0.5 * report.bytes_before
    assert all(row.rows == {64: 1} for row in report.rows)


def test_int8_is_near_and_small() -> None:
    model, x = mlp(), torch.randn(64, 512)
    prune_(model, Prune(sparsity=0.8))
    expected = model(x).detach()
    report = realise_(model, x, only_if_faster=False)
    assert float((model(x) - expected).norm() / expected.norm()) < 0.02
    assert report.bytes_after < 0.12 * report.bytes_before  # a quarter of a fifth, an index, and the mask
    assert all(row.snr_db is not None and row.snr_db > 30 for row in report.rows)


def test_a_layer_without_zeros_stays_dense_and_says_why() -> None:
    model, x = mlp(), torch.randn(64, 512)
    prune_(model, Prune(sparsity=0.0))
    report = realise_(model, x, weights="float")
    assert isinstance(model[0], nn.Linear)
    assert report.rows[0].action == "dense"
    assert "fewer than a fifth" in report.rows[0].reason


def test_int8_dense_where_that_is_faster() -> None:
    model, x = mlp(1024, 1024), torch.randn(128, 1024)
    prune_(model, Prune(sparsity=0.05), include="0")
    report = realise_(model, x)
    assert type(model[0]) is Int8Linear
    assert report.rows[0].action == "int8"
    assert "fewer than a fifth" in report.rows[0].reason


def test_zeros_that_gain_too_little_are_told_with_their_ratio() -> None:
    model, x = mlp(1024, 1024), torch.randn(8, 1024)
    prune_(model, Prune(sparsity=0.25), include="0")
    report = realise_(model, x)
    assert type(model[0]) is Int8Linear
    assert "sparse would have 0." in report.rows[0].reason
    assert "of the dense int8 layer" in report.rows[0].reason


def test_many_zeros_become_a_sparse_layer() -> None:
    model, x = mlp(1024, 2048), torch.randn(128, 1024)
    prune_(model, Prune(sparsity=0.9), include="0")
    report = realise_(model, x)
    assert isinstance(model[0], SparseLinear)
    assert model[0].rows == "many"
    assert report.rows[0].ms_before is not None
    assert report.rows[0].ms_after is not None
    assert report.rows[0].ms_after < report.rows[0].ms_before


def test_few_rows_get_the_order_for_few() -> None:
    model, x = mlp(2048, 2048), torch.randn(1, 2048)
    prune_(model, Prune(sparsity=0.8), include="0")
    realise_(model, x)
    assert isinstance(model[0], SparseLinear)
    assert model[0].rows == "few"


@pytest.mark.parametrize("seed", range(3))
def test_no_layer_is_slower_than_dense(seed: int) -> None:
    """Thirty random shapes in all; what realise_ chose is timed again, against the faster dense layer."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    for _ in range(10):
        k, n, m = draw(16, 1500), draw(16, 1500), draw(1, 160)
        model, x = nn.Sequential(nn.Linear(k, n)).eval(), torch.randn(m, k)
        pattern = ("1x4", "unstructured")[draw(0, 2)]
        prune_(model, Prune(sparsity=draw(50, 97) / 100, pattern=pattern))
        plain = model[0].to_float()
        realise_(model, x)
        new = model[0]
        if not isinstance(new, SparseLinear):
            continue
        int8 = Int8Linear.from_float(plain)
        for attempt in range(5):  # a busy machine may spoil one timing, not five
            ways = {"sparse": lambda: new(x), "float": lambda: plain(x), "int8": lambda: int8(x)}  # noqa: B023
            times = compare(ways, seconds=0.05 * (attempt + 1))
            if times["sparse"].low <= 1.05 * min(times["float"].low, times["int8"].low):
                break
        else:
            pytest.fail(f"{m} rows, {k} -> {n}, {new}: slower than dense: {times}")


@pytest.mark.parametrize("kernel", [1, 3])
def test_deep_convolutions_become_sparse(kernel: int, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(512, 512, kernel, padding=kernel // 2), nn.ReLU()).eval()

    model, x = build(), torch.randn(1, 512, 7, 7)
    prune_(model, Prune(sparsity=0.9))
    expected = model(x).detach()
    report = realise_(model, x)
    assert isinstance(model[0], SparseConv2d), report
    assert report.rows[0].action == "sparse int8"
    assert float((model(x) - expected).norm() / expected.norm()) < 0.02
    potstill.save(model, tmp_path / "m.safetensors")
    assert torch.equal(potstill.load(build(), tmp_path / "m.safetensors")(x), model(x))


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(6, 10, 1), 9),
        (nn.Conv2d(6, 10, 1, stride=2, bias=False), 9),
        (nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), 11),
        (nn.Conv2d(4, 4, 1, padding=1), 5),
    ],
)
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_sparse_convolutions_compute_what_dense_ones_do(conv: nn.Conv2d, size: int, weights: Weights) -> None:
    conv = copy.deepcopy(conv).requires_grad_(False)
    conv.weight.view(-1)[::3] = 0.0
    x = torch.randn(2, conv.in_channels, size, size)
    layer = SparseConv2d.from_float(conv, weights)
    error = float((layer(x) - conv(x)).norm() / conv(x).norm())
    assert error < (1e-6 if weights == "float" else 0.02)
    assert torch.equal(layer.to_float()(x) == 0, layer(x) == 0) or weights == "int8"
    with pytest.raises(ValueError, match="expected \\[batch"):
        layer(x[:, :1])
    with pytest.raises(TypeError, match="one group"):
        SparseConv2d.from_float(nn.Conv2d(4, 4, 1, groups=2))


def test_convolutions_that_gain_nothing_become_plain_ones() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(2, 3, 40, 40)
    prune_(model, Prune(sparsity=0.5))
    expected = model(x)
    without = copy.deepcopy(model)
    report = realise_(model, x)
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model(x), expected)
    assert "sparse would have 0." in report.rows[0].reason
    assert "it got none" in realise_(without).rows[0].reason
    assert type(without[0]) is nn.Conv2d


def test_zeros_from_elsewhere_count_too() -> None:
    model, x = mlp(1024, 2048), torch.randn(128, 1024)
    prune_(model, Prune(sparsity=0.9), include="0")
    plain = nn.Sequential(model[0].to_float(), model[1], model[2]).eval().requires_grad_(False)
    expected = plain(x)
    report = realise_(plain, x)
    assert [row.names for row in report.rows] == [("0",)]  # the other has no zeros
    assert isinstance(plain[0], SparseLinear)
    assert float((plain(x) - expected).norm() / expected.norm()) < 0.02


def test_zeros_that_gain_nothing_leave_the_layer_itself() -> None:
    linear = nn.Linear(64, 64).requires_grad_(False)
    linear.weight[:, :24] = 0.0
    model = nn.Sequential(linear).eval()
    report = realise_(model, torch.randn(512, 64), weights="float")
    assert (model[0] is linear) == (report.rows[0].action == "kept")
    linear.weight[:, 8:] = 1.0  # an eighth of zeros is not even looked at
    assert not realise_(nn.Sequential(linear), torch.randn(512, 64)).rows


def test_layers_that_are_never_called_stay_dense() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(256, 256), nn.Linear(256, 256)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Half().eval()
    prune_(model, Prune(sparsity=0.9))
    report = realise_(model, torch.randn(64, 256))
    assert {row.names: row.reason for row in report.rows}[("unused",)] == "90% zeros: the sample never calls it"
    assert type(model.unused) is nn.Linear


def test_float64_stays_dense() -> None:
    model = mlp().double()
    prune_(model, Prune(sparsity=0.9))
    report = realise_(model, torch.randn(8, 512, dtype=torch.float64))
    assert all(row.action == "dense" for row in report.rows)
    assert all("float64" in row.reason for row in report.rows)


def test_saved_loaded_and_fused(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(64, 512)
    prune_(model, Prune(sparsity=0.9))
    realise_(model, x, only_if_faster=False)
    report = potstill.fuse_(model, x, only_if_faster=False)
    assert [row.action for row in report.rows] == ["fused"]
    assert model[0].activation == "relu"
    potstill.save(model, tmp_path / "m.safetensors")
    assert torch.equal(potstill.load(mlp(), tmp_path / "m.safetensors")(x), model(x))


def test_a_realised_layer_cannot_be_pruned_again() -> None:
    model, x = mlp(), torch.randn(64, 512)
    prune_(model, Prune(sparsity=0.9), include="0")
    realise_(model, x, only_if_faster=False)
    report = prune_(model, Prune(sparsity=0.5))
    kept = [row for row in report.rows if row.names == ("0",)]
    assert all(row.reason for row in kept)
    assert isinstance(model[0], SparseLinear)
    assert isinstance(model[2], MaskedLinear)


def test_unknown_weights_are_an_error() -> None:
    with pytest.raises(ValueError, match="weights is 'int4', expected one of int8, float"):
        realise_(mlp(), weights="int4")  # type: ignore[arg-type]


def block_pruned(model: nn.Sequential, sparsity: float, pattern: str) -> nn.Sequential:
    prune_(model, Prune(sparsity=sparsity, pattern=pattern), include="0")
    return model


@pytest.fixture
def with_block_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this CPU had a kernel for whole blocks, and none for small ones, as GPUs."""
    kernel = block_sparse_linear.kernels["cuda"]
    for op, kernels in ((block_sparse_linear, {"cpu": kernel}), (sparse_linear, {})):
        monkeypatch.setitem(op.__dict__, "kernels", kernels)


def measured(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """What the candidates are found to take: those that begin with a name; the dense layer takes 1."""

    def fastest(comparisons: Any) -> Any:
        of = {name.replace("_", " "): value for name, value in seconds.items()} | {"dense": 1.0}
        return {
            key: {way: next(value for name, value in of.items() if way.startswith(name)) for way in ways}
            for key, ways in comparisons.items()
        }

    monkeypatch.setattr("potstill.transform.realise.fastest", fastest)


@pytest.mark.usefixtures("with_block_kernel")
def test_whole_blocks_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured(monkeypatch, block_sparse=0.5)
    model, x = block_pruned(mlp(), 0.75, "64x64"), torch.randn(8, 512)
    expected = model(x)
    report = realise_(model, x, weights="float")
    assert isinstance(model[0], BlockSparseLinear)
    assert (model[0].block, model[0].blocks) == (64, 16)
    assert report.rows[0].action == "block sparse"
    assert "2.00 times the speed of the dense layer" in report.rows[0].reason
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    report = potstill.fuse_(model, x, only_if_faster=False)
    assert [row.action for row in report.rows] == ["fused"]
    assert model[0].activation == "relu"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    potstill.save(model, tmp_path / "m.safetensors")
    assert torch.equal(potstill.load(mlp(), tmp_path / "m.safetensors")(x), model(x))


@pytest.mark.usefixtures("with_block_kernel")
def test_whole_blocks_are_left_where_they_are_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, block_sparse=0.95)
    model, x = block_pruned(mlp(), 0.75, "64x64"), torch.randn(8, 512)
    report = realise_(model, x, weights="float")
    assert type(model[0]) is nn.Linear
    assert "sparse would have 1.05 times the speed" in report.rows[0].reason


def test_whole_blocks_are_no_candidate_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, block_sparse=0.1, sparse=2.0)
    model = block_pruned(mlp(), 0.75, "64x64")
    realise_(model, torch.randn(8, 512), weights="float")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("pattern", "sparsity", "sizes"),
    [("128x128", 0.5, [128]), ("64x64", 0.75, [64]), ("32x32", 0.95, [64, 32]), ("16x16", 0.6, [16]), ("1x4", 0.9, [])],
)
def test_blocks_are_as_large_as_their_zeros(pattern: str, sparsity: float, sizes: list[int]) -> None:
    layer = block_pruned(mlp(1024, 1024), sparsity, pattern)[0]
    assert isinstance(layer, MaskedLinear)
    assert list(realise._block_sizes(layer.masked_weight())) == sizes
