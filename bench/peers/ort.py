"""ONNX Runtime: dynamic int8 (DynamicQuantizeMatMul) and 4-bit weights (MatMulNBits)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor, nn

from peers import GROUP, INT4, INT8, MODEL, SPARSE, Call, Job, Start, contestant


@contestant("ONNX Runtime int8", INT8, SPARSE, MODEL)
def int8(job: Job) -> Start:
    def quantized(source: Path, target: Path) -> None:
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)

    return _prepared(job, quantized)


@contestant("ONNX Runtime int4", INT4)
def int4(job: Job) -> Start:
    """4-bit weights; accuracy level 4 lets the kernel quantise activations to int8."""

    def quantized(source: Path, target: Path) -> None:
        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=GROUP, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        onnx.save(quantizer.model.model, target)

    return _prepared(job, quantized)


def _prepared(job: Job, quantized: Callable[[Path, Path], None]) -> Start:
    results = job.module(*job.inputs)
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        if isinstance(job.module, nn.Sequential):
            onnx.save(_chain(job.module), source)
        else:
            program = torch.onnx.export(job.module, job.inputs, dynamo=True, verbose=False)
            assert program is not None
            program.save(source)
        quantized(source, target)
        model = target.read_bytes()
    return lambda: _session(model, job.inputs, results)


def _chain(layers: Iterable[nn.Module]) -> onnx.ModelProto:
    """MatMul and Add per layer; the exporter would write Gemm, which MatMulNBitsQuantizer leaves alone."""
    nodes, constants, value = [], [], "x0"
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(linears):
        weight = np.ascontiguousarray(layer.weight.detach().numpy().T)
        constants += [numpy_helper.from_array(weight, f"weight{i}")]
        constants += [numpy_helper.from_array(layer.bias.detach().numpy(), f"bias{i}")]
        nodes += [helper.make_node("MatMul", [value, f"weight{i}"], [f"product{i}"])]
        value = f"x{i + 1}"
        nodes += [helper.make_node("Add", [f"product{i}", f"bias{i}"], [value])]
    x = helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["rows", linears[0].in_features])
    y = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["rows", linears[-1].out_features])
    graph = helper.make_graph(nodes, "linear", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _session(model: bytes, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> Call:
    """Inputs and outputs are bound once: a call neither copies nor allocates them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for value, x in zip(session.get_inputs(), inputs, strict=True):
        binding.bind_cpu_input(value.name, x.numpy())
    outputs = [np.empty(result.shape, np.float32) for result in results]
    for value, y in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(value.name, "cpu", 0, y.dtype, y.shape, y.ctypes.data)
    run, first = session.run_with_iobinding, outputs[0]

    def call() -> Any:
        run(binding)
        return first

    # The binding holds addresses only; the call keeps what they point to.
    call.__dict__["memory"] = (inputs, outputs)
    return call
