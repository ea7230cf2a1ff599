"""Drop-in linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from potstill.nn.quantized import QuantizedLinear
from potstill.ops.activation import check_activation
from potstill.ops.int8_linear import (
    MAX_FEATURES,
    ROW_DEVICES,
    as_rows,
    int8_linear,
    integers,
    laid_out,
    pack,
    quantize_weight,
)


class Int8Linear(QuantizedLinear):
    """A linear layer with int8 weights whose input is quantised per row on the fly; see :data:`ops.int8_linear`.

    Input [..., in_features] of any float dtype, output [..., out_features] of the same dtype (under autocast: of the
    autocast dtype). Float32 and bfloat16, and on GPUs float16, run compiled kernels; an ``activation`` ("relu", "gelu",
    "gelu_tanh" or "silu") is applied before the outputs leave the registers. Gradients flow to the input; the layer
    itself is frozen (``layer.bias.requires_grad_()`` thaws the bias). ``state_dict`` holds ``weight`` as [out_features,
    in_features] int8 and ``scale`` as [out_features] float32; in memory the weight is kept only once, in the layout
    that the kernels of its device take. With ``smooth`` there is a ``factor`` too, [in_features] float32, by which
    inputs are multiplied.

    Raises :class:`ValueError` when the input's last dimension is not ``in_features``, or ``in_features`` is above
    :data:`ops.int8_linear.MAX_FEATURES`.

    >>> linear = torch.nn.Linear(64, 32)
    >>> fast = Int8Linear.from_float(linear)
    >>> fast
    Int8Linear(in_features=64, out_features=32, bias=True)
    >>> x = torch.randn(8, 64)
    >>> bool((fast(x) - linear(x)).norm() < 0.02 * linear(x).norm())
    True
    """

    kind = "int8_linear"
    _options: ClassVar = ("activation", "smooth")
    weight: nn.Parameter
    factor: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "none",
        smooth: bool = False,
    ) -> None:
        super().__init__()
        check_activation("Int8Linear", activation)
        if in_features > MAX_FEATURES:
            raise ValueError(
                f"Int8Linear: in_features is {in_features}, expected at most {MAX_FEATURES}; split the layer"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        zeros = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(_of_device(zeros), requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("factor", torch.ones(in_features) if smooth else None)
        zero_bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", zero_bias)  # also when it is None

    @classmethod
    def from_float(cls, linear: nn.Linear, activation: str = "none") -> Self:
        """The int8 form of ``linear`` and an activation after it; the bias's memory is shared, not copied."""
        layer = cls.from_integers(*quantize_weight(linear.weight), linear.bias, activation)
        return layer.train(linear.training)

    @classmethod
    def from_integers(
        cls,
        integers: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        factor: Tensor | None = None,
    ) -> Self:
        """The layer with the weight ``integers * scale[:, None] * factor``; the bias's memory is shared, not copied.

        ``integers``: [out_features, in_features] int8 in [-127, 127]; ``scale``: [out_features] float32; ``factor``:
        [in_features] float32, or None for 1. Raises :class:`ValueError` if they are anything else.
        """
        if integers.dtype != torch.int8 or integers.dim() != 2 or bool((integers == -128).any()):
            raise ValueError(
                f"Int8Linear: integers are {integers.dtype} {list(integers.shape)}, expected int8 "
                "[out_features, in_features] with values in [-127, 127]"
            )
        if scale.dtype != torch.float32 or scale.shape != integers.shape[:1]:
            raise ValueError(
                f"Int8Linear: scale is {scale.dtype} {list(scale.shape)}, expected float32 [{len(integers)}]: one for "
                "each output"
            )
        if factor is not None and (factor.dtype != torch.float32 or factor.shape != integers.shape[1:]):
            raise ValueError(
                f"Int8Linear: factor is {factor.dtype} {list(factor.shape)}, expected float32 [{integers.shape[1]}]: "
                "one for each input"
            )
        with torch.device(integers.device):
            layer = cls(integers.shape[1], integers.shape[0], bias=False, activation=activation)
        layer.weight.data = _of_device(integers)
        layer.scale, layer.factor = scale, factor
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def to_float(self) -> nn.Linear:
        """A float32 ``nn.Linear`` with the dequantised weight and a copy of the bias, without the activation."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.weight.device)
        with torch.no_grad():
            weight = self.int8_weight().float() * self.scale[:, None]
            linear.weight.copy_(weight if self.factor is None else weight * self.factor)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    @property
    def smooth(self) -> bool:
        """Whether inputs have factors."""
        return self.factor is not None

    def int8_weight(self) -> Tensor:
        """The integers as [out_features, in_features]."""
        return integers(self.weight.detach(), self.out_features, self.in_features)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], plus ``residual`` of that shape if it is given."""
        # nn.Module.__getattr__ is slow beside a small layer: the dictionaries are read directly.
        parameters = self._parameters
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"Int8Linear: x has {x.shape[-1]} features, expected in_features={self.in_features}; "
                f"x has shape {list(x.shape)}"
            )
        factor = self._buffers["factor"]
        tensors = x, parameters["weight"], self._buffers["scale"], parameters["bias"]
        if residual is None and factor is None and self.activation == "none":
            return int8_linear(*tensors)  # type: ignore[no-any-return]  # each argument costs the dispatcher 0.3 us
        return int8_linear(*tensors, self.activation, residual, factor)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them, and what is not as usual."""
        return super().extra_repr().replace(", activation='none'", "").replace(", smooth=False", "")

    def _lay_out(self) -> None:
        weight = self.weight
        laid = laid_out(weight.detach(), self.out_features, self.in_features, weight.device.type)
        if laid.dim() != weight.dim():
            weight.data = laid

    @classmethod
    def wrong_values(cls, state: Mapping[str, Tensor], prefix: str) -> str:
        """The kernels' sums are exact only for integers in [-127, 127]; see :mod:`potstill.ops.int8_linear`."""
        weight, scale = state[f"{prefix}weight"], state[f"{prefix}scale"]
        if bool((weight == -128).any()):
            return f"{prefix}weight has the value -128; int8 weights lie in [-127, 127]"
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            return f"{prefix}scale has values that are negative or not finite"
        factor = state.get(f"{prefix}factor")
        if factor is not None and not bool((torch.isfinite(factor) & (factor > 0)).all()):
            return f"{prefix}factor has values that are not positive and finite"
        return ""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.int8_weight()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        weight = state_dict.get(key)
        if weight is None:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        errors: list[str] = args[-1]
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected or weight.dtype != torch.int8:
            errors.append(f"{key} is {weight.dtype} {list(weight.shape)}, expected int8 {list(expected)}")
            return None
        if bool((weight == -128).any()):
            errors.append(f"{key} has the value -128; int8 weights lie in [-127, 127]")
            return None
        laid = as_rows(weight) if self.weight.dim() == 2 else pack(weight)
        super()._load_from_state_dict({**state_dict, key: laid}, prefix, *args)
        self._lay_out()  # with assign=True it may have come to a device that takes another layout
        return None


def _of_device(weight: Tensor) -> Tensor:
    """Integers [out_features, in_features] in the layout that the kernels of their device take."""
    return as_rows(weight) if weight.device.type in ROW_DEVICES else pack(weight)
