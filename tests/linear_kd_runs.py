"""What the test of LinearKDLoss under FSDP2 runs. As a program: one of two processes."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from potstill.nn import LinearKDLoss

ROWS, FEATURES, CLASSES = 6, 8, 50


class Student(nn.Module):
    """A body and a head; ``forward`` returns the loss, ``loss_of`` is another way in."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.loss = LinearKDLoss(temperature=2.0, alpha=0.5, max_memory_bytes=1200)

    def forward(self, x: Tensor, teacher: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        hidden = self.body(x).relu()
        loss: Tensor = self.loss(hidden, self.head.weight, teacher, teacher_weight, target, self.head.bias)
        return loss

    def loss_of(self, *inputs: Tensor) -> Tensor:
        return self.forward(*inputs)


def inputs(rank: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(10 + rank)
    x, teacher = torch.randn(ROWS, FEATURES, generator=random), torch.randn(ROWS, 12, generator=random)
    weight = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(1))
    return x, teacher, weight, torch.randint(CLASSES, (ROWS,), generator=random)


def student() -> Student:
    torch.manual_seed(0)
    return Student()


def expected() -> tuple[list[float], dict[str, Tensor]]:
    """Each rank's loss, and the gradients' mean over the ranks, in one process."""
    model = student()
    losses = [model(*inputs(rank)) for rank in range(2)]
    (sum(losses) / 2).backward()
    return [float(loss.detach()) for loss in losses], {name: p.grad for name, p in model.named_parameters()}


def largest_error(model: nn.Module, gradients: dict[str, Tensor]) -> float:
    return max(
        float((p.grad.full_tensor() - gradients[name]).abs().max() / gradients[name].abs().max())
        for name, p in model.named_parameters()
    )


def main(rank: int, meeting: str, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = dist.init_device_mesh("cpu", (2,))
    losses, gradients = expected()
    found: dict[str, Any] = {}
    for name in ("forward", "loss_of"):
        model = student()
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss_of")
        loss = (model if name == "forward" else model.loss_of)(*inputs(rank))
        loss.backward()
        found[name] = [abs(float(loss.detach()) - losses[rank]), largest_error(model, gradients)]
    x, teacher, weight, target = inputs(rank)
    outside = student()
    fully_shard(outside, mesh=mesh)
    try:
        LinearKDLoss()(x, outside.head.weight, teacher, weight, target)
    except TypeError as error:
        found["outside"] = str(error)
    with open(path, "w") as file:
        json.dump(found, file)
    dist.barrier()  # a rank that leaves while the other still talks to it aborts now and then
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
