"""Models under plans, on two and on four processes, against the same models on one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import parallel_layout_runs as runs
from tests import parallel_models as models
from torch import Tensor, nn

from potstill.nn import Int4Linear, Int8Linear, MaskedLinear, SparseLinear
from potstill.parallel import Plan
from potstill.parallel.estimate import estimate, measure
from potstill.parallel.tensor import find

Results = dict[int, list[dict[str, Any]]]  # by number of processes, of each rank: name -> what came of it

CASES = [
    pytest.param(world, text, name, id=f"{text} {name}")
    for world, plans in runs.PLANS.items()
    for text in plans
    for name in runs.models_of(world, Plan.parse(text))
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    quiet = ["-W", "error", "-W", "ignore:FSDP2-wrapped module"]
    command = [sys.executable, *quiet, "-m", "tests.parallel_layout_runs"]
    root = Path(runs.__file__).parent.parent
    path = os.environ | {"PYTHONPATH": str(root / "bench")}
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=root, env=path, stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    try:
        complaints = [rank.communicate(timeout=180)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * 4, complaints
    return {world: [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)] for world in (4, 2)}


class Summed(nn.Module):
    """A layer whose inputs are split over ranks, in one process: each share of the inputs is quantised by itself."""

    def __init__(self, layer: Any, ranks: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_shares(layer, ranks))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        shares = x.chunk(len(self.parts), -1)
        return sum(part(share) for part, share in zip(self.parts, shares, strict=True)) + self.bias


def _shares(layer: Any, ranks: int) -> list[nn.Module]:
    if isinstance(layer, Int4Linear):
        parts = []
        for integers, scale, zero in zip(*(t.chunk(ranks, 1) for t in layer.int4_weight()), strict=True):
            part = Int4Linear(integers.shape[1], len(integers), False, layer.group_size, layer.symmetric)
            part.set_weight(integers, scale, zero)
            parts.append(part)
        return parts
    if isinstance(layer, SparseLinear):  # its results are those of the dense int8 layer
        integers = (layer.to_float().weight.detach() / layer.scale[:, None]).round().to(torch.int8)
    else:
        integers = layer.int8_weight()
    return [Int8Linear.from_integers(share, layer.scale) for share in integers.chunk(ranks, 1)]


def model_of(name: str, plan: Plan, seed: int) -> nn.Module:
    """On one process, what a plan computes."""
    model = models.MODELS[name](seed=seed)
    if plan.tensor > 1 and name in ("int8", "int4", "sparse"):
        for block in model.blocks:
            block.attention.out = Summed(block.attention.out, plan.tensor)
            block.down = Summed(block.down, plan.tensor)
    return model


@cache
def expected(name: str, plan: Plan) -> tuple[float, float, dict[str, Tensor], Tensor]:
    """Loss, norm of the gradients, these when they are clipped, and the logits of the model of another seed."""
    model = model_of(name, plan, 3)
    x, y = models.data()
    loss = runs.cross_entropy(runs.logits_of(model, x), y)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), runs.MAX_NORM)
    with torch.no_grad():
        logits = runs.logits_of(model_of(name, plan, 4), x)
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), float(norm), gradients, logits


def close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert (found - exact).norm() <= tolerance * exact.norm()


def close_gradients(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    """Of each tensor; one whose exact gradient is 0 (as the bias of keys) is compared with the largest."""
    largest = max(float(gradient.norm()) for gradient in exact.values())
    for name, gradient in exact.items():
        error = float((found[name] - gradient).norm())
        assert error <= tolerance * max(float(gradient.norm()), 1e-3 * largest), name


@pytest.mark.parametrize(("world", "text", "name"), CASES)
def test_loss_and_gradients_are_those_of_one_process(results: Results, world: int, text: str, name: str) -> None:
    plan = Plan.parse(text)
    tolerance = 1e-5 if plan.tensor > 1 and name in ("int8", "int4", "sparse") else 1e-6
    loss, norm, gradients, _ = expected(name, plan)
    assert norm > 2 * runs.MAX_NORM
    for rank in results[world]:
        found = rank[f"{text} {name}"]
        assert isinstance(found, dict), found
        assert float(found["loss"]) == pytest.approx(loss, rel=tolerance)
        assert float(found["norm"]) == pytest.approx(norm, rel=tolerance)
        close_gradients(found["gradients"], gradients, tolerance)


@pytest.mark.parametrize(("world", "text", "name"), CASES)
def test_a_state_goes_in_and_comes_out_whole(results: Results, world: int, text: str, name: str) -> None:
    plan = Plan.parse(text)
    *_, logits = expected(name, plan)
    shares = logits.chunk(plan.data)
    for number, rank in enumerate(results[world]):
        found = rank[f"{text} {name}"]
        assert found["state"] is True
        close(found["output"], shares[number // plan.tensor % plan.data], 1e-5)


@pytest.mark.parametrize(("world", "text", "name"), [case for case in CASES if "pp=" not in case.id])
def test_bytes_sent_are_those_of_the_formula(results: Results, world: int, text: str, name: str) -> None:
    plan, model, sample = Plan.parse(text), models.MODELS[name](), models.data()[0][:2]
    formula = estimate(model, plan, find(model, sample, plan), measure(model, sample), models.ROWS, sample).sent
    for rank in results[world]:
        assert rank[f"{text} {name}"]["sent"] == pytest.approx(formula, rel=0.05)


def test_int8_weights_are_gathered_as_integers(results: Results) -> None:
    for rank in results[2]:
        of_float, of_int8 = rank["quarter"]
        assert of_float == 2 * 256 * 256 * 4 / 2
        assert of_int8 / of_float == pytest.approx(0.25, rel=0.03)  # and the sums that packed weights end with


@pytest.mark.parametrize("name", runs.HEADS_OF)
def test_vocabulary_is_split_from_embedding_to_loss(results: Results, name: str) -> None:
    model = models.MODELS[name]()
    x, y = runs.padded()
    loss = runs.cross_entropy(runs.logits_of(model, x), y)
    loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    for rank, columns in zip(results[2], (21, 20), strict=True):
        found = rank[f"vocabulary {name}"]
        assert isinstance(found, dict), found
        assert found["columns"] == columns
        assert float(found["loss"]) == pytest.approx(loss.item(), rel=1e-6)
        close_gradients(found["gradients"], gradients, 1e-6)
        assert found["gradients"].keys() == model.state_dict().keys()
        assert "1/2 of rows" in found["table"]


def test_split_layers_are_realised_on_each_rank(results: Results) -> None:
    model, x = models.MODELS["masked"](), models.data()[0]
    with torch.no_grad():
        exact = model(x)
    for name in [name for name, module in model.named_modules() if isinstance(module, MaskedLinear)]:
        model.set_submodule(name, SparseLinear.from_float(model.get_submodule(name).to_float(), "float"))
    state = model.state_dict()
    for rank in results[2]:
        found = rank["realised"]
        assert isinstance(found, dict), found
        close(found["output"], exact, 1e-6)
        assert found["state"].keys() == state.keys()
        assert all(torch.equal(found["state"][key], state[key]) for key in state)
        up = next(line.split() for line in found["table"].splitlines() if "blocks.*.up" in line)
        assert up == ["blocks.*.up", "2", "MaskedLinear", "1/2", "of", "outputs"]


def test_states_keep_their_dtypes(results: Results) -> None:
    for rank in results[2]:
        assert rank["narrow"] == dict.fromkeys(rank["narrow"], True)
        assert len(rank["narrow"]) == 4


def test_four_save_and_two_and_one_load(results: Results) -> None:
    plan = Plan()
    model = runs.trained(plan)
    with torch.no_grad():
        exact, before = model(models.data()[0]), models.MODELS["plain"]()(models.data()[0])
    assert (exact - before).norm() > 0.01 * before.norm()  # it has learnt something
    for rank in results[4]:
        close(rank["saved"], exact, 1e-5)
    for rank in results[2]:
        assert torch.equal(rank["loaded"], results[2][0]["loaded"])
        close(rank["loaded"], exact, 1e-5)


def test_positions_are_shared(results: Results) -> None:
    torch.manual_seed(0)
    model, (x, y) = models.Tokenwise(), models.data()
    runs.cross_entropy(model(x), y).backward()
    assert torch.equal(torch.cat([rank["positions"]["x"] for rank in results[2]], 1), x)
    for rank in results[2]:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            close(rank["positions"]["gradients"][name], parameter.grad, 1e-6)


MESSAGES = {
    "world": ("dp=3 needs 3 devices but there are 2; with 2 fit: dp=2; tp=2; pp=2",) * 2,
    "weights": ("rank 1 has another model than rank 0",) * 2,
    "sample of one": ("RuntimeError: Expected tensor for argument #1", "rank 0 could not go on, so no rank does"),
    "no sample": ("tp=2 needs sample_input",) * 2,
    "half a pair": ("no row reads as many features",) * 2,
    "role": ("'left', expected one of column, row, replicate",) * 2,
    "head": ("head is 'tail', expected the name of a linear layer",) * 2,
    "positions": ("this model relates them to each other",) * 2,
    "rows": ("3 rows cannot be divided among 2",) * 2,
    "missing": ("the state lacks 'blocks.0.up.weight'",) * 2,
    "unknown": ("the model lacks 'more', which the state has",) * 2,
    "shape": ("norm.weight is torch.float32 [3] in the state",) * 2,
    "blocks": ("blocks.0.attention.q.weight is torch.uint8",) * 2,
    "not applied": ("is not what apply returned",) * 2,
}


@pytest.mark.parametrize("name", runs.failures(0))
def test_all_ranks_raise(results: Results, name: str) -> None:
    for rank, message in zip(results[2], MESSAGES[name], strict=True):
        assert isinstance(rank[f"fails: {name}"], str), rank[f"fails: {name}"]
        assert message in rank[f"fails: {name}"]
