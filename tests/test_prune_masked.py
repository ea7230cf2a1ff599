"""Masked layers: what is masked counts as zero whatever training does, and all of torch's machinery takes them."""

from __future__ import annotations

import copy
import gc
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from potstill import Prune, load, prune_, save
from potstill.distill import Distiller, HardLabels, TrainingPlan
from potstill.distill.training import _averaged
from potstill.errors import CheckpointError
from potstill.nn import MaskedConv2d, MaskedLinear
from potstill.nn.masked import Masked

CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 3), "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "groups": 2},
]


def _mask(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.4


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))


def _batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(16, 2, 5, 5, generator=generator), torch.arange(16) % 3) for _ in range(count)]


def test_linear_computes_with_zeros() -> None:
    linear, mask, x = nn.Linear(7, 5), _mask(5, 7), torch.randn(2, 3, 7)
    layer = MaskedLinear.from_float(linear, mask)
    assert layer.weight is linear.weight
    assert "sparsity=0." in repr(layer)
    assert (
        repr(copy.deepcopy(layer).to("meta"))
        == "MaskedLinear(in_features=7, out_features=5, bias=True, transposed=False)"
    )
    assert layer.bias is linear.bias
    expected = F.linear(x, linear.weight * mask, linear.bias)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), expected)
    plain = layer.to_float()
    assert type(plain) is nn.Linear
    assert torch.equal(plain(x), expected)
    assert torch.equal(plain.weight == 0, ~mask)
    assert layer.sparsity == pytest.approx(1 - mask.float().mean().item())


@pytest.mark.parametrize("arguments", CONVS)
def test_convolution_computes_with_zeros(arguments: dict) -> None:
    conv, x = nn.Conv2d(4, 6, **arguments), torch.randn(2, 4, 9, 8)
    mask = _mask(6, conv.weight[0].numel())
    layer = MaskedConv2d.from_float(conv, mask)
    plain = copy.deepcopy(conv)
    with torch.no_grad():
        plain.weight.mul_(mask.view_as(plain.weight))
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.to_float()(x), plain(x), rtol=0, atol=0)
    assert layer.weight is conv.weight


def test_conv1d_of_transformers_keeps_its_layout() -> None:
    conv, mask, x = Conv1D(5, 7), _mask(5, 7), torch.randn(3, 7)
    layer = MaskedLinear.from_float(conv, mask)
    assert layer.weight is conv.weight
    assert layer.mask.shape == (7, 5)
    torch.testing.assert_close(layer(x), x @ (conv.weight * mask.t()) + conv.bias)
    torch.testing.assert_close(layer.to_float()(x), layer(x))


def test_gradients_are_exactly_zero_where_masked_even_among_infinities() -> None:
    layer = MaskedLinear.from_float(nn.Linear(6, 4), _mask(4, 6))
    layer(torch.randn(3, 6)).square().sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    assert bool((gradient[~layer.mask] == 0).all())
    assert bool((gradient[layer.mask] != 0).all())
    layer.weight.grad = None
    layer(torch.full((1, 6), torch.inf)).sum().backward()
    assert bool((layer.weight.grad[~layer.mask] == 0).all())


def test_an_optimiser_made_before_goes_on_and_zeros_stay() -> None:
    """AdamW with weight decay and momentum moves masked master weights; with accumulation; the layers never see it."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for x, y in _batches():  # momentum from before
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    prune_(model, Prune(0.75))
    masters = [m.weight.detach().clone() for m in model.modules() if isinstance(m, Masked)]
    for _ in range(3):
        for x, y in _batches():
            (F.cross_entropy(model(x), y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [m for m in model.modules() if isinstance(m, Masked)]
    assert len(layers) == 3
    x, y = _batches()[0]
    for layer, before in zip(layers, masters, strict=True):
        assert not torch.equal(layer.weight, before)
        assert bool((layer.weight[~layer.mask] != before[~layer.mask]).any()), "the test needs masters that move"
        assert bool((layer.masked_weight()[~layer.mask] == 0).all())
        assert bool((layer.to_float().weight.view_as(layer.mask)[~layer.mask] == 0).all())
    plain = nn.Sequential(*(m.to_float() if isinstance(m, Masked) else m for m in model))
    torch.testing.assert_close(plain(x), model(x))


def test_distilling_with_averaged_weights() -> None:
    model = _model()
    prune_(model, Prune(0.5))
    masks = [m.mask.clone() for m in model.modules() if isinstance(m, Masked)]
    plan = TrainingPlan(epochs=2, lr=0.01, ema=0.9, accumulate=2)
    Distiller(None, model, HardLabels()).fit(_batches(), plan, quiet=True)
    layers = [m for m in model.modules() if isinstance(m, Masked)]
    assert all(torch.equal(m.mask, mask) and m.mask.dtype == torch.bool for m, mask in zip(layers, masks, strict=True))


def test_the_average_of_a_run_copies_masks() -> None:
    layer = MaskedLinear.from_float(nn.Linear(6, 4), _mask(4, 6))
    averaged = _averaged(layer, 0.9)
    averaged.update_parameters(layer)
    with torch.no_grad():
        layer.weight += 1
    layer.set_mask(~_mask(4, 6))
    averaged.update_parameters(layer)
    assert averaged.module.mask.dtype == torch.bool
    assert torch.equal(averaged.module.mask, layer.mask)
    assert not torch.equal(averaged.module.weight, layer.weight)
    assert bool((averaged.module.masked_weight()[~layer.mask] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_mask(dtype: torch.dtype) -> None:
    mask = _mask(4, 6)
    layer = MaskedLinear.from_float(nn.Linear(6, 4), mask).to(dtype)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.mask, mask)
    assert layer(torch.ones(2, 6, dtype=dtype)).dtype == dtype


def test_copies_and_state_dicts() -> None:
    model = _model()
    prune_(model, Prune(0.75))
    x = _batches()[0][0]
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = _model()
    prune_(other, Prune(0.25))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


def test_save_and_load(tmp_path: Path) -> None:
    model = nn.Sequential(_model(), nn.Sequential(Conv1D(5, 3), nn.Conv2d(1, 2, 3, padding="same")))
    prune_(model, Prune(0.5, pattern="unstructured"))
    save(model, tmp_path / "model")
    fresh = load(
        nn.Sequential(_model(), nn.Sequential(Conv1D(5, 3), nn.Conv2d(1, 2, 3, padding="same"))), tmp_path / "model"
    )
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    for (name, old), (other, new) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert (name, old.dtype) == (other, new.dtype)
        assert torch.equal(old, new)
    x = _batches()[0][0]
    assert torch.equal(fresh[0](x), model[0](x))
    assert fresh[0][0].weight.requires_grad
    load(model, tmp_path / "model")  # also into a model that is masked already


def test_a_file_for_other_sizes_or_with_bytes_that_are_no_bool(tmp_path: Path) -> None:
    layer = nn.Sequential(MaskedLinear.from_float(nn.Linear(6, 4), _mask(4, 6)))
    save(layer, tmp_path / "model")
    with pytest.raises(CheckpointError, match="in_features"):
        load(nn.Sequential(nn.Linear(7, 4)), tmp_path / "model")
    raw = (tmp_path / "model").read_bytes()
    mask = bytes(layer[0].mask.flatten().to(torch.uint8).tolist())
    assert raw.count(mask) == 1
    (tmp_path / "model").write_bytes(raw.replace(mask, bytes([7]) + mask[1:]))
    with pytest.raises(CheckpointError, match="neither 0 nor 1"):
        load(nn.Sequential(nn.Linear(6, 4)), tmp_path / "model")


def test_compiles_whole() -> None:
    model = nn.Sequential(
        MaskedConv2d.from_float(nn.Conv2d(2, 4, 3), _mask(4, 18)),
        nn.Flatten(),
        MaskedLinear.from_float(nn.Linear(36, 8), _mask(8, 36)),
    )
    x = torch.randn(3, 2, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert bool((model[2].weight.grad[~model[2].mask] == 0).all())


def test_autocast() -> None:
    layer = MaskedLinear.from_float(nn.Linear(6, 4), _mask(4, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 6)).dtype == torch.bfloat16


def test_distributed_data_parallel(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _gradients_are_those_of_one_process()
        gc.collect()
    finally:
        # Nothing may hold the group now: freed with the last reducer, its threads wait for the lock that Python holds.
        distributed.destroy_process_group()


def _gradients_are_those_of_one_process() -> None:
    model = _model()
    prune_(model, Prune(0.75))
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    x, y = _batches()[0]
    F.cross_entropy(wrapped(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    for mine, theirs in zip(model.parameters(), wrapped.module.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(theirs.grad, mine.grad)
    assert not any(p.requires_grad for p in model.parameters() if p.dtype == torch.bool)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Linear or a Conv1D"):
        MaskedLinear.from_float(nn.ReLU())
    with pytest.raises(TypeError, match="pads with zeros"):
        MaskedConv2d.from_float(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"))
    layer = MaskedLinear.from_float(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"mask is torch\.bool \[3, 2\], expected bool \[2, 3\]"):
        layer.set_mask(torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected bool"):
        layer.set_mask(torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected a number or a pair"):
        MaskedConv2d(1, 1, [1, 2, 3])
