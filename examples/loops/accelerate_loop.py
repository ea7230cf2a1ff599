"""Distillation in a loop of Hugging Face's Accelerate, on one device or several.

An MLP of 256 hidden units has learned 100 labelled digits. One of 8 learns the same 100 labels alone, and again, for
as many steps, what the teacher says about 1000 digits, without a label.

    pip install potstill[demo] accelerate
    python examples/loops/accelerate_loop.py        # or, on two GPUs: accelerate launch --num_processes 2 ...
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from potstill.distill import Distiller, HardLabels, SoftTargets
from potstill.distill.metrics import accuracy

LABELLED, TRAINING, STEPS = 100, 1000, 600


class Lesson(nn.Module):
    def __init__(self, distiller: Distiller) -> None:  # the loss as a module, to be wrapped for several processes
        super().__init__()
        self.student, self.strategies = distiller.student, distiller.strategies
        self.loss = distiller.loss

    def forward(self, item: Any, step: int) -> Tensor:
        return self.loss(item, step)


def train(accelerator: Accelerator, distiller: Distiller, loader: DataLoader, epochs: int) -> None:
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=2e-2)
    lesson, optimizer, loader = accelerator.prepare(Lesson(distiller), optimizer, loader)
    lesson.train()
    step = 0
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(lesson):
                accelerator.backward(lesson(batch, step + 1))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(lesson.parameters(), 1.0)
                    step += 1
                optimizer.step()
                optimizer.zero_grad()


def main() -> None:
    accelerator = Accelerator()
    torch.set_num_threads(1)  # networks as small as these do not gain from a second
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(y))
    x, y = x[order].float() / 16, y[order]
    labelled = DataLoader(TensorDataset(x[:LABELLED], y[:LABELLED]), batch_size=50, shuffle=True)
    no_labels = 0 * y[:TRAINING]  # with alpha=1 soft targets do not look at them
    everything = DataLoader(TensorDataset(x[:TRAINING], no_labels), batch_size=50, shuffle=True)
    validate = accuracy([(x[TRAINING:], y[TRAINING:])])

    def learn(name: str, hidden: int, loader: DataLoader, teacher: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)).to(accelerator.device)
        strategy = HardLabels() if teacher is None else SoftTargets(temperature=2.0, alpha=1.0)
        before = validate(student)
        train(accelerator, Distiller(teacher, student, strategy), loader, STEPS // len(loader))
        accelerator.print(f"{name}: {before} untrained, {validate(student)} trained")
        return student

    teacher = learn("teacher", 256, labelled)
    learn("student alone", 8, labelled)
    learn("student distilled", 8, everything, teacher)


if __name__ == "__main__":
    main()
