"""Losses split by vocabulary: two processes against one, and the merge of simulated ranks against the definition."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import vocab_parallel_runs as runs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.ops import top_k
from potstill.ops.divergence import DIVERGENCES
from potstill.ops.kd_loss import Options, row_gradients, row_losses
from potstill.ops.topk import REST
from potstill.parallel import VocabShards, vocab_parallel_kd_loss, vocab_parallel_linear_kd_loss, vocab_parallel_top_k
from potstill.parallel import kd_loss as module
from potstill.parallel import rows as rows_module
from potstill.parallel.shards import layout
from potstill.parallel.statistics import Rows, Slice, local_statistics, merge

Results = list[dict[str, Any]]  # of each rank: name -> what came of it


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    files = [folder / "0.json", folder / "1.json"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", runs.__file__, str(rank), str(folder / "meeting"), str(file)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        complaints = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], complaints
    return [json.loads(file.read_text()) for file in files]


def check(results: Results, name: str, collectives: int, tolerance: float = 1e-5) -> None:
    first, second = (rank[name] for rank in results)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert repr(first["loss"]) == repr(second["loss"])  # bit for bit; as text, in which a NaN equals itself
    for result in (first, second):
        assert result["loss error"] <= 1e-6
        assert result["gradient error"] <= tolerance
        assert result["collectives"] == collectives


@pytest.mark.parametrize(("name", "case"), runs.cases().items(), ids=runs.cases())
def test_two_processes(results: Results, name: str, case: runs.Case) -> None:
    rounds = 2 if case.options.get("divergence") in runs.SECOND_ROUND else 1
    if not math.prod(case.shape):
        rounds = 0
    check(results, name, rounds + case.find_shards)


@pytest.mark.parametrize(("name", "case"), runs.linear_cases().items(), ids=runs.linear_cases())
def test_two_processes_from_hidden_states(results: Results, name: str, case: runs.LinearCase) -> None:
    rounds = case.chunks * (2 if case.options.get("divergence") in runs.SECOND_ROUND else 1)
    of_gradient = "hidden" not in case.frozen
    # Bfloat16 gradients are rounded twice, by at most 2^-8 each: when they are complete, and when they are scaled.
    check(results, name, rounds + of_gradient, 8e-3 if case.dtype == torch.bfloat16 else 1e-5)


MESSAGES = {
    "rows differ between the ranks": ("have [3, 4] rows", "have [3, 4] rows"),
    "rows differ on rank 1": ("rank 1 of the group has refused", "teacher_shard [4, 25]"),
    "no columns at all": ("0 columns of the student", "0 columns of the student"),
    "starts differ": ("rank 1 starts at column 25", "rank 1 starts at column 25"),
    "column on two ranks": ("must be on one rank", "must be on one rank"),
    "bad option": ("temperature is 0.0", "temperature is 0.0"),
    "label": ("label 50; expected labels from 0 to 49", "label 50; expected labels from 0 to 49"),
    "label with known shards": ("label 50", "label 50"),
    "top k": ("class 50; expected 0 to 49", "class 50; expected 0 to 49"),
    "top k of the jsd": ("jsd needs the teacher's logits", "jsd needs the teacher's logits"),
    "DTensor": ("pass its to_local()", "pass its to_local()"),
    "linear DTensor": ("pass its to_local()", "pass its to_local()"),
    "shards": ("25 columns from 40 on", "25 columns from 40 on"),
    "linear rows differ on rank 1": ("rank 1 of the group has refused", "teacher_hidden [4, 8]"),
    "linear features": ("its weight [25, 9]", "its weight [25, 9]"),
    "linear bias": ("bias has shape [24]", "bias has shape [24]"),
    "linear none": ("expected mean or sum", "expected mean or sum"),
    "linear memory": ("max_memory_bytes is 0", "max_memory_bytes is 0"),
    "linear label": ("label 50", "label 50"),
}


@pytest.mark.parametrize("name", runs.failures(0))
def test_all_ranks_raise(results: Results, name: str) -> None:
    for rank, message in zip(results, MESSAGES[name], strict=True):
        assert isinstance(rank[name], str), rank[name]
        assert rank[name].startswith(("ValueError: ", "TypeError: "))
        assert message in rank[name]


def simulated(student: Tensor, teacher: Tensor, o: Options, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Losses and gradients of ranks with these numbers of columns, in one process."""
    shards = [VocabShards(sum(sizes[:rank]), sum(sizes), sum(sizes)) for rank in range(len(sizes))]
    teachers = [teacher] * len(sizes) if o.teacher_indices is not None else teacher.split(sizes, -1)
    parts = [Slice(s, t, o, place) for s, t, place in zip(student.split(sizes, -1), teachers, shards, strict=True)]
    merged = merge(stacked([local_statistics(part) for part in parts]), o)
    if rows_module.needs_second_round(o):
        second = stacked([rows_module.second_statistics(part, merged) for part in parts])
        merged |= {name: ranks.sum(0) for name, ranks in second.items()}
    gradients = [rows_module.local_gradient(part, merged) for part in parts]
    return rows_module.row_losses(merged, o, shards[0]), torch.cat(gradients, -1)


def stacked(ranks: list[Rows]) -> Rows:
    return {name: torch.stack([rank[name] for rank in ranks]) for name in ranks[0]}


def logits(rows: int, classes: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows * 1009 + classes)
    student, teacher = (torch.randn(rows, classes, generator=random, dtype=torch.float64) * scale for _ in range(2))
    return student, teacher, torch.randint(classes, (rows,), generator=random)


@settings(deadline=None, max_examples=120)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    smoothing=st.sampled_from([0.0, 0.2]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_merge_of_any_ranks_is_the_definition(
    sizes: list[int], divergence: str, temperature: float, alpha: float, smoothing: float, scale: float
) -> None:
    student, teacher, target = logits(4, sum(sizes), scale)
    o = Options(target, divergence=divergence, temperature=temperature, alpha=alpha, label_smoothing=smoothing)
    losses, gradient = simulated(student, teacher, o, sizes)
    torch.testing.assert_close(losses, row_losses(student, teacher, o), rtol=1e-11, atol=1e-14 * max(scale, 1.0))
    torch.testing.assert_close(gradient, row_gradients(student, teacher, o), rtol=1e-10, atol=1e-13)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    share=st.floats(0.0, 1.0),
    rest=st.sampled_from(REST),
    divergence=st.sampled_from(["forward_kl", "soft_ce"]),
    twice=st.booleans(),
)
def test_merge_of_top_k_is_the_definition(
    sizes: list[int], share: float, rest: str, divergence: str, twice: bool
) -> None:
    student, teacher, target = logits(4, sum(sizes))
    log_probs, indices = top_k(teacher, 1 + int(share * (sum(sizes) - 1)), 2.0)
    if twice:
        indices[:, -1] = indices[:, 0]
    o = Options(target, indices, rest=rest, divergence=divergence, temperature=2.0, alpha=0.6)
    losses, gradient = simulated(student, log_probs, o, sizes)
    torch.testing.assert_close(losses, row_losses(student, log_probs, o), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, row_gradients(student, log_probs, o), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_small_divergences_keep_their_digits(offset: float) -> None:
    # KL of a student that is close to its teacher, about 1e-3: a loss of sums that are 1000 times as large.
    teacher = torch.randn(16, 4000) * 3.0 + offset
    student = teacher + torch.randn(16, 4000) * 0.05 - 2.0 * offset
    losses, gradient = simulated(student, teacher, Options(), [1000, 1700, 0, 1300])
    exact = row_losses(student.double(), teacher.double(), Options())
    assert 5e-4 < float(exact.mean()) < 2e-3
    assert float(((losses - exact) / exact).abs().max()) < 1e-4
    expected = row_gradients(student.double(), teacher.double(), Options())
    assert float((gradient - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_weight_that_vanishes_counts_as_absent() -> None:
    # The second rank's teacher lies 1e4 below: e^-1e4 is 0, whatever the student has there.
    student, teacher, _ = logits(3, 8)
    teacher[:, 5:] -= 1e4
    few, _ = simulated(student.float(), teacher.float(), Options(), [5, 3])
    student[:, 6] = -math.inf
    dropped = student[:, [0, 1, 2, 3, 4, 5, 7]], teacher[:, [0, 1, 2, 3, 4, 5, 7]]
    losses, _ = simulated(student.float(), teacher.float(), Options(), [5, 3])
    assert bool(few.isfinite().all())
    torch.testing.assert_close(losses, row_losses(*dropped, Options()), rtol=1e-6, atol=1e-6)


def test_rows_in_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, target = logits(11, 30)
    weight = torch.rand(11, dtype=torch.float64)
    log_probs, indices = top_k(teacher, 4)

    def values() -> list[Tensor]:
        found = []
        for t, options in ((teacher, {"divergence": "jsd"}), (log_probs, {"teacher_indices": indices})):
            leaf = student.clone().requires_grad_()
            loss = vocab_parallel_kd_loss(leaf, t, target, alpha=0.5, row_weight=weight, **options)
            loss.backward()
            assert leaf.grad is not None
            found += [loss.detach(), leaf.grad]
        return found

    whole = values()
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * 30)
    for value, expected in zip(values(), whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-16)


def test_layout_of_shards() -> None:
    assert layout([(3, 3), (4, 6)], 1) == VocabShards(3, 7, 9)
    assert layout([(3, 3), (0, 0), (4, 2), (5, 0)], 3) == VocabShards(7, 12, 5)
    assert layout([(0, 0), (4, 4)], 1) == VocabShards(0, 4, 4)
    for sizes in ([(3, 4), (4, 3)], [(5, 2), (0, 4)], [(3, 0), (0, 3)], [(0, 0), (4, 0)]):
        with pytest.raises(ValueError, match=r"vocab_parallel: "):
            layout(sizes, 0)


def test_gradient_is_scaled_and_defined_once() -> None:
    student, teacher, target = logits(5, 20)
    leaf = student.requires_grad_()
    loss = vocab_parallel_kd_loss(leaf, teacher, target, alpha=0.5)
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 0.25, leaf, retain_graph=True)
    torch.testing.assert_close(scaled, once * 0.25)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with torch.no_grad():
        assert not vocab_parallel_kd_loss(leaf, teacher, target, alpha=0.5).requires_grad


def test_float16_gradients_survive_scaling() -> None:
    student, teacher, _ = logits(64, 500)
    half = student.half().requires_grad_()
    (vocab_parallel_kd_loss(half, teacher.half()) * 2.0**16).backward()
    expected = row_gradients(student.half().double(), teacher.half().double(), Options()) * 2.0**10
    assert half.grad is not None
    assert half.grad.dtype == torch.float16
    torch.testing.assert_close(half.grad.double(), expected, rtol=2e-3, atol=1e-6)


def test_one_row() -> None:
    student, teacher, target = logits(1, 20)
    log_probs, indices = top_k(teacher, 3)
    for t, chosen in ((teacher, None), (log_probs, indices)):
        whole = vocab_parallel_kd_loss(student, t, target, teacher_indices=chosen, alpha=0.5, reduction="none")
        row = None if chosen is None else chosen[0]
        one = vocab_parallel_kd_loss(student[0], t[0], target[0], teacher_indices=row, alpha=0.5, reduction="none")
        assert one.shape == ()
        assert torch.equal(one, whole[0])


def test_float_normalizer() -> None:
    student, teacher, target = logits(6, 20)
    total = vocab_parallel_kd_loss(student, teacher, target, alpha=0.5, reduction="sum")
    torch.testing.assert_close(vocab_parallel_kd_loss(student, teacher, target, alpha=0.5, normalizer=8.0), total / 8.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's own, both
def test_compiles() -> None:
    student, teacher, target = logits(5, 60)

    def step(s: Tensor) -> Tensor:
        return vocab_parallel_kd_loss(s * 2.0, teacher, target, alpha=0.5) * 3.0

    compiled: Callable[[Tensor], Tensor] = torch.compile(step, backend="aot_eager")
    ours, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    compiled(ours).backward()
    step(expected).backward()
    torch.testing.assert_close(ours.grad, expected.grad)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.nbytes)
        return result


def linear_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((64, 8), (1000, 8), (64, 8), (1000, 8))
    return [torch.randn(shape).to(dtype).requires_grad_(number < 2) for number, shape in enumerate(shapes)]


def test_no_logits_of_all_rows() -> None:
    inputs = linear_inputs()
    with Largest() as seen:
        vocab_parallel_linear_kd_loss(*inputs, max_memory_bytes=64 * 1000 * 8, temperature=2.0).backward()
    assert seen.size <= 8 * 1000 * 8  # a chunk of 8 rows in float64, for sums


def test_autocast_leaves_the_logits_alone() -> None:
    hidden, head, teacher_hidden, teacher_head = linear_inputs()
    expected = vocab_parallel_linear_kd_loss(hidden, head, teacher_hidden, teacher_head)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vocab_parallel_linear_kd_loss(hidden, head, teacher_hidden, teacher_head), expected)


def test_bfloat16_heads_have_float32_logits() -> None:
    # A student close to its teacher: with logits rounded to bfloat16 this gradient is wrong by more than a third.
    hidden, head, _, _ = linear_inputs(torch.bfloat16)
    near = (hidden.float() + 0.02 * torch.randn(64, 8)).bfloat16().detach()
    vocab_parallel_linear_kd_loss(hidden, head, near, head.detach()).backward()
    exact = hidden.detach().double().requires_grad_()
    weight = head.detach().double()
    row_losses(exact @ weight.t(), near.double() @ weight.t(), Options()).mean().backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    gap = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert float(gap) < 4e-3  # the rounding of the gradient itself


def test_the_measure_of_errors_is_not_blind() -> None:
    one, nan = torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan])
    assert runs.error(one, one, torch.tensor(1.0)) == 0.0
    assert runs.error(nan, nan, torch.tensor(1.0)) == 0.0
    assert runs.error(one, nan, torch.tensor(1.0)) == math.inf
    assert runs.error(nan, one, torch.tensor(1.0)) == math.inf
    assert runs.error(one, torch.tensor([1.0, math.inf]), torch.tensor(1.0)) == math.inf
    assert runs.error(one, torch.tensor([1.0, 2.5]), torch.tensor(2.0)) == 0.25


@pytest.mark.parametrize("name", runs.TOP)
def test_top_k_is_that_of_whole_logits(name: str, results: Results) -> None:
    _, k = runs.TOP[name]
    log_probs, indices = top_k(runs.top_logits().double(), k, 2.0)
    for rank in results:
        found = rank[f"top {name}"]
        torch.testing.assert_close(torch.tensor(found["probs"]), log_probs.exp().float(), rtol=3e-6, atol=0.0)
        possible = log_probs > -torch.inf
        assert torch.equal(torch.tensor(found["indices"])[possible], indices[possible])


def test_top_k_of_too_few_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 4; expected 1 to 3"):
        vocab_parallel_top_k(torch.zeros(2, 3), 4)
