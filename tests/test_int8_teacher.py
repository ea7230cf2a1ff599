"""A teacher in int8: used where it is faster and near enough, and otherwise left as it is."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from potstill.distill import Distiller, SoftTargets
from potstill.distill.batch import Indexed
from potstill.distill.int8_teacher import Int8Teacher, int8_teacher
from potstill.nn import Int8Linear

MODULE = importlib.import_module("potstill.distill.int8_teacher")

pytestmark = pytest.mark.usefixtures("one_thread")

Speed = Callable[[Callable[[dict[str, Any]], dict[str, float]]], None]


@pytest.fixture
def quicker(speed: Speed) -> None:
    """Whatever could be chosen takes half the time."""
    speed(lambda calls: {name: 2.0 if name in ("float", "before", "plain") else 1.0 for name in calls})


def mlp(width: int = 48, classes: int = 5) -> nn.Sequential:
    layers = (nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
    return nn.Sequential(*layers)


def sample(rows: int = 24, features: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, features), torch.zeros(rows, dtype=torch.long)


def relative(wanted: Tensor, found: Tensor) -> float:
    y, other = wanted.detach().double().numpy(), found.detach().double().numpy()
    return float((((y - other) ** 2).sum() / (y**2).sum()) ** 0.5)


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if name}


def states(model: nn.Module) -> list[Any]:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    tensors = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    return [kinds(model), hooks, modes, tensors]


def same(one: list[Any], other: list[Any]) -> bool:
    tensors = zip(one[3], other[3], strict=True)
    return one[:3] == other[:3] and all(a == b and torch.equal(x, y) for (a, x), (b, y) in tensors)


def test_a_large_teacher_is_faster_in_int8() -> None:
    teacher = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    x, y = sample(64, 512)
    before = states(teacher)
    result = int8_teacher(teacher, (x, y))
    assert result.used
    assert result.speedup is not None
    assert result.speedup > 1.0
    assert result.model is not teacher
    assert any(isinstance(module, Int8Linear) for module in result.model.modules())
    assert result.errors == {"output": pytest.approx(relative(teacher(x), result.model(x)), rel=1e-3)}
    assert 0.0 < result.errors["output"] < 0.05
    assert same(states(teacher), before)


@pytest.mark.usefixtures("quicker")
def test_layers_that_are_learnt_from_are_measured_too() -> None:
    teacher, (x, y) = mlp(), sample()
    result = int8_teacher(teacher, (x, y), layers=["0", "3"])
    assert result.used
    assert result.errors == {
        "output": pytest.approx(relative(teacher(x), result.model(x)), rel=1e-3),
        "0": pytest.approx(relative(teacher[0](x), result.model[0](x)), rel=1e-3),
        "3": pytest.approx(relative(teacher[:4](x), result.model[:4](x)), rel=1e-3),
    }
    assert "int8 has 2.00 times the teacher's speed, and errors of 0.0" in result.reason


@pytest.mark.usefixtures("quicker")
def test_a_layer_that_is_learnt_from_is_not_joined_with_its_activation() -> None:
    joined = int8_teacher(mlp(), sample(), layers="1").model
    assert isinstance(joined[0], Int8Linear)
    assert (joined[0].activation, kinds(joined)["1"]) == ("relu", "FusedActivation")
    separate = int8_teacher(mlp(), sample(), layers="0").model
    assert isinstance(separate[0], Int8Linear)
    assert (separate[0].activation, kinds(separate)["1"]) == ("none", "ReLU")


@pytest.mark.usefixtures("quicker")
def test_a_block_is_not_replaced_around_a_layer_that_is_learnt_from() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    teacher = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    item = torch.randn(3, 8, 32), torch.zeros(3)
    whole = kinds(int8_teacher(teacher, item).model)
    assert "Int8" in whole["layers.0"]
    assert "Int8" in whole["layers.1"]
    result = int8_teacher(teacher, item, layers="layers.1.linear2")
    assert result.used
    assert {*result.errors} == {"output", "layers.1.linear2"}
    found = kinds(result.model)
    assert "Int8" in found["layers.0"]
    assert (found["layers.1"], found["layers.1.linear2"]) == ("TransformerEncoderLayer", "Int8Linear")


def sensitive() -> nn.Sequential:
    """The input of the layer "2" has a large number that does not matter: one scale for the row loses all others."""
    model = mlp()
    with torch.no_grad():
        model[0].bias[0] = 1e4
        model[2].weight[:, 0] = 0.0
    return model


@pytest.mark.usefixtures("quicker")
def test_the_most_sensitive_layers_stay_in_float() -> None:
    teacher, (x, y) = sensitive(), sample()
    before = states(teacher)
    result = int8_teacher(teacher, (x, y))
    assert result.used
    assert result.kept == ("2",)
    assert [kinds(result.model)[name] for name in "024"] == ["Int8Linear", "Linear", "Int8Linear"]
    assert result.errors["output"] == pytest.approx(relative(teacher(x), result.model(x)), rel=1e-3)
    assert result.errors["output"] <= 0.05
    assert same(states(teacher), before)
    assert int8_teacher(teacher, (x, y), max_error=100.0).errors["output"] > 0.05


@pytest.mark.usefixtures("quicker")
def test_a_bound_that_int8_cannot_keep() -> None:
    teacher = mlp()
    result = int8_teacher(teacher, sample(), max_error=1e-6)
    assert (result.model, result.used, result.speedup, result.kept) == (teacher, False, None, ())
    assert result.reason.startswith(
        f"the error of output is {result.errors['output']:.3g} in int8, and comes below 1e-06"
    )
    assert kinds(teacher)["0"] == "Linear"


@pytest.mark.usefixtures("quicker")
@pytest.mark.parametrize("max_error", [0.003, 0.006, 0.009, 0.012, 0.02])
def test_the_bound_is_kept(max_error: float) -> None:
    teacher, (x, y) = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))), sample()
    result = int8_teacher(teacher, (x, y), max_error=max_error, layers="2")
    wanted, found = teacher[:3](x), result.model[:3](x)
    assert relative(wanted, found) <= max_error
    assert relative(teacher(x), result.model(x)) <= max_error
    assert result.used == any("Int8" in kind for kind in kinds(result.model).values())


def test_a_model_that_is_slower_as_a_whole(speed: Speed, monkeypatch: pytest.MonkeyPatch) -> None:
    speed(lambda calls: {name: 2.0 if name in ("float", "before") else 1.0 for name in calls})
    monkeypatch.setattr(MODULE, "fastest", lambda _: {"run": {"float": 1.0, "int8": 1.25}})
    teacher = mlp()
    result = int8_teacher(teacher, sample())
    assert (result.model, result.used, result.speedup) == (teacher, False, 0.8)
    assert result.reason == "int8 has 0.80 times the teacher's speed"
    assert "output" in result.errors


def test_nothing_to_convert(speed: Speed) -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    result = int8_teacher(teacher, (torch.randn(2, 3, 8, 8), torch.zeros(2)))
    assert (result.model, result.used, result.errors, result.speedup) == (teacher, False, {}, None)
    assert result.reason == "nothing in it can be int8: it has no linear layer, embedding or attention"
    speed(lambda calls: {name: 1.0 if name == "float" else 4.0 for name in calls})
    slow = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
    result = int8_teacher(slow, sample())
    assert result.model is slow
    assert result.reason.startswith("nothing in it became int8: 0: int8 is slower: 0.25 times the speed; 1: int8 is sl")
    assert result.reason.endswith("; and 2 more")


@pytest.mark.usefixtures("quicker")
def test_a_transformer_stays_as_it_was() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    teacher = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    inputs = {"input_ids": torch.randint(50, (3, 12)), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    item = inputs, torch.zeros(3, dtype=torch.long)
    before, attention = states(teacher), teacher.config._attn_implementation
    name = "encoder.layer.0.intermediate.dense"
    result = int8_teacher(teacher, item, layers=[name, "encoder.layer.1"])
    assert result.used
    assert {name, "encoder.layer.1"} < {*result.errors}
    assert max(result.errors.values()) <= 0.05
    assert same(states(teacher), before)
    assert teacher.config._attn_implementation == attention
    with torch.no_grad():
        wanted, found = teacher.eval()(**inputs)[0], result.model.eval()(**inputs)[0]
    assert result.errors["output.last_hidden_state"] == pytest.approx(relative(wanted, found), rel=0.05)


@pytest.mark.usefixtures("quicker")
def test_a_student_learns_from_it() -> None:
    result = int8_teacher(mlp(), Indexed(sample(), torch.arange(24)))
    assert result.used
    student = nn.Linear(32, 5)
    Distiller(result.model, student, SoftTargets()).loss(sample()).backward()
    assert float(student.weight.grad.abs().max()) > 0.0


@pytest.mark.usefixtures("quicker")
def test_classes_that_the_teacher_excludes_have_no_error() -> None:
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).masked_fill(torch.arange(5) == 2, -math.inf)

    teacher, (x, y) = Sure(), sample()
    result = int8_teacher(teacher, (x, y))
    others = torch.tensor([0, 1, 3, 4])
    expected = relative(teacher(x)[:, others], result.model(x)[:, others])
    assert result.errors == {"output": pytest.approx(expected, rel=1e-3)}


def test_the_table_says_why() -> None:
    table = Int8Teacher(mlp(), False, "because", {"output": 0.01, "0": 0.2}, None, ()).table()
    assert table.title == "because"
    assert [list(column.cells) for column in table.columns] == [["0", "output"], ["0.2", "0.01"]]


@pytest.mark.parametrize("max_error", [0.0, -1.0, math.inf, math.nan])
def test_bounds_that_are_none(max_error: float) -> None:
    with pytest.raises(ValueError, match=r"max_error is .*; expected a positive number"):
        int8_teacher(mlp(), sample(), max_error=max_error)


def test_layers_that_are_none() -> None:
    with pytest.raises(ValueError, match="no module of the teacher is named 'encoder'"):
        int8_teacher(mlp(), sample(), layers="encoder")

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.idle = mlp(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(ValueError, match="the module 'idle' did not run on the sample; name another"):
        int8_teacher(Idle(), sample(), layers=["body", "idle"])
