"""Drop-in embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from potstill.ops.int8_embedding import int8_embedding
from potstill.ops.int8_linear import quantize_weight


class Int8Embedding(nn.Module):
    """An embedding with int8 rows, each with a scale of its own; see :data:`ops.int8_embedding`.

    Indices [...] of int64 or int32, output [..., embedding_dim] of the dtype that the embedding had, or that ``.to()``
    gave the layer since. Float32 and bfloat16 run compiled kernels, on GPUs float16 too. The table is a quarter of its
    float32 form, and frozen; ``padding_idx`` is kept for :meth:`to_float`. ``state_dict`` holds ``weight`` as
    [num_embeddings, embedding_dim] int8 and ``scale`` as [num_embeddings] float32.

    Raises :class:`ValueError` for an index that names no row; on a GPU its output is NaN.

    >>> embedding = nn.Embedding(100, 64)
    >>> small = Int8Embedding.from_float(embedding)
    >>> small
    Int8Embedding(100, 64)
    >>> x = torch.tensor([[3, 99], [0, 3]])
    >>> bool((small(x) - embedding(x)).norm() < 0.01 * embedding(x).norm())
    True
    """

    kind = "int8_embedding"
    weight: nn.Parameter
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__()
        if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
            raise ValueError(f"Int8Embedding: padding_idx is {padding_idx}, expected a row below {num_embeddings}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.dtype = torch.get_default_dtype()
        self.weight = nn.Parameter(torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.ones(num_embeddings, dtype=torch.float32))

    @staticmethod
    def unsupported(embedding: nn.Embedding) -> str:
        """Why ``embedding`` has no int8 form; empty if it has one."""
        if embedding.max_norm is not None:
            return f"max_norm={embedding.max_norm} rescales rows of its weight on every call"
        if embedding.sparse or embedding.scale_grad_by_freq:
            option = "sparse" if embedding.sparse else "scale_grad_by_freq"
            return f"{option}=True says that its weight is being trained; the int8 table is frozen"
        return ""

    @staticmethod
    def float_config(module: nn.Module) -> dict[str, Any] | None:
        """The :meth:`config` of the int8 form of ``module``, or None if it is no ``nn.Embedding``."""
        if type(module) is not nn.Embedding:
            return None
        return {
            "num_embeddings": module.num_embeddings,
            "embedding_dim": module.embedding_dim,
            "padding_idx": module.padding_idx,
        }

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> Self:
        """The int8 form of ``embedding``; raises :class:`ValueError` if there is none."""
        if why := cls.unsupported(embedding):
            raise ValueError(f"Int8Embedding: {why}")
        with torch.device("meta"):
            layer = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        integers, layer.scale = quantize_weight(embedding.weight)
        layer.weight = nn.Parameter(integers, requires_grad=False)
        layer.dtype = embedding.weight.dtype
        return layer.train(embedding.training)

    def to_float(self) -> nn.Embedding:
        """An ``nn.Embedding`` of the layer's dtype with the dequantised rows."""
        rows = (self.weight.float() * self.scale[:, None]).to(self.dtype)
        embedding: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=self.padding_idx)
        return embedding.train(self.training)

    def config(self) -> dict[str, Any]:
        """The arguments that build an empty layer of this shape."""
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
        }

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim]."""
        y: Tensor = int8_embedding(self._parameters["weight"], self._buffers["scale"], input, self.dtype)
        return y

    @classmethod
    def wrong_values(cls, state: Mapping[str, Tensor], prefix: str) -> str:
        """What is wrong with the numbers of a ``state_dict`` whose shapes and dtypes are right; empty if nothing is."""
        scale = state[f"{prefix}scale"]
        good = bool((torch.isfinite(scale) & (scale >= 0)).all())
        return "" if good else f"{prefix}scale has values that are negative or not finite"

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Embedding`` prints them."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .half() and .to(bfloat16) set the dtype of the result; integers and scales follow the device only.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        scale = self.scale
        nn.Module._apply(self, fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != torch.int8:
            errors: list[str] = args[-1]
            errors.append(f"{prefix}weight is {weight.dtype}, expected int8")
            return None
        return super()._load_from_state_dict(state_dict, prefix, *args)
