"""all-MiniLM-L6-v2, pruned, distilled from itself and made sparse: how near its embeddings stay, and how fast it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.table import Table
from torch import Tensor, nn

import potstill
from accuracy.lm import example
from potstill import Prune, prune_, realise_
from potstill.distill import TrainingPlan
from potstill.report.machine import machine
from potstill.timing import compare

SPARSITY, PATTERN, LAYERS, SEEN = 0.8, "1x4", "model.encoder.*", 8


def run(minutes: float, out: Path) -> dict[str, Any]:
    """All rows; what ``out`` holds of an earlier run with as many minutes is not done again.

    Raises :class:`SystemExit` if ``out`` holds a run of another length.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "minilm.json"
    record = json.loads(path.read_text()) if path.exists() else {"minutes": minutes}
    if record["minutes"] != minutes:
        raise SystemExit(f"{path} is of --minutes {record['minutes']:g}, not {minutes:g}; choose another --out")
    sentences = example("distill_minilm")
    training, held_out = sentences.batches()
    bert = transformers.BertModel.from_pretrained(sentences.FOLDER, add_pooling_layer=False)
    for dropout in (module for module in bert.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0  # the dense model's outputs are no noisy labels
    bert.embeddings.requires_grad_(False)
    dense = sentences.Embedder(bert).eval()
    expected = sentences.embeddings(dense, held_out)

    def cosine(model: nn.Module) -> float:
        return mean_cosine(sentences.embeddings(model, held_out), expected)

    int8 = copy.deepcopy(dense)
    potstill.quantize_(int8, only_if_faster=False, sample_input=held_out[0][0])
    rows = {"dense int8": cosine(int8)}
    for criterion in ("magnitude", "sparsegpt"):
        student = pruned(dense, criterion, training)
        rows[f"pruned by {criterion}"] = cosine(student)
    distiller = sentences.lesson(dense, student, training)  # the last one: sparsegpt
    record["steps"] = record.get("steps") or sentences.steps_in(distiller, training, minutes)
    path.write_text(json.dumps(record, indent=1) + "\n")
    plan = TrainingPlan(steps=record["steps"], lr=sentences.LR, warmup=0.05, precision="bf16")
    history = distiller.fit(training, plan, checkpoint=out / "minilm.pt", checkpoint_every=200)
    rows["pruned by sparsegpt, distilled"] = cosine(student)
    student.eval().requires_grad_(False)
    report = realise_(student, held_out[0][0])
    potstill.save(student, out / "minilm.safetensors")
    rows["the same, realised in int8"] = cosine(student)
    record |= {
        "task": "minilm",
        "settings": {"sparsity": SPARSITY, "pattern": PATTERN, "layers": LAYERS, "sentences": len(expected)},
        "machine": machine(),
        "trained minutes": sum(epoch.seconds for epoch in history.epochs) / 60,
        "cosine": rows,
        "realised": str(report).strip().splitlines()[-4:],  # the summary below the layers
        "seconds": speeds({"float": dense, "dense int8": int8, "realised": student}, held_out[0][0]),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def pruned(dense: nn.Module, criterion: str, training: list[Any]) -> nn.Module:
    """A copy with masks in the linear layers of the encoder; the criterion sees the first batches."""
    student = copy.deepcopy(dense)
    config = Prune(SPARSITY, pattern=PATTERN, criterion=criterion)
    prune_(student, config, [inputs for inputs, _ in training[:SEEN]], include=LAYERS)
    return student


def mean_cosine(given: Tensor, expected: Tensor) -> float:
    """Of rows with the rows in the same place."""
    return float(F.cosine_similarity(given, expected).mean())


def speeds(models: Mapping[str, nn.Module], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Median seconds of a batch, all taking turns."""

    def call(model: nn.Module) -> Any:
        return lambda: model(**inputs)

    with torch.inference_mode():
        times = compare({name: call(model) for name, model in models.items()}, seconds=20.0, rounds=21)
    return {name: time.median for name, time in times.items()}


def table(record: Mapping[str, Any]) -> Table:
    """The cosines, then the speed of the realised model as a ratio."""
    shown = Table("", "", title=f"all-MiniLM-L6-v2, {100 * SPARSITY:.0f} % {PATTERN}, {record['steps']} steps")
    for name, value in record["cosine"].items():
        shown.add_row(f"mean cosine to the dense model: {name}", f"{value:.4f}")
    seconds = record["seconds"]
    for name in ("float", "dense int8"):
        shown.add_row(f"realised, times as fast as {name}", f"{seconds[name] / seconds['realised']:.2f}")
    return shown
