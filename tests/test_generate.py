"""What a language model writes: each token from its own distribution, and the best sequences against all there are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tests.writers import CLASSES, Writer, counted
from torch import Tensor, nn

from potstill.distill.generate import beam_search, generate, prompts, shifted

pytestmark = pytest.mark.usefixtures("one_thread")

STOP = CLASSES - 1


def prompt(rows: int = 3, tokens: int = 2, seed: int = 5) -> Tensor:
    return torch.randint(CLASSES, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def greedy_by_hand(model: nn.Module, row: list[int], n: int, stop: int | None, pad: int, source: Any = ()) -> list[int]:
    written = list(row)
    for _ in range(n):
        token = int(model(*source, torch.tensor([written]))[0, -1].argmax())
        written.append(token)
        if token == stop:
            break
    return written + [pad] * (len(row) + n - len(written))


@pytest.mark.parametrize("stop", [None, STOP])
def test_greedy_takes_the_likeliest(stop: int | None) -> None:
    model, ids = Writer(2), prompt(rows=40)
    found = generate(model, ids, 6, temperature=0.0, stop=stop, pad=1)
    assert found.tolist() == [greedy_by_hand(model, row, 6, stop, 1) for row in ids.tolist()]
    assert found.dtype == torch.int64
    ended = sum(STOP in row[2:-1] for row in found.tolist())
    assert stop is None or 0 < ended < 40  # both kinds of row were there


def test_nothing_is_read_once_all_rows_have_ended() -> None:
    always = Writer(bias={STOP: 100.0})
    with counted(always) as widths:
        found = generate(always, prompt(), 50, stop=STOP, pad=0)
    assert widths == [2]
    assert found[:, 2:].tolist() == [[STOP] + [0] * 49] * 3


def test_stop_in_the_prompt_ends_nothing() -> None:
    ids = torch.full((1, 2), STOP)
    found = generate(Writer(bias={STOP: -100.0}), ids, 4, stop=STOP, pad=STOP)
    assert STOP not in found[0, 2:].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_distribution(temperature: float) -> None:
    model, rows = Writer(), 20_000
    ids = torch.tensor([[1, 2]]).expand(rows, 2)
    found = generate(model, ids, 2, temperature=temperature)
    first = (model(ids[:1])[0, -1] / temperature).softmax(-1)
    pairs = torch.stack(
        [
            first[token] * (model(torch.tensor([[1, 2, token]]))[0, -1] / temperature).softmax(-1)
            for token in range(CLASSES)
        ]
    )
    counts = torch.bincount(found[:, 2] * CLASSES + found[:, 3], minlength=CLASSES**2).view(CLASSES, CLASSES)
    deviations = (counts - rows * pairs) / (rows * pairs * (1 - pairs)).sqrt()
    assert deviations.abs().max() < 4.5


def test_same_seed_same_tokens() -> None:
    model = Writer()
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(model, prompt(8), 8))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_model_is_evaluated_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.Embedding(CLASSES, 8), nn.Dropout(0.9), nn.Linear(8, CLASSES))
    model[2].eval()
    found = generate(model, prompt(), 5, temperature=0.0)
    assert [module.training for module in model] == [True, True, False]
    model.eval()
    assert torch.equal(found, generate(model, prompt(), 5, temperature=0.0))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_each_row_reads_its_own_source(search: str) -> None:
    model, ids = Writer(reads_source=True), torch.zeros(6, 1, dtype=torch.int64)
    source = prompt(6, 4)
    if search == "greedy":
        found = generate(model, ids, 5, inputs=(source,), temperature=0.0, stop=STOP)
    else:
        found = beam_search(model, ids, 5, beams=1, inputs=(source,), stop=STOP)
    assert found.tolist() == [greedy_by_hand(model, [0], 5, STOP, 0, (row[None],)) for row in source]
    assert len(found.unique(dim=0)) > 1
    several = beam_search(model, ids, 5, beams=3, inputs=(source,), stop=STOP)
    alone = [beam_search(model, ids[:1], 5, beams=3, inputs=(row[None],), stop=STOP) for row in source]
    assert torch.equal(several, torch.cat(alone))


class Uncached(nn.Module):
    """Hides from :func:`generate` that the model remembers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids, use_cache=False)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_read_each_token_once(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {"vocab_size": 17, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, **size)
        model = transformers.GPT2LMHeadModel(config)
    else:
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(max_position_embeddings=32, **shape, **size))
    model = model.double()  # so that rounding decides nothing
    for p in model.parameters():
        p.data.mul_(3.0)
    ids = torch.randint(17, (4, 5))
    with counted(model) as widths:
        found = generate(model, ids, 9, temperature=0.0)
    assert widths == [5, *[1] * 8]
    assert torch.equal(found, generate(Uncached(model), ids, 9, temperature=0.0))
    assert len(found[:, 5:].unique()) > 3
    drawn = []
    for reader in (model, Uncached(model)):
        torch.manual_seed(3)
        drawn.append(generate(reader, ids, 9))
    assert torch.equal(*drawn)


class ForgetfulAsOfOld(Writer):
    def forward(self, ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        assert past_key_values is None
        return super().forward(ids)


class Forgetful(Writer):
    def forward(self, ids: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        assert cache is None
        return super().forward(ids)


@pytest.mark.parametrize("kind", [Forgetful, ForgetfulAsOfOld])
def test_model_that_keeps_nothing_reads_everything(kind: type[Writer]) -> None:
    with counted(model := kind()) as widths:
        found = generate(model, prompt(), 5, temperature=0.0)
    assert widths == [2, 3, 4, 5, 6]
    assert torch.equal(found, generate(Writer(), prompt(), 5, temperature=0.0))


def log_p(model: nn.Module, source: tuple[Tensor, ...], start: list[int], new: tuple[int, ...]) -> float:
    with torch.no_grad():
        scores = model(*source, torch.tensor([[*start, *new]]))[0, len(start) - 1 : -1].double().log_softmax(-1)
    return math.fsum(float(scores[i, token]) for i, token in enumerate(new))


def all_sequences(n: int, stop: int | None) -> list[tuple[int, ...]]:
    """Every one of n tokens, or shorter and ended by ``stop``."""
    if stop is None:
        return list(itertools.product(range(CLASSES), repeat=n))
    others = [token for token in range(CLASSES) if token != stop]
    ended = [(*head, stop) for size in range(n) for head in itertools.product(others, repeat=size)]
    return ended + list(itertools.product(others, repeat=n))


@pytest.mark.parametrize("stop", [None, STOP])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_sequences(length_penalty: float, stop: int | None) -> None:
    n, lengths = 4, set()
    every = all_sequences(n, stop)
    for seed in range(4):
        model, source, ids = Writer(seed, reads_source=True), prompt(3, 2, seed), prompt(3, 2, seed + 50)
        found = beam_search(
            model, ids, n, beams=CLASSES**n, inputs=(source,), stop=stop, pad=1, length_penalty=length_penalty
        )
        for row, start, given in zip(found.tolist(), ids.tolist(), source, strict=True):
            best = max(every, key=lambda new: log_p(model, (given[None],), start, new) / len(new) ** length_penalty)
            assert row == [*start, *best, *[1] * (n - len(best))]
            lengths.add(len(best))
    assert stop is None or len(lengths) > 1 or length_penalty == 2.0


def beams_by_hand(model: nn.Module, start: list[int], n: int, beams: int, stop: int, power: float) -> tuple[int, ...]:
    kept: list[tuple[int, ...]] = [()]
    for _ in range(n):
        open_ = [new for new in kept if not new or new[-1] != stop]
        further = [(*new, token) for new in open_ for token in range(CLASSES)]
        candidates = [new for new in kept if new not in open_] + further
        kept = sorted(candidates, key=lambda new: -log_p(model, (), start, new) / len(new) ** power)[:beams]
    return kept[0]


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_few_beams_keep_the_best_of_what_they_see(beams: int) -> None:
    improved = 0
    for seed in range(8):
        model, ids = Writer(seed), prompt(2, 2, seed)
        found = beam_search(model, ids, 5, beams=beams, stop=STOP)
        greedy = generate(model, ids, 5, temperature=0.0, stop=STOP)
        for row, start in zip(found.tolist(), ids.tolist(), strict=True):
            best = beams_by_hand(model, start, 5, beams, STOP, 1.0)
            assert row == [*start, *best, *[0] * (5 - len(best))]
        improved += not torch.equal(found, greedy)
    assert bool(improved) == (beams > 1)


def test_ended_sequence_takes_one_place_only() -> None:
    class Slow(nn.Module):  # 0, 1, 1 is worse on average than the stop at once, until its third token
        def forward(self, ids: Tensor) -> Tensor:
            by_length = torch.tensor([[0.45, 0.02, 0.02, 0.51], [0.02, 0.49, 0.48, 0.01], [0.01, 0.97, 0.01, 0.01]])
            return by_length.log()[: ids.shape[1]].expand(len(ids), -1, -1)

    start = torch.tensor([[2]])
    assert beam_search(Slow(), start, 3, beams=2, stop=STOP).tolist() == [[2, 0, 1, 1]]
    assert beam_search(Slow(), start, 3, beams=1, stop=STOP).tolist() == [[2, STOP, 0, 0]]


def test_impossible_tokens_are_never_chosen() -> None:
    model = Writer(bias=dict.fromkeys(range(1, CLASSES), -math.inf))
    found = beam_search(model, prompt(), 3, beams=6)
    assert (found[:, 2:] == 0).all()
    assert (generate(model, prompt(), 3)[:, 2:] == 0).all()


@pytest.mark.parametrize("stop", [None, 3])
def test_shifted_against_rows_by_hand(stop: int | None) -> None:
    ids, given, width = torch.randint(6, (20, 9)), 3, 0
    x, target = shifted(ids, given, stop=stop, ignore_index=-7)
    for i, row in enumerate(ids.tolist()):
        expected = [-7] * (given - 1)
        for token in row[given:]:
            expected.append(token)
            if token == stop:
                break
        width = max(width, len(expected))
        expected += [-7] * (8 - len(expected))
        assert target[i].tolist() == expected[: target.shape[1]]
        assert x[i].tolist() == row[: target.shape[1]]
    assert x.shape[1] == target.shape[1] == width


def test_shifted_leaves_out_columns_that_count_for_no_row() -> None:
    x, target = shifted(torch.tensor([[1, 5, 0, 0, 0], [1, 2, 5, 0, 0]]), 1, stop=5)
    assert x.tolist() == [[1, 5], [1, 2]]
    assert target.tolist() == [[5, -100], [2, 5]]


def test_prompts_of_items() -> None:
    source, ids, target = torch.ones(2, 7), torch.arange(8).view(2, 4), torch.zeros(2, 4, dtype=torch.int64)
    inputs, found = prompts((source, ids, target), None, torch.device("cpu"), "Test")
    assert inputs[0] is source
    assert torch.equal(found, ids)
    with pytest.raises(TypeError, match=r"^Test: the loader yielded a mapping"):
        prompts(({"ids": ids}, target), 1, torch.device("cpu"), "Test")
    with pytest.raises(ValueError, match=r"^Test: .*\[2, 4\]; expected \[batch, tokens\] with 5 "):
        prompts((ids, target), 5, torch.device("cpu"), "Test")


class Bad(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, ids: Tensor) -> Tensor:
        return self.output


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate(Writer(), prompt(), 0), "new_tokens is 0; it must be at least 1"),
        (lambda: generate(Writer(), prompt(), 1, temperature=-1.0), "temperature is -1.0"),
        (lambda: generate(Writer(), prompt(), 1, temperature=math.nan), "temperature is nan"),
        (lambda: generate(Writer(), prompt(1, 0), 1), r"ids is torch.int64 \[1, 0\]; expected"),
        (lambda: generate(Writer(), prompt().int(), 1), r"ids is torch.int32 \[3, 2\]; expected"),
        (lambda: beam_search(Writer(), prompt(), 1, beams=0), "beams is 0; it must be at least 1"),
        (lambda: beam_search(Writer(), prompt(), 1, beams=1, length_penalty=-0.5), "length_penalty is -0.5"),
        (
            lambda: generate(Bad(torch.zeros(3, 4)), prompt(), 1),
            r"logits are \[3, 4\]; expected \[3, tokens, classes\]",
        ),
        (lambda: generate(Bad(torch.full((3, 2, 4), math.nan)), prompt(), 1), "logits are NaN"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
