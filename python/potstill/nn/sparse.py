"""Linear layers whose zeros cost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from potstill.nn.quantized import QuantizedLinear
from potstill.ops.activation import check_activation
from potstill.ops.int8_linear import MAX_FEATURES, quantize_weight
from potstill.ops.sparse import BLOCK, ROWS, Rows, from_blocks, pack, pack_bits, to_blocks, unpack_bits
from potstill.ops.sparse_int8_linear import blocks, laid_out, lay, sparse_int8_linear
from potstill.ops.sparse_linear import sparse_linear

Weights = Literal["int8", "float"]
"""What the weights of a sparse layer are."""

_DTYPES = {"int8": torch.int8, "float": torch.float32}


class SparseLinear(QuantizedLinear):
    """A linear layer that stores and computes only blocks of 4 inputs of an output that are not all zero.

    Input [..., in_features] of any float dtype, output [..., out_features] of the same dtype (under autocast: of the
    autocast dtype). With int8 ``weights`` the input is quantised per row, and the result is bit for bit that of
    :class:`Int8Linear`; with float ones it is summed in float32. Float32 and bfloat16 on the CPU run compiled kernels;
    on GPUs int8 ones do, with float16 too.
    ``rows`` says for how many rows the weights are ordered: "many" (from about 16 on) or "few"; either is right.
    ``activation`` as in :class:`Int8Linear`. Gradients flow to the input; the layer itself is frozen.

    ``state_dict`` holds ``mask`` [out_features, bytes], a bit for each block, first block lowest; ``values``
    [blocks, 4], int8 or float32, row by row; and of int8 ``scale`` [out_features] float32. In memory the weight is kept
    only once, in the kernels' order. What the constructor returns has no weights yet: :meth:`from_float` makes a
    whole layer, and loading a ``state_dict`` completes one.

    Raises :class:`ValueError` when the input's last dimension is not ``in_features``, for unknown options, or more
    int8 inputs than :data:`ops.int8_linear.MAX_FEATURES`.

    >>> linear = torch.nn.Linear(64, 32).requires_grad_(False)
    >>> linear.weight[:, 16:] = 0.0
    >>> layer = SparseLinear.from_float(linear)
    >>> layer
    SparseLinear(in_features=64, out_features=32, bias=True, weights='int8', rows='many', blocks=128)
    >>> x = torch.randn(8, 64)
    >>> bool((layer(x) - linear(x)).norm() < 0.02 * linear(x).norm())
    True
    """

    kind = "sparse_linear"
    _options: ClassVar = ("weights", "rows", "blocks", "activation")
    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weights: Weights = "int8",
        rows: Rows = "many",
        blocks: int = 0,
        activation: str = "none",
    ) -> None:
        super().__init__()
        check_activation("SparseLinear", activation)
        for name, given, choices in (("weights", weights, get_args(Weights)), ("rows", rows, ROWS)):
            if given not in choices:
                raise ValueError(f"SparseLinear: {name} is {given!r}, expected one of {', '.join(choices)}")
        if weights == "int8" and in_features > MAX_FEATURES:
            raise ValueError(
                f"SparseLinear: in_features is {in_features}, expected at most {MAX_FEATURES}; split the layer"
            )
        if not 0 <= blocks <= out_features * -(-in_features // BLOCK):
            raise ValueError(f"SparseLinear: blocks is {blocks}, expected 0 to as many as the layer has")
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.rows, self.blocks, self.activation = weights, rows, blocks, activation
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features) if weights == "int8" else None)
        zero_bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", zero_bias)  # also when it is None

    @classmethod
    def from_float(
        cls, linear: nn.Linear, weights: Weights = "int8", rows: Rows = "many", activation: str = "none"
    ) -> Self:
        """The sparse form of ``linear``, which has zeros, and an activation after it; the bias's memory is shared.

        Raises :class:`ValueError` if a weight is not finite.
        """
        n, k = linear.weight.shape
        with torch.device(linear.weight.device):
            layer = cls(k, n, False, weights, rows, activation=activation)
        weight = linear.weight.detach()
        if weights == "int8":
            weight, layer.scale = quantize_weight(weight)
        elif not bool(torch.isfinite(weight).all()):
            raise ValueError("SparseLinear: weight has NaN or infinite values; expected finite ones")
        layer._set_blocks(*to_blocks(weight.to(_DTYPES[weights])))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def to_float(self) -> nn.Linear:
        """A float32 ``nn.Linear`` with the weight and its zeros, and a copy of the bias, without the activation."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.weight.device)
        with torch.no_grad():
            weight = from_blocks(*blocks(self.weight, self.in_features), self.in_features).float()
            linear.weight.copy_(weight if self.weights == "float" else weight * self.scale[:, None])
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    @property
    def sparsity(self) -> float:
        """The share of the blocks that are all zero."""
        return 1.0 - self.blocks / max(self.out_features * -(-self.in_features // BLOCK), 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], plus ``residual`` of that shape if it is given."""
        parameters = self._parameters  # nn.Module.__getattr__ is slow beside a small layer
        weight, bias = parameters["weight"], parameters["bias"]
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"SparseLinear: x has {x.shape[-1]} features, expected in_features={self.in_features}; "
                f"x has shape {list(x.shape)}"
            )
        if self.weights == "float":
            args = x, weight, self.out_features, bias, self.activation, residual
            return sparse_linear(*args)  # type: ignore[no-any-return]
        scale = self._buffers["scale"]
        if residual is None and self.activation == "none":
            return sparse_int8_linear(x, weight, scale, bias)  # type: ignore[no-any-return]  # each argument costs
        return sparse_int8_linear(x, weight, scale, bias, self.activation, residual)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them, and what is not as usual."""
        return super().extra_repr().replace(", activation='none'", "")

    @classmethod
    def wrong_values(cls, state: Mapping[str, Tensor], prefix: str) -> str:
        """As many bits as blocks, and numbers that the kernels are exact for."""
        mask, values, scale = state[f"{prefix}mask"], state[f"{prefix}values"], state.get(f"{prefix}scale")
        bits = int(unpack_bits(mask, mask.shape[1] * 8).sum())
        if bits != len(values):
            return f"{prefix}mask has {bits} blocks and {prefix}values {len(values)}; they must agree"
        if values.dtype == torch.int8 and bool((values == -128).any()):
            return f"{prefix}values has the value -128; int8 weights lie in [-127, 127]"
        if not bool(torch.isfinite(values).all()):
            return f"{prefix}values has values that are not finite"
        if not bool((values != 0).any(-1).all()):
            return f"{prefix}values has blocks that are all zero; those are not stored"
        if scale is not None and not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            return f"{prefix}scale has values that are negative or not finite"
        return ""

    def _set_blocks(self, mask: Tensor, values: Tensor) -> None:
        self.blocks = len(values)
        if self.weights == "int8":
            weight = lay(mask, values, self.in_features, self.rows, values.device.type)
        else:
            weight = pack(mask, values, self.in_features, self.rows)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def _lay_out(self) -> None:
        weight = self.weight.detach()
        if weight.is_meta:  # no blocks are there; a state brings them
            self.weight.data = weight.new_empty(0, dtype=torch.uint8)
        elif self.weights == "int8" and weight.numel():
            laid = laid_out(weight, self.in_features, self.rows, weight.device.type)
            if laid is not weight:
                self.weight.data = laid

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]
        if self.weight.numel():
            mask, values = blocks(self.weight.detach(), self.in_features)
            destination[prefix + "mask"], destination[prefix + "values"] = pack_bits(mask), values
        else:
            for name, (dtype, shape) in self._stored().items():
                destination[prefix + name] = torch.zeros(shape, dtype=dtype, device=self.weight.device)

    def _stored(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        columns = -(-self.in_features // BLOCK)
        return {
            "mask": (torch.uint8, [self.out_features, -(-columns // 8)]),
            "values": (_DTYPES[self.weights], [self.blocks, BLOCK]),
        }

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        stored = self._stored()
        given = {name: state_dict[prefix + name] for name in stored if prefix + name in state_dict}
        if len(given) == len(stored):
            wrong = self._wrong_form(given, prefix) or self.wrong_values(state_dict, prefix)
            if wrong:
                args[-1].append(wrong)  # what is wrong
                return
            mask = unpack_bits(given["mask"], -(-self.in_features // BLOCK))
            self._set_blocks(mask.to(self.weight.device), given["values"].to(self.weight.device))
        args[-3].extend(prefix + name for name in stored if name not in given)  # what is missing
        # The base class copies the weight onto itself and knows no other name for it.
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in stored}}
        super()._load_from_state_dict({**rest, prefix + "weight": self.weight.data}, prefix, *args)

    def _wrong_form(self, given: Mapping[str, Tensor], prefix: str) -> str:
        wanted = self._stored()
        wanted["values"][1][0] = len(given["values"])
        for name, (dtype, shape) in wanted.items():
            if given[name].dtype != dtype or list(given[name].shape) != shape:
                return f"{prefix}{name} is {given[name].dtype} {list(given[name].shape)}, expected {dtype} {shape}"
        columns = -(-self.in_features // BLOCK)
        if bool(unpack_bits(given["mask"], wanted["mask"][1][1] * 8)[:, columns:].any()):
            return f"{prefix}mask has blocks beyond the {self.in_features} inputs"
        return ""
