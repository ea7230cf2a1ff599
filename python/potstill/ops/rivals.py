"""What a user of plain torch would call instead of our ops; used by the benchmarks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def quantize_dynamic(linear: nn.Linear, x: Tensor) -> dict[str, Callable[[], Any]]:
    """``torch.ao.quantization.quantize_dynamic`` of ``linear`` applied to ``x``, once per engine of this torch."""
    return {f"quantize_dynamic {engine}": dynamic(linear, engine, x) for engine in engines()}


def engines() -> list[str]:
    """The engines of ``quantize_dynamic`` that a user of this machine would choose from."""
    supported, chosen = torch.backends.quantized.supported_engines, torch.backends.quantized.engine
    return [e for e in ("x86", "fbgemm", "onednn", "qnnpack") if e in supported and (e != "qnnpack" or e == chosen)]


def dynamic(module: nn.Module, engine: str, *inputs: Tensor) -> Callable[[], Any]:
    """``quantize_dynamic`` of a copy of ``module`` applied to ``inputs``, with one engine."""
    chosen = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that torch.ao.quantization will move
            model = torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {nn.Linear}, dtype=torch.qint8)[0]
    finally:
        torch.backends.quantized.engine = chosen

    def call() -> Any:
        torch.backends.quantized.engine = engine  # the packed weights belong to one engine
        return model(*inputs)

    return call
