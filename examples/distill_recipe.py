"""A recipe for the command ``potstill distill``: a small student of scikit-learn's digits learns from a wider teacher.

    potstill distill examples/distill_recipe.py
    torchrun --nproc-per-node 4 -m potstill distill examples/distill_recipe.py --plan "dp=2,tp=2" --teacher-plan "tp=4"

All processes call ``recipe()``; random numbers are the same in each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from potstill.demo.data import digits
from potstill.distill import Distiller, HardLabels, Recipe, SoftTargets, TrainingPlan
from potstill.distill.metrics import accuracy


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), *(Block(width) for _ in range(2)), nn.Linear(width, 10))


def recipe() -> Recipe:
    images = digits()
    data = [
        TensorDataset(images.normalise(x).flatten(1), y)
        for x, y in ((images.train_x, images.train_y), (images.test_x, images.test_y))
    ]
    train, test = DataLoader(data[0], batch_size=64, shuffle=True), DataLoader(data[1], batch_size=360)
    teacher, student = network(128), network(16)
    # In earnest: load a trained teacher from its file.
    Distiller(None, teacher, HardLabels()).fit(train, TrainingPlan(epochs=6, lr=3e-3), quiet=True)
    return Recipe(
        teacher,
        student,
        SoftTargets(temperature=4.0, alpha=0.9),
        train,
        TrainingPlan(epochs=8, lr=1e-2),
        validate=accuracy(test),
        sample=next(iter(train)),
    )
