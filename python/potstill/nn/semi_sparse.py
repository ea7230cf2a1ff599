"""Linear layers that store two of each four inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.nn.quantized import QuantizedLinear
from potstill.ops import semi_sparse_int8_linear, sparse_units
from potstill.ops.activation import ACTIVATIONS, check_activation
from potstill.ops.int8_linear import MAX_FEATURES, quantize_weight
from potstill.ops.semi_sparse import canonical, from_semi, laid_out, to_semi, wrong_numbers, wrong_padding, zeros

Weights = Literal["int8", "float"]
"""What the weights of a 2:4 layer are."""

FEW = 64
"""Rows up to which int8 weights are read by a kernel of ours: its time is that of reading them."""

MOST_ROWS = 1 << 16
"""The largest number of rows that algorithms are searched for; more rows take the algorithm for so many."""


def row_class(rows: int) -> int:
    """The power of two, from 8 to :data:`MOST_ROWS`, whose algorithm ``rows`` take.

    >>> row_class(1), row_class(100), row_class(10**6)
    (8, 128, 65536)
    """
    return int(min(MOST_ROWS, max(8, 1 << (rows - 1).bit_length())))


class SemiSparseLinear(QuantizedLinear):
    """A linear layer of whose weight two of each four consecutive inputs of an output are stored: 2:4 sparsity.

    Input [..., in_features], output [..., out_features] of the same dtype (under autocast: of the autocast dtype). With
    int8 ``weights`` the input is quantised per row, and the result is bit for bit that of :class:`Int8Linear`; float
    ones keep the dtype of the model. ``activation`` as in :class:`Int8Linear`. The layer is frozen; gradients flow to
    the input.

    It is made for GPUs. Up to :data:`FEW` rows int8 weights are read by a kernel that expands them in registers; more
    rows, and float weights, go to the sparse units of a GPU in 16 bits, once :meth:`tune` has packed the weight for
    them and searched the fastest algorithm: beside the weight of 5/8 of its dense size (float: 9/16) the GPU then
    holds one packed of as much. ``tuned`` are the classes of rows that this was done for; it is done again where the
    layer comes to another GPU or is loaded, and never in :meth:`forward`. Everywhere else plain torch expands the
    weight in each call: right, and slower than a dense layer. So do float layers when a gradient is wanted.

    ``state_dict`` holds ``values`` [out_features, inputs / 2], int8 or float, and ``indices`` uint8 [out_features,
    inputs / 8], the inputs rounded up to eights (see :mod:`ops.semi_sparse`), and of int8 ``scale`` [out_features].

    Raises :class:`ValueError` when the input's last dimension is not ``in_features``, for unknown options, or more int8
    inputs than :data:`ops.int8_linear.MAX_FEATURES`.

    >>> linear = torch.nn.Linear(64, 32).requires_grad_(False)
    >>> linear.weight.view(32, 16, 4)[..., ::2] = 0.0
    >>> layer = SemiSparseLinear.from_float(linear)
    >>> layer
    SemiSparseLinear(in_features=64, out_features=32, bias=True, weights='int8')
    >>> x = torch.randn(8, 64)
    >>> bool((layer(x) - linear(x)).norm() < 0.02 * linear(x).norm())
    True
    """

    kind = "semi_sparse_linear"
    _options: ClassVar = ("weights", "activation", "tuned")
    values: nn.Parameter
    indices: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weights: Weights = "int8",
        activation: str = "none",
        tuned: Iterable[int] = (),
    ) -> None:
        super().__init__()
        check_activation("SemiSparseLinear", activation)
        if weights not in get_args(Weights):
            raise ValueError(
                f"SemiSparseLinear: weights is {weights!r}, expected one of {', '.join(get_args(Weights))}"
            )
        if weights == "int8" and in_features > MAX_FEATURES:
            raise ValueError(
                f"SemiSparseLinear: in_features is {in_features}, expected at most {MAX_FEATURES}; split the layer"
            )
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.activation = weights, activation
        self.tuned = _classes(tuned)
        self._packed: sparse_units.Packed | None = None
        self._packed_for: tuple[torch.device, torch.dtype] | None = None
        self._algorithms: dict[int, int | None] = {}  # by class of rows; None: the library refuses these
        dtype = torch.int8 if weights == "int8" else torch.get_default_dtype()
        self._set_weight(*zeros(out_features, in_features, dtype))
        self.register_buffer("scale", torch.ones(out_features) if weights == "int8" else None)
        zero_bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", zero_bias)  # also when it is None

    @classmethod
    def from_float(cls, linear: nn.Linear, weights: Weights = "int8", activation: str = "none") -> Self:
        """The 2:4 form of ``linear``, of whose weight at least two of each four inputs are zero; the bias is shared.

        Raises :class:`ValueError` if they are not, or a weight is not finite.
        """
        n, k = linear.weight.shape
        with torch.device(linear.weight.device):
            layer = cls(k, n, False, weights, activation)
        weight = linear.weight.detach()
        if weights == "int8":
            weight, layer.scale = quantize_weight(weight)
        elif not bool(torch.isfinite(weight).all()):
            raise ValueError("SemiSparseLinear: weight has NaN or infinite values; expected finite ones")
        layer._set_weight(*to_semi(weight))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def to_float(self) -> nn.Linear:
        """A float32 ``nn.Linear`` with the weight and its zeros, and a copy of the bias, without the activation."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.values.device)
        with torch.no_grad():
            weight = self._dense().float()
            linear.weight.copy_(weight if self.weights == "float" else weight * self.scale[:, None])
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def tune(self, rows: int) -> bool:
        """Prepares for calls with about ``rows`` rows, where torch has a library for the sparse units of the device.

        Searching runs the product in all of the library's algorithms, and takes memory for the rows. Returns whether
        such calls then go to the sparse units; if not, whatever the layer did for them before still serves them.
        """
        if self.weights == "int8" and rows <= FEW:
            return False
        wanted = row_class(rows)
        if self._algorithms.get(wanted) is None and not self._search(wanted):
            return False
        self.tuned = _classes((*self.tuned, wanted))
        return True

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], plus ``residual`` of that shape if it is given."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"SemiSparseLinear: x has {x.shape[-1]} features, expected in_features={self.in_features}; "
                f"x has shape {list(x.shape)}"
            )
        if self.weights == "float":
            y = ACTIVATIONS[self.activation](self._product(x))
            return y if residual is None else y + residual
        tensors = x, self.values, self.indices, self.scale, self.bias, self.activation, residual
        rows = math.prod(x.shape[:-1])
        if self._packed is None or rows <= FEW or (algorithm := self._algorithm(rows)) is None:
            return semi_sparse_int8_linear(*tensors)  # type: ignore[no-any-return]
        return semi_sparse_int8_linear(*tensors, self._packed[0], algorithm)  # type: ignore[no-any-return]

    def _algorithm(self, rows: int) -> int | None:
        """The library's algorithm for so many rows, its first one if none was searched for."""
        return self._algorithms.get(row_class(rows), 0)

    def _product(self, x: Tensor) -> Tensor:
        """With float weights; by the sparse units if it is tuned for them and no gradient is wanted: they have none."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, self.bias))
        rows = x.reshape(-1, self.in_features)
        library, algorithm = sparse_units.library(x.device, x.dtype), self._algorithm(len(rows))
        usable = x.dtype == self.values.dtype and not wanted
        if library is None or self._packed is None or algorithm is None or not usable:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self._dense().to(x.dtype), bias)
        y = sparse_units.multiply(library, self._packed, rows, self.out_features, self.bias, algorithm)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them, and what is not as usual."""
        return super().extra_repr().replace(", activation='none'", "").replace(", tuned=[]", "")

    @classmethod
    def wrong_values(cls, state: Mapping[str, Tensor], prefix: str) -> str:
        """Places that are places, and numbers that the kernels are exact for."""
        values, indices, scale = state[f"{prefix}values"], state[f"{prefix}indices"], state.get(f"{prefix}scale")
        if wrong := wrong_numbers(values, indices):
            return f"{prefix}{wrong}"
        if scale is not None and not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            return f"{prefix}scale has values that are negative or not finite"
        return ""

    def _dense(self, width: int | None = None) -> Tensor:
        return from_semi(self.values.detach(), self.indices.detach(), width or self.in_features)

    def _set_weight(self, values: Tensor, indices: Tensor) -> None:
        values, indices = laid_out(values, indices, self.in_features, values.device.type)
        self.values, self.indices = (nn.Parameter(t, requires_grad=False) for t in (values, indices))

    def _search(self, rows: int) -> bool:
        """Whether there is now a packed weight and an algorithm for ``rows``; a library refuses sizes by raising."""
        values = self.values.detach()
        library = None if values.is_meta else sparse_units.library(values.device, values.dtype)
        if library is None:
            return False
        # Our kernels round int8 rows to the inputs that the weight has here, which are more than in_features.
        width = 2 * values.shape[1] if self.weights == "int8" else self.in_features
        example = torch.ones(rows, width, dtype=values.dtype, device=values.device)
        try:
            if self._packed is None:
                self._packed = sparse_units.compress(library, self._dense(width))
                self._packed_for = values.device, values.dtype
            self._algorithms[rows] = sparse_units.search(library, self._packed, example)
        except RuntimeError:
            self._algorithms[rows] = None
            return False
        return True

    def _lay_out(self) -> None:
        values, indices = self.values.detach(), self.indices.detach()
        laid = laid_out(values, indices, self.in_features, values.device.type)
        if laid[0] is not values:
            self.values.data, self.indices.data = laid
        if self._packed_for != (values.device, values.dtype):
            self._pack_again()

    def _pack_again(self) -> None:
        """What was packed of other values, or elsewhere, is forgotten."""
        self._packed, self._algorithms = None, {}
        self._packed_for = self.values.device, self.values.dtype
        for rows in self.tuned:
            self._search(rows)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        values, indices = canonical(self.values.detach(), self.indices.detach(), self.in_features)
        destination[prefix + "values"], destination[prefix + "indices"] = values, indices

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        names = [prefix + name for name in ("values", "indices")]
        if all(name in state_dict for name in names):
            values, indices = (state_dict[name] for name in names)
            wrong = self._wrong_form(values, indices, prefix) or self.wrong_values(state_dict, prefix)
            if not wrong and (padding := wrong_padding(values, indices, self.in_features)):
                wrong = prefix + padding
            if wrong:
                args[-1].append(wrong)
                return
            laid = laid_out(values, indices, self.in_features, self.values.device.type)
            state_dict = {**state_dict, **dict(zip(names, laid, strict=True))}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._lay_out()  # with assign=True it may have come to a device that takes another layout
        self._pack_again()

    def _wrong_form(self, values: Tensor, indices: Tensor, prefix: str) -> str:
        wanted = zeros(self.out_features, self.in_features, torch.int8, "meta")
        for name, given, expected in zip(("values", "indices"), (values, indices), wanted, strict=True):
            kind = str(expected.dtype).removeprefix("torch.")
            right = given.dtype == expected.dtype
            if name == "values" and self.weights == "float":
                kind, right = "floats", given.is_floating_point()
            if not right or given.shape != expected.shape:
                return f"{prefix}{name} is {given.dtype} {list(given.shape)}, expected {kind} {list(expected.shape)}"
        return ""


def _classes(rows: Iterable[int]) -> list[int]:
    """Sorted, each once; raises :class:`ValueError` for anything but classes of rows."""
    given = list(rows)
    if not all(type(count) is int and count > 0 and row_class(count) == count for count in given):
        raise ValueError(
            f"SemiSparseLinear: tuned is {given!r:.80}, expected powers of two from {row_class(1)} to {MOST_ROWS}"
        )
    return sorted(set(given))
