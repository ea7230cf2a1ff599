"""What :func:`quantize_` may be asked to make of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.transform.swap import Pattern


@dataclass(frozen=True)
class Int8:
    """Int8 weights with one scale per output, activations quantised per row on the fly; see :class:`nn.Int8Linear`."""

    bits: ClassVar[int] = 8
    """Bits of one weight, its share of the scale not counted."""


@dataclass(frozen=True)
class Int4:
    """Int4 weights with one scale for each ``group_size`` inputs of an output; see :class:`nn.Int4Linear`.

    Asymmetric groups have a zero point too, so that a group whose weights lie on one side of zero uses all 16 values.
    Raises :class:`ValueError` for a group size that the kernels do not have.
    """

    group_size: int = 32
    symmetric: bool = True
    bits: ClassVar[int] = 4
    """Bits of one weight, its share of scale and zero point not counted."""

    def __post_init__(self) -> None:
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"Int4: group_size is {self.group_size}, expected 32, 64 or 128")


Config = Int8 | Int4
"""What one layer becomes."""


@dataclass(frozen=True, repr=False)
class Mixed:
    """Another config for each layer: ``layers`` maps wildcards for dotted names, or module types, to configs or None.

    The first pattern that matches a layer decides; None keeps the layer as it is, and so does no match. Whoever reads a
    ``Mixed`` raises :class:`ConversionError` if a pattern matches no layer of the model.

    >>> Mixed({"lm_head": None, "*.mlp.*": Int4(group_size=64), "*": Int8()})
    Mixed({
        'lm_head': None,
        '*.mlp.*': Int4(group_size=64, symmetric=True),
        '*': Int8(),
    })
    """

    layers: Mapping[Pattern, Config | None]

    def __post_init__(self) -> None:
        for pattern, config in self.layers.items():
            if not (config is None or isinstance(config, Config)):
                raise TypeError(f"Mixed: {pattern!r} is mapped to {config!r}, expected Int8(), Int4(...) or None")

    def __repr__(self) -> str:
        lines = [
            f"    {pattern.__name__ if isinstance(pattern, type) else repr(pattern)}: {config!r},\n"
            for pattern, config in self.layers.items()
        ]
        return f"Mixed({{\n{''.join(lines)}}})"
