"""A model whose consecutive parts lie on consecutive ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from potstill.parallel.faults import named
from potstill.parallel.micro import Job, Kind, Loss, Runner, split
from potstill.parallel.parts import Part, Stages, held
from potstill.parallel.shards import gather
from potstill.transform.observe import Sample, evaluating

_NEXT = "The ranks cannot go on; start all again, from the last checkpoint"

SCHEDULES = ("gpipe", "1f1b", "interleaved")
"""In which order the micro-batches go through the stages."""


class Pipeline:
    """A model cut into ``stages``, of which this rank holds one (or, interleaved, every n-th of them).

    - ``model``: the whole model, the same on every rank; it stays as it is, and shares its parameters with this. Delete
      it to free the parts that lie elsewhere.
    - ``stages``: the names of each stage's modules, from :func:`potstill.parallel.stages.stages`; as many as there are
      ranks, or a multiple of that for the interleaved schedule.
    - ``group``: the ranks in the order of their stages: a process group, a mesh of one dimension, or None for all.
    - ``schedule``: ``"gpipe"`` (all micro-batches forward, then all backward), ``"1f1b"`` (a rank begins with backward
      as soon as it can and holds activations of at most as many micro-batches as there are ranks) or ``"interleaved"``
      (1F1B with several stages per rank: shorter waits, more messages). See :mod:`torch.distributed.pipelining`.
    - ``micro_batches``: into how many equal parts the rows of a batch are split.

    ``module`` is this rank's part: its parameters have the names that they have in ``model``, so the ranks'
    ``state_dict()`` together are that of the model. Parameters of modules that no stage names, and tied ones, are on
    several ranks, which add up their gradients. Put ``module`` into training or evaluation mode as any other, and
    convert layers before.

    Raises :class:`ValueError` on every rank if the arguments do not fit each other.

    >>> from potstill.parallel.stages import stages
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model, x, y = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(6, 4), torch.arange(6) % 3
    >>> pipeline = Pipeline(model, stages(model, 1, x), micro_batches=2)
    >>> loss = pipeline.step(x, y, nn.functional.cross_entropy)
    >>> abs(loss - nn.functional.cross_entropy(model(x), y).item()) < 1e-6, model[0].weight.grad.shape
    (True, torch.Size([8, 4]))
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Stages,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        schedule: str = "1f1b",
        micro_batches: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._group = group.get_group() if isinstance(group, DeviceMesh) else group
        self.rank, self.ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.stages = tuple(tuple(names) for names in stages)
        self.schedule, self.micro_batches, self.device = schedule, micro_batches, torch.device(device)
        self._agree_on(_problem(model, self.stages, self.ranks, schedule, micro_batches))
        self.module = held(model, self.stages, range(self.rank, len(self.stages), self.ranks)).to(self.device)
        self._shared = [(p, ranks) for p, ranks in _holders(model, self.stages, self.ranks) if self.rank in ranks]
        self._job = Job()
        self._runners = {}
        for index in range(self.rank, len(self.stages), self.ranks):
            part = Part(model, self.stages, index, self.module)
            self._runners[index] = Runner(part, self._job, self.device, index == len(self.stages) - 1)
        self._schedules: dict[bool, tuple[object, Any]] = {}

    def step(self, inputs: Sample, target: Any, loss: Loss) -> float:
        """Adds the gradients of the mean loss of a batch to ``.grad`` of the parameters; returns it, on every rank.

        - ``inputs``: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments;
          ``target``: any nested tuples, lists and dictionaries of tensors. Both are the whole batch's, on every rank.
          Tensors with as many rows as the first tensor of ``inputs`` are split; anything else goes to every
          micro-batch as it is. So several targets (labels, a teacher's top k) are a tuple, and row numbers are one of
          them for what ``loss`` looks up elsewhere.
        - ``loss(output, target)``: a scalar, the mean over the rows of a micro-batch; called on the last rank only. If
          rows count differently (ignored labels), divide by the number that all of the batch has, and multiply by
          ``micro_batches``: the result is the mean of the micro-batches' losses.

        Raises :class:`ValueError` for a number of rows that ``micro_batches`` does not divide. What the model or the
        loss raises is raised on its rank after the step, and :class:`RuntimeError` on the others; gradients then mean
        nothing.
        """
        earlier = [parameter.grad for parameter, _ in self._shared]
        for parameter, _ in self._shared:
            parameter.grad = None
        self._begin(inputs, target, loss)
        self._run(training=True)
        found = self._agree()
        for (parameter, ranks), before in zip(self._shared, earlier, strict=True):
            parameter.grad = self._added_up(parameter, ranks)
            if before is not None:
                parameter.grad += before
        return found

    def __call__(self, inputs: Sample, *, everywhere: bool = False) -> Any:
        """The model's output for ``inputs`` on the last rank, None on the others, or the output ``everywhere``.

        Runs under ``torch.inference_mode``, in the mode that ``module`` is in. The rows of the micro-batches' tensors
        are put together again; anything else in the output may only be None.
        """
        with torch.inference_mode():
            self._begin(inputs, None, None)
            self._run(training=False)
            output = self._job.output()
            self._agree()
            return self._from_last(output) if everywhere else output

    def _begin(self, inputs: Sample, target: Any, loss: Loss | None) -> None:
        if not isinstance(inputs, Tensor | tuple | Mapping):
            raise TypeError(
                f"Pipeline: inputs is a {type(inputs).__name__}; expected a tensor, a tuple of positional arguments or "
                "a mapping of keyword arguments"
            )
        plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
        rows = next((len(x) for x in tree_leaves(plain) if isinstance(x, Tensor) and x.dim()), 0)
        if not rows or rows % self.micro_batches:
            raise ValueError(
                f"Pipeline: the batch has {rows} rows, which {self.micro_batches} micro-batches cannot share equally; "
                "use batches whose rows they divide (drop_last=True in a DataLoader) or another micro_batches"
            )
        inputs_of, targets = (split(values, rows, self.micro_batches, self.device) for values in (plain, target))
        self._job.begin(inputs_of, targets, loss)

    def _run(self, *, training: bool) -> None:
        first = self._job.inputs[0]
        signature = tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, Tensor) else type(x), first)
        made, schedule = self._schedules.get(training, (None, None))
        if made != signature:
            schedule = self._make_schedule(training)
            self._schedules[training] = signature, schedule
        index = torch.arange(self.micro_batches)
        with named(lambda: "Pipeline", _NEXT, group=self._group, mixed=True):
            if training:
                schedule.step(index=index, target=index, return_outputs=False)
            else:
                schedule.eval(index=index, return_outputs=False)

    def _make_schedule(self, training: bool) -> Any:
        from torch.distributed import pipelining  # here: it takes a second, and torch's compiler with it

        # With the sizes of all hidden states, lest torch finds them by running the model on uninitialised memory: batch
        # normalisation would remember that.
        kinds = self._kinds(training)
        stages: list[Any] = [
            pipelining.PipelineStage(
                runner,
                index,
                len(self.stages),
                self.device,
                input_args=tuple(kind.zeros("meta") for kind in kinds[index : index + 1] if kind is not None),
                output_args=(runner.kind.zeros("meta"),),
                group=self._group,
            )
            for index, runner in self._runners.items()
        ]
        loss = (lambda output, _: output) if training else None
        if self.schedule == "interleaved":
            return pipelining.ScheduleInterleaved1F1B(stages, self.micro_batches, loss, scale_grads=False)
        kind = pipelining.Schedule1F1B if training and self.schedule == "1f1b" else pipelining.ScheduleGPipe
        return kind(stages[0], self.micro_batches, loss, scale_grads=False)

    def _kinds(self, training: bool) -> list[Kind | None]:
        """What each stage receives: found by running them on one micro-batch, one after the other."""
        kinds: list[Kind | None] = [None]
        for index in range(len(self.stages)):
            answer: list[Any] = [None]
            if index in self._runners:
                with evaluating(self.module), torch.set_grad_enabled(training), self._random_kept():
                    try:
                        answer = [self._runners[index].find_kind(kinds[-1])]
                    except Exception as error:  # the other ranks wait for an answer, whatever has gone wrong
                        self._broadcast([f"{type(error).__name__}: {error}"], index % self.ranks)
                        raise
            self._broadcast(answer, index % self.ranks)
            if isinstance(answer[0], str):
                raise RuntimeError(f"Pipeline: stage {index} fails on the first micro-batch: {answer[0]}")
            kinds.append(answer[0])
        return kinds

    def _random_kept(self) -> AbstractContextManager[None]:
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def _agree(self) -> float:
        """The loss; raises on all ranks if one has failed."""
        job = self._job
        mine = torch.tensor([job.failed, job.mean_loss()], dtype=torch.float64, device=self.device)
        ranks = gather(mine, self._group).tolist()
        if job.problem is not None:
            raise job.problem
        for rank, (failed, _) in enumerate(ranks):
            if failed:
                raise RuntimeError(
                    f"Pipeline: rank {rank} of {self.ranks} failed in micro-batch {int(failed)} of "
                    f"{self.micro_batches}; its own error says why"
                )
        return float(ranks[-1][1])

    def _agree_on(self, problem: str | None) -> None:
        mine = (problem, self.stages, self.schedule, self.micro_batches)
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine, self._group)
        for rank, (found, *settings) in enumerate(everyone):
            if found is not None:
                raise ValueError(found if rank == self.rank else f"Pipeline: rank {rank} of {self.ranks}: {found}")
            if settings != list(mine[1:]):
                raise ValueError(
                    f"Pipeline: rank {rank} has stages, schedule, micro_batches = {settings}, but rank {self.rank} "
                    f"{list(mine[1:])}; all ranks must be given the same"
                )

    def _added_up(self, parameter: nn.Parameter, ranks: Sequence[int]) -> Tensor:
        """The sum of the gradients on these ranks, in their order, so that it is the same bits on all."""
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        found = {rank: own if rank == self.rank else torch.empty_like(own) for rank in ranks}
        others = [rank for rank in ranks if rank != self.rank]
        operations = [dist.P2POp(dist.isend, own, group=self._group, group_peer=rank) for rank in others]
        operations += [dist.P2POp(dist.irecv, found[rank], group=self._group, group_peer=rank) for rank in others]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return torch.stack(list(found.values())).sum(0)

    def _from_last(self, output: Any) -> Any:
        leaves, structure = tree_flatten(output)
        kinds = [Kind.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        message = [tree_unflatten(kinds, structure)]
        self._broadcast(message, self.ranks - 1)
        kinds, structure = tree_flatten(message[0])
        tensors = iter([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        for place, kind in enumerate(kinds):
            if isinstance(kind, Kind):
                mine = self.rank == self.ranks - 1
                kinds[place] = next(tensors).contiguous() if mine else kind.zeros(self.device)
                dist.broadcast(kinds[place], group=self._group, group_src=self.ranks - 1)
        return tree_unflatten(kinds, structure)

    def _broadcast(self, message: list[Any], rank: int) -> None:
        dist.broadcast_object_list(message, group=self._group, group_src=rank)


def _problem(model: nn.Module, stages: Stages, ranks: int, schedule: str, micro_batches: int) -> str | None:
    """Why these arguments do not go together."""
    count = len(stages)
    names = [name for stage in stages for name in stage]
    known = dict(model.named_modules())
    unknown = [name for name in names if not name or name not in known]
    inside = [a for a in names for b in names if a.startswith(f"{b}.")]
    if schedule not in SCHEDULES:
        return f"Pipeline: schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}"
    if unknown or inside or len(set(names)) < len(names) or not all(stages):
        odd = [*unknown, *inside, *(name for name in names if names.count(name) > 1), "an empty stage"][0]
        return f"Pipeline: stages has {odd!r}; each stage names modules of the model, each once and none inside another"
    if count % ranks or not count or (schedule != "interleaved" and count != ranks):
        wanted = f"{ranks}" if schedule != "interleaved" else f"a multiple of {ranks}"
        return f"Pipeline: there are {count} stages for {ranks} ranks; the schedule {schedule} needs {wanted}"
    if micro_batches < 1 or (schedule == "1f1b" and micro_batches < count):
        least = count if schedule == "1f1b" else 1
        return f"Pipeline: micro_batches is {micro_batches}; the schedule {schedule} needs at least {least}"
    if schedule == "interleaved" and micro_batches % max(1, micro_batches // ranks):
        return f"Pipeline: micro_batches is {micro_batches}; the schedule interleaved needs a multiple of {ranks}"
    return None


def _holders(model: nn.Module, stages: Stages, ranks: int) -> list[tuple[nn.Parameter, list[int]]]:
    """The trained parameters that are on several ranks, and these ranks."""
    owners = {model.get_submodule(name): number % ranks for number, stage in enumerate(stages) for name in stage}
    found: dict[nn.Parameter, set[int]] = {}

    def visit(module: nn.Module, where: set[int]) -> None:
        where = {owners[module]} if module in owners else where
        for parameter in module.parameters(recurse=False):
            found.setdefault(parameter, set()).update(where)
        for child in module.children():
            visit(child, where)

    visit(model, set(range(ranks)))
    return [(parameter, sorted(on)) for parameter, on in found.items() if len(on) > 1 and parameter.requires_grad]
