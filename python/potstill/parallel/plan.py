"""How a model is spread over devices: a plan that is a few numbers, and what it does to a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_map

from potstill.parallel import describe, estimate, gradients, mesh, state, tensor
from potstill.parallel.data import ReplicatedPipeline, check_positions, spread
from potstill.parallel.layout import layout_of
from potstill.parallel.parts import Stages
from potstill.parallel.pipeline import SCHEDULES, Pipeline
from potstill.parallel.stages import stages as cut
from potstill.transform.observe import Sample
from potstill.transform.swap import Pattern

_SHORT = {"dp": "data", "tp": "tensor", "pp": "pipeline", "sp": "sequence", "micro": "micro_batches"}
_SHOWN = 12  # layouts that an error lists

_T = TypeVar("_T")


@dataclass(frozen=True)
class Plan:
    """How many devices do what; the sizes multiply to the number of processes.

    - ``data``: replicas of the model, each with its share of the rows of a batch; their gradients are averaged.
    - ``tensor``: devices that share each layer, whose outputs (column) or inputs (row) are divided between them.
    - ``pipeline``: stages of consecutive layers, through which ``micro_batches`` flow in the order of ``schedule``.
    - ``shard``: the replicas keep only a share of the parameters, gradients and optimiser's state each, and gather
      a block's weights while it computes (FSDP); quantised weights are gathered as integers.
    - ``sequence``: devices that share the positions of a sequence in contiguous pieces, for models that treat each
      position by itself.

    Raises :class:`ValueError` for sizes that are no positive integers, and for an unknown schedule.

    >>> plan = Plan(data=2, tensor=2, shard=True)
    >>> str(plan), plan.devices, Plan.parse("dp=2,tp=2,shard") == plan
    ('dp=2,tp=2,shard', 4, True)
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    shard: bool = False
    sequence: int = 1
    micro_batches: int | None = None
    schedule: str = "1f1b"

    def __post_init__(self) -> None:
        for name in _SHORT.values():
            value = getattr(self, name)
            if not (value is None and name == "micro_batches") and (type(value) is not int or value < 1):
                raise ValueError(f"Plan: {name} is {value!r}, expected a positive integer")
        if type(self.shard) is not bool:
            raise ValueError(f"Plan: shard is {self.shard!r}, expected True or False")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Plan: schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that ``text`` names, such as ``"dp=2,tp=2,pp=2,shard"``; undone by ``str``.

        Keys are dp, tp, pp, sp (``sequence``), micro (``micro_batches``) and schedule. Raises :class:`ValueError` for
        anything else.

        >>> Plan.parse("dp=4, pp=2, micro=8, schedule=gpipe")
        Plan(data=4, tensor=1, pipeline=2, shard=False, sequence=1, micro_batches=8, schedule='gpipe')
        """
        found: dict[str, Any] = {}
        for item in (part.strip() for part in text.split(",")):
            key, equals, value = (part.strip() for part in item.partition("="))
            name = "shard" if item == "shard" else "schedule" if key == "schedule" else _SHORT.get(key)
            if name is None or bool(equals) == (name == "shard") or name in found:
                raise ValueError(
                    f"Plan: {item!r} in {text!r} is not understood; expected items such as dp=2, tp=2, pp=2, sp=2, "
                    "micro=4, schedule=1f1b and shard, each at most once, with commas between them"
                )
            if name in ("shard", "schedule"):
                found[name] = value if value else True
            elif value.isdecimal():
                found[name] = int(value)
            else:
                raise ValueError(f"Plan: {key} is {value!r} in {text!r}, expected a positive integer")
        return cls(**found)

    def __str__(self) -> str:
        default = {field.name: field.default for field in fields(self)}
        given = [f"{key}={getattr(self, name)}" for key, name in _SHORT.items() if getattr(self, name) != default[name]]
        given += ["shard"] if self.shard else []
        given += [f"schedule={self.schedule}"] if self.schedule != default["schedule"] else []
        return ",".join(given) or "dp=1"

    @property
    def devices(self) -> int:
        """How many there must be."""
        return self.data * self.tensor * self.pipeline * self.sequence

    @property
    def stages_each(self) -> int:
        """Stages of a rank: two where they are interleaved."""
        return 2 if self.schedule == "interleaved" else 1

    def check(self, world: int) -> None:
        """Raises :class:`ValueError`, which lists what fits, if the plan does not need exactly ``world`` devices.

        >>> Plan(data=3).check(4)
        Traceback (most recent call last):
        ...
        ValueError: Plan: dp=3 needs 3 devices but there are 4; with 4 fit: dp=4; dp=2,tp=2; dp=2,pp=2; tp=4; \
tp=2,pp=2; pp=4
        """
        if self.devices == world:
            return
        fitting = sorted(layouts(world, self.sequence), key=self._distance)
        names = [_sizes(*sizes, self.sequence) for sizes in fitting[:_SHOWN]]
        more = [f"and {len(fitting) - _SHOWN} more"] if len(fitting) > _SHOWN else []
        nothing = f"nothing: it is no multiple of sequence={self.sequence}"
        raise ValueError(
            f"Plan: {self} needs {self.devices} devices but there are {world}; with {world} fit: "
            + ("; ".join(names + more) or nothing)
        )

    def _distance(self, sizes: tuple[int, int, int]) -> float:
        wanted = (self.data, self.tensor, self.pipeline)
        return sum(abs(math.log(size / want)) for size, want in zip(sizes, wanted, strict=True))

    def apply(
        self,
        model: nn.Module,
        sample_input: Sample | None = None,
        *,
        device: torch.device | str = "cpu",
        tensor_plan: Mapping[Pattern, str] | None = None,
        head: str | None = None,
    ) -> Any:
        """Spreads ``model`` over the ranks of torch's default process group; returns this rank's part.

        ``model`` must be the same on all ranks, weights included, and is changed in place. ``sample_input`` is a few
        rows of what it is called with: a tensor, a tuple of positional or a mapping of keyword arguments; without it
        there can only be replicas. The result is called as the model is, with the rows of this rank (see
        :meth:`share`), and the gradients of a loss that is a mean over them become those of the mean over all replicas.
        Of a plan with a pipeline it is a :class:`Pipeline`, whose ``step`` does all that.

        ``tensor_plan`` names layers, by wildcards or types, that are to be split as "column" or "row", or kept whole
        ("replicate"); all others are chosen by what a run on the sample shows. ``head`` names the last layer of a
        language model, which then returns this rank's columns of the logits (see :class:`VocabShards`); embeddings
        with as many rows are split too.

        Raises :class:`ValueError` if the plan or ``tensor_plan`` does not fit, and :class:`RuntimeError` without a
        process group, if the model differs between the ranks, or if another rank raised.
        """
        place = torch.device(device)
        built = mesh.build(self, place)
        mesh.together(lambda: self._check_sample(sample_input))
        mesh.check_alike("model", state.fingerprint(model))
        if self.sequence > 1 and sample_input is not None:
            mesh.together(partial(check_positions, model, sample_input, self.sequence))
        layout = mesh.together(lambda: tensor.find(model, sample_input, self, tensor_plan, head))
        layout.mesh = built
        mesh.check_alike("choice of split layers", repr((layout.splits, layout.attributes)))
        if self.pipeline > 1 and sample_input is not None:
            layout.stages = cut(model, self.pipeline * self.stages_each, sample_input)
        if self.tensor > 1:
            tensor.split_(model, layout)
        result = self._spread(model, layout.stages, built, place)
        layout.copies = gradients.copies(_part(result), built)
        return layout.attach(result)

    def _spread(self, model: nn.Module, stages: Stages, built: DeviceMesh, place: torch.device) -> Any:
        if stages:
            return self._pipeline(model, stages, built, place)
        model.to(place)
        if self.data * self.sequence > 1:
            spread(model, built["dp"], self.shard)
        return model

    def _pipeline(self, model: nn.Module, stages: Stages, built: DeviceMesh, place: torch.device) -> Pipeline:
        micro = self.micro_batches or self.pipeline
        options: dict[str, Any] = {"schedule": self.schedule, "micro_batches": micro, "device": place}
        if self.data * self.sequence == 1:
            return Pipeline(model, stages, built["pp"], **options)
        return ReplicatedPipeline(model, stages, built["pp"], **options, replicas=built["dp"], shard=self.shard)

    def _check_sample(self, sample: Sample | None) -> None:
        if sample is None and max(self.tensor, self.pipeline, self.sequence) > 1:
            raise ValueError(f"Plan: {self} needs sample_input, on which it runs the model to see how it may be cut")

    def describe(self, model: nn.Module | Pipeline) -> str:
        """A table of where each layer of ``model``, which :meth:`apply` returned, lies, and why some are whole.

        Of a pipeline it has the layers of this rank, and below them which modules each stage has.
        """
        return describe.table(_part(model), layout_of(model))

    def share(self, batch: _T) -> _T:
        """This rank's part of a batch: of each tensor in it the rows, and with ``sequence`` the positions.

        ``batch`` is a tensor [rows, ...] or tuples, lists and mappings of them; with ``sequence`` dimension 1 is
        positions in tensors that have it. Raises :class:`ValueError` if the numbers cannot be divided evenly: the mean
        over the replicas would not be that of the batch.

        >>> Plan().share({"x": torch.zeros(4, 2)})["x"].shape
        torch.Size([4, 2])
        """
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        mine = mesh.place(self, rank)
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        for dim, parts, what in ((0, self.data, "rows"), (1, self.sequence, "positions")):
            for x in tensors:
                if x.dim() > dim and x.shape[dim] % parts:
                    raise ValueError(
                        f"Plan: {x.shape[dim]} {what} cannot be divided among {parts} of {self}; give a multiple"
                    )

        def own(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() == 0:
                return x
            x = x.chunk(self.data)[mine.rows] if self.data > 1 else x
            return x.chunk(self.sequence, 1)[mine.positions] if self.sequence > 1 and x.dim() > 1 else x

        shared: _T = tree_map(own, batch)
        return shared

    def clip_grad_norm_(self, model: nn.Module | Pipeline, max_norm: float) -> Tensor:
        """:func:`torch.nn.utils.clip_grad_norm_` for the 2-norm of all of the model's gradients; returns that norm.

        All ranks must call it, after backward; torch's own function does not know which ranks share a parameter.
        """
        return gradients.clip(_part(model), layout_of(model).copies, max_norm)

    def full_state_dict(self, model: nn.Module | Pipeline, *, rank0_only: bool = False) -> dict[str, Tensor]:
        """The state of the whole model under its own names, on the CPU, as if nothing had been split.

        All ranks must call it; with ``rank0_only`` the others get an empty one. It can be loaded by the unsplit model,
        or by :meth:`load_full_state_dict` under any other plan.
        """
        found = state.full(_part(model))
        if self.pipeline > 1:
            found = state.of_all_stages(found, _mesh_of(model)["pp"])
        return {} if rank0_only and dist.get_rank() else found

    def load_full_state_dict(self, model: nn.Module | Pipeline, whole: Mapping[str, Tensor]) -> None:
        """Gives ``model`` its part of a whole state, the same on every rank, which all must call.

        Raises :class:`ValueError` for names or shapes that are not the model's.
        """
        unused = mesh.together(lambda: state.load(_part(model), whole))
        if self.pipeline > 1:
            unused = state.unused_by_all(unused, _mesh_of(model)["pp"])
        if unused:
            raise ValueError(f"Plan: the model lacks {sorted(unused)[0]!r}, which the state has")

    @classmethod
    def auto(
        cls,
        model: nn.Module,
        memory_per_device: int,
        world: int,
        batch: int,
        sample_input: Sample,
        *,
        optimizer_bytes: int = 8,
    ) -> Plan:
        """The plan for ``world`` devices that fits in their memory and sends least; prints the table it chose from.

        ``batch`` is the rows of a whole batch, of which ``sample_input`` has a few; ``memory_per_device`` is in bytes;
        ``optimizer_bytes`` is the optimiser's state per trainable parameter, 8 for Adam in float32. Nothing is sent and
        nothing is changed. See :func:`estimate.estimates` for what is counted. Plans without a pipeline come first,
        since its stages wait for each other.

        Raises :class:`ValueError` with the table if nothing fits.
        """
        rows = estimate.estimates(model, world, batch, sample_input, optimizer_bytes)
        text = estimate.table(rows, memory_per_device)
        fitting = [row for row in rows if row.memory <= memory_per_device]
        if not fitting:
            raise ValueError(
                f"Plan.auto: nothing fits in {memory_per_device} bytes on each of {world} devices; use more devices, "
                f"a smaller batch or int8 weights\n{text}"
            )
        print(text)
        best = min(fitting, key=lambda row: (row.idle, row.sent))
        return best.plan


def layouts(world: int, sequence: int = 1) -> Iterator[tuple[int, int, int]]:
    """All sizes (data, tensor, pipeline) that with ``sequence`` multiply to ``world``.

    >>> list(layouts(2))
    [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
    """
    devices, rest = divmod(world, sequence)
    if rest:
        return
    for data in range(devices, 0, -1):
        for tensors in range(devices // data if devices % data == 0 else 0, 0, -1):
            if devices // data % tensors == 0:
                yield data, tensors, devices // data // tensors


def _sizes(data: int, tensor: int, pipeline: int, sequence: int) -> str:
    return str(Plan(data, tensor, pipeline, sequence=sequence))


def _part(model: nn.Module | Pipeline) -> nn.Module:
    return model.module if isinstance(model, Pipeline) else model


def _mesh_of(model: nn.Module | Pipeline) -> DeviceMesh:
    found = layout_of(model).mesh
    assert found is not None  # apply sets it
    return found
