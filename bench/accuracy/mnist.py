"""A perceptron and a small convolutional net on MNIST."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from accuracy.grid import Subject
from potstill.demo.data import Batches, Images
from potstill.distill import Distiller, HardLabels, TrainingPlan

CRITERIA = ("magnitude", "random", "taylor", "snip", "wanda", "sparsegpt")
PERCENTS = (50, 60, 70, 80, 90, 95)
BATCH, LR = 128, 1e-3


def perceptron() -> nn.Sequential:
    """784 - 300 - 100 - 10, the one of LeCun 1998."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def convolutional() -> nn.Sequential:
    """Two convolutions with stride 2, then two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


MODELS: dict[str, Callable[[], nn.Sequential]] = {"mnist-mlp": perceptron, "mnist-cnn": convolutional}


def subject(task: str, images: Images, seed: int, dense_steps: int, steps: int) -> Subject:
    """The net of a seed, trained; its last layer is never pruned. The criteria see 8 batches of training images."""
    torch.manual_seed(seed)
    dense = MODELS[task]()
    batches = Batches(images, BATCH, shift=0)
    plan = TrainingPlan(steps=dense_steps, lr=2e-3, warmup=0.05, seed=seed)
    Distiller(None, dense, HardLabels()).fit(batches, plan, quiet=True)
    order = torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(seed))[: 8 * BATCH]
    x, y = images.normalise(images.train_x[order]), images.train_y[order]
    test_x, test_y = images.normalise(images.test_x), images.test_y

    def accuracy(model: nn.Module) -> float:
        right = [
            (model(part).argmax(-1) == labels).sum()
            for part, labels in zip(test_x.split(1000), test_y.split(1000), strict=True)
        ]
        return 100 * int(sum(right)) / len(test_y)

    return Subject(
        dense.eval(),
        list(zip(x.split(BATCH), y.split(BATCH), strict=True)),
        batches,
        lambda model, item: F.cross_entropy(model(item[0]), item[1]),
        accuracy,
        exclude=str(len(dense) - 1),
        steps=steps,
        lr=LR,
        seed=seed,
    )
