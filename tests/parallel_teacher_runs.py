"""A teacher that is split by layers and vocabulary, and a student that is replicated. As a program: one rank of two."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from potstill.nn import KDLoss
from potstill.parallel import Plan, vocab_parallel_top_k

CLASSES, ROWS, K, TEMPERATURE = 40, 4, 6, 2.0


class Language(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(CLASSES, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.lm_head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.lm_head(x + self.down(nn.functional.gelu(self.up(x))))


def models() -> tuple[nn.Module, nn.Module]:
    return Language(16, 0).requires_grad_(False), Language(8, 1)


def batch() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(0, CLASSES, (ROWS, 5), generator=random) for _ in range(2))
    return tokens, labels


def main(rank: int, meeting: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    teacher, student = models()
    tokens, labels = batch()
    teacher = Plan(tensor=2).apply(teacher, tokens[:2], head="lm_head")
    plan = Plan(data=2)
    student = plan.apply(student, tokens[:2])
    with torch.no_grad():
        columns = teacher(tokens)
    log_probs, indices = vocab_parallel_top_k(columns, K, TEMPERATURE)
    mine = plan.share((tokens, labels, log_probs, indices))
    loss = KDLoss(temperature=TEMPERATURE)(student(mine[0]), mine[2], mine[1], teacher_indices=mine[3])
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {name: whole(p.grad) for name, p in student.named_parameters()}
    torch.save({"columns": columns.shape[-1], "loss": total / 2, "gradients": gradients}, result)
    dist.destroy_process_group()


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
