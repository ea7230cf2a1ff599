"""What the tests of quantize_ share."""

import torch
from torch import Tensor, nn

import potstill


def mlp(width: int = 48, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 16)).to(dtype)


def convert(model: nn.Module, **options: object) -> potstill.Report:
    return potstill.quantize_(model, only_if_faster=False, **options)  # type: ignore[arg-type]


def row(report: potstill.Report, name: str) -> potstill.LayerRow:
    (found,) = [r for r in report.rows if name in r.names]
    return found


def snr(y: Tensor, other: Tensor) -> float:
    y, other = y.detach().double(), other.detach().double()
    return float(10 * torch.log10(y.square().sum() / (y - other).square().sum()))


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.named = nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})
        self.chain = nn.Sequential(nn.Sequential(nn.Linear(32, 8)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.several:
            x = layer(x)
        return self.chain(self.named["down"](self.named["up"](x)))


def two_with_one_weight() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(32, 16), "b": nn.Linear(32, 16), "c": nn.Linear(32, 16)})
    model["b"].weight = model["a"].weight
    model["c"].bias = model["a"].bias
    return model
