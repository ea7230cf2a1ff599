"""Linear layers of which only whole square blocks of weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from potstill.nn.quantized import QuantizedLinear
from potstill.ops.activation import check_activation
from potstill.ops.block_sparse import SIZES, from_block_sparse, longest_first, to_block_sparse, wrong_blocks
from potstill.ops.block_sparse_linear import block_sparse_linear


class BlockSparseLinear(QuantizedLinear):
    """A linear layer that stores and computes only the ``block`` x ``block`` blocks of weights that are not all zero.

    Input [..., in_features] of any float dtype, output [..., out_features] of the same dtype (under autocast: of the
    autocast dtype), summed in float32. On GPUs float32, bfloat16 and float16 run a kernel; elsewhere plain torch
    multiplies block by block. ``activation`` as in :class:`Int8Linear`. The weight is of any float dtype and follows
    ``.to(dtype)``. Gradients flow to the input; the layer itself is frozen.

    ``state_dict`` holds ``values`` [blocks, block, block], block row by block row, ``columns`` int32 [blocks], the
    block column of each, and ``first`` int32 [block rows + 1], where each row begins. What the constructor returns has
    zeros in its blocks: :meth:`from_float` makes a whole layer, and loading a ``state_dict`` completes one.

    Raises :class:`ValueError` when the input's last dimension is not ``in_features``, or for unknown options.

    >>> linear = torch.nn.Linear(64, 32).requires_grad_(False)
    >>> linear.weight[:16, 16:] = 0.0
    >>> layer = BlockSparseLinear.from_float(linear, 16)
    >>> layer
    BlockSparseLinear(in_features=64, out_features=32, bias=True, block=16, blocks=5)
    >>> x = torch.randn(8, 64)
    >>> torch.allclose(layer(x), linear(x), atol=1e-5)
    True
    """

    kind = "block_sparse_linear"
    _options: ClassVar = ("block", "blocks", "activation")
    values: nn.Parameter
    columns: nn.Parameter
    first: nn.Parameter
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block: int = 64,
        blocks: int = 0,
        activation: str = "none",
    ) -> None:
        super().__init__()
        check_activation("BlockSparseLinear", activation)
        if block not in SIZES:
            raise ValueError(f"BlockSparseLinear: block is {block!r}, expected one of {', '.join(map(str, SIZES))}")
        rows, columns = -(-out_features // block), -(-in_features // block)
        if not 0 <= blocks <= rows * columns:
            raise ValueError(f"BlockSparseLinear: blocks is {blocks}, expected 0 to as many as the layer has")
        self.in_features, self.out_features = in_features, out_features
        self.block, self.activation = block, activation
        first = (torch.arange(rows + 1) * columns).clamp(max=blocks)
        self._set(torch.zeros(blocks, block, block), torch.arange(blocks) % max(columns, 1), first)
        zero_bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", zero_bias)  # also when it is None

    def _set(self, values: Tensor, columns: Tensor, first: Tensor) -> None:
        for name, value in (("values", values), ("columns", columns.int()), ("first", first.int())):
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_buffer("order", longest_first(self.first), persistent=False)

    @classmethod
    def from_float(cls, linear: nn.Linear, block: int, activation: str = "none") -> Self:
        """The block-sparse form of ``linear``, which has zeros, and an activation after it; the bias is shared.

        Raises :class:`ValueError` if a weight is not finite.
        """
        weight = linear.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("BlockSparseLinear: weight has NaN or infinite values; expected finite ones")
        with torch.device(weight.device):
            layer = cls(linear.in_features, linear.out_features, False, block, activation=activation)
        layer._set(*to_block_sparse(weight, block))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def to_float(self) -> nn.Linear:
        """An ``nn.Linear`` with the weight and its zeros, and a copy of the bias, without the activation."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.values.device, self.values.dtype
        )
        with torch.no_grad():
            weight = from_block_sparse(self.values, self.columns, self.first, self.out_features, self.in_features)
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    @property
    def blocks(self) -> int:
        """How many blocks are stored."""
        return len(self.values)

    @property
    def sparsity(self) -> float:
        """The share of the blocks that are all zero."""
        return 1.0 - self.blocks / max(-(-self.out_features // self.block) * -(-self.in_features // self.block), 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], plus ``residual`` of that shape if it is given."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"BlockSparseLinear: x has {x.shape[-1]} features, expected in_features={self.in_features}; "
                f"x has shape {list(x.shape)}"
            )
        own = self._parameters  # nn.Module.__getattr__ is slow beside a small layer
        weight = own["values"], own["columns"], own["first"], self._buffers["order"]
        args = x, *weight, self.out_features, own["bias"], self.activation, residual
        return block_sparse_linear(*args)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them, and what is not as usual."""
        return super().extra_repr().replace(", activation='none'", "")

    @classmethod
    def wrong_values(cls, state: Mapping[str, Tensor], prefix: str) -> str:
        """Values must be finite; where they lie is looked at with the layer's sizes, by ``load_state_dict``."""
        if not bool(torch.isfinite(state[f"{prefix}values"]).all()):
            return f"{prefix}values has values that are not finite"
        return ""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        names = [prefix + name for name in ("values", "columns", "first")]
        if all(name in state_dict for name in names):
            values, columns, first = (state_dict[name] for name in names)
            wrong = wrong_blocks(values, columns, first, self.out_features, self.in_features, self.block)
            wrong = prefix + wrong if wrong else self.wrong_values(state_dict, prefix)
            if wrong:
                args[-1].append(wrong)  # what is wrong
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.order = longest_first(self.first)
