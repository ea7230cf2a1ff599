"""Times a step of distillation, BERT-base to its half, against plain PyTorch; see README.md beside this file."""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import default_collate

from potstill.distill import CachedTeacher, Distiller, SoftTargets, TrainingPlan, int8_teacher
from potstill.distill.batch import Batch, Indexed
from potstill.distill.processes import Processes
from potstill.distill.training import Training
from potstill.report.machine import machine
from potstill.timing import compare

ROWS, TOKENS = 8, 128
TEMPERATURE, ALPHA, LR = 2.0, 0.7, 1e-4
TOP_K = 64
GOALS = {"int8 teacher, bf16": 1.5, "cached teacher, bf16": 2.5}
PLAIN = "plain PyTorch"
Step = Callable[[], object]


class Classes(nn.Module):
    """A model of transformers as a function of token numbers to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits


def models(task: str) -> tuple[nn.Module, nn.Module]:
    """BERT-base, and a student with half of its layers; random weights, on which the time does not depend."""
    config = transformers.BertConfig(num_labels=2)
    small = copy.deepcopy(config)
    small.num_hidden_layers //= 2
    kind = {"classes": transformers.BertForSequenceClassification, "words": transformers.BertForMaskedLM}[task]
    torch.manual_seed(0)
    return Classes(kind(config)).eval(), Classes(kind(small))


def examples(task: str) -> list[tuple[Tensor, Tensor]]:
    """Sequences, with a class each, or with a sixth of their words as targets."""
    torch.manual_seed(1)
    ids = torch.randint(1000, 30000, (ROWS, TOKENS))
    if task == "classes":
        return list(zip(ids, torch.randint(2, (ROWS,)), strict=True))
    return list(zip(ids, ids.masked_fill(torch.rand(ids.shape) > 1 / 6, -100), strict=True))


def plain(teacher: nn.Module, student: nn.Module, item: tuple[Tensor, Tensor], bf16: bool) -> Step:
    """The loop of the tutorials: Hinton's loss from torch's parts, AdamW, clipped gradients."""
    x, y = item
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                taught = teacher(x)
            logits = student(x)
        counts = (y != -100).flatten()
        taught, logits = taught.flatten(0, -2)[counts].float(), logits.flatten(0, -2)[counts].float()
        soft = F.kl_div(
            (logits / TEMPERATURE).log_softmax(-1), (taught / TEMPERATURE).softmax(-1), reduction="batchmean"
        )
        loss = ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(logits, y.flatten()[counts])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    return step


def ours(teacher: nn.Module, student: nn.Module, item: object, precision: str) -> Step:
    """A step of the Distiller."""
    distiller = Distiller(teacher, copy.deepcopy(student).train(), SoftTargets(TEMPERATURE, ALPHA))
    plan = TrainingPlan(steps=1, lr=LR, schedule="constant", precision=precision)
    training = Training(distiller, plan, None, Processes(torch.device("cpu")))
    teacher.eval()
    return lambda: training.step([Batch.of(item)], 1, lambda _: "the benchmark")


def contestants(task: str, folder: Path, console: Console) -> dict[str, Step]:
    teacher, student = models(task)
    data = examples(task)
    item = default_collate(data)
    fast = int8_teacher(teacher, item)
    console.print(fast.table())
    # All logits of a few classes; of 30522 words the likeliest, at the temperature of the loss.
    top_k = {"top_k": TOP_K, "temperature": TEMPERATURE} if task == "words" else {}
    cached = CachedTeacher(teacher, data, folder / task, batch_size=ROWS, **top_k)
    indexed = Indexed(item, torch.arange(ROWS))
    return {
        PLAIN: plain(teacher, student, item, bf16=False),
        "plain PyTorch, bf16": plain(teacher, student, item, bf16=True),
        "int8 teacher": ours(fast.model, student, item, "float32"),
        "int8 teacher, bf16": ours(fast.model, student, item, "bf16"),
        "cached teacher": ours(cached, student, indexed, "float32"),
        "cached teacher, bf16": ours(cached, student, indexed, "bf16"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("classes", "words"), action="append", help="only this; may be repeated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing per task (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "distill-step.json")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, found, missed = Console(), {}, []
    for task in options.task or ("classes", "words"):
        with tempfile.TemporaryDirectory() as folder:
            times = compare(contestants(task, Path(folder), console), seconds=options.seconds, rounds=9)
        table = Table("step", "seconds", "times as fast", "goal", title=f"{task}: {ROWS} x {TOKENS} tokens")
        rows = {}
        for name, timing in times.items():
            ratio = times[PLAIN].median / timing.median
            rows[name] = asdict(timing) | {"ratio": ratio}
            goal = GOALS.get(name)
            missed += [f"{task}, {name}: {ratio:.2f}"] if goal is not None and ratio < goal else []
            table.add_row(name, f"{timing.median:.2f}", f"{ratio:.2f}", "" if goal is None else f"{goal}")
        console.print(table)
        found[task] = rows
    record = {"machine": machine(), "threads": options.threads, "rows": ROWS, "tokens": TOKENS, "steps": found}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    if missed:
        console.print(f"goals missed: {'; '.join(missed)}")
    if missed and options.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
