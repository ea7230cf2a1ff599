"""Layers some of whose weights count as zero, whatever happens to their master weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.nn.float_linear import as_linear, is_conv1d


class Masked(nn.Module, ABC):
    """A layer with float master weights and a mask of their shape, bool; weights where it is False count as zero.

    That holds in training and evaluation and does not depend on the optimiser: weight decay, momentum and averages may
    move a master weight that is masked, but the layer never sees it, and its gradient is exactly zero, also where the
    gradients around it are infinite or NaN. ``weight`` is the very ``nn.Parameter`` of the layer that was replaced, so
    that an optimiser made before goes on. ``mask`` is a parameter that needs no gradient: DDP broadcasts buffers at
    every forward, and FSDP would cast floats. Two things of torch do not expect a bool among the parameters:
    ``model.requires_grad_()`` raises, and ``AveragedModel`` needs a ``multi_avg_fn`` that copies what is no float.
    """

    kind: ClassVar[str]
    weight: nn.Parameter
    mask: nn.Parameter
    bias: nn.Parameter | None

    def _take(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.weight = weight
        self.mask = nn.Parameter(torch.ones_like(weight, dtype=torch.bool), requires_grad=False)
        self.register_parameter("bias", bias)  # also when it is None

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The arguments that build an empty layer of this shape."""

    @abstractmethod
    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [outputs, inputs]: what patterns and criteria are defined on."""

    @abstractmethod
    def like_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""

    @abstractmethod
    def to_float(self) -> nn.Module:
        """The plain layer of torch, with zeros where the mask is False."""

    def masked_weight(self) -> Tensor:
        """What the layer computes with: the weight, and zeros where the mask is False; differentiable."""
        return torch.where(self.mask, self.weight, 0.0)  # not a product: 0 * inf is a NaN

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> Self:
        """Copies ``mask`` [outputs, inputs], bool, into the layer's; returns the layer.

        Raises :class:`ValueError` for another shape or dtype.
        """
        shape = self.matrix(self.mask).shape
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: mask is {mask.dtype} {list(mask.shape)}, expected bool {list(shape)}: "
                "[outputs, inputs]"
            )
        self.mask.copy_(self.like_weight(mask))
        return self

    @property
    def sparsity(self) -> float:
        """The share of the weights that the mask makes zero."""
        return 1.0 - float(self.mask.double().mean())

    def extra_repr(self) -> str:
        """Sizes, as torch's own layer prints them, and the sparsity if it has values."""
        sparsity = [] if self.mask.is_meta else [f"sparsity={self.sparsity:.3f}"]
        return ", ".join([*(f"{name}={value!r}" for name, value in self.config().items()), *sparsity])

    @classmethod
    def wrong_values(cls, state: Mapping[str, Tensor], prefix: str) -> str:
        """A bool is one byte in a file, which may hold more than 0 and 1."""
        mask = state[f"{prefix}mask"]
        if mask.numel() and int(mask.contiguous().view(torch.uint8).max()) > 1:
            return f"{prefix}mask has values that are neither 0 nor 1"
        return ""


class MaskedLinear(Masked):
    """A linear layer some of whose weights count as zero; see :class:`Masked`.

    Input [..., in_features], output [..., out_features] of any float dtype, as ``nn.Linear``. ``weight`` and ``mask``
    are [out_features, in_features], or with ``transposed`` [in_features, out_features], as in the ``Conv1D`` of the
    transformers package.

    >>> linear = nn.Linear(4, 2)
    >>> layer = MaskedLinear.from_float(linear, torch.tensor([[True, True, False, False]] * 2))
    >>> layer
    MaskedLinear(in_features=4, out_features=2, bias=True, transposed=False, sparsity=0.500)
    >>> layer.weight is linear.weight, layer.to_float().weight[:, 2:].tolist()
    (True, [[0.0, 0.0], [0.0, 0.0]])
    """

    kind = "masked_linear"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, transposed: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed
        linear = nn.Linear(in_features, out_features, bias)
        if transposed:
            linear.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        self._take(linear.get_parameter("weight"), linear._parameters["bias"])

    @classmethod
    def from_float(cls, linear: nn.Module, mask: Tensor | None = None) -> Self:
        """The masked form of an ``nn.Linear`` or a ``Conv1D`` of transformers, whose parameters it takes over.

        ``mask``: [out_features, in_features], bool; None masks nothing. Raises :class:`TypeError` for other modules.
        """
        config = cls.float_config(linear)
        if config is None:
            raise TypeError(f"MaskedLinear: got a {type(linear).__name__}, expected an nn.Linear or a Conv1D")
        with torch.device("meta"):
            layer = cls(**config)
        layer._take(linear.get_parameter("weight"), linear._parameters["bias"])
        layer.train(linear.training)
        return layer if mask is None else layer.set_mask(mask)

    @staticmethod
    def float_config(module: nn.Module) -> dict[str, Any] | None:
        """What a float linear layer says of the :meth:`config` of its masked form; None for any other module."""
        linear = as_linear(module)
        if linear is None:
            return None
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
        return {**sizes, "bias": linear.bias is not None, "transposed": is_conv1d(module)}

    def config(self) -> dict[str, Any]:
        """See :class:`Masked`."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "bias": self.bias is not None, "transposed": self.transposed}

    def matrix(self, tensor: Tensor) -> Tensor:
        """See :class:`Masked`."""
        return tensor.t() if self.transposed else tensor

    def like_weight(self, matrix: Tensor) -> Tensor:
        """See :class:`Masked`."""
        return matrix.t() if self.transposed else matrix

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.matrix(self.masked_weight()), self.bias)

    def to_float(self) -> nn.Linear:
        """An ``nn.Linear`` with zeros where the mask is False, and a copy of the bias."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        _copy(linear, self.matrix(self.masked_weight()), self)
        return linear


class MaskedConv2d(Masked):
    """A convolution some of whose weights count as zero; see :class:`Masked`.

    Arguments, input and output are those of ``nn.Conv2d``, with zeros for padding. ``weight`` and ``mask`` are
    [out_channels, in_channels / groups, height, width]; as a matrix that is [out_channels, the rest], the columns in
    the order of ``F.unfold``: channel, height, width.

    >>> layer = MaskedConv2d.from_float(nn.Conv2d(3, 8, 3, padding=1))
    >>> layer(torch.zeros(1, 3, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    kind = "masked_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        size, steps, gaps = _pair(kernel_size), _pair(stride), _pair(dilation)
        edges = padding if isinstance(padding, str) else _pair(padding)
        conv = nn.Conv2d(in_channels, out_channels, size, steps, edges, gaps, groups, bias)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = size, steps, edges, gaps
        self._take(conv.get_parameter("weight"), conv._parameters["bias"])

    @classmethod
    def from_float(cls, conv: nn.Module, mask: Tensor | None = None) -> Self:
        """The masked form of an ``nn.Conv2d`` that pads with zeros; it takes over the parameters.

        ``mask``: [out_channels, columns], bool; None masks nothing. Raises :class:`TypeError` for other modules.
        """
        config = cls.float_config(conv)
        if config is None:
            raise TypeError(f"MaskedConv2d: got {conv}, expected an nn.Conv2d that pads with zeros")
        with torch.device("meta"):
            layer = cls(**config)
        layer._take(conv.get_parameter("weight"), conv._parameters["bias"])
        layer.train(conv.training)
        return layer if mask is None else layer.set_mask(mask)

    @staticmethod
    def float_config(module: nn.Module) -> dict[str, Any] | None:
        """What a float convolution says of the :meth:`config` of its masked form; None for any other module."""
        if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
            return None
        return _conv_config(module)

    def config(self) -> dict[str, Any]:
        """See :class:`Masked`."""
        return _conv_config(self)

    def matrix(self, tensor: Tensor) -> Tensor:
        """See :class:`Masked`."""
        return tensor.flatten(1)

    def like_weight(self, matrix: Tensor) -> Tensor:
        """See :class:`Masked`."""
        return matrix.reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] -> [batch, out_channels, height, width]."""
        weight = self.masked_weight()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def to_float(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with zeros where the mask is False, and a copy of the bias."""
        conv = nn.Conv2d(**self.config(), device=self.weight.device, dtype=self.weight.dtype)
        _copy(conv, self.masked_weight(), self)
        return conv


@torch.no_grad()
def _copy(plain: nn.Linear | nn.Conv2d, weight: Tensor, source: Masked) -> None:
    plain.weight.copy_(weight)
    if plain.bias is not None and source.bias is not None:
        plain.bias.copy_(source.bias)
    plain.train(source.training)


def _conv_config(conv: nn.Conv2d | MaskedConv2d) -> dict[str, Any]:
    """Lists for tuples, as JSON has none."""
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": list(conv.kernel_size),
        "stride": list(conv.stride),
        "padding": conv.padding if isinstance(conv.padding, str) else list(conv.padding),
        "dilation": list(conv.dilation),
        "groups": conv.groups,
        "bias": conv.bias is not None,
    }


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2:
        raise ValueError(f"MaskedConv2d: got {value!r}, expected a number or a pair: (height, width)")
    return both[0], both[1]
