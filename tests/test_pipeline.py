"""Pipelines of two and four processes against the model in one piece, and where models are cut."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import pipeline_runs as runs
from torch import Tensor, nn

from potstill.parallel.parts import Part, held
from potstill.parallel.stages import balanced, stages

Results = list[dict[str, Any]]  # of each rank: name -> what came of it

pytestmark = pytest.mark.usefixtures("one_thread")


def results(folder: Path, ranks: int) -> Results:
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    launch = [sys.executable, "-W", "error", "-m", "tests.pipeline_runs"]
    processes = [
        subprocess.Popen(
            [*launch, str(rank), str(ranks), str(folder / "meeting"), str(file)],
            cwd=Path(runs.__file__).parent.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        complaints = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, complaints
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(tmp_path_factory.mktemp("four"), 4)


def check(ranks: Results, name: str) -> None:
    found = [rank[name] for rank in ranks]
    for result in found:
        assert isinstance(result, dict), result
        assert result["loss"] <= 1e-6
        assert result["gradients"] <= 1e-6
        assert result["output"] <= 1e-6
        assert result["same"]
    assert sum(result["trained"] for result in found)
    assert set().union(*(result["tensors"] for result in found)) == set(found[0]["whole"])
    for result in found:
        assert set(result["tensors"]) < set(result["whole"])


def names(ranks: int) -> list[str]:
    return [f"{name}, {schedule} {count}" for name, schedule, count in runs.runs(ranks)]


@pytest.mark.parametrize("name", names(2))
def test_two_stages_are_the_model(name: str, two: Results) -> None:
    check(two, name)


@pytest.mark.parametrize("name", names(4))
def test_four_stages_are_the_model(name: str, four: Results) -> None:
    check(four, name)


def test_a_tensor_is_on_one_rank_unless_it_is_tied_or_of_no_stage(two: Results) -> None:
    def both(name: str) -> set[str]:
        first, second = (set(rank[name]["tensors"]) for rank in two)
        return first & second

    assert both("mlp, gpipe 1") == set()
    assert both("looped, gpipe 4") == {"shift"}
    assert both("llama, gpipe 4") == set()
    assert "lm_head.weight" not in two[0]["gpt2, tied, gpipe 4"]["tensors"]
    assert "transformer.wte.weight" not in two[1]["gpt2, tied, gpipe 4"]["tensors"]


def test_statistics_of_batch_norm_are_those_of_the_micro_batches(two: Results) -> None:
    assert two[1]["batch norm"] == {"error": 0.0, "batches": 6}
    assert two[0]["batch norm"] == {"held": ["0.bias", "0.weight"]}


def test_the_part_of_a_rank_has_the_mode_of_the_model(two: Results) -> None:
    assert two[0]["modes"] == two[1]["modes"]
    assert 15 < two[0]["modes"]["train"] < 57  # of 72 numbers half are dropped
    assert two[0]["modes"]["eval"]
    assert two[0]["modes"]["smaller batch"]


def test_errors_are_raised_on_both_ranks(two: Results) -> None:
    first, second = (rank["refusals"] for rank in two)
    for name, text in {
        "rows": "ValueError: Pipeline: the batch has 10 rows, which 4 micro-batches cannot share equally",
        "inputs": "TypeError: Pipeline: inputs is a list",
        "not to be cut": "ValueError: stages: the model cannot be cut into 2: at most 0 of its modules",
        "other stages": "ValueError: Pipeline: rank ",
    }.items():
        assert first[name].startswith(text), first[name]
        assert second[name].startswith(text), second[name]
    assert all("lies on another rank of the pipeline" in found["part alone"] for found in (first, second))
    for name, text in {
        "schedule": "Pipeline: schedule is 'dualpipe'; expected one of gpipe, 1f1b, interleaved",
        "count": "Pipeline: there are 1 stages for 2 ranks; the schedule 1f1b needs 2",
        "micro-batches": "Pipeline: micro_batches is 1; the schedule 1f1b needs at least 2",
        "interleaved": "Pipeline: micro_batches is 5; the schedule interleaved needs a multiple of 2",
        "unknown": "Pipeline: stages has '99'",
        "inside": "Pipeline: stages has ''",
        "one is wrong": "Pipeline: micro_batches is 0",
    }.items():
        assert first[name].startswith(f"ValueError: {text}"), first[name]
        assert second[name].startswith(f"ValueError: Pipeline: rank 0 of 2: {text}"), second[name]


def test_what_fails_in_a_step_is_raised_after_it(two: Results) -> None:
    first, second = (rank["refusals"] for rank in two)
    assert second["loss"] == "FailingError: the third micro-batch"
    assert first["loss"].startswith("RuntimeError: Pipeline: rank 1 of 2 failed in micro-batch 3 of 4")
    assert second["loss of rows"].startswith("TypeError: Pipeline.step: loss returned a tensor of shape [3]")
    assert first["first stage"] == "FailingError: too large"
    assert second["first stage"].startswith("RuntimeError: Pipeline: rank 0 of 2 failed in micro-batch 2 of 4")
    assert second["output"].startswith(
        "TypeError: Pipeline: the model's output holds a str, which cannot be put together"
    )
    assert first["output"].startswith("RuntimeError: Pipeline: rank 1 of 2 failed in micro-batch 2 of 2")
    assert abs(first["after that"]) < 1e-6
    assert abs(second["after that"]) < 1e-6


def test_what_fails_on_the_first_micro_batch_is_raised_before_the_step(two: Results) -> None:
    first, second = (rank["refusals"]["first stage, first batch"] for rank in two)
    assert first == "FailingError: too large"
    assert second == "RuntimeError: Pipeline: stage 0 fails on the first micro-batch: FailingError: too large"


def test_a_rank_that_dies_is_named(two: Results) -> None:
    message = "RuntimeError: Pipeline: rank 0 of 2 waited for the others in vain: rank 1 does not answer; it has died"
    assert two[0]["left alone"].startswith(message), two[0]["left alone"]


def largest(costs: list[float], ends: tuple[int, ...]) -> float:
    return max(sum(costs[a:b]) for a, b in zip((0, *ends), (*ends, len(costs)), strict=True))


COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(COSTS.flatmap(lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))))
def test_cuts_are_the_best_of_all(case: tuple[list[float], int]) -> None:
    costs, count = case
    ends = balanced(costs, count)
    assert len(ends) == count
    assert ends[-1] == len(costs)
    assert all(a < b for a, b in zip([0, *ends], ends, strict=False))
    best = min(largest(costs, cut) for cut in combinations(range(1, len(costs)), count - 1))
    assert largest(costs, tuple(ends[:-1])) == best


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x + 1.0


def test_stages_are_balanced_by_the_seconds_of_their_modules() -> None:
    for seconds, first in (((9, 3, 3, 3), 1), ((3, 3, 3, 9), 3), ((1, 12, 1, 1, 1), 2)):
        model = nn.Sequential(*(Slow(each / 1000) for each in seconds))
        assert len(stages(model, 2, torch.zeros(1))[0]) == first


def test_what_comes_before_and_after_belongs_to_the_first_and_last_stage() -> None:
    model, inputs, _, _ = runs.cases()["llama"]()
    first, *_, last = stages(model, 4, inputs)
    assert first == ("model.embed_tokens", "model.layers.0")
    assert last == ("model.layers.3", "model.norm", "lm_head")


def test_a_module_that_overwrites_its_input_begins_no_stage() -> None:
    cut = stages(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), 2, torch.zeros(2, 4))
    assert cut == (("0", "1"), ("2",))
    with pytest.raises(ValueError, match=r"cannot be cut into 3: at most 2 of its modules .* \(0, 1, 2\)"):
        stages(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), 3, torch.zeros(2, 4))


class Skipping(nn.Module):
    """The end reads what was there at the beginning: only a cut after ``first`` changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = before = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x + before


def test_models_that_a_cut_would_change_are_refused() -> None:
    with pytest.raises(ValueError, match="returns something else: code between its modules reads a value from before"):
        stages(Skipping(), 3, torch.randn(2, 4))
    act = nn.ReLU()
    shared = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    with pytest.raises(ValueError, match="each called once"):
        stages(shared, 2, torch.randn(2, 4))
    with pytest.raises(ValueError, match="count is 0"):
        stages(shared, 0, torch.randn(2, 4))


def test_a_model_is_left_as_it_was_and_shares_its_parameters() -> None:
    model = runs.Looped()
    names, tensors = list(model.state_dict()), list(model.parameters())
    cut = (("first", "layers.0", "layers.1"), ("layers.2", "layers.3", "head"))
    part = held(model, cut, [1])
    assert list(part.state_dict()) == ["shift", *(n for n in names if n.startswith(("layers.2", "layers.3", "head")))]
    assert part.get_parameter("head.weight") is model.head.weight
    x, scale = runs.rows()[0], 2.0
    hidden = Part(model, cut, 0, model)(None, {"x": x, "scale": scale})
    output = Part(model, cut, 1, model)(hidden, {"x": x, "scale": scale})
    assert torch.equal(output, model(x, scale=scale))
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), tensors, strict=True))
