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

from potstill.distill.batch import Batch
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
        self._average = None if plan.ema is None else _averaged(distiller.student, plan.ema)
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
        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        for batch in group:
            with processes.random(self._plan.seed, number):
                losses.append(self._backward(processes.share(batch), weights, totals))
        parameters = _parameters(self.optimizer)
        processes.sum_gradients(parameters)
        terms = processes.sum(torch.stack(losses))
        found = self._update(parameters, terms, lambda index: f"step {number}: {where(index)}")
        if self._average is not None:
            self._average.update_parameters(distiller.student)
        return found

    def _backward(self, batch: Batch, weights: Sequence[float], totals: Sequence[int]) -> Tensor:
        # The mean over the rows of the group is the sum of the micro-batches' means, each times its share of rows.
        distiller = self._distiller
        shares = (count / max(total, 1) for count, total in zip(distiller.rows(batch), totals, strict=True))
        factors = [weight * share for weight, share in zip(weights, shares, strict=True)]
        if not any(factors):
            return torch.zeros(len(factors), dtype=self._dtype, device=distiller.device)
        terms = distiller.contributions(batch.to(distiller.device), factors, bf16=self._plan.precision == "bf16")
        terms.sum().backward()
        return terms.detach().to(self._dtype)

    def _update(self, parameters: list[nn.Parameter], terms: Tensor, where: Where) -> Step:
        gradients = [p.grad for p in parameters if p.grad is not None]
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        norm = torch.nn.utils.get_total_norm(dense)
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
            student = copy.deepcopy(self.model.state_dict())
            self._best = {"value": value, "epoch": epoch.epoch, "student": student}
        return epoch.epoch - int(self._best["epoch"]) >= rule.patience

    def finish(self) -> None:
        """Gives the student the weights that the run was for: of the best epoch, or the averaged ones."""
        if self._best["student"] is not None:
            self._distiller.student.load_state_dict(self._best["student"])
        elif self._average is not None:
            self._distiller.student.load_state_dict(self._average.module.state_dict())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the models and the optimiser; nothing of the teacher."""
        return {
            "student": self._distiller.student.state_dict(),
            "strategies": self._distiller.strategies.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "best": self._best,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave to a checkpoint."""
        self._distiller.student.load_state_dict(saved["student"])
        self._distiller.strategies.load_state_dict(saved["strategies"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        if self._average is not None:
            self._average.load_state_dict(saved["average"])
        self._best = saved["best"]

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


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
