"""The demo's tasks: which images, which teacher, which student, and how long to train."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from potstill.demo.data import Images, digits, mnist


@dataclass(frozen=True)
class Training:
    """A schedule: AdamW, whose learning rate rises to ``lr`` and falls to zero along a cosine."""

    epochs: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Task:
    """What one run of the demo works on; ``shift`` is the largest random shift of a training image in pixels."""

    images: Callable[[], Images]
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    teacher_training: Training
    student_training: Training
    shift: int


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def _channels_last(model: nn.Sequential) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() == 4:  # torch's CPU convolutions train a fifth faster so
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def mnist_teacher() -> nn.Module:
    """Four convolutions, then two linear layers: 28 x 28 pixels to 10 classes."""
    model = nn.Sequential(
        *_convolution(1, 32, 5, stride=2),  # 14 x 14
        *_convolution(32, 32, 3),
        nn.MaxPool2d(2),  # 7 x 7
        *_convolution(32, 64, 3),
        *_convolution(64, 64, 3),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    return _channels_last(model)


def digits_teacher() -> nn.Module:
    """Two convolutions, then two linear layers: 8 x 8 pixels to 10 classes."""
    model = nn.Sequential(
        *_convolution(1, 16, 3),
        *_convolution(16, 32, 3),
        nn.MaxPool2d(2),  # 4 x 4
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    return _channels_last(model)


def perceptron(*sizes: int) -> nn.Module:
    """Linear layers of these sizes with ReLU between them, on flattened images.

    >>> perceptron(64, 32, 10)
    Sequential(
      (flatten): Flatten(start_dim=1, end_dim=-1)
      (hidden1): Linear(in_features=64, out_features=32, bias=True)
      (relu1): ReLU()
      (classes): Linear(in_features=32, out_features=10, bias=True)
    )
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise(sizes[:-1]), start=1):
        layers[f"hidden{number}"] = nn.Linear(inputs, outputs)
        layers[f"relu{number}"] = nn.ReLU()
    layers["classes"] = nn.Linear(sizes[-2], sizes[-1])
    return nn.Sequential(layers)


TASKS = {
    "mnist": Task(
        images=mnist,
        teacher=mnist_teacher,
        student=lambda: perceptron(28 * 28, 128, 128, 10),
        teacher_training=Training(epochs=4, batch=128, lr=4e-3),
        student_training=Training(epochs=12, batch=128, lr=4e-3),
        shift=2,
    ),
    "digits": Task(
        images=digits,
        teacher=digits_teacher,
        student=lambda: perceptron(8 * 8, 192, 64, 10),
        teacher_training=Training(epochs=10, batch=64, lr=4e-3),
        student_training=Training(epochs=20, batch=64, lr=4e-3),
        shift=1,
    ),
}
