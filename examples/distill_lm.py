"""A language model of bytes, a fourteenth of its teacher's size, that learns to write Python as the teacher does.

    python examples/distill_lm.py --out lm            # 3 seeds, about 25 minutes on one core; goes on if interrupted
    python examples/distill_lm.py --quick --out quick-lm

Both models are transformers over bytes; they read the sources of this Python's standard library. Every tenth file, by a
hash of its name, is held out: judged is how many bits a model needs for each of its bytes (8 if it knew nothing).

- "student alone" learns the bytes, "+ probability distillation" mostly the teacher's distribution of each next byte;
- "+ parameter distillation" starts from a part of the teacher's own layers and widths, "+ features" learns its hidden
  states too; all take the same number of steps;
- the last three go on from "+ parameter distillation", equally long: as before; with the reverse KL; and with that on
  what the student writes itself after the first bytes of a window (on-policy).

Two more tables judge what the models write after the beginnings of held-out files. The teacher's bits for each byte are
fewer for a student that only dares what is very likely, so the third table has the divergence: by how many bits the
teacher's distributions differ from those that the student wrote with. Tables and curves are written as pages to the
folder, beside the checkpoints of all models.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import potstill
from potstill.distill import (
    Distiller,
    HardLabels,
    HiddenStates,
    OnPolicy,
    SoftTargets,
    Strategy,
    TrainingPlan,
    generate,
    initialise,
)
from potstill.report.study import Study

CONTEXT, PROMPT, WRITTEN = 128, 32, 64  # bytes
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
TEACHER, STUDENT = (128, 6), (48, 2)  # width and depth
MORE = "then more of the same"


@dataclass(frozen=True)
class Sizes:
    """How long everything takes."""

    teacher_steps: int = 2400
    steps: int = 1000
    further_steps: int = 200
    batch: int = 8
    epochs: int = 6
    windows: int = 256
    continuations: int = 128


QUICK = Sizes(teacher_steps=6, steps=4, further_steps=2, batch=2, epochs=2, windows=8, continuations=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lm"), help="folder of all results (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each row (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that all runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the models are small
    options.out.mkdir(parents=True, exist_ok=True)
    Experiment(QUICK if options.quick else Sizes(), options.out, Console()).run(options.seeds)


class Experiment:
    """The rows of all tables."""

    def __init__(self, sizes: Sizes, out: Path, console: Console) -> None:
        self.sizes, self.out, self.console = sizes, out, console
        self.text, held_out = texts()
        every = torch.linspace(0, len(held_out) - CONTEXT - 1, sizes.windows).long()
        self.windows = window(held_out, every)
        self.sample = self.windows[: sizes.batch, :-1], self.windows[: sizes.batch, 1:]
        settings = {**asdict(sizes), "context": CONTEXT, "teacher": TEACHER, "student": STUDENT}
        self.known, self.surprising, self.divergent = (
            Study(f"Python by bytes: {what}", metric=metric, unit="bits", larger_is_better=False, settings=settings)
            for what, metric in (
                ("held-out files", "bits per byte"),
                ("what the models write", "the teacher's bits per byte"),
                ("how far from the teacher", "KL(student, teacher) per byte written"),
            )
        )

    def run(self, seeds: int) -> None:
        """Trains all rows, and prints and writes the tables."""
        self.teacher = self.model(0, TEACHER)
        pupil = Distiller(None, self.teacher, HardLabels())
        self.train("teacher", 0, pupil, self.sizes.teacher_steps, 2e-3, "reads the files")
        self.fast = copy.deepcopy(self.teacher)
        potstill.quantize_(self.fast, only_if_faster=False)
        for seed in range(seeds):
            self.run_seed(seed)
        for study, baseline in ((self.known, "student alone"), (self.surprising, MORE), (self.divergent, MORE)):
            study.baseline = baseline
            self.console.print(study.table())
            self.console.print(f"written to {study.write(self.out)}")

    def run_seed(self, seed: int) -> None:
        """Every row of one seed."""
        soft = SoftTargets(temperature=1.0, alpha=0.9)
        reverse = SoftTargets(temperature=1.0, alpha=1.0, divergence="reverse_kl")
        steps, lr = self.sizes.steps, 4e-3

        def taught(student: nn.Module, *strategies: Strategy | tuple[float, Strategy]) -> Distiller:
            return Distiller(self.fast, student, strategies, sample=self.sample)

        alone = Distiller(None, self.model(seed, STUDENT), HardLabels())
        self.train("student alone", seed, alone, steps, lr, "learns the bytes")
        row = taught(self.model(seed, STUDENT), soft)
        self.train("+ probability distillation", seed, row, steps, lr, "and the teacher's distributions")
        row = taught(self.cut(seed, show=seed == 0), soft)
        best = self.train("+ parameter distillation", seed, row, steps, lr, "and starts from its layers")
        row = taught(self.cut(seed), soft, (0.1, HiddenStates("layers.*")))
        self.train("+ features", seed, row, steps, lr, "and learns its hidden states")

        steps, lr = self.sizes.further_steps, 1e-3
        row = taught(copy.deepcopy(best), soft)
        self.train(MORE, seed, row, steps, lr, "+ parameter distillation, continued")
        row = taught(copy.deepcopy(best), reverse)
        self.train("then reverse KL", seed, row, steps, lr, "as long, on files")
        row = taught(copy.deepcopy(best), reverse)
        self.train("then reverse KL, on-policy", seed, row, steps, lr, "as long, on its own bytes", on_policy=True)

    def model(self, seed: int, size: tuple[int, int]) -> ByteModel:
        """One with the seed's first weights."""
        torch.manual_seed(seed)
        return ByteModel(*size)

    def cut(self, seed: int, *, show: bool = False) -> ByteModel:
        """A student made of the teacher's layers and widths."""
        student = self.model(seed, STUDENT)
        made = initialise(student, self.teacher, sample=self.sample)
        if show:
            self.console.print(made.table())
        return student

    def train(
        self,
        name: str,
        seed: int,
        distiller: Distiller,
        steps: int,
        lr: float,
        about: str,
        *,
        on_policy: bool = False,
    ) -> nn.Module:
        """Trains a row, or loads what an earlier run has trained; measures it, and returns the student."""
        student = distiller.student
        loader = Windows(self.text, self.sizes.batch, math.ceil(steps / self.sizes.epochs))
        items = OnPolicy(loader, student, prompt_tokens=PROMPT, new_tokens=WRITTEN) if on_policy else loader
        plan = TrainingPlan(steps=steps, lr=lr, warmup=0.05, seed=seed)
        path = self.out / f"{re.sub('[^a-z]+', '-', name.lower()).strip('-')}-{seed}.pt"
        history = distiller.fit(items, plan, self.bits, checkpoint=path)
        curve = [epoch.validation["value"] for epoch in history.epochs]
        row: dict[str, Any] = {"seed": seed, "about": about, "parameters": sum(p.numel() for p in student.parameters())}
        student.eval()
        surprise, divergence = self.judge(student)
        self.known.add(name, value=curve[-1], curve=curve, **row)
        self.surprising.add(name, value=surprise, **row)
        self.divergent.add(name, value=divergence, **row)
        self.console.print(f"{name}, seed {seed}: {curve[-1]:.3f} bits per byte; divergence {divergence:.3f}")
        return student

    @torch.no_grad()
    def bits(self, model: nn.Module) -> float:
        """Per byte of the held-out windows."""
        losses = [
            F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            for part in self.windows.split(32)
        ]
        return float(torch.cat(losses).mean()) / math.log(2)

    @torch.no_grad()
    def judge(self, model: nn.Module) -> tuple[float, float]:
        """How a model continues the beginnings of held-out windows: the teacher's bits per byte, and the divergence.

        Both are means over the written bytes of what is expected of the byte at that place: of -log2 q, and of
        log2 p / q, where the model draws it from p and the teacher expects q.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = generate(model, self.windows[: self.sizes.continuations, :PROMPT], WRITTEN)
        p, q = (other(ids[:, :-1])[:, PROMPT - 1 :].log_softmax(-1) / math.log(2) for other in (model, self.teacher))
        drawn = p.exp2()
        return float(-(drawn * q).sum(-1).mean()), float((drawn * (p - q)).sum(-1).mean())


class ByteModel(nn.Module):
    """Bytes [batch, tokens] -> logits [batch, tokens, 256] of the byte after each; a transformer behind a convolution.

    The convolution sees four bytes at once, so that layers need not first find out what stands before what.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.mix = nn.Conv1d(width, width, 4)
        self.layers = nn.ModuleList(Layer(width, width // 16) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids)
        mixed = self.mix(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)
        x = x + F.gelu(mixed) + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """Attention to what came before, then a network for each position; each behind a norm, and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Windows:
    """Batches of windows at random places, drawn from torch's global generator: (bytes, the byte after each)."""

    def __init__(self, text: Tensor, batch: int, batches: int) -> None:
        self.text, self.batch, self.batches = text, batch, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.batches):
            found = window(self.text, torch.randint(len(self.text) - CONTEXT, (self.batch,)))
            yield found[:, :-1], found[:, 1:]


def window(text: Tensor, starts: Tensor) -> Tensor:
    """[windows, CONTEXT + 1]: the bytes from each start on."""
    return text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)].long()


def texts() -> tuple[Tensor, Tensor]:
    """The standard library's sources and the held-out ones, uint8; a zero byte ends each file."""
    folder = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(name.parts):
            parts[zlib.crc32(name.as_posix().encode()) % 10 == 0].append(path.read_bytes() + b"\0")
    train, held_out = (torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8) for files in parts)
    return train, held_out


if __name__ == "__main__":
    main()
