"""What the tests of the vocabulary-parallel losses run on two processes. As a program: one rank, which runs it all."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from potstill.ops import kd_loss, top_k
from potstill.ops.divergence import DIVERGENCES
from potstill.ops.kd_loss import Options, divisor, row_losses
from potstill.ops.topk import REST
from potstill.parallel import (
    VocabShards,
    vocab_parallel_kd_loss,
    vocab_parallel_linear_kd_loss,
    vocab_parallel_top_k,
)

CLASSES, ROWS = 50, 12
EVEN, UNEVEN, NONE_FIRST, NONE_LAST = (25, 25), (13, 37), (0, 50), (50, 0)
SECOND_ROUND = ("jsd", "tv")
TWO_CHUNKS = 64 * 32 * ROWS // 2  # bytes of ROWS / 2 rows of a shard of at most 32 columns


class Case(NamedTuple):
    """A loss of two ranks with these numbers of columns; ``change`` edits the student's and the teacher's logits."""

    sizes: tuple[int, int] = UNEVEN
    teacher_sizes: tuple[int, int] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    change: Callable[[Tensor, Tensor, Tensor], None] | None = None
    shape: tuple[int, ...] = (3, 4)
    k: int = 0
    dtype: torch.dtype = torch.float32
    find_shards: bool = False


def _masked(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    target.remainder_(10)  # so that no label is masked
    student[..., 10::3] = teacher[..., 10::3] = -math.inf


def _teacher_masked(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    teacher[..., ::3] = -math.inf


def _half_absent(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """In some rows a whole rank has nothing but -inf, at one side or at both."""
    target[0] = 20
    target[1] = 3
    student[0, ..., :13] = teacher[0, ..., :13] = -math.inf
    student[1, ..., 13:] = teacher[1, ..., 13:] = -math.inf
    teacher[2, 0, :13] = -math.inf


def _student_masked(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    student[0, 1, 20] = student[1, 1, :13] = -math.inf


def _spoilt(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    student[0, 1, 20], teacher[1, 2, 3] = math.nan, math.nan
    student[2, 3], teacher[2, 2] = -math.inf, -math.inf


def _spoilt_but_ignored(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    target[0, 1] = target[1, 2] = -100
    student[0, 1, 20], teacher[1, 2] = math.nan, -math.inf


def _offset(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    student += 1000.0
    teacher -= 1000.0


def _lowest(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    student[..., 13:] = teacher[..., 13:] = torch.finfo(student.dtype).min
    target.remainder_(13)


def _labels_from(low: int, high: int) -> Callable[[Tensor, Tensor, Tensor], None]:
    def change(student: Tensor, teacher: Tensor, target: Tensor) -> None:
        target.remainder_(high - low).add_(low)

    return change


def cases() -> dict[str, Case]:
    """By name; a case of any divergence is repeated for each."""
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0] * 3).view(3, 4)
    found = {"labels only": Case(options={"alpha": 0.0, "label_smoothing": 0.1, "teacher": None})}
    for name in DIVERGENCES:
        mixed = {"divergence": name, "temperature": 2.0, "alpha": 0.7, "label_smoothing": 0.1, "beta": 0.3}
        plain = mixed | {"label_smoothing": 0.0}
        found |= {
            f"{name} even": Case(EVEN, options=mixed),
            f"{name} uneven": Case(options=mixed | {"temperature": 3.0}),
            f"{name} T=1 alpha=1": Case(options={"divergence": name}),
            f"{name} nothing on rank 0": Case(NONE_FIRST, options=mixed),
            f"{name} nothing on rank 1": Case(NONE_LAST, options=mixed),
            f"{name} larger teacher": Case((25, 25), (25, 40), mixed),
            f"{name} smaller teacher": Case((13, 37), (13, 20), mixed),
            f"{name} teacher on rank 0 alone": Case((25, 25), (20, 0), mixed),
            f"{name} masked": Case(options=plain, change=_masked),
            f"{name} one rank all -inf": Case(options=plain, change=_half_absent),
            f"{name} lowest": Case(options=plain, change=_lowest),
            f"{name} spoilt but ignored": Case(options=plain, change=_spoilt_but_ignored),
            f"{name} labels on rank 0": Case(options=mixed, change=_labels_from(0, 13)),
            f"{name} labels on rank 1": Case(options=mixed, change=_labels_from(13, 50)),
            f"{name} reduction sum": Case(options=mixed | {"reduction": "sum"}),
            f"{name} reduction none": Case(options=mixed | {"reduction": "none"}),
            f"{name} row weights": Case(options=mixed | {"row_weight": weight}),
            f"{name} normalizer": Case(options=mixed | {"normalizer": torch.tensor(40)}),
            f"{name} shards unknown": Case(options=mixed, find_shards=True),
            f"{name} no rows": Case(options=mixed, shape=(0,)),
            f"{name} float64": Case(options=mixed, dtype=torch.float64),
        }
        if name != "mse":  # the square of 2000 has no digits left for the difference
            found[f"{name} offset"] = Case(options=plain, change=_offset)
    for name in ("forward_kl", "soft_ce", "tv"):
        options = {"divergence": name, "temperature": 2.0, "reduction": "none", "target": None}
        found[f"{name} teacher -inf"] = Case(options=options, change=_teacher_masked)
        found[f"{name} student -inf"] = Case(options=options, change=_student_masked)
        found[f"{name} spoilt"] = Case(options=options, change=_spoilt)
    for rest in REST:
        for name in ("forward_kl", "soft_ce"):
            options = {"divergence": name, "rest": rest, "temperature": 2.0, "alpha": 0.7}
            label = f"top k {rest} {name}"
            found |= {
                f"{label} even": Case(EVEN, options=options, k=9),
                f"{label} one class": Case(options=options, k=1),
                f"{label} all classes": Case(options=options, k=CLASSES),
                f"{label} nothing on rank 0": Case(NONE_FIRST, options=options, k=9),
                f"{label} reduction none": Case(options=options | {"reduction": "none"}, k=9),
                f"{label} masked": Case(options=options, change=_masked, k=9),
                f"{label} on rank 0": Case(options=options, change=_teacher_prefers(0), k=9),
                f"{label} on rank 1": Case(options=options, change=_teacher_prefers(1), k=9),
            }
    return found


def _teacher_prefers(rank: int) -> Callable[[Tensor, Tensor, Tensor], None]:
    def change(student: Tensor, teacher: Tensor, target: Tensor) -> None:
        teacher[..., slice(13) if rank == 0 else slice(13, 50)] += 30.0

    return change


def split(x: Tensor, sizes: tuple[int, int], rank: int, dim: int = -1) -> Tensor:
    return x.split(sizes, dim)[rank].clone()


def inputs(case: Case) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Whole logits of student and teacher (or log-probabilities of its top k), and the other arguments."""
    random = torch.Generator().manual_seed(5)
    teacher_sizes = case.teacher_sizes or case.sizes
    student, teacher = (
        torch.randn((*case.shape, sum(sizes)), generator=random).to(case.dtype) * 3.0
        for sizes in (case.sizes, teacher_sizes)
    )
    target = torch.randint(sum(case.sizes), case.shape, generator=random)
    if case.change is not None:
        case.change(student, teacher, target)
    if target.numel() and case.options.get("target", target) is target:
        target.view(-1)[-1] = -100
    options = {"target": target} | dict(case.options)
    if case.k:
        teacher, indices = top_k(teacher, case.k, options["temperature"])
        if case.k > 2:  # a class that is given twice, and some with probability 0
            indices[..., 1] = indices[..., 0]
            teacher[..., 2::4] = -math.inf
        options["teacher_indices"] = indices
    return student, teacher, options


def upstream(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)


def error(value: Tensor, expected: Tensor, relative_to: Tensor) -> float:
    """The largest; infinite where only one is a NaN, or an infinity is not matched."""
    value, expected = value.double(), expected.double()
    same = (value == expected) | (value.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (value - expected).abs() / relative_to)
    return float(gap.nan_to_num(math.inf, math.inf).max()) if gap.numel() else 0.0


def run_case(case: Case, rank: int) -> dict[str, Any]:
    """Loss and gradient of this rank, against the definition in float64 on one process."""
    student, teacher, options = inputs(case)
    options.pop("teacher", None)
    exact, exact_gradient = kd_loss.reference(student.double(), teacher.double(), *Options(**options))
    exact_gradient = exact_gradient * upstream(exact).unsqueeze(-1)
    teacher_sizes = case.teacher_sizes or case.sizes
    shards = VocabShards(sum(case.sizes[:rank]), sum(case.sizes), sum(teacher_sizes))
    leaf = split(student, case.sizes, rank).requires_grad_()
    part = teacher if case.k else split(teacher, teacher_sizes, rank)
    target = options.pop("target")
    before = Counter.calls
    loss = vocab_parallel_kd_loss(leaf, part, target, shards=None if case.find_shards else shards, **options)
    loss.backward(upstream(loss))
    calls = Counter.calls - before
    assert leaf.grad is not None
    assert leaf.grad.dtype == leaf.dtype == loss.dtype
    largest = exact_gradient.nan_to_num(0.0).abs().max() if exact_gradient.numel() else torch.tensor(1.0)
    return {
        "loss": loss.detach().flatten().tolist(),
        "loss error": error(loss.detach(), exact, exact.abs().clamp(min=1e-3)),
        "gradient error": error(leaf.grad, split(exact_gradient, case.sizes, rank), largest),
        "collectives": calls,
    }


class LinearCase(NamedTuple):
    """As :class:`Case`, from hidden states and heads; ``frozen`` names what needs no gradient."""

    sizes: tuple[int, int] = (20, 30)
    teacher_sizes: tuple[int, int] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    dtype: torch.dtype = torch.float32
    bias: bool = True
    frozen: tuple[str, ...] = ()
    spoilt: bool = False
    max_memory_bytes: int = TWO_CHUNKS
    chunks: int = 2


def linear_cases() -> dict[str, LinearCase]:
    """By name."""
    found = {}
    for name in DIVERGENCES:
        options = {"divergence": name, "temperature": 2.0, "alpha": 0.7, "label_smoothing": 0.1, "beta": 0.3}
        found |= {
            f"linear {name}": LinearCase(options=options),
            f"linear {name} other vocabulary": LinearCase((25, 25), (25, 36), options),
        }
    options = {"temperature": 2.0, "alpha": 0.7}
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0] * 3).view(3, 4)
    return found | {
        "linear one chunk": LinearCase(options=options, max_memory_bytes=1 << 30, chunks=1),
        "linear one row at a time": LinearCase(options=options, max_memory_bytes=1, chunks=ROWS),
        "linear nothing on rank 1": LinearCase((50, 0), options=options),
        "linear bfloat16": LinearCase(options=options, dtype=torch.bfloat16),
        "linear without bias": LinearCase(options=options, bias=False),
        "linear frozen head": LinearCase(options=options, frozen=("weight", "bias")),
        "linear frozen body": LinearCase(options=options, frozen=("hidden",)),
        "linear labels only": LinearCase(options={"alpha": 0.0}),
        "linear all frozen": LinearCase(options=options, frozen=("hidden", "weight", "bias")),
        "linear spoilt but ignored": LinearCase(options=options, spoilt=True),
        "linear sum": LinearCase(options=options | {"reduction": "sum"}),
        "linear row weights": LinearCase(options=options | {"row_weight": weight, "normalizer": torch.tensor(9.0)}),
    }


def run_linear_case(case: LinearCase, rank: int) -> dict[str, Any]:
    """Loss and gradients of this rank, against autograd through the definition in float64."""
    random = torch.Generator().manual_seed(6)
    teacher_sizes = case.teacher_sizes or case.sizes
    columns, teacher_columns = sum(case.sizes), sum(teacher_sizes)
    shapes = ((3, 4, 16), (columns, 16), (columns,), (3, 4, 24), (teacher_columns, 24), (teacher_columns,))
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = (
        torch.randn(shape, generator=random).to(case.dtype) for shape in shapes
    )
    target = torch.randint(columns, (3, 4), generator=random)
    target[2, 3] = -100
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    s = exact[0] @ exact[1].t() + (exact[2] if case.bias else 0.0)
    t = teacher_hidden.double() @ teacher_weight.double().t() + (teacher_bias.double() if case.bias else 0.0)
    o = Options(target=target, **case.options)
    expected = row_losses(s, t, o).sum() / divisor(ROWS, o) * 3.0
    expected.backward()
    if case.spoilt:
        hidden[2, 3], teacher_hidden[2, 3] = math.nan, math.inf
    leaves = {
        "hidden": hidden.clone(),
        "weight": split(weight, case.sizes, rank, 0),
        "bias": split(bias, case.sizes, rank, 0),
    }
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in case.frozen)
    before = Counter.calls
    loss = 3.0 * vocab_parallel_linear_kd_loss(
        leaves["hidden"],
        leaves["weight"],
        teacher_hidden,
        split(teacher_weight, teacher_sizes, rank, 0),
        target,
        bias_shard=leaves["bias"] if case.bias else None,
        teacher_bias_shard=split(teacher_bias, teacher_sizes, rank, 0) if case.bias else None,
        shards=VocabShards(sum(case.sizes[:rank]), columns, teacher_columns),
        max_memory_bytes=case.max_memory_bytes,
        **case.options,
    )
    if loss.requires_grad:
        loss.backward()
    calls = Counter.calls - before
    assert loss.dtype == torch.float32
    errors = []
    for name, leaf, whole in zip(leaves, leaves.values(), exact, strict=True):
        if name in case.frozen or (name == "bias" and not case.bias):
            assert leaf.grad is None
            continue
        assert leaf.grad is not None
        assert leaf.grad.dtype == case.dtype
        assert whole.grad is not None
        part = whole.grad if name == "hidden" else split(whole.grad, case.sizes, rank, 0)
        errors.append(error(leaf.grad, part, whole.grad.abs().max()))
    result = {"loss": [loss.item()], "loss error": error(loss.detach(), expected.detach(), expected.detach().abs())}
    return result | {"gradient error": max(errors, default=0.0), "collectives": calls}


def failures(rank: int) -> dict[str, Callable[[], object]]:
    """What must raise on both ranks, though only one of them may be at fault."""
    labels, x = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 25)
    known = VocabShards(25 * rank, 50, 50)
    wrong = torch.tensor([0, 50, 1])
    rows = 3 if rank == 0 else 4
    hidden, head = torch.zeros(3, 8), torch.zeros(25, 8)

    def spread(x: Tensor) -> Tensor:
        return DTensor.from_local(x, init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False)

    linear = vocab_parallel_linear_kd_loss
    return {
        "rows differ between the ranks": lambda: vocab_parallel_kd_loss(torch.zeros(rows, 25), torch.zeros(rows, 25)),
        "rows differ on rank 1": lambda: vocab_parallel_kd_loss(x, torch.zeros(rows, 25)),
        "no columns at all": lambda: vocab_parallel_kd_loss(x[:, :0], x[:, :0]),
        "starts differ": lambda: vocab_parallel_kd_loss(x, x[:, : 20 + 5 * rank]),
        "column on two ranks": lambda: vocab_parallel_kd_loss(x[:, : 10 * rank], x[:, : 10 - 10 * rank]),
        "bad option": lambda: vocab_parallel_kd_loss(x, x, temperature=0.0),
        "label": lambda: vocab_parallel_kd_loss(x, x, wrong, alpha=0.5),
        "label with known shards": lambda: vocab_parallel_kd_loss(x, x, wrong, alpha=0.5, shards=known),
        "top k": lambda: vocab_parallel_kd_loss(
            x, torch.full((3, 1), -1.0), teacher_indices=wrong.unsqueeze(-1), shards=known
        ),
        "top k of the jsd": lambda: vocab_parallel_kd_loss(
            x, torch.full((3, 1), -1.0), teacher_indices=labels.unsqueeze(-1), divergence="jsd"
        ),
        "DTensor": lambda: vocab_parallel_kd_loss(spread(x), x),
        "linear DTensor": lambda: linear(hidden, spread(head), hidden, head),
        "shards": lambda: vocab_parallel_kd_loss(x, x, shards=VocabShards(40, 50, 50)),
        "linear rows differ on rank 1": lambda: linear(hidden, head, torch.zeros(rows, 8), head),
        "linear features": lambda: linear(hidden, head, hidden, torch.zeros(25, 9)),
        "linear bias": lambda: linear(hidden, head, hidden, head, bias_shard=torch.zeros(24)),
        "linear none": lambda: linear(hidden, head, hidden, head, reduction="none"),
        "linear memory": lambda: linear(hidden, head, hidden, head, max_memory_bytes=0),
        "linear label": lambda: linear(hidden, head, hidden, head, wrong, alpha=0.5),
    }


class Counter:
    """Counts the collectives of this process."""

    calls = 0

    @classmethod
    def watch(cls) -> None:
        for name in ("all_gather", "all_reduce"):
            setattr(dist, name, cls._counted(getattr(dist, name)))

    @classmethod
    def _counted(cls, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            cls.calls += 1
            return collective(*args, **kwargs)

        return counted


TOP = {"even": (EVEN, 7), "uneven": (UNEVEN, 20), "none first": (NONE_FIRST, 5), "all": (UNEVEN, CLASSES)}


def top_logits() -> Tensor:
    """With rows whose likeliest classes are all on one rank, and masked ones."""
    logits = torch.randn(3, 4, CLASSES, generator=torch.Generator().manual_seed(3)) * 3
    logits[0, :2, :13] += 30.0
    logits[1, :2, 13:] += 30.0
    logits[2, 0, ::3] = -math.inf
    return logits


def run_top_k(sizes: tuple[int, int], k: int, rank: int) -> dict[str, Any]:
    """Probabilities and classes, at temperature 2."""
    log_probs, indices = vocab_parallel_top_k(split(top_logits(), sizes, rank), k, 2.0)
    return {"probs": log_probs.exp().tolist(), "indices": indices.tolist()}


def _outcome(run: Callable[[], object]) -> object:
    try:
        return run()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


def main(rank: int, meeting: str, results: str) -> None:
    """One rank of two: everything above, in an order that both share; what comes of it goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    Counter.watch()
    found = {name: _outcome(run) for name, run in failures(rank).items()}
    found |= {name: _outcome(lambda case=case: run_case(case, rank)) for name, case in cases().items()}
    found |= {name: _outcome(lambda case=case: run_linear_case(case, rank)) for name, case in linear_cases().items()}
    found |= {f"top {name}": _outcome(lambda case=case: run_top_k(*case, rank)) for name, case in TOP.items()}
    with open(results, "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
