"""Tensor parallelism: chooses how the layers of a model are split over the ranks, and splits them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from potstill.nn import KINDS
from potstill.parallel.layout import Layout, Split
from potstill.parallel.search import (
    Candidate,
    MisfitError,
    Reference,
    blocks,
    candidates,
    reference,
    variants,
    verify,
)
from potstill.parallel.styles import Entry, SplitLinear, is_linear, sizes, why_not
from potstill.transform.observe import Sample
from potstill.transform.swap import Pattern, matching, replace, shared_names, sites, tie

if TYPE_CHECKING:
    from potstill.parallel.plan import Plan

ROLES = ("column", "row", "replicate")

_ALONE = "no later layer could add up what its parts would give"


def find(
    model: nn.Module,
    sample: Sample | None,
    plan: Plan,
    tensor_plan: Mapping[Pattern, str] | None = None,
    head: str | None = None,
) -> Layout:
    """Which layers can be split over ``plan.tensor`` ranks, from runs of ``model`` on ``sample``; changes nothing.

    Raises :class:`ValueError` if ``tensor_plan`` or ``head`` asks for what cannot be.
    """
    layout = Layout(plan)
    if plan.tensor == 1 or sample is None:
        return layout
    search = _Search(model, sample, layout)
    search.head(head)
    search.asked(tensor_plan or {})
    search.automatic()
    search.explain()
    return layout


class _Search:
    def __init__(self, model: nn.Module, sample: Sample, layout: Layout) -> None:
        self.model, self.sample, self.layout = model, sample, layout
        self.ranks = layout.plan.tensor
        self.found = [site for site in sites(model, nn.Module) if is_linear(site.module)]
        self.layers = {site.names[0]: site.module for site in self.found}
        self.known: Reference = reference(model, self.layers, sample)
        self.free = list(self.known.inputs)
        self.tied = self._tied()

    def head(self, name: str | None) -> None:
        if name is None:
            return
        if name not in self.layers:
            raise ValueError(f"Plan: head is {name!r}, expected the name of a linear layer of the model")
        if name not in self.free:
            raise ValueError(f"Plan: head is {name!r}, which the sample run does not call")
        classes = sizes(self.layers[name])[1]
        size = -(-classes // self.ranks)
        if -(-classes // size) < self.ranks:
            raise ValueError(f"Plan: head {name!r} has {classes} outputs, too few for {self.ranks} devices")
        self.layout.splits[name] = Split("column", group=-2)
        for site in sites(self.model, nn.Embedding):
            embedding = site.module
            if embedding.num_embeddings == classes and embedding.max_norm is None and not embedding.sparse:
                self.layout.splits[site.names[0]] = Split("vocabulary")
        plain = type(self.layers[name]) is nn.Linear
        for other in self.tied.get(name, ()):
            if not plain or other not in self.layout.splits:
                raise ValueError(f"Plan: head {name!r} shares its weight with {other!r}, which cannot be split with it")
        self._take(name)

    def _tied(self) -> dict[str, tuple[str, ...]]:
        """Linear layers -> other modules that have the same weight."""
        shared = shared_names(self.model)
        aliases = {site.names[0]: site.names for site in self.found}
        others = {
            name: tuple(
                owner
                for owner, _, own in (other.rpartition(".") for other in shared.get(f"{name}.weight", ()))
                if own == "weight" and owner not in aliases[name]
            )
            for name in self.layers
        }
        return {name: found for name, found in others.items() if found}

    def asked(self, tensor_plan: Mapping[Pattern, str]) -> None:
        roles: dict[nn.Module, str] = {}
        for pattern, role in tensor_plan.items():
            if role not in ROLES:
                raise ValueError(f"Plan: tensor_plan has {role!r}, expected one of {', '.join(ROLES)}")
            for module in matching(self.found, pattern, "tensor_plan"):
                roles.setdefault(module, role)
        names = {name: roles[layer] for name, layer in self.layers.items() if layer in roles}
        for name, role in names.items():
            if role != "replicate" and name not in self.free:
                raise ValueError(f"Plan: tensor_plan splits {name!r}, which the sample run does not call")
            if name in self.free:
                self._take(name)
            if role == "replicate":
                self.layout.reasons[name] = "as tensor_plan asks"
        columns = [name for name, role in names.items() if role == "column"]
        rows = [name for name, role in names.items() if role == "row"]
        if not columns and not rows:
            return
        parents = dict.fromkeys(name.rpartition(".")[0] for name in columns)
        problem = "columns and rows must be split together: no row reads as many features as a column gives"
        for candidate in variants(self.model, columns, rows, parents, self.known):
            problem = self._try(candidate)
            if not problem:
                return
        raise ValueError(f"Plan: tensor_plan does not give what the model computes: {problem}")

    def automatic(self) -> None:
        tried: set[Candidate] = set()
        for _ in range(len(self.free)):
            found = blocks(self.model, self.free)
            new = (one for block in found for one in candidates(self.model, block, self.known) if one not in tried)
            for candidate in new:
                tried.add(candidate)
                if not self._try(candidate):
                    for name in [*(name for name, _ in candidate.columns), *candidate.rows]:
                        self._take(name)
                    break
            else:
                return

    def _try(self, candidate: Candidate) -> str:
        splits = dict(candidate.columns) | {name: Split("row") for name in candidate.rows}
        for name, split in splits.items():
            why = f"it shares its weight with {self.tied[name][0]}" if name in self.tied else ""
            if why := why or why_not(self.layers[name], split, self.ranks):
                self.layout.reasons.setdefault(name, why)
                return why
        parents = {name.rpartition(".")[0] for name, _ in candidate.columns}
        for name, attribute in candidate.attributes:
            value = getattr(self.model.get_submodule(name), attribute)
            if value % self.ranks:
                why = f"{attribute} is {value}, which cannot be divided among {self.ranks}"
                if name in parents:
                    for layer in splits:
                        self.layout.reasons.setdefault(layer, why)
                return why
        try:
            verify(self.model, self.sample, candidate, self.ranks, self.known)
        except MisfitError as error:
            return str(error)
        self.layout.splits |= splits
        self.layout.attributes += candidate.attributes
        return ""

    def _take(self, name: str) -> None:
        self.free.remove(name)
        self.layout.reasons.pop(name, None)

    def explain(self) -> None:
        reasons = self.layout.reasons
        for name in self.layers:
            if name not in self.known.inputs:
                reasons[name] = "the sample run does not call it"
        for name in self.free:
            reasons[name] = reasons.get(name, _ALONE)
        for site in sites(self.model, tuple(KINDS.values())):
            if site.names[0] not in self.layers:
                reasons[site.names[0]] = f"a {type(site.module).__name__} is not split"


def split_(model: nn.Module, layout: Layout) -> None:
    """Splits the layers of ``model`` that ``layout`` names: this rank keeps its share."""
    assert layout.mesh is not None
    mesh: DeviceMesh = layout.mesh["tp"]
    tied = {name: names for name, names in shared_names(model).items() if len(names) > 1}
    names = {site.names[0]: site.names for site in sites(model, nn.Module)}
    entries: dict[int, Entry] = {}
    for name, split in layout.splits.items():
        layer = model.get_submodule(name)
        entry = entries.setdefault(split.group, Entry(mesh)) if split.how == "column" else Entry(mesh)
        entry.users += 1
        if type(layer) is nn.Embedding or (type(layer) is nn.Linear and split.parts == 1):
            _by_torch(layer, split, mesh, entry)
            replace(model, names[name], layer)  # by itself: this switches off kernels of torch that do not call it
        else:
            replace(model, names[name], SplitLinear(layer, split, mesh, entry))
    for name, attribute in layout.attributes:
        module = model.get_submodule(name)
        setattr(module, attribute, getattr(module, attribute) // mesh.size())
    for name in layout.splits:
        for own in ("weight", "bias"):
            for other in tied.get(f"{name}.{own}", ()):
                if other.rpartition(".")[0] not in names[name]:
                    tie(model, other, f"{name}.{own}")


def _by_torch(layer: nn.Module, split: Split, mesh: DeviceMesh, entry: Entry) -> None:
    style: ParallelStyle = RowwiseParallel(input_layouts=Replicate() if split.how == "vocabulary" else Shard(-1))
    if split.how == "column":
        layer.register_forward_pre_hook(entry.hook)
        style = ColwiseParallel(output_layouts=Shard(-1))
    parallelize_module(layer, mesh, style, src_data_rank=None)
