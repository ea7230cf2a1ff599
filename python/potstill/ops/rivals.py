"""What a user of plain torch would call instead of our ops; used by the benchmarks."""

from __future__ import annotations

import importlib.util
import shutil
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


def can_compile(x: Tensor) -> bool:
    """Whether ``torch.compile`` is worth timing: its first call takes seconds, and needs a C++ compiler on a CPU."""
    compiler = x.device.type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++"))
    return compiler and x.numel() >= 1 << 15


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under ``torch.compile``, for one shape; those compiled before start anew: only eight are kept."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def matmul_nbits(
    x: Tensor, integers: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> dict[str, Callable[[], Any]]:
    """ONNX Runtime's ``MatMulNBits`` with int8 activations on 4-bit weights in groups, if it is installed.

    Only for float32 and whole groups; ``integers`` are [n, k] in 0..15, ``scale`` and ``zero`` [n, groups].
    """
    n, k = integers.shape
    if x.dtype != torch.float32 or k % group or importlib.util.find_spec("onnxruntime") is None:
        return {}
    import numpy as np
    import onnx
    import onnxruntime

    pairs = (integers[:, 0::2] | integers[:, 1::2] << 4).view(n, k // group, group // 2)
    tensors = {"w": pairs, "s": scale.float().flatten(), "z": None, "g": None, "b": bias}
    if zero is not None:
        even = nn.functional.pad(zero, (0, zero.shape[1] % 2))
        tensors["z"] = (even[:, 0::2] | even[:, 1::2] << 4).flatten()
    names = [name if tensor is not None else "" for name, tensor in tensors.items()]
    options = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": 4}
    node = onnx.helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", **options)
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, k])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, n])],
        [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items() if t is not None],
    )
    versions = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=9)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options, ["CPUExecutionProvider"])
    rows = np.ascontiguousarray(x.reshape(-1, k).numpy())
    return {"onnxruntime MatMulNBits": lambda: session.run(None, {"x": rows})}
