"""Narrower students: what is kept, that nothing is lost where nothing need be, and what is refused."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tests.width_cases import CASES, Encoder, lively, plain_cnn, widen
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from potstill.demo.data import Batches, digits
from potstill.distill import Distiller, HardLabels, SoftTargets, TrainingPlan
from potstill.distill.initialise import Initialisation, initialise

pytestmark = pytest.mark.usefixtures("one_thread")


def output(model: nn.Module, x: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def bert(hidden: int, units: int, heads: int, layers: int, attention: str = "sdpa", **more: int) -> nn.Module:
    sizes = {"hidden_size": hidden, "intermediate_size": units, "num_attention_heads": heads, "vocab_size": 40} | more
    config = BertConfig(num_hidden_layers=layers, max_position_embeddings=sizes.pop("positions", 12), **sizes)
    config._attn_implementation = attention
    return lively(BertForSequenceClassification(config))


def llama(heads: int, pairs: int, size: int) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 1}
    heads_ = {"num_attention_heads": heads, "num_key_value_heads": pairs, "head_dim": size}
    return lively(LlamaForCausalLM(LlamaConfig(**sizes, **heads_)))


def tokens(count: int = 40) -> tuple[Tensor, Tensor]:
    return torch.randint(count, (16, 9)), torch.zeros(16)


def perceptron(*sizes: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("both", "widths"), [(False, "importance"), (True, "project")])
@pytest.mark.parametrize("family", CASES)
def test_a_teacher_that_can_be_cut_without_loss_is(family: str, both: bool, widths: str) -> None:
    case = CASES[family]
    small, teacher, student = lively(case.build(False)), lively(case.build(True)), case.build(False)
    widen(small, teacher, case.roles, both=both)
    sample, (held_out, _) = case.sample(), case.sample()
    wanted = output(small, held_out)
    torch.testing.assert_close(output(teacher, held_out), wanted, rtol=1e-4, atol=1e-4)  # the case is what it should be
    made = initialise(student, teacher, sample=sample, widths=widths)
    assert made.left == {}
    assert made.parameters_copied == made.parameters
    tolerance = 1e-5 if widths == "importance" else 1e-3  # a fit to data with a ridge
    torch.testing.assert_close(output(student, held_out), wanted, rtol=tolerance, atol=tolerance)


def test_fewer_layers_too() -> None:
    case = CASES["torch pre-norm"]
    small, teacher = (Encoder(*sizes, norm_first=True) for sizes in ((8, 2, 10), (16, 4, 24)))
    small.encoder.layers.extend(Encoder(8, 2, 10, norm_first=True).encoder.layers)
    teacher.encoder.layers.extend(Encoder(16, 4, 24, norm_first=True).encoder.layers)
    student = Encoder(8, 2, 10, norm_first=True)
    widen(lively(small), lively(teacher), case.roles)
    initialise(student, teacher, [3, 0], sample=tokens(), widths="importance")
    small.encoder.layers = nn.ModuleList([small.encoder.layers[3], small.encoder.layers[0]])
    torch.testing.assert_close(output(student, x := tokens()[0]), output(small, x), rtol=1e-5, atol=1e-5)


def test_a_layer_taken_twice() -> None:
    teacher, student = bert(16, 24, 4, 3), bert(8, 10, 2, 2)
    initialise(student, teacher, [1, 1], sample=tokens(), widths="importance")
    first, second = (dict(layer.named_parameters()) for layer in student.bert.encoder.layer)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("family", ["bert", "torch post-norm", "gpt2"])
def test_smaller_heads(family: str) -> None:
    """The teacher's heads have dimensions that nothing uses; its scores are smaller by its larger scale."""
    torch.manual_seed(1)
    builds: dict[str, Callable[[int], nn.Module]] = {
        "bert": lambda size: bert(2 * size, 10, 2, 1),
        "torch post-norm": lambda size: Encoder(2 * size, 2, 10, norm_first=False),
        "gpt2": lambda size: _gpt2(2 * size),
    }
    small, teacher, student = (lively(builds[family](size)) for size in (4, 8, 4))
    widen(small, teacher, CASES[family].roles, heads=2)
    for name, tensor in teacher.state_dict().items():
        if "query" in name or "key" in name:
            tensor.mul_(2**0.25)
        elif "in_proj" in name:
            tensor[: 2 * len(tensor) // 3].mul_(2**0.25)
        elif "c_attn" in name:
            tensor[..., : 2 * tensor.shape[-1] // 3].mul_(2**0.25)
    torch.testing.assert_close(output(teacher, x := tokens()[0]), output(small, x), rtol=1e-5, atol=1e-5)
    made = initialise(student, teacher, sample=tokens(), widths="importance")
    assert made.left == {}
    assert {width.heads for width in made.widths} == {None}
    torch.testing.assert_close(output(student, x), output(small, x), rtol=1e-5, atol=1e-5)


def _gpt2(hidden: int) -> nn.Module:
    sizes = {"n_embd": hidden, "n_inner": 10, "n_head": 2, "n_layer": 1, "vocab_size": 40, "n_positions": 12}
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False))


def test_the_most_important_units_are_kept() -> None:
    teacher, student, x = perceptron(4, 32, 3), perceptron(4, 8, 3), torch.randn(64, 4)
    (width,) = initialise(student, teacher, sample=(x, torch.zeros(64)), widths="importance").widths
    worth = (teacher[:2](x).norm(dim=0) * teacher[2].weight.norm(dim=0)).detach()
    kept = worth.topk(8).indices.sort().values
    assert torch.equal(student[0].weight, teacher[0].weight[kept])
    assert torch.equal(student[0].bias, teacher[0].bias[kept])
    assert torch.equal(student[2].weight, teacher[2].weight[:, kept])
    assert torch.equal(student[2].bias, teacher[2].bias)
    assert width.share == pytest.approx(float(worth[kept].sum() / worth.sum()))
    assert (width.kept, width.of, width.heads) == (8, 32, None)
    assert width.axes == (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))


def test_of_equal_units_one_is_kept_and_fitted() -> None:
    """A teacher of four units, each there three times: selection alone keeps the largest, and loses the others."""
    small, teacher, student, x = perceptron(4, 4, 2), perceptron(4, 12, 2), perceptron(4, 4, 2), torch.randn(99, 4)
    with torch.no_grad():
        small[0].bias.fill_(0.5)
        teacher[0].weight.copy_(small[0].weight.repeat(3, 1))
        teacher[0].bias.copy_(small[0].bias.repeat(3))
        teacher[2].weight.copy_(small[2].weight.repeat(1, 3) / 3)
        teacher[2].bias.copy_(small[2].bias)
    made = initialise(student, teacher, sample=(x, torch.zeros(99)), widths="project")
    (before, after) = made.refitted["2.weight"]
    assert after < 1e-3 < before
    torch.testing.assert_close(output(student, x), output(small, x), rtol=1e-3, atol=1e-3)
    initialise(student, teacher, sample=(x, torch.zeros(99)), widths="importance")
    assert (output(student, x) - output(small, x)).abs().max() > 0.1


def test_a_fit_that_does_not_carry_over_is_not_made() -> None:
    """Independent units say nothing about each other: fitting 40 of them to 60 rows can only do harm."""

    def model(units: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(80, units, bias=False), nn.Tanh(), nn.Linear(units, 3, bias=False))

    teacher, student = model(80), model(40)
    nn.init.orthogonal_(teacher[0].weight)
    initialise(student, teacher, sample=(torch.randn(60, 80), torch.zeros(60)), widths="project")
    kept = [int((teacher[0].weight == row).all(1).nonzero()) for row in student[0].weight]
    x = torch.randn(2000, 80)
    with torch.no_grad():
        wanted = teacher(x)
        cut = F.linear(student[:2](x), teacher[2].weight[:, kept])
        assert (student(x) - wanted).norm() < 1.02 * (cut - wanted).norm()


def test_positions_are_the_first() -> None:
    teacher, student = bert(16, 24, 4, 1), bert(16, 24, 4, 1, positions=10)
    made = initialise(student, teacher, sample=tokens())
    name = "bert.embeddings.position_embeddings.weight"
    assert torch.equal(student.get_parameter(name), teacher.get_parameter(name)[:10])
    assert made.left == {}
    assert torch.equal(output(student, x := tokens()[0]), output(teacher, x))


def test_tied_weights_stay_tied() -> None:
    models = [
        BertForMaskedLM(BertConfig(vocab_size=40, hidden_size=n, intermediate_size=20, num_attention_heads=n // 4))
        for n in (8, 16)
    ]
    made = initialise(*models, sample=tokens())
    student = models[0]
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
    assert made.left == {}


def test_bfloat16_and_the_state_of_the_models() -> None:
    teacher, student = lively(plain_cnn(True)).bfloat16().train(), plain_cnn(False).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    sample = torch.randn(8, 1, 8, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="the student cannot run on the sample"):
        initialise(student, teacher, sample=(sample[0].bfloat16(), sample[1]))
    made = initialise(student.bfloat16(), teacher, sample=(sample[0].bfloat16(), sample[1]))
    assert made.left == {}
    assert student[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(module.training for model in (student, teacher) for module in model.modules())
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Decoder(nn.Module):
    """torch's decoder layer: its cross-attention splits one weight for the query and for the keys and values."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, hidden)
        self.layer, self.head = nn.TransformerDecoderLayer(hidden, heads, 20, batch_first=True), nn.Linear(hidden, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        y: Tensor = self.head(self.layer(x, x))
        return y


class Padded(nn.Sequential):
    """Channels that pass a group norm, ReLU6 and padding on their way."""

    def __init__(self, n: int) -> None:
        pad, norm = nn.ZeroPad2d(1), nn.GroupNorm(2, n)
        super().__init__(nn.Conv2d(1, n, 3), norm, nn.ReLU6(), pad, nn.Conv2d(n, 3, 3), nn.Flatten(), nn.Linear(48, 3))


def t5(hidden: int, heads: int) -> nn.Module:
    config = T5Config(vocab_size=40, num_layers=2, d_kv=4, d_model=hidden, d_ff=20, num_heads=heads)
    return T5ForConditionalGeneration(config)


def qwen3(hidden: int, heads: int) -> nn.Module:
    sizes = {"vocab_size": 40, "num_hidden_layers": 1, "head_dim": 8, "hidden_size": hidden, "intermediate_size": 20}
    heads_ = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads_, pad_token_id=0))


@pytest.mark.parametrize(
    ("build", "sample", "heads"),
    [
        (Decoder, tokens(), {(2, 4)}),
        (lambda n, _: Padded(n), (torch.randn(8, 1, 6, 6), torch.zeros(8)), {None}),
        (t5, ({"input_ids": tokens()[0], "decoder_input_ids": tokens()[0]}, torch.zeros(64)), {(2, 4)}),  # a bias each
        (qwen3, tokens(), {(1, 2)}),  # of keys and values; the queries' are norms too
    ],
)
def test_features_are_followed_everywhere(build: Any, sample: Any, heads: set[Any]) -> None:
    student, teacher = lively(build(8, 2)), lively(build(16, 4))
    made = initialise(student, teacher, sample=sample)
    assert made.left == {}
    assert {width.heads for width in made.widths} - {None} == heads - {None}


class Ramp(nn.Module):
    """Each unit counts by its number: they cannot be exchanged, though each operation is an ordinary one."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, units), nn.Linear(units, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        z: Tensor = self.out(y * torch.arange(y.shape[-1]).to(y))
        return z


class Grouped(nn.Sequential):
    """A grouped convolution, through which features are not followed."""

    def __init__(self, n: int) -> None:
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(nn.Conv2d(1, n, 3), nn.Conv2d(n, n, 3, groups=2), pool, nn.Flatten(), nn.Linear(n, 3))


IMAGES = torch.randn(8, 1, 8, 8), torch.zeros(8)
ROWS = torch.randn(8, 4), torch.zeros(8)


@pytest.mark.parametrize(
    ("student", "teacher", "sample", "name", "why"),
    [
        (lambda: Ramp(8), lambda: Ramp(16), ROWS, "into.weight", "exchanging its features changes"),
        (lambda: Grouped(4), lambda: Grouped(8), IMAGES, "1.weight", "an operation that is not followed"),
        (
            lambda: perceptron(4, 8, 2),
            lambda: perceptron(4, 16, 3),
            ROWS,
            "2.weight",
            r"its shape is \[2, 8\], the teacher's \[3, 16\]: what reads its features was not seen",
        ),
        (lambda: perceptron(4, 8, 3), lambda: perceptron(4, 16, 3), None, "2.weight", "pass a sample"),
        (
            lambda: bert(16, 24, 4, 1, vocab_size=39),
            lambda: bert(16, 24, 4, 1),
            tokens(39),
            "bert.embeddings.word_embeddings.weight",
            "what reads its features was not seen",
        ),
        (
            lambda: bert(8, 24, 4, 1, "eager"),
            lambda: bert(16, 24, 4, 1, "eager"),
            tokens(),
            "bert.encoder.layer.0.attention.self.query.weight",
            "heads can be made smaller only where",
        ),
        (
            lambda: bert(12, 24, 6, 1),
            lambda: bert(16, 24, 4, 1),
            tokens(),
            "bert.encoder.layer.0.attention.self.query.weight",
            "the student has 6 heads or groups here, the teacher 4",
        ),
        (
            lambda: llama(4, 4, 4),
            lambda: llama(4, 4, 8),
            tokens(),
            "model.layers.0.self_attn.q_proj.weight",
            "exchanging its features changes",
        ),
        (
            lambda: llama(4, 4, 8),
            lambda: llama(8, 4, 8),
            tokens(),
            "model.layers.0.self_attn.q_proj.weight",
            "what reads its features was not seen",
        ),
    ],
)
def test_what_cannot_be_cut_is_left(student: Any, teacher: Any, sample: Any, name: str, why: str) -> None:
    student, teacher = student(), teacher()
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    made = initialise(student, teacher, sample=sample)
    assert name in made.left
    assert re.search(why, made.left[name]), made.left[name]
    for key in made.left:
        assert torch.equal(student.state_dict()[key], before[key]), key


def test_arguments_that_do_not_fit() -> None:
    student, teacher = bert(8, 10, 2, 1), bert(16, 24, 4, 2)
    before = student.bert.pooler.dense.weight.clone()
    with pytest.raises(ValueError, match="widths is 'svd'; expected one of importance, project"):
        initialise(student, teacher, sample=tokens(), widths="svd")
    with pytest.raises(ValueError, match="layers='average' takes means of layers"):
        initialise(student, teacher, "average", sample=tokens())
    with pytest.raises(ValueError, match="the student cannot run on the sample"):
        initialise(bert(8, 10, 2, 1, vocab_size=20), teacher, sample=(torch.full((2, 3), 30), torch.zeros(2)))
    assert torch.equal(student.bert.pooler.dense.weight, before)


def test_the_table_says_what_was_kept() -> None:
    made: Initialisation = initialise(bert(8, 10, 2, 1), bert(16, 24, 4, 2), sample=tokens())
    Console(width=200, file=(file := io.StringIO())).print(made.table())
    text = file.getvalue()
    whole = "100.0 % of the student's numbers come from the teacher"
    heads = "16 -> 8, 4 -> 2 heads or groups"
    for words in (whole, heads, "bert.embeddings.word_embeddings.weight[1] and", "24 -> 10:", "weights refitted"):
        assert words in text


def test_a_student_made_of_its_teacher_starts_and_ends_better() -> None:
    images = digits()
    x, held_out = images.normalise(images.train_x), images.normalise(images.test_x)

    def cnn(n: int, m: int, units: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(),
            nn.Conv2d(n, m, 3, padding=1, stride=2), nn.BatchNorm2d(m), nn.ReLU(),
            nn.Flatten(), nn.Linear(m * 16, units), nn.ReLU(), nn.Linear(units, 10),
        )  # fmt: skip

    teacher = cnn(12, 24, 64)
    loader = Batches(images, 64, 1)
    Distiller(None, teacher, HardLabels()).fit(loader, TrainingPlan(epochs=4, lr=3e-3), quiet=True)
    goal = output(teacher, held_out).softmax(1)
    start, end = {}, {}
    for widths in ("random", "importance", "project"):
        torch.manual_seed(1)
        student = cnn(4, 8, 16)
        if widths != "random":
            initialise(student, teacher, sample=(x[:256], images.train_y[:256]), widths=widths)
        start[widths] = F.cross_entropy(output(student, held_out), goal).item()
        Distiller(teacher, student, SoftTargets()).fit(loader, TrainingPlan(epochs=1, lr=2e-3), quiet=True)
        end[widths] = F.cross_entropy(output(student, held_out), goal).item()
    assert start["project"] < 0.5 * start["importance"]
    assert start["project"] < 0.5 * start["random"]
    assert end["project"] < end["importance"] < end["random"]
