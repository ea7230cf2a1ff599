"""Runs a recipe on the processes that there are, and writes what comes of it into a folder."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from potstill.checkpoint import save
from potstill.distill import Distiller, History, Recipe, TrainingPlan
from potstill.parallel import Plan
from potstill.report.machine import machine
from potstill.report.training import page

CHECKPOINT, STUDENT, RESULTS, REPORT = "checkpoint.pt", "student.safetensors", "results.json", "report.html"
"""The files in the folder."""


def launch(
    where: str,
    folder: Path,
    parallel: Plan | None = None,
    teacher_parallel: Plan | None = None,
    *,
    steps: int | None = None,
    resume: bool = True,
) -> dict[str, Any] | None:
    """Trains the student of the recipe ``where`` (see :meth:`Recipe.read`); returns what it wrote to ``results.json``.

    Every process that ``torchrun`` has started calls it; all but the first get None. Random numbers that the recipe
    draws are the same on all, and in every call.

    Raises :class:`ValueError`, before anything is loaded, if a plan does not fit the number of processes.
    """
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    for layout in (parallel, teacher_parallel):
        if layout is not None:
            layout.check(world)
    torch.manual_seed(0)
    recipe = Recipe.read(where)
    folder.mkdir(parents=True, exist_ok=True)
    student = copy.deepcopy(recipe.student) if parallel is not None and rank == 0 else recipe.student
    distiller = Distiller(
        recipe.teacher,
        recipe.student,
        recipe.strategies,
        sample=recipe.sample,
        parallel=parallel,
        teacher_parallel=teacher_parallel,
    )
    plan = recipe.plan if steps is None else replace(recipe.plan, steps=steps, epochs=None)
    history = distiller.fit(
        recipe.loader,
        plan,
        recipe.validate,
        checkpoint=folder / CHECKPOINT,
        checkpoint_every=recipe.checkpoint_every,
        resume=resume,
    )
    whole = distiller.student.state_dict() if distiller.spread is None else distiller.spread.state()
    if rank:
        return None
    student.load_state_dict(whole)
    save(student, folder / STUDENT)
    spread = {"processes": world, "plan": str(parallel or Plan(data=world)), "teacher": _named(teacher_parallel)}
    return _written(folder, {"recipe": where, **spread}, plan, history)


def _named(plan: Plan | None) -> str:
    return "whole" if plan is None else str(plan)


def _written(folder: Path, facts: dict[str, Any], plan: TrainingPlan, history: History) -> dict[str, Any]:
    record = {**facts, "training": repr(plan), "machine": machine(), **history.to_dict()}
    (folder / RESULTS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(page(record), encoding="utf-8")
    return record
