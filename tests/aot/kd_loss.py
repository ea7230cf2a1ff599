"""Launches of the GPU kernels of ``kd_loss``, and what their machine code must have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tests.aot.code import Launch, recorded, specialised

from potstill.ops.kd_loss import Options
from potstill.ops.triton import kd_loss as host

GPUS = (80, 90, 100)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv", "dkd", "soft_ce", "mse")
REST = ("tail", "renormalize", "partial")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = ("kd_loss_kernel", "topk_kernel", "count_kernel")


class Case(NamedTuple):
    """A launch: ``kind`` is a divergence, "labels" (alpha = 0) or what is assumed of a top-k teacher's rest."""

    kind: str
    dtype: str = "bfloat16"
    sm: int = 90
    classes: int = 32000
    teacher: str | None = None  # dtype, if another
    teacher_classes: int | None = None
    alpha: float = 0.7
    temperature: float = 2.0
    smoothing: float = 0.1
    beta: float = 0.5
    ignore_index: int = -100
    gradient: bool = True
    in_place: bool = False

    @property
    def label(self) -> str:
        default = Case("")._asdict()
        return " ".join(
            f"{k}={v}" for k, v in self._asdict().items() if k in ("kind", "dtype", "sm") or v != default[k]
        )

    @property
    def aligned(self) -> bool:
        return self.classes % 8 == 0 and (self.teacher_classes or self.classes) % 8 == 0


def chosen() -> Iterator[Case]:
    """What CI compiles: every divergence with both usual dtypes and as each of its programs, and each special case."""
    for kind, dtype in itertools.product((*DIVERGENCES, *REST), ("bfloat16", "float32")):
        yield Case(kind, dtype)
    for kind, sm in itertools.product(("forward_kl", "jsd", "tail"), (80, 100)):
        yield Case(kind, sm=sm)
    for kind in DIVERGENCES:
        yield Case(kind, classes=32064, teacher_classes=32000)
    for kind in (*DIVERGENCES, *REST):
        yield Case(kind, alpha=1.0)
        yield Case(kind, gradient=False)
    for kind in ("forward_kl", "jsd", "tail"):
        yield Case(kind, classes=50257)
        yield Case(kind, classes=1000)
    yield Case("labels")
    yield Case("forward_kl", "float16")
    yield Case("forward_kl", temperature=3.0)
    yield Case("forward_kl", in_place=True)
    yield Case("forward_kl", "bfloat16", teacher="float32")
    yield Case("forward_kl", "float32", teacher="bfloat16")
    yield Case("tail", in_place=True)


def every() -> Iterator[Case]:
    """What a user can meet, with one of each kind of size."""
    kinds = (*DIVERGENCES, "labels", *REST)
    for kind, dtype, sm, classes in itertools.product(kinds, ("bfloat16", "float32"), GPUS, (32000, 50257, 1000)):
        for alpha, gradient in ((0.7, True), (1.0, True), (0.7, False)):
            yield Case(kind, dtype, sm, classes, alpha=alpha, gradient=gradient)
    for kind, sm in itertools.product(kinds, GPUS):
        for smaller, larger in ((32000, 32064), (32000, 50257)):
            yield Case(kind, sm=sm, classes=smaller, teacher_classes=larger)
            yield Case(kind, sm=sm, classes=larger, teacher_classes=smaller)
        for student, teacher in itertools.permutations(DTYPES, 2):
            yield Case(kind, student, sm, teacher=teacher)
        for temperature in (1.0, 3.0, 4.0):
            yield Case(kind, sm=sm, temperature=temperature)
        yield Case(kind, "float16", sm)
        yield Case(kind, sm=sm, smoothing=0.0)
        yield Case(kind, sm=sm, in_place=True)


def launches(case: Case) -> list[Launch]:
    """The kernels that the library launches for a case, each with its arguments."""
    rows, k = 64, 64
    top_k = case.kind in REST
    student = torch.empty((rows, case.classes), dtype=DTYPES[case.dtype], device="meta")
    shape = (rows, k if top_k else case.teacher_classes or case.classes)
    teacher = torch.empty(shape, dtype=DTYPES[case.teacher or case.dtype], device="meta")
    options = Options(
        target=torch.empty(rows, dtype=torch.int64, device="meta"),
        teacher_indices=torch.empty(shape, dtype=torch.int64, device="meta") if top_k else None,
        divergence=case.kind if case.kind in DIVERGENCES else "forward_kl",
        rest=case.kind if top_k else "tail",
        temperature=case.temperature,
        alpha=0.0 if case.kind == "labels" else case.alpha,
        label_smoothing=case.smoothing,
        beta=case.beta,
        ignore_index=case.ignore_index,
        need_grad=case.gradient,
    )
    with recorded(host, KERNELS) as found:
        if case.in_place:
            host.launch_in_place(student, teacher, options)
        else:
            host.launch(student, teacher, *options)
    return found


def label(kernel: str, case: Case) -> str:
    """The key of a kernel's counts; those of the count of rows are the same for all cases."""
    return f"{kernel} sm={case.sm}" if kernel == "count_kernel" else f"{kernel} {case.label}"


def faults(case: Case, kernel: str, found: dict[str, Any]) -> list[str]:
    """Rows whose addresses allow it are read and written 128 bits at a time."""
    wrong = []
    if kernel != "count_kernel" and case.aligned:
        half = found["half loads"] and case.teacher is None  # with two dtypes the smaller one's are
        if found["narrow loads"] or half or not found["wide loads"]:
            wrong.append("rows are not loaded 128 bits at a time")
        if case.gradient and not found["wide stores"] and case.teacher is None:
            wrong.append("nor stored")
    return wrong


def recompiled() -> list[str]:
    """Arguments that users change all the time, and for which triton would nonetheless compile anew."""
    wrong = []
    for kind in ("forward_kl", "jsd", "tail"):
        base = Case(kind, temperature=3.0)
        sources = {}
        for change in (
            {}, {"temperature": 5.5}, {"alpha": 0.2}, {"smoothing": 0.3}, {"beta": 0.2}, {"classes": 50304},
            {"ignore_index": 0}, {"ignore_index": 1}, {"ignore_index": 32},
        ):  # fmt: skip
            for kernel, arguments in launches(base._replace(**change)):
                key = specialised(kernel, arguments, 90)["src"].hash()
                if sources.setdefault(kernel.fn.__name__, key) != key:
                    wrong.append(f"{kernel.fn.__name__} {kind} is compiled anew for {change}")
    return wrong
