"""Attention, and the encoder layers around it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from potstill.nn import Int8MultiheadAttention, Int8TransformerEncoderLayer
from potstill.ops import int8_linear
from potstill.transform.configs import Int8
from potstill.transform.eligible import why_not_plain, why_not_weight
from potstill.transform.observe import BlockCalls, Call, usual_calls
from potstill.transform.rounding import Rounding
from potstill.transform.rules.linear import USUAL_ROWS
from potstill.transform.rules.rule import Arguments, Rule
from potstill.transform.swap import Site

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_AFFINE = ("weight", "bias")


class _BlockRule(Rule[BlockCalls]):
    """A block of torch becomes one of ours with the same arguments."""

    target: ClassVar[type[Int8MultiheadAttention | Int8TransformerEncoderLayer]]
    config = Int8
    action = "int8"

    def why_not(self, site: Site) -> str:
        """See :class:`Rule`."""
        return self.why_not_parts(site.module) or next(
            (f"{name}: {why}" for name in self.weights(site.module) if (why := _why_not(site.module, name))), ""
        )

    @abstractmethod
    def why_not_parts(self, module: Any) -> str:
        """Why ``module`` or a part of it may behave otherwise than its class says; empty if none does."""

    @abstractmethod
    def random(self, module: Any, rows: int, dtype: torch.dtype) -> Arguments:
        """Arguments for one sequence of ``rows`` random tokens."""

    def why_not_call(self, call: Call) -> str:
        """See :class:`Rule`."""
        backend, why = int8_linear.backend(call.device, call.used_dtype)
        return "" if backend == "kernel" else f"for its input in the sample {why}"

    def watch(self) -> BlockCalls:
        """See :class:`Rule`."""
        return BlockCalls()

    def usual(self, module: nn.Module) -> Mapping[Call, int]:
        """See :class:`Rule`."""
        parameter = next(module.parameters())
        return usual_calls(parameter.dtype, parameter.device.type, USUAL_ROWS)

    def arguments(self, module: nn.Module, call: Call, calls: BlockCalls | None) -> Arguments:
        """Those of the sample, or random ones."""
        return calls.examples[call] if calls else self._random(module, call.rows, call.dtype)

    def example(self, module: nn.Module, calls: BlockCalls) -> Arguments:
        """See :class:`Rule`."""
        first = next(iter(calls.examples.values()), None)
        return first or self._random(module, USUAL_ROWS[-1], next(module.parameters()).dtype)

    def _random(self, module: nn.Module, rows: int, dtype: torch.dtype) -> Arguments:
        args, kwargs = self.random(module, rows, dtype)
        device = next(module.parameters()).device
        return tuple(x.to(device) if isinstance(x, Tensor) else x for x in args), kwargs

    def alike(self, module: nn.Module) -> Hashable:
        """The arguments that such a module is made with, and the dtype."""
        return (*(self.target.float_config(module) or {}).items(), next(module.parameters()).dtype)


class AttentionToInt8(_BlockRule):
    """``nn.MultiheadAttention`` becomes :class:`nn.Int8MultiheadAttention`."""

    source = nn.MultiheadAttention
    target = Int8MultiheadAttention

    def why_not_parts(self, module: nn.MultiheadAttention) -> str:
        """See :class:`_BlockRule`."""
        own = (*_PROJECTIONS, "in_proj_bias", "bias_k", "bias_v")
        why = why_not_plain(module, nn.MultiheadAttention, own, ("out_proj",))
        return why or _of("out_proj", why_not_plain(module.out_proj, NonDynamicallyQuantizableLinear, _AFFINE))

    def build(self, module: nn.MultiheadAttention, config: Int8, rounding: Rounding | None) -> Int8MultiheadAttention:
        """See :class:`Rule`."""
        return Int8MultiheadAttention.from_float(module)

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        """See :class:`Rule`."""
        return (*(name for name in _PROJECTIONS if getattr(module, name) is not None), "out_proj.weight")

    def random(self, module: nn.MultiheadAttention, rows: int, dtype: torch.dtype) -> Arguments:
        """Self-attention if the sizes allow it."""
        widths = (module.embed_dim, module.kdim, module.vdim)
        query, key, value = (_tokens(rows, width, dtype, module.batch_first) for width in widths)
        inputs = (query, query, query) if len(set(widths)) == 1 else (query, key, value)
        return inputs, {"need_weights": False}

    def shape(self, module: nn.MultiheadAttention) -> tuple[int, ...]:
        """(outputs, inputs) of all projections of one token."""
        return module.embed_dim * 4, module.embed_dim


class EncoderLayerToInt8(_BlockRule):
    """``nn.TransformerEncoderLayer`` becomes :class:`nn.Int8TransformerEncoderLayer`."""

    source = nn.TransformerEncoderLayer
    target = Int8TransformerEncoderLayer

    def why_not_parts(self, module: nn.TransformerEncoderLayer) -> str:
        """See :class:`_BlockRule`."""
        parts = ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2", "activation")
        why = why_not_plain(module, nn.TransformerEncoderLayer, (), parts) or Int8TransformerEncoderLayer.unsupported(
            module
        )
        if why:
            return why
        if Int8TransformerEncoderLayer.float_config(module) is None:
            return f"its activation {module.activation!r} has no name that a checkpoint could hold"
        expected = {"linear1": nn.Linear, "linear2": nn.Linear, "norm1": nn.LayerNorm, "norm2": nn.LayerNorm}
        expected |= dict.fromkeys(("dropout", "dropout1", "dropout2"), nn.Dropout)
        if isinstance(module.activation, nn.Module):
            expected["activation"] = type(module.activation)
        reasons = [_of(name, why_not_plain(getattr(module, name), kind, _AFFINE)) for name, kind in expected.items()]
        reasons.append(_of("self_attn", AttentionToInt8().why_not_parts(module.self_attn)))
        return next(filter(None, reasons), "")

    def build(
        self, module: nn.TransformerEncoderLayer, config: Int8, rounding: Rounding | None
    ) -> Int8TransformerEncoderLayer:
        """See :class:`Rule`."""
        return Int8TransformerEncoderLayer.from_float(module)

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        """See :class:`Rule`."""
        attention = (f"self_attn.{name}" for name in AttentionToInt8().weights(module.self_attn))  # type: ignore[arg-type]
        return (*attention, "linear1.weight", "linear2.weight")

    def random(self, module: nn.TransformerEncoderLayer, rows: int, dtype: torch.dtype) -> Arguments:
        """See :class:`_BlockRule`."""
        return (_tokens(rows, module.self_attn.embed_dim, dtype, module.self_attn.batch_first),), {}

    def shape(self, module: nn.TransformerEncoderLayer) -> tuple[int, ...]:
        """(d_model, dim_feedforward)."""
        return module.linear1.in_features, module.linear1.out_features


def _why_not(module: nn.Module, weight: str) -> str:
    return why_not_weight(module.get_parameter(weight), int8_linear)


def _of(part: str, why: str) -> str:
    return f"its {part}: {why}" if why else ""


def _tokens(rows: int, width: int, dtype: torch.dtype, batch_first: bool) -> Tensor:
    shape = (1, rows, width) if batch_first else (rows, 1, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
