"""Drop-in linear layer with 4-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.nn.quantized import QuantizedLinear
from potstill.ops.int4_layout import by_output, integers, laid_out, pack, pack_rows, pack_scales, scales_laid_out
from potstill.ops.int4_linear import check_group_size, dequantize_groups, int4_linear, quantize_groups
from potstill.ops.int8_linear import ROW_DEVICES

_PACKED = pack, pack_scales  # what lays out integers, and scales or zero points
_ROWS = pack_rows, Tensor.contiguous


class Int4Linear(QuantizedLinear):
    """A linear layer with 4-bit weights whose input is quantised per row on the fly; see :data:`ops.int4_linear`.

    Each ``group_size`` (32, 64 or 128) inputs of an output share a bfloat16 scale, and a zero point unless
    ``symmetric``. Input [..., in_features] of any float dtype, output [..., out_features] of the same dtype (under
    autocast: of the autocast dtype). Float32 and bfloat16, and on GPUs float16, run compiled kernels. Gradients flow to
    the input; the layer itself is frozen (``layer.bias.requires_grad_()`` thaws the bias). ``state_dict`` holds
    ``weight`` as [out_features, ceil(in_features / 2)] uint8, the first input of a pair in the low half, and ``scale``
    and ``zero`` (if there is one) as [out_features, groups]; in memory all are kept only once, in the layout that the
    kernels of their device take.

    Raises :class:`ValueError` for another group size, and when the input's last dimension is not ``in_features``.

    >>> linear = torch.nn.Linear(64, 32)
    >>> small = Int4Linear.from_float(linear)
    >>> small
    Int4Linear(in_features=64, out_features=32, bias=True, group_size=32, symmetric=True)
    >>> x = torch.randn(8, 64)
    >>> bool((small(x) - linear(x)).norm() < 0.15 * linear(x).norm())
    True
    """

    kind = "int4_linear"
    _options: ClassVar = ("group_size", "symmetric")
    weight: nn.Parameter
    zero: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, group_size: int = 32, symmetric: bool = True
    ) -> None:
        super().__init__()
        check_group_size("Int4Linear", group_size)
        if not isinstance(symmetric, bool):
            raise TypeError(f"Int4Linear: symmetric is {symmetric!r}, expected True or False")
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.symmetric = symmetric
        middle = torch.full((out_features, in_features), 8, dtype=torch.uint8)
        lay, lay_scales = _ROWS if middle.device.type in ROW_DEVICES else _PACKED
        self.weight = nn.Parameter(lay(middle), requires_grad=False)
        groups = torch.ones(out_features, -(-in_features // group_size))
        self.register_buffer("scale", lay_scales(groups.to(torch.bfloat16)))
        self.register_buffer("zero", None if symmetric else lay_scales((8 * groups).to(torch.uint8)))
        zero_bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", zero_bias)  # also when it is None

    @classmethod
    def from_float(cls, linear: nn.Linear, group_size: int = 32, symmetric: bool = True) -> Self:
        """The 4-bit form of ``linear``; the bias's memory is shared with it, not copied."""
        with torch.device(linear.weight.device):
            layer = cls(linear.in_features, linear.out_features, False, group_size, symmetric)
        layer.set_weight(*quantize_groups(linear.weight, group_size, symmetric))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        layer.train(linear.training)
        return layer

    def to_float(self) -> nn.Linear:
        """A float32 ``nn.Linear`` with the dequantised weight and a copy of the bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.weight.device)
        with torch.no_grad():
            linear.weight.copy_(dequantize_groups(*self.int4_weight(), self.group_size))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def int4_weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Integers in 0..15, scales and zero points, as :func:`ops.int4_linear.quantize_groups` returns them."""
        n = self.out_features
        zero = None if self.zero is None else by_output(self.zero, n)
        return integers(self.weight.detach(), n, self.in_features), by_output(self.scale, n), zero

    def set_weight(self, integers: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Takes what :func:`ops.int4_linear.quantize_groups`, or a better rounding, made of a weight."""
        lay, lay_scales = _ROWS if integers.device.type in ROW_DEVICES else _PACKED
        self.weight.data, self.scale = lay(integers), lay_scales(scale)
        self.zero = None if zero is None else lay_scales(zero)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        # nn.Module.__getattr__ is slow beside a small layer: the dictionaries are read directly.
        parameters, buffers = self._parameters, self._buffers
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"Int4Linear: x has {x.shape[-1]} features, expected in_features={self.in_features}; "
                f"x has shape {list(x.shape)}"
            )
        return int4_linear(  # type: ignore[no-any-return]
            x,
            parameters["weight"],
            buffers["scale"],
            self.out_features,
            self.group_size,
            buffers["zero"],
            parameters["bias"],
        )

    def _lay_out(self) -> None:
        n, device = self.out_features, self.weight.device.type
        laid = laid_out(self.weight.detach(), n, self.in_features, device)
        if laid.dim() != self.weight.dim():
            self.weight.data = laid
            self.scale = scales_laid_out(self.scale, n, device)
            self.zero = None if self.zero is None else scales_laid_out(self.zero, n, device)

    @classmethod
    def wrong_values(cls, state: Mapping[str, Tensor], prefix: str) -> str:
        """Scales must be finite and zero points in 0..15; any byte is two good weights."""
        if not bool(torch.isfinite(state[f"{prefix}scale"]).all()):
            return f"{prefix}scale has values that are not finite"
        zero = state.get(f"{prefix}zero")
        if zero is not None and bool((zero > 15).any()):
            return f"{prefix}zero has values above 15; zero points of 4-bit weights lie in 0..15"
        return ""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        integers, scale, zero = self.int4_weight()
        destination[prefix + "weight"] = _pairs(integers)
        destination[prefix + "scale"] = scale
        if zero is not None:
            destination[prefix + "zero"] = zero

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        n, groups = self.out_features, -(-self.in_features // self.group_size)
        expected = {
            "weight": (torch.uint8, [n, -(-self.in_features // 2)]),
            "scale": (torch.bfloat16, [n, groups]),
        } | ({} if self.zero is None else {"zero": (torch.uint8, [n, groups])})
        given = {name: state_dict[prefix + name] for name in expected if prefix + name in state_dict}
        wrong = [
            f"{prefix}{name} is {t.dtype} {list(t.shape)}, expected {dtype} {shape}"
            for name, t in given.items()
            for dtype, shape in [expected[name]]
            if t.dtype != dtype or list(t.shape) != shape
        ]
        if len(given) == len(expected) and not wrong:
            wrong = [text for text in [self.wrong_values(state_dict, prefix)] if text]
        if wrong:
            errors.extend(wrong)
            return
        lay, lay_scales = _ROWS if self.weight.dim() == 2 else _PACKED
        laid = {prefix + name: lay_scales(t) for name, t in given.items() if name != "weight"}
        if "weight" in given:
            laid[prefix + "weight"] = lay(_integers(given["weight"], self.in_features))
        super()._load_from_state_dict({**state_dict, **laid}, prefix, *args)
        self._lay_out()  # with assign=True it may have come to a device that takes another layout


def _pairs(integers: Tensor) -> Tensor:
    """Two integers to a byte: [n, k] -> [n, ceil(k/2)]."""
    even = F.pad(integers, (0, integers.shape[1] % 2))
    return even[:, 0::2] | even[:, 1::2] << 4


def _integers(pairs: Tensor, k: int) -> Tensor:
    return torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)[:, :k]
