"""A hundred labelled digits, nine hundred without a label: what a small student gains from a teacher.

The teacher, a convolutional network, is trained on the labelled images. The student, an MLP 76 times smaller, is
trained twice from the same initial weights and for the same number of steps: on the labels alone, and on the teacher's
soft targets for all images, which takes no label. All are tested on images that none of them has seen.

    pip install potstill[demo]
    python distill_digits.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from potstill.distill import Distiller, HardLabels, SoftTargets, Strategy

LABELLED, TRAINING, BATCH = 100, 1000, 50
SEEDS = range(5)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(512, 80),
        nn.ReLU(),
        nn.Linear(80, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def train(
    build: Callable[[], nn.Module],
    strategy: Strategy,
    data: TensorDataset,
    steps: int,
    seed: int,
    teacher: nn.Module | None,
) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    batches = DataLoader(data, batch_size=BATCH, shuffle=True)
    epochs = steps // len(batches)

    def scheduler(optimizer: Optimizer) -> LRScheduler:
        return OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * len(batches))

    Distiller(teacher, model, strategy, optimizer=AdamW, scheduler=scheduler, seed=seed).fit(batches, epochs)
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)  # networks as small as these do not gain from a second
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(digits.data).float()[order] / 16, torch.from_numpy(digits.target)[order]
    labelled = TensorDataset(x[:LABELLED], y[:LABELLED])
    # With alpha=1 soft targets do not look at the labels, so any will do for the images that have none.
    everything = TensorDataset(x[:TRAINING], torch.zeros(TRAINING, dtype=torch.long))

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return 100 * float((model(x[TRAINING:]).argmax(-1) == y[TRAINING:]).float().mean())

    def show(name: str, models: list[nn.Module]) -> None:
        found = [accuracy(model) for model in models]
        size = sum(p.numel() for p in models[0].parameters())
        spread = f"   ({min(found):.1f} to {max(found):.1f} over {len(found)} seeds)" if len(found) > 1 else ""
        print(f"{name:22} {size:6} parameters   {statistics.mean(found):5.1f} % right{spread}")

    teacher = train(cnn, HardLabels(), labelled, 300, seed=0, teacher=None)
    alone = [train(mlp, HardLabels(), labelled, 600, seed, teacher=None) for seed in SEEDS]
    soft = SoftTargets(temperature=2.0, alpha=1.0)
    distilled = [train(mlp, soft, everything, 600, seed, teacher) for seed in SEEDS]
    show("teacher", [teacher])
    show("student, labels only", alone)
    show("student, distilled", distilled)


if __name__ == "__main__":
    main()
