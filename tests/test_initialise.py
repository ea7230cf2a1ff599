"""Parameter distillation: what is copied from where, and what is said about the rest."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from potstill.distill import initialise


class Block(nn.Module):
    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.norm, self.scale = nn.Linear(width, width), nn.BatchNorm1d(width), scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.scale * self.norm(self.linear(x))
        return y


class Net(nn.Module):
    def __init__(self, depth: int, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, width), nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def bert(layers: int, seed: int) -> BertModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}
    return BertModel(BertConfig(num_hidden_layers=layers, max_position_embeddings=12, **sizes)).eval()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("even", [[1], [3], [5]]),
        ("first", [[0], [1], [2]]),
        ("last", [[3], [4], [5]]),
        ("average", [[0, 1], [2, 3], [4, 5]]),
        ([5, 0, 0], [[5], [0], [0]]),
    ],
)
def test_layers_are_chosen(layers: Any, expected: list[list[int]]) -> None:
    student, teacher = Net(3), Net(6)
    made = initialise(student, teacher, layers)
    assert made.layers == {"blocks": expected}
    assert made.left == {}
    assert made.parameters == made.parameters_copied
    for i, chosen in enumerate(expected):
        weights = torch.stack([teacher.blocks[j].linear.weight for j in chosen])
        torch.testing.assert_close(student.blocks[i].linear.weight, weights.mean(0))
    assert torch.equal(student.stem.weight, teacher.stem.weight)
    assert torch.equal(student.head.bias, teacher.head.bias)


def test_teacher_with_as_many_layers_is_copied() -> None:
    student, teacher = Net(4).eval(), Net(4).eval()
    x = torch.randn(5, 4)
    for layers in ("even", "first", "last", "average", "influence"):
        initialise(student, teacher, layers)
        assert torch.equal(student(x), teacher(x))


def test_layers_that_change_their_input_most() -> None:
    teacher = Net(5)
    for block, scale in zip(teacher.blocks, (0.01, 2.0, 0.02, 3.0, 0.03), strict=True):
        block.scale = scale
    made = initialise(Net(2), teacher, "influence", sample=(torch.randn(16, 4), torch.zeros(16)))
    assert made.layers == {"blocks": [[1], [3]]}
    assert not any(block._forward_hooks for block in teacher.blocks)
    assert teacher.training


def test_half_of_a_real_encoder() -> None:
    student, teacher = bert(2, 0), bert(4, 1)
    sample = ({"input_ids": torch.randint(40, (3, 7))}, torch.zeros(3))
    for layers in ("even", "influence"):
        made = initialise(student, teacher, layers, sample=sample)
        assert made.left == {}
        assert len(made.layers["encoder.layer"]) == 2
    initialise(student, teacher, "first")
    whole = teacher(sample[0]["input_ids"], output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(student(sample[0]["input_ids"]).last_hidden_state, whole)


def test_what_does_not_fit_is_said() -> None:
    student, teacher = Net(2, classes=5), Net(4)
    before = student.head.weight.clone()
    made = initialise(student, teacher)
    assert made.left == {
        "head.weight": "its shape is [5, 8], the teacher's [3, 8]",
        "head.bias": "its shape is [5], the teacher's [3]",
    }
    assert torch.equal(student.head.weight, before)
    console = Console(width=100, file=io.StringIO())
    console.print(made.table())
    text = console.file.getvalue()
    assert "blocks.0" in text
    assert "blocks.1" in text
    assert "left as it was: its shape is [5, 8]" in text


def test_dtype_stays() -> None:
    student, teacher = Net(2).bfloat16(), Net(4)
    initialise(student, teacher, "average")
    assert student.stem.weight.dtype == torch.bfloat16
    torch.testing.assert_close(student.stem.weight, teacher.stem.weight.bfloat16())


@pytest.mark.parametrize(
    ("depth", "layers", "message"),
    [
        (3, "middle", "layers is 'middle'; expected one of even"),
        (7, "even", "the student's blocks has 7 layers, the teacher's 6"),
        (3, [0, 1], "needs 3 numbers from 0 to 5"),
        (3, [0, 1, 6], "needs 3 numbers from 0 to 5"),
        (3, "influence", "pass one as sample"),
    ],
)
def test_choices_that_do_not_fit(depth: int, layers: Any, message: str) -> None:
    student = Net(depth)
    before = student.stem.weight.clone()
    with pytest.raises(ValueError, match=message):
        initialise(student, Net(6), layers)
    assert torch.equal(student.stem.weight, before)


def test_another_family() -> None:
    with pytest.raises(ValueError, match="both must be of one family"):
        initialise(nn.Sequential(nn.Linear(3, 3)), Net(2))
