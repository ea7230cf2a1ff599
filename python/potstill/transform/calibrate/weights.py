"""The weights of a model that can be calibrated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from potstill.transform.configs import Config, Mixed
from potstill.transform.grid import Grid
from potstill.transform.survey import Layer, survey, tied_groups


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight, the layers that hold it, and what it is to be rounded to."""

    layers: tuple[Layer, ...]
    tensor: Tensor
    config: Config
    grid: Grid

    @property
    def inputs(self) -> int:
        """Its columns."""
        return self.tensor.shape[1]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules of its layers."""
        return [layer.site.module for layer in self.layers]


def weights_of(model: nn.Module, config: Config | Mixed) -> list[Weight]:
    """Every weight that ``quantize_(model, config)`` may round on a grid, in the order of the model."""
    layers = survey(model, config)
    gridded = [layer for layer in layers if not layer.kept and layer.rule is not None and layer.rule.grid(layer.config)]
    found = []
    for group in tied_groups(model, layers, gridded):
        first = group[0]
        grid = first.rule.grid(first.config) if first.rule is not None else None
        if not first.kept and grid is not None and first.config is not None:
            matrix = first.rule.matrix(first.site.module)  # type: ignore[union-attr]
            found.append(Weight(tuple(group), matrix, first.config, grid))
    return found
