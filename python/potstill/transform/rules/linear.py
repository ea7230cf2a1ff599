"""Linear layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from potstill.nn import Int4Linear, Int8Linear
from potstill.nn.float_linear import as_linear, is_conv1d
from potstill.ops import int4_linear, int8_linear
from potstill.ops.int8_linear import MAX_FEATURES
from potstill.ops.op import Op
from potstill.transform.configs import Int4, Int8
from potstill.transform.eligible import why_not_plain, why_not_weight
from potstill.transform.grid import Grid
from potstill.transform.observe import KEPT_ROWS, Call, RowCalls, usual_calls
from potstill.transform.rounding import Rounding
from potstill.transform.rules.rule import Arguments, Rule
from potstill.transform.swap import Site

USUAL_ROWS = (1, 32, 128)
"""Without a sample: a token, a small batch, a sentence."""


class LinearRule(Rule[RowCalls]):
    """``nn.Linear``, or what computes the same, becomes a layer over ``op``."""

    source = nn.Linear
    op: ClassVar[Op]

    @abstractmethod
    def too_long(self, features: int) -> str:
        """Why ``op`` does not take so many features; empty if it does."""

    def replaces(self, module: nn.Module) -> bool:
        """See :class:`Rule`."""
        return isinstance(module, nn.Linear) or is_conv1d(module)

    def why_not(self, site: Site) -> str:
        """See :class:`Rule`."""
        module = site.module
        if any(isinstance(a, nn.MultiheadAttention) and a.out_proj is module for a in site.ancestors):
            return "read by nn.MultiheadAttention, which never calls it"
        source = type(module) if is_conv1d(module) else nn.Linear
        return (
            why_not_plain(module, source, ("weight", "bias"))
            or self.too_long(self.shape(module)[1])
            or why_not_weight(module.get_parameter("weight"), self.op)
        )

    def why_not_call(self, call: Call) -> str:
        """See :class:`Rule`."""
        backend, why = self.op.backend(call.device, call.used_dtype)
        return "" if backend == "kernel" else f"for its input in the sample {why}"

    def watch(self) -> RowCalls:
        """See :class:`Rule`."""
        return RowCalls()

    def usual(self, module: nn.Module) -> Mapping[Call, int]:
        """See :class:`Rule`."""
        weight = module.get_parameter("weight")
        return usual_calls(weight.dtype, weight.device.type, USUAL_ROWS)

    def arguments(self, module: nn.Module, call: Call, calls: RowCalls | None) -> Arguments:
        """Random rows."""
        x = torch.randn(call.rows, self.shape(module)[1], generator=torch.Generator().manual_seed(0))
        return (x.to(module.get_parameter("weight").device, call.dtype),), {}

    def example(self, module: nn.Module, calls: RowCalls) -> Arguments:
        """See :class:`Rule`."""
        rows = calls.inputs
        if not rows:
            rows = [torch.randn(KEPT_ROWS, self.shape(module)[1], generator=torch.Generator().manual_seed(0))]
        weight = module.get_parameter("weight")
        return (torch.cat([part.to(weight.device, weight.dtype) for part in rows]),), {}

    def shape(self, module: Any) -> tuple[int, ...]:
        """See :class:`Rule`."""
        sizes = (module.nf, module.nx) if is_conv1d(module) else (module.out_features, module.in_features)
        return int(sizes[0]), int(sizes[1])

    def matrix(self, module: nn.Module) -> Tensor:
        """See :class:`Rule`."""
        weight = super().matrix(module)
        return weight.t() if is_conv1d(module) else weight

    def alike(self, module: nn.Module) -> Hashable:
        """Class, sizes, dtype and whether there is a bias."""
        weight = module.get_parameter("weight")
        return type(module), weight.shape, weight.dtype, module.bias is None


class LinearToInt8(LinearRule):
    """:class:`nn.Int8Linear`."""

    target = Int8Linear
    config = Int8
    action = "int8"
    shared = ("weight", "scale", "factor")
    op = int8_linear

    def too_long(self, features: int) -> str:
        """See :class:`LinearRule`."""
        return f"has {features} inputs; int8 sums are exact up to {MAX_FEATURES}" if features > MAX_FEATURES else ""

    def grid(self, config: Int8) -> Grid:
        """That of :func:`ops.int8_linear.quantize_weight`."""
        return Grid(-127, 127, group=None, symmetric=True)

    def build(self, module: nn.Module, config: Int8, rounding: Rounding | None) -> Int8Linear:
        """See :class:`Rule`."""
        linear = _linear(module)
        if rounding is None:
            return Int8Linear.from_float(linear)
        layer = Int8Linear.from_integers(rounding.integers, rounding.scale, linear.bias, factor=rounding.factor)
        return layer.train(module.training)


class LinearToInt4(LinearRule):
    """:class:`nn.Int4Linear`."""

    target = Int4Linear
    config = Int4
    action = "int4"
    shared = ("weight", "scale", "zero")
    op = int4_linear

    def too_long(self, features: int) -> str:
        """Sums are of one group each: any number of groups will do."""
        return ""

    def grid(self, config: Int4) -> Grid:
        """That of :func:`ops.int4_linear.quantize_groups`."""
        low, high = (-8, 7) if config.symmetric else (0, 15)
        return Grid(low, high, config.group_size, config.symmetric, torch.bfloat16)

    def build(self, module: nn.Module, config: Int4, rounding: Rounding | None) -> Int4Linear:
        """See :class:`Rule`."""
        linear = _linear(module)
        if rounding is None:
            return Int4Linear.from_float(linear, config.group_size, config.symmetric)
        with torch.device(linear.weight.device):
            new = Int4Linear(linear.in_features, linear.out_features, False, config.group_size, config.symmetric)
        integers = rounding.integers + 8 if config.symmetric else rounding.integers
        zero = None if rounding.zero is None else rounding.zero.to(torch.uint8)
        new.set_weight(integers.to(torch.uint8), rounding.scale.to(torch.bfloat16), zero)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return new.train(module.training)


def _linear(module: nn.Module) -> nn.Linear:
    linear = as_linear(module)
    assert linear is not None  # why_not() let it pass
    return linear
