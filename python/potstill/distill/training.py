"""Optimiser steps: what changes the student."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from potstill.distill.batch import Batch, mapped, rows_of
from potstill.distill.history import Epoch
from potstill.distill.plan import TrainingPlan
from potstill.distill.processes import Processes

if TYPE_CHECKING:
    from potstill.distill.distiller import Distiller

Where = Callable[[int | None], str]


class Step(NamedTuple):
    """What an optimiser step leaves for the record: the loss, and what each strategy contributed to it."""

    loss: float
    terms: list[float]


class Training:
    """The optimiser, schedule, averaged weights and best epoch of one run; with the student, all that a run changes."""

    def __init__(self, distiller: Distiller, plan: TrainingPlan, steps: int | None, processes: Processes) -> None:
        self._distiller = distiller
        self._plan = plan
        self._processes = processes
        self.optimizer = plan.make_optimizer(distiller.parameters())
        self._check_optimizer()
        self.scheduler = plan.make_scheduler(self.optimizer, steps)
        self._average = None if plan.ema is None else self._averaged(plan.ema)
        self._dtype = torch.float32 if distiller.device.type == "mps" else torch.float64  # of the losses' sums
        self._best: dict[str, Any] = {"value": None, "epoch": 0, "student": None}
        self.settings = {
            "device": distiller.device.type,
            **plan.settings(steps),
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
            **distiller.settings(),
            **_group_settings(self.optimizer),
        }

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def model(self) -> nn.Module:
        """The student to validate: that of the averaged weights where there is one."""
        return self._distiller.student if self._average is None else self._average.module

    def step(self, group: Sequence[Batch], number: int, where: Where) -> Step | None:
        """Takes optimiser step ``number`` on a group of micro-batches; None, and no step, if no row of theirs counts.

        ``where`` says, for an error, where the group lies, or its micro-batch of that index.
        """
        distiller, processes = self._distiller, self._processes
        totals = [sum(counts) for counts in zip(*map(distiller.rows, group), strict=True)]
        if not any(totals):
            return None
        weights = distiller.weights(number)
        if not any(weight and total for weight, total in zip(weights, totals, strict=True)):
            return None
        self._begin()
        losses: list[Tensor] = []
        for batch in group:
            with processes.random(self._plan.seed, number):
                losses.append(self._backward(batch, weights, totals))
        parameters = _parameters(self.optimizer)
        self._sum_gradients(parameters)
        terms = processes.sum(torch.stack(losses))
        found = self._update(parameters, terms, lambda index: f"step {number}: {where(index)}")
        if self._average is not None:
            self._average.update_parameters(distiller.student)
        return found

    def _backward(self, batch: Batch, weights: Sequence[float], totals: Sequence[int]) -> Tensor:
        # The mean over the rows of the group is the sum of the micro-batches' means, each times its share of rows.
        distiller = self._distiller
        mine = self._processes.share(batch)
        shares = (count / max(total, 1) for count, total in zip(distiller.rows(mine), totals, strict=True))
        factors = [weight * share for weight, share in zip(weights, shares, strict=True)]
        if distiller.rows_alike is not None:
            return self._backward_together(batch, factors)
        if not any(factors):
            return torch.zeros(len(factors), dtype=self._dtype, device=distiller.device)
        terms = distiller.contributions(mine.to(distiller.device), factors, bf16=self._plan.precision == "bf16")
        terms.sum().backward()
        return terms.detach().to(self._dtype)

    def _backward_together(self, batch: Batch, factors: Sequence[float]) -> Tensor:
        """The same where processes share a model: all run it, forward and backward, also those whose rows do not count.

        The gradient of the student's output is 0 there, so that the same parameters have one everywhere.
        """
        distiller = self._distiller
        (shown, own), gain = self._processes.shown(batch), self._gain
        shown = shown.to(distiller.device)
        mine = mapped(shown, lambda x: rows_of(x, len(shown.target), own))
        outputs = distiller.outputs(mine, bf16=self._plan.precision == "bf16", shown=(shown, own))
        terms = distiller.terms(outputs, [gain * factor for factor in factors])
        reached = [x for x in tree_leaves(getattr(outputs.student, "logits", outputs.student)) if _trained(x)]
        ends = [x for x in (terms.sum(), *reached) if x.requires_grad]
        if ends:
            own_terms = [None] if terms.requires_grad else []
            torch.autograd.backward(ends, [*own_terms, *map(torch.zeros_like, reached)])
        return terms.detach().to(self._dtype) / gain

    @property
    def _gain(self) -> int:
        """By what the loss is multiplied, since a spread student's gradients are averaged over its replicas."""
        return 1 if self._distiller.spread is None else self._processes.replicas

    def _begin(self) -> None:
        self.optimizer.zero_grad()
        if self._distiller.spread is not None:
            self._distiller.spread.begin()

    def _sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        spread = self._distiller.spread
        if spread is not None:
            spread.collect()
        self._processes.sum_gradients(self._not_spread(parameters), 1.0 / self._gain)

    def _not_spread(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        spread = self._distiller.spread
        held = set() if spread is None else set(map(id, spread.parameters))
        return [parameter for parameter in parameters if id(parameter) not in held]

    def _norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Of the whole gradient."""
        spread = self._distiller.spread
        gradients = [p.grad for p in self._not_spread(parameters) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
        if spread is None:
            return norm
        return (self._processes.total(spread.square()) + norm.double().square()).sqrt()

    def _update(self, parameters: list[nn.Parameter], terms: Tensor, where: Where) -> Step:
        norm = self._norm(parameters)
        *contributions, size = torch.cat((terms.sum(0), norm.to(terms).reshape(1))).tolist()
        loss = math.fsum(contributions) if all(map(math.isfinite, contributions)) else math.nan
        if not math.isfinite(loss) or not math.isfinite(size):
            bad = (~terms.isfinite().all(1)).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"Distiller.fit: {where(bad[0] if bad else None)}: the loss is {loss:g} ({self._named(contributions)}) "
                f"and the norm of its gradient {size:g}. The parameters are still those of the step before; lower lr, "
                "set clip_grad_norm, or look for NaN or infinity in the inputs and in the teacher's logits"
            )
        if self._plan.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._plan.clip_grad_norm, norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return Step(loss, contributions)

    def _named(self, contributions: Sequence[float]) -> str:
        return ", ".join(f"{n} {v:g}" for n, v in zip(self._distiller.names, contributions, strict=True))

    def judge(self, epoch: Epoch) -> bool:
        """Keeps the weights of the best epoch; whether the run should stop now."""
        rule = self._plan.early_stopping
        if rule is None:
            return False
        if rule.metric not in epoch.validation:
            raise ValueError(
                f"EarlyStopping: metric is {rule.metric!r}, but validate returned "
                f"{', '.join(epoch.validation) or 'nothing'}; name one of these"
            )
        value = epoch.validation[rule.metric]
        if rule.better(value, self._best["value"]):
            spread = self._distiller.spread
            student = copy.deepcopy(self.model.state_dict()) if spread is None else spread.state()
            self._best = {"value": value, "epoch": epoch.epoch, "student": student}
        return epoch.epoch - int(self._best["epoch"]) >= rule.patience

    def finish(self) -> None:
        """Gives the student the weights that the run was for: of the best epoch, or the averaged ones."""
        if self._best["student"] is not None:
            self._load_student(self._best["student"])
        elif self._average is not None:
            self._distiller.student.load_state_dict(self._average.module.state_dict())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the models and the optimiser; nothing of the teacher.

        Of a spread student all processes must call it; it is the same under any plan.
        """
        spread, optimizer = self._distiller.spread, self.optimizer
        return {
            "student": self._distiller.student.state_dict() if spread is None else spread.state(),
            "strategies": self._distiller.strategies.state_dict(),
            "optimizer": optimizer.state_dict() if spread is None else spread.optimizer_state(optimizer),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "best": self._best,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave to a checkpoint."""
        if self._distiller.spread is None:
            self.optimizer.load_state_dict(saved["optimizer"])
        else:
            self._distiller.spread.load_optimizer(self.optimizer, saved["optimizer"], saved["student"])
        self._load_student(saved["student"])
        self._distiller.strategies.load_state_dict(saved["strategies"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        if self._average is not None:
            self._average.load_state_dict(saved["average"])
        self._best = saved["best"]

    def _load_student(self, whole: Mapping[str, Tensor]) -> None:
        if self._distiller.spread is None:
            self._distiller.student.load_state_dict(whole)
        else:
            self._distiller.spread.load(whole)

    def _averaged(self, decay: float) -> AveragedModel:
        if self._distiller.spread is not None:
            raise ValueError(
                f"TrainingPlan: ema is {decay}, a copy of the whole student, but {self._distiller.spread.plan} leaves "
                "each process a part of it; set ema=None, or spread the student by data alone"
            )
        return _averaged(self._distiller.student, decay)

    def _check_optimizer(self) -> None:
        distiller = self._distiller
        held = {id(p) for p in _parameters(self.optimizer)}
        teacher = distiller.teacher.named_parameters() if distiller.teacher is not None else ()
        taught = [name for name, p in teacher if id(p) in held]
        if taught:
            raise ValueError(
                f"Distiller: the optimiser holds {taught[0]}, a parameter of the teacher ({len(taught)} in all); the "
                "teacher is not trained: give the student its own copy"
            )
        if held.isdisjoint(map(id, distiller.parameters())):
            raise ValueError(
                "Distiller: the optimiser holds no parameter of the student; make it from the list it is called with"
            )
        named = distiller.strategies.named_parameters()
        left = [name for name, p in named if p.requires_grad and id(p) not in held]
        if left:
            raise ValueError(
                f"Distiller: the optimiser does not hold the strategies' parameters {', '.join(left)}; make it from "
                "the whole list it is called with, as in optimizer=lambda parameters: torch.optim.AdamW(parameters)"
            )


def _averaged(student: nn.Module, decay: float) -> AveragedModel:
    def average(means: Any, values: Any, count: Any) -> None:
        # Early on a mean that remembers 1/(1 - decay) steps would be mostly the first weights.
        kept = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        if means[0].is_floating_point():
            torch._foreach_lerp_(means, values, 1.0 - kept)
        else:
            torch._foreach_copy_(means, values)

    return AveragedModel(student, multi_avg_fn=average, use_buffers=True)


def _group_settings(optimizer: Optimizer) -> dict[str, object]:
    return {
        f"optimizer.{key}[{index}]": len(value) if key == "params" else repr(value)
        for index, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
    }


def _trained(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
