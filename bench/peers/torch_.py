"""Plain torch: float32, bfloat16, torch.compile, its sparse matrices and its 4-bit weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peers import GROUP, INT4, INT8, MODEL, SPARSE, Call, Job, Start, contestant
from potstill.ops.sparse_samples import csr_linear


def calling(module: nn.Module, inputs: tuple[Tensor, ...]) -> Start:
    """A start for what runs on torch's own threads; a single layer is called without its container."""
    run = single(module)

    def call() -> Any:
        return first(run(*inputs))

    return lambda: call


def compiled(module: nn.Module, inputs: tuple[Tensor, ...]) -> Start:
    """``torch.compile`` with weights as constants (freezing), which lets it prepack them; compiled per thread count."""

    def start() -> Call:
        call = calling(torch.compile(single(module), dynamic=False, options={"freezing": True}), inputs)()
        call()
        return call

    return start


def first(result: Any) -> Any:
    """The first of several outputs."""
    return result if isinstance(result, Tensor) else result[0]


def single(module: nn.Module) -> nn.Module:
    """The layer of a container of one, else ``module``."""
    return module[0] if isinstance(module, nn.Sequential) and len(module) == 1 else module


def as_bf16(job: Job) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and the inputs in bfloat16; integer inputs stay the same tensors."""
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in job.inputs)
    return copy.deepcopy(job.module).bfloat16(), inputs


@contestant("torch fp32", INT8, INT4, SPARSE, MODEL)
def fp32(job: Job) -> Start:
    return calling(job.module, job.inputs)


@contestant("torch bf16", INT8, INT4, SPARSE, MODEL)
def bf16(job: Job) -> Start:
    return calling(*as_bf16(job))


@contestant("torch.compile fp32", INT8, MODEL)
def compiled_fp32(job: Job) -> Start:
    return compiled(job.module, job.inputs)


@contestant("torch.compile bf16", INT8, MODEL)
def compiled_bf16(job: Job) -> Start:
    return compiled(*as_bf16(job))


@contestant("torch CSR", SPARSE)
def csr(job: Job) -> Start:
    layer, (x,) = single(job.module), job.inputs
    call = csr_linear(x, layer.weight, layer.bias)
    return lambda: call


@contestant("torch int4pack", INT4)
def int4pack(job: Job) -> Start:
    layers = [Int4Pack(layer) for layer in job.module.children() if isinstance(layer, nn.Linear)]
    return calling(nn.Sequential(*layers), tuple(x.bfloat16() for x in job.inputs))


class Int4Pack(nn.Module):
    """``_weight_int4pack_mm_for_cpu``, torch's weight-only kernel: bfloat16 activations, no bias of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        groups = linear.weight.detach().unflatten(1, (-1, GROUP))
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low) / 15).clamp_min(1e-9)
        integers = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).flatten(1).int()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        # The kernel computes (integer - 8) * scale + zero.
        self.zeros = torch.stack([scale, low + 8 * scale], dim=2).transpose(0, 1).contiguous().bfloat16()
        self.bias = linear.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.zeros)
        return product.add_(self.bias)
