"""Convolutions whose zeros cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.nn.masked import MaskedConv2d
from potstill.nn.sparse import SparseLinear, Weights
from potstill.ops.sparse import Rows


class SparseConv2d(nn.Module):
    """A convolution as a :class:`SparseLinear` of the patches that ``F.unfold`` cuts out; a 1x1 one needs no patches.

    Input [batch, in_channels, height, width], output [batch, out_channels, ..] in channels-last memory, which is also
    the input's best. Arguments are those of ``nn.Conv2d`` without groups, and ``weights``, ``rows`` and ``blocks`` of
    :class:`SparseLinear`, which is the submodule ``linear``: with int8 weights each patch is quantised by itself.

    >>> conv = nn.Conv2d(16, 8, 1).requires_grad_(False)
    >>> conv.weight[:, 4:] = 0.0
    >>> layer, x = SparseConv2d.from_float(conv, weights="float"), torch.randn(1, 16, 5, 5)
    >>> layer.linear.blocks, torch.allclose(layer(x), conv(x), atol=1e-5)
    (8, True)
    """

    kind = "sparse_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        bias: bool = True,
        weights: Weights = "int8",
        rows: Rows = "many",
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding, self.dilation = tuple(padding), tuple(dilation)
        features = in_channels * self.kernel_size[0] * self.kernel_size[1]
        self.linear = SparseLinear(features, out_channels, bias, weights, rows, blocks)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weights: Weights = "int8", rows: Rows = "many") -> Self:
        """The sparse form of ``conv``, which has zeros; the bias's memory is shared.

        Raises :class:`TypeError` for convolutions with groups, other padding than zeros, or padding by name.
        """
        config = cls.float_config(conv)
        if config is None:
            raise TypeError(f"SparseConv2d: got {conv}, expected an nn.Conv2d with one group and zeros for padding")
        linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, device="meta")
        linear.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
        linear.register_parameter("bias", conv._parameters["bias"])
        layer = cls(**config, weights=weights, rows=rows)
        layer.linear = SparseLinear.from_float(linear, weights, rows)
        return layer.train(conv.training)

    @staticmethod
    def float_config(module: nn.Module) -> dict[str, Any] | None:
        """What a float convolution says of the :meth:`config` of its sparse form; None for any other module."""
        config = MaskedConv2d.float_config(module)
        if config is None or config.pop("groups") != 1 or isinstance(config["padding"], str):
            return None
        return {name: list(value) if isinstance(value, tuple | list) else value for name, value in config.items()}

    def config(self) -> dict[str, Any]:
        """The arguments that build an empty layer of this shape."""
        lists = {name: list(getattr(self, name)) for name in ("kernel_size", "stride", "padding", "dilation")}
        of_linear = {name: value for name, value in self.linear.config().items() if name in _OF_LINEAR}
        return {"in_channels": self.in_channels, "out_channels": self.out_channels} | lists | of_linear

    def to_float(self) -> nn.Conv2d:
        """A float32 ``nn.Conv2d`` with the weight and its zeros, and a copy of the bias."""
        linear = self.linear.to_float()
        config = {name: value for name, value in self.config().items() if name not in _OF_LINEAR}
        conv = nn.Conv2d(**config, bias=linear.bias is not None, device=linear.weight.device)
        with torch.no_grad():
            conv.weight.copy_(linear.weight.view_as(conv.weight))
            if conv.bias is not None:
                conv.bias.copy_(linear.bias)
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] -> [batch, out_channels, height, width]."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"SparseConv2d: x has shape {list(x.shape)}, expected [batch, {self.in_channels}, height, width]"
            )
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            rows = x[:, :, :: self.stride[0], :: self.stride[1]].movedim(1, -1)
            y: Tensor = self.linear(rows)
            return y.movedim(-1, 1)
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride).transpose(1, 2)
        shape = [self._outputs(x.shape[2 + d], d) for d in (0, 1)]
        return self.linear(patches).transpose(1, 2).unflatten(2, shape)  # type: ignore[no-any-return]

    def _outputs(self, size: int, d: int) -> int:
        return (size + 2 * self.padding[d] - self.dilation[d] * (self.kernel_size[d] - 1) - 1) // self.stride[d] + 1

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Conv2d`` prints them."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


_OF_LINEAR = ("bias", "weights", "rows", "blocks")
