"""What :func:`quantize_` may be asked to make of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

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
    ``Mixed`` raises :class:`ConversionError` if a pattern matches no layer of the model. It prints as Python; ``notes``
    are printed behind their lines.

    >>> Mixed({"lm_head": None, "*.mlp.*": Int4(group_size=64), "*": Int8()})
    Mixed({
        'lm_head': None,
        '*.mlp.*': Int4(group_size=64, symmetric=True),
        '*': Int8(),
    })
    """

    layers: Mapping[Pattern, Config | None]
    notes: Mapping[Pattern, str] = field(default_factory=dict, compare=False)

    @classmethod
    def auto(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        average_bits: float,
        candidates: Iterable[Config | None] = (Int4(), Int8()),
        quiet: bool = False,
    ) -> Mixed:
        """The configs by which the output of ``model`` changes least, with ``average_bits`` per weight at most.

        - ``loader``: a few batches of inputs, as for :func:`calibrate_`.
        - ``average_bits``: over the weights of the layers that can get one of the ``candidates``; scales do not count.
        - ``candidates``: what a layer may become; None for as it is.

        How sensitive a layer is, is measured: it alone is replaced by each candidate, and the relative squared error of
        the model's output is noted. The errors of several layers count as their sum, as in ZeroQ (Cai et al. 2020,
        "ZeroQ: A Novel Zero Shot Quantization Framework", section 3.2, with the Kullback-Leibler divergence for the
        error), and the choice with the least sum is found exactly. That takes a run of the model for each layer,
        candidate and batch. The notes tell the errors.

        Raises :class:`PotstillError` if the candidates need more bits, or the loader yields nothing.

        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> mixed = Mixed.auto(model, [torch.randn(32, 64)], average_bits=20, candidates=[Int8(), None])
        >>> sorted(mixed.layers), list(mixed.layers.values()).count(None)
        (['0', '2'], 1)
        """
        from potstill.transform.sensitivity import choose  # which has to know this class

        return choose(model, loader, average_bits, candidates, quiet)

    def __post_init__(self) -> None:
        for pattern, config in self.layers.items():
            if not (config is None or isinstance(config, Config)):
                raise TypeError(f"Mixed: {pattern!r} is mapped to {config!r}, expected Int8(), Int4(...) or None")

    def __repr__(self) -> str:
        lines = []
        for pattern, config in self.layers.items():
            name = pattern.__name__ if isinstance(pattern, type) else repr(pattern)
            note = f"  # {self.notes[pattern]}" if pattern in self.notes else ""
            lines.append(f"    {name}: {config!r},{note}\n")
        return f"Mixed({{\n{''.join(lines)}}})"
