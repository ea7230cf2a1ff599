"""What a user of plain torch would call instead of our ops; used by the benchmarks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def quantize_dynamic(linear: nn.Linear, x: Tensor) -> dict[str, Callable[[], Any]]:
    """``torch.ao.quantization.quantize_dynamic`` of ``linear`` applied to ``x``, once per engine of this torch."""
    calls: dict[str, Callable[[], Any]] = {}
    chosen = torch.backends.quantized.engine
    try:
        for engine in ("x86", "fbgemm", "onednn", "qnnpack"):
            if engine in torch.backends.quantized.supported_engines and (engine != "qnnpack" or chosen == "qnnpack"):
                calls[f"quantize_dynamic {engine}"] = _dynamic(linear, x, engine)
    finally:
        torch.backends.quantized.engine = chosen
    return calls


def _dynamic(linear: nn.Linear, x: Tensor, engine: str) -> Callable[[], Any]:
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that torch.ao.quantization will move
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)

    def call() -> Any:
        torch.backends.quantized.engine = engine  # the packed weights belong to one engine
        return model(x)

    return call
