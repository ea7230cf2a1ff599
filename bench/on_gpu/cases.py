"""The shapes that are timed on a GPU, most telling first, and what else a user would call for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from on_gpu import libraries
from potstill.nn import BlockSparseLinear, Int4Linear, Int8Linear, SemiSparseLinear
from potstill.ops import OPS, sparse_units
from potstill.ops.op import Cost

Call = Callable[[], Any]
Contest = tuple[Call, Cost, dict[str, Call]]
HALF = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """``make(device)``: our call, the work that nobody avoids, and what else one would call, by name."""

    op: str
    label: str
    make: Callable[[torch.device], Contest]


def cases(small: bool) -> Iterator[Case]:
    """``small``: shapes for a rehearsal, which takes seconds on a CPU."""
    square, layers = ((64, 64), ((96, 64),)) if small else ((8192, 8192), ((4096, 4096), (8192, 8192), (4096, 14336)))
    block = 16 if small else 64
    for m in (40, 3) if small else (4096, 1, 16, 1024, 256, 64):
        for k, n in layers:
            yield Case("int8_linear", f"m={m} k={k} n={n}", partial(_int8, m, k, n))
    for m in (1, 20) if small else (1, 16, 256, 4096):
        yield Case("int4_linear", f"m={m} k={square[0]} n={square[1]} group=128", partial(_int4, m, *square))
    for m in (3, 70) if small else (1, 16, 64, 256, 4096):
        yield Case("semi_sparse_int8_linear", f"m={m} k={square[0]} n={square[1]}", partial(_semi, m, *square))
    for density in (0.1, 0.2, 0.5):
        for m in (40, 3) if small else (4096, 16):
            k, n = square
            label = f"m={m} k={k} n={n} block={block} density={density}"
            yield Case("block_sparse_linear", label, partial(_block_sparse, m, k, n, block, density))
    rows, features = (8, 48) if small else (8192, 4096)
    yield Case("add_layer_norm", f"{rows} x {features}", partial(_norm, rows, features))
    table = 100 if small else 128256
    yield Case("int8_embedding", f"{rows} of {table} x {features}", partial(_embedding, rows, table, features))
    for count, classes in ((4, 100),) if small else ((4096, 128256), (8192, 32000)):
        yield Case("kd_loss", f"rows={count} classes={classes}", partial(_kd_loss, count, classes))
    sizes = (6, 16, 100) if small else (4096, 4096, 128256)
    for divergence in ("forward_kl", "jsd"):
        label = "rows={} hidden={} classes={}".format(*sizes)
        yield Case("linear_kd_loss", f"{label} {divergence}", partial(_linear_kd_loss, *sizes, divergence))


def _int8(m: int, k: int, n: int, device: torch.device) -> Contest:
    linear = _linear(k, n, device)
    x = torch.randn(m, k, device=device, dtype=HALF)
    layer = Int8Linear.from_float(linear)
    integers, scale = layer.int8_weight().contiguous(), layer.scale
    rivals: dict[str, Call] = {"torch eager": lambda: linear(x)}
    if m > 16:  # _int_mm takes no fewer rows

        def parts() -> Tensor:
            """One operation after the other, as torchao does it without a compiler."""
            largest = x.abs().amax(1, keepdim=True).float()
            q = (x.float() * (127.0 / largest)).round().to(torch.int8)
            return ((torch._int_mm(q, integers.t()) * (largest / 127.0)) * scale + linear.bias).to(HALF)

        q = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
        rivals |= {"quantise, _int_mm, dequantise": parts, "that, compiled": torch.compile(parts, dynamic=False)}
        rivals |= {"_int_mm alone": lambda: torch._int_mm(q, integers.t()), **_quantisation(x)}
    cost = Cost(int8_ops=2.0 * m * n * k, bytes=float(n * k + 2 * m * (n + k)))
    return lambda: layer(x), cost, rivals | libraries.int8_linear(linear, x)


def _quantisation(x: Tensor) -> dict[str, Call]:
    if x.device.type != "cuda":
        return {}
    from potstill.ops.triton.quantize_rows import quantize_rows

    return {"our quantisation alone": lambda: quantize_rows(x)}


def _int4(m: int, k: int, n: int, device: torch.device) -> Contest:
    linear = _linear(k, n, device)
    x = torch.randn(m, k, device=device, dtype=HALF)
    layer = Int4Linear.from_float(linear, group_size=128)
    cost = Cost(int8_ops=2.0 * m * n * k, bytes=n * k / 2 + 2.0 * n * k / 128 + 2.0 * m * (n + k))
    return lambda: layer(x), cost, {"torch eager": lambda: linear(x)} | libraries.int4_linear(linear, x)


def _semi(m: int, k: int, n: int, device: torch.device) -> Contest:
    """Against the dense layers, and the same zeros in bfloat16 on the sparse units."""
    linear = _linear(k, n, device)
    linear.weight.view(n, k // 4, 4)[..., 1:3] = 0.0
    x = torch.randn(m, k, device=device, dtype=HALF)
    layer, dense = SemiSparseLinear.from_float(linear), Int8Linear.from_float(linear)
    layer.tune(m)
    rivals: dict[str, Call] = {"torch eager": lambda: linear(x), "int8_linear": lambda: dense(x)}
    library = sparse_units.library(device, HALF)
    if library is not None:
        packed = sparse_units.compress(library, linear.weight)
        algorithm = sparse_units.search(library, packed, x)
        rivals[type(library).__name__] = lambda: sparse_units.multiply(library, packed, x, n, linear.bias, algorithm)
    cost = Cost(int8_ops=1.0 * m * n * k, bytes=0.625 * n * k + 2.0 * m * (n + k))
    return lambda: layer(x), cost, rivals


def _block_sparse(m: int, k: int, n: int, block: int, density: float, device: torch.device) -> Contest:
    linear = _linear(k, n, device)
    kept = torch.rand(n // block, k // block, device=device) < density
    linear.weight *= kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    x = torch.randn(m, k, device=device, dtype=HALF)
    layer = BlockSparseLinear.from_float(linear, block)
    arguments = {"values": layer.values, "columns": layer.columns, "first": layer.first, "out_features": n}
    rivals: dict[str, Call] = {"torch eager": lambda: linear(x)}
    cost = OPS["block_sparse_linear"].cost(x, **arguments)
    return lambda: layer(x), cost, rivals | libraries.block_sparse_linear(linear, x, block)


def _linear(k: int, n: int, device: torch.device) -> torch.nn.Linear:
    return torch.nn.Linear(k, n, device=device, dtype=HALF).requires_grad_(False)


def _norm(rows: int, features: int, device: torch.device) -> Contest:
    x, residual = (torch.randn(rows, features, device=device, dtype=HALF) for _ in range(2))
    weight, bias = (torch.randn(features, device=device, dtype=HALF) for _ in range(2))
    op = OPS["add_layer_norm"]

    def eager() -> Tensor:
        return F.layer_norm(x + residual, (features,), weight, bias)

    rivals = {"torch eager": eager, "compiled": torch.compile(eager, dynamic=False)}
    return lambda: op(x, residual, weight, bias, 1e-5), op.cost(x, residual, weight, bias, 1e-5), rivals


def _embedding(rows: int, table: int, features: int, device: torch.device) -> Contest:
    weight = torch.randint(-127, 128, (table, features), dtype=torch.int8, device=device)
    scale, indices = torch.rand(table, device=device), torch.randint(0, table, (rows,), device=device)
    floats = weight.to(HALF) * scale[:, None].to(HALF)
    op, arguments = OPS["int8_embedding"], (weight, scale, indices, HALF)
    return lambda: op(*arguments), op.cost(*arguments), {"torch eager": lambda: F.embedding(indices, floats)}


def _kd_loss(rows: int, classes: int, device: torch.device) -> Contest:
    student, teacher = (torch.randn(rows, classes, device=device, dtype=HALF) for _ in range(2))
    return _training_step("kd_loss", student=student, teacher=teacher, target=_labels(rows, classes, device))


def _linear_kd_loss(rows: int, hidden: int, classes: int, divergence: str, device: torch.device) -> Contest:
    student, teacher = (torch.randn(rows, hidden, device=device, dtype=HALF) for _ in range(2))
    heads = [torch.randn(classes, hidden, device=device, dtype=HALF) * (3.0 / hidden**0.5) for _ in range(2)]
    arguments = {"student": student, "weight": heads[0], "teacher": teacher, "teacher_weight": heads[1]}
    arguments["target"] = _labels(rows, classes, device)
    ours, cost, rivals = _training_step("linear_kd_loss", divergence=divergence, **arguments)
    if divergence == "jsd":
        rivals |= libraries.linear_jsd(student, *heads[:1], teacher, *heads[1:], arguments["target"])
    return ours, cost, rivals


def _labels(rows: int, classes: int, device: torch.device) -> Tensor:
    return torch.randint(0, classes, (rows,), device=device)


def _training_step(name: str, **given: Any) -> Contest:
    """The loss and its gradient, against what the op's own benchmark compares it with."""
    op = OPS[name]
    names = [argument.name for argument in op._call._schema.arguments]
    defaults = dict(zip(names, op.positional(**given), strict=True))
    arguments = defaults | {"temperature": 2.0, "alpha": 0.7}
    return op.run(**arguments), op.cost(**arguments), op.rivals(**arguments)
