"""Distillation in a training loop of your own: Distiller computes the loss, the loop is plain PyTorch.

A convolutional teacher has learned 100 labelled digits. A small MLP learns the same 100 labels alone, and again, for as
many steps, what the teacher says about 1000 digits, without a label.

    pip install potstill[demo]
    python examples/loops/plain_loop.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from potstill.distill import Distiller, HardLabels, SoftTargets, TrainingPlan
from potstill.distill.metrics import accuracy

LABELLED, TRAINING, STEPS = 100, 1000, 600


def train(distiller: Distiller, loader: DataLoader, steps: int, validate: Callable[[nn.Module], object]) -> None:
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=2e-2)  # also of strategies that have any
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    epochs = steps // len(loader)
    step = 0
    for epoch in range(1, epochs + 1):
        distiller.student.train()
        for batch in loader:
            step += 1
            loss = distiller.loss(batch, step=step)  # the step is for weights that change in the course of training
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        if epoch % (epochs // 3) == 0:
            print(f"  epoch {epoch}: loss {loss.item():.3f}, {validate(distiller.student)}")


def cnn() -> nn.Module:
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 80), nn.ReLU(), nn.Linear(80, 10)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convolutions, *head)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def main() -> None:
    torch.set_num_threads(1)  # networks as small as these do not gain from a second
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(y))
    x, y = x[order].float() / 16, y[order]
    labelled = DataLoader(TensorDataset(x[:LABELLED], y[:LABELLED]), batch_size=50, shuffle=True)
    no_labels = 0 * y[:TRAINING]  # with alpha=1 soft targets do not look at them
    everything = DataLoader(TensorDataset(x[:TRAINING], no_labels), batch_size=50, shuffle=True)
    validate = accuracy([(x[TRAINING:], y[TRAINING:])])

    teacher = cnn()
    Distiller(None, teacher, HardLabels()).fit(labelled, TrainingPlan(steps=300, lr=3e-3))
    print("teacher:", validate(teacher), "\nstudent untrained:", validate(mlp()), "\nstudent alone:")
    train(Distiller(None, mlp(), HardLabels()), labelled, STEPS, validate)
    print("student distilled:")
    train(Distiller(teacher, mlp(), SoftTargets(temperature=2.0, alpha=1.0)), everything, STEPS, validate)


if __name__ == "__main__":
    main()
