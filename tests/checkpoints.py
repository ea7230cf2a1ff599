"""The models that the tests of save and load use, and what load must not touch when it fails."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import potstill
from potstill.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.Linear(32, 32)
        self.again = self.body
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.again(self.body(self.embed(tokens))))


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(32, 20), nn.BatchNorm1d(20)
        self.register_buffer("offset", torch.arange(20))
        self.register_buffer("passing", torch.ones(20), persistent=False)
        self.register_buffer("nothing", None)
        self.mixed = nn.Parameter(torch.randn(20, 6).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.layer(x)) + self.offset * self.passing) @ self.mixed.t() * self.scalar


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False))


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)


def two_with_one_weight() -> nn.ModuleDict:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    return model


FLOATS, TOKENS = torch.randn(6, 32, generator=torch.Generator().manual_seed(3)), torch.arange(12).view(2, 6)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, FLOATS),
    "bfloat16": (lambda: mlp().to(torch.bfloat16), FLOATS.to(torch.bfloat16)),
    "root": (lambda: nn.Linear(32, 16), FLOATS),
    "encoder": (encoder, FLOATS.view(2, 3, 32)),
    "tied": (Tied, TOKENS),
    "one weight": (two_with_one_weight, FLOATS),
    "buffers": (Buffers, FLOATS),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(32, 32)), nn.Linear(32, 4)), FLOATS),
    "no parameters": (nn.ReLU, FLOATS),
}


def build(name: str, seed: int, converted: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval()
    if converted:
        potstill.quantize_(model, only_if_faster=False)
    return model


def snapshot(model: nn.Module) -> list[object]:
    """Everything of ``model`` that load could change."""
    modules = [(name, module, type(module), module.training) for name, module in model.named_modules()]
    flags = [getattr(m, "activation_relu_or_gelu", None) for m in model.modules()]
    tensors = [(n, id(t), t.dtype, t.tolist()) for n, t in (*model.named_parameters(), *model.named_buffers())]
    return [modules, flags, tensors, getattr(model, "use_nested_tensor", None)]


def rejected(model: nn.Module, path: Path, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        potstill.load(model, path)
    assert snapshot(model) == before
