"""torchao: int8 weights with dynamic int8 activations, and int4 weights, eager and compiled."""

from __future__ import annotations

import copy

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from peers import GROUP, INT4, INT8, MODEL, Job, Start, contestant
from peers.torch_ import as_bf16, calling, compiled


def _quantized(module: nn.Module, config: AOBaseConfig) -> nn.Module:
    module = copy.deepcopy(module)
    quantize_(module, config)
    return module


@contestant("torchao int8", INT8)
def int8(job: Job) -> Start:
    return calling(_quantized(job.module, Int8DynamicActivationInt8WeightConfig()), job.inputs)


@contestant("torchao int8 compiled", INT8, MODEL)
def int8_compiled(job: Job) -> Start:
    return compiled(_quantized(job.module, Int8DynamicActivationInt8WeightConfig()), job.inputs)


@contestant("torchao int4", INT4)
def int4(job: Job) -> Start:
    module, inputs = as_bf16(job)
    return calling(_quantized(module, PrototypeInt4WeightOnlyConfig(group_size=GROUP)), inputs)
