"""What other libraries offer on a GPU for the same work, where they are installed."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]


def int8_linear(linear: nn.Linear, x: Tensor) -> dict[str, Call]:
    """bitsandbytes' LLM.int8() without outliers, and torchao's dynamic int8."""
    found: dict[str, Call] = {}
    if _installed("bitsandbytes", x):
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=0.0)
        layer.load_state_dict(linear.state_dict())
        layer, half = layer.to(x.device), x.to(torch.float16)
        found["bitsandbytes int8"] = lambda: layer(half)
    if _installed("torchao", x):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = nn.Sequential(copy.deepcopy(linear))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        found["torchao int8"] = lambda: model(x)
        found["torchao int8, compiled"] = _compiled(model, x)
    return found


def int4_linear(linear: nn.Linear, x: Tensor) -> dict[str, Call]:
    """4-bit weights and 16-bit activations of bitsandbytes and torchao."""
    found: dict[str, Call] = {}
    if _installed("bitsandbytes", x):
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=x.dtype, quant_type="nf4", device="cpu"
        )
        layer.load_state_dict(linear.state_dict())
        layer = layer.to(x.device)
        found["bitsandbytes nf4"] = lambda: layer(x)
    if _installed("torchao", x):
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        model = nn.Sequential(copy.deepcopy(linear))
        quantize_(model, Int4WeightOnlyConfig(group_size=128))
        found["torchao int4"] = lambda: model(x)
    return found


def block_sparse_linear(linear: nn.Linear, x: Tensor, block: int) -> dict[str, Call]:
    """torch's own product with a matrix of blocks, which it has as a Triton kernel."""
    if not _installed("triton", x):
        return {}
    from torch.sparse._triton_ops import bsr_dense_addmm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch's BSR is in beta
        weight = linear.weight.to_sparse_bsr(block)
    columns, bias = x.t(), linear.bias[:, None].expand(-1, len(x))
    return {"torch BSR": lambda: bsr_dense_addmm(bias, weight, columns).t()}


def linear_jsd(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, target: Tensor
) -> dict[str, Call]:
    """Liger's fused linear layer and Jensen-Shannon divergence, with its gradients."""
    if not _installed("liger_kernel", student):
        return {}
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.3, weight_soft_loss=0.7, temperature=2.0)
    hidden, head = student.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()

    def step() -> Tensor:
        hidden.grad = head.grad = None
        value: Tensor = loss(hidden, head, teacher, teacher_weight, target)
        value.backward()
        return value

    return {"Liger": step}


def _compiled(model: nn.Module, x: Tensor) -> Call:
    fast = torch.compile(model, dynamic=False)
    return lambda: fast(x)


def _installed(package: str, x: Tensor) -> bool:
    return x.device.type == "cuda" and importlib.util.find_spec(package) is not None
