"""The chunk loop of :data:`potstill.ops.linear_kd_loss`: logits exist for the rows of one chunk at a time.

For the c rows of a chunk, with X their hidden states, W and b the student's head, and a prime for the teacher's::

    S  = X W^T + b         [c, classes], overwritten by G, the gradient of the loss by S
    S' = X' W'^T + b'      [c, classes'], unless the teacher's logits or its top k are given
    dX = G W      dW += G^T X      db += the sum of G's rows

All of it is float32 (float64 if an input is), also for half-precision inputs: G is a difference of probabilities, so
where student and teacher nearly agree, logits rounded to bfloat16 would make it wrong by half of its size.

Each chunk reads W and W' again, and reads and writes all of dW: chunks should have as many rows as memory allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from potstill.ops.kd_loss import Options, divisor, kd_loss, kd_loss_in_place
from potstill.ops.memory import empty

Head = Callable[[Tensor], Tensor]
Part = slice | Tensor  # some of the flattened rows

_MEMORY = {"cpu": 32 << 20}  # for a chunk's logits, unless the caller decides
_MEMORY_ELSEWHERE = 1 << 30
_ROWS = 256  # with fewer, a CPU's matrix products lose a fifth of their speed and more to bringing W in
_SHARE = 1 / 4  # of all rows: logits of both sides are then a twelfth of the six times all rows' that autograd needs
_KNOWN = ("cpu",)  # where values can be looked at without waiting
_WIDE_PRODUCTS = ("cuda",)  # where torch.mm takes out_dtype
_BLOCK = 16 << 20  # bytes of a half-precision weight's widened part and of 256 rows' logits; 4 MiB cost twice the time
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Arguments(NamedTuple):
    """The arguments of :data:`potstill.ops.linear_kd_loss`, with the schema's defaults."""

    student: Tensor
    weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor | None = None
    target: Tensor | None = None
    bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    teacher_indices: Tensor | None = None
    row_weight: Tensor | None = None
    normalizer: Tensor | None = None
    divergence: str = "forward_kl"
    beta: float = 0.5
    rest: str = "tail"
    temperature: float = 1.0
    alpha: float = 1.0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    max_memory_bytes: int | None = None
    need_hidden_grad: bool = True
    need_weight_grad: bool = True
    need_bias_grad: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """What everything is computed in."""
        tensors = (self.student, self.weight, self.teacher, self.teacher_weight, self.bias, self.teacher_bias)
        wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
        return torch.float64 if wide else torch.float32

    @property
    def wants_bias(self) -> bool:
        """Whether there is a bias and its gradient is asked for."""
        return self.bias is not None and self.need_bias_grad

    def flat(self) -> Arguments:
        """The same with a single dimension of rows."""
        k = self.teacher_indices
        return self._replace(
            student=self.student.reshape(-1, self.student.shape[-1]),
            teacher=self.teacher.reshape(-1, self.teacher.shape[-1]),
            target=None if self.target is None else self.target.reshape(-1),
            row_weight=None if self.row_weight is None else self.row_weight.reshape(-1),
            teacher_indices=None if k is None else k.reshape(-1, k.shape[-1]),
        )

    def options(self, part: Part | None = None) -> Options:
        """Those of :data:`potstill.ops.kd_loss`, for a part of the flat rows or for all."""

        def rows(x: Tensor | None) -> Tensor | None:
            return x if x is None or part is None else x[part]

        return Options(
            target=rows(self.target),
            teacher_indices=rows(self.teacher_indices),
            row_weight=rows(self.row_weight),
            normalizer=self.normalizer,
            divergence=self.divergence,
            beta=self.beta,
            rest=self.rest,
            temperature=self.temperature,
            alpha=self.alpha,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            need_grad=self.need_hidden_grad or self.need_weight_grad or self.wants_bias,
        )

    def counting(self) -> Tensor | None:
        """Which rows count: those with a label and a weight that is not 0. None if all do."""
        labelled = None if self.target is None else self.target != self.ignore_index
        if self.row_weight is None:
            return labelled
        weighs = self.row_weight != 0
        return weighs if labelled is None else weighs & labelled


def gradient_dtype(x: Tensor) -> torch.dtype:
    """Of the gradient by ``x`` before backward scales it: in float16 it could vanish until then."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def rows_per_chunk(rows: int, row_bytes: int, limit: int) -> int:
    """The size of the fewest chunks of at most ``limit`` bytes, at least one row each, as equal as possible.

    >>> rows_per_chunk(1000, 256_000, 64 << 20)  # 262 would fit
    250
    """
    chunks = math.ceil(rows / max(1, limit // row_bytes))
    return math.ceil(rows / max(1, chunks))


@torch.no_grad()  # autograd is not for products into given memory
def run_chunks(a: Arguments, head: Head | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients by the student's hidden states, weight and bias ([0] where none is asked for).

    ``head`` makes the teacher's logits from rows of ``teacher``, in place of ``teacher_weight``. Checks nothing.
    """
    shape = a.student.shape
    a = a.flat()
    if a.reduction == "mean":  # of all rows: the chunks' losses are their shares of it
        by = divisor(a.student.shape[0], a.options())
        a = a._replace(normalizer=by if isinstance(by, Tensor) else torch.full((), by, device=a.student.device))
    loop = _Loop(a, head)
    for part in loop.parts():
        loop.step(part)
    hidden, weight, bias = loop.gradients()
    return loop.loss, hidden.view(shape) if a.need_hidden_grad else hidden, weight, bias


class _Loop:
    # Whatever is as large as the weight or as the logits of a chunk is allocated once, by this and _Linear.

    def __init__(self, a: Arguments, head: Head | None) -> None:
        self.a, self.head = a, head
        self.student = _Linear(a.student, a.weight, a.bias, a.dtype)
        self.teacher = None
        if a.teacher_weight is not None and a.alpha > 0.0:
            self.teacher = _Linear(a.teacher, a.teacher_weight, a.teacher_bias, a.dtype)
        # Rows that do not count are left out, where that can be known without waiting for a device.
        self.counts = a.counting()
        self.chosen = None
        if self.counts is not None and self.counts.device.type in _KNOWN and not bool(self.counts.all()):
            self.chosen = self.counts.nonzero().squeeze(1)
        self.total = len(a.student) if self.chosen is None else len(self.chosen)
        self.rows = rows_per_chunk(self.total, self._row_bytes(), self._limit())
        classes, features = a.weight.shape
        self.loss = self._zeros()
        # Left-out rows are exactly 0, and without any chunk all is.
        new_rows = torch.empty if self.chosen is None else torch.zeros
        hidden = a.student.shape if a.need_hidden_grad else (0,)
        self.d_hidden = new_rows(hidden, dtype=gradient_dtype(a.student), device=a.student.device)
        self.d_weight = self._empty(classes, features) if a.need_weight_grad else self._empty(0)
        self.d_bias = self._zeros(classes) if a.wants_bias else self._empty(0)
        self.begun = False

    def parts(self) -> Iterator[Part]:
        for first in range(0, self.total, max(1, self.rows)):
            part = slice(first, min(first + self.rows, self.total))
            yield part if self.chosen is None else self.chosen[part]

    def step(self, part: Part) -> None:
        a = self.a
        x = self.student.input(self._present(a.student[part], part))
        s = self.student.forward(x)
        teacher, options = self._teacher_logits(part, s), a.options(part)
        if not options.need_grad:
            self.loss += kd_loss(s, teacher, *options)[0]
            return
        self.loss += kd_loss_in_place(s, teacher, options)
        g = self.student.input(s)
        if a.need_hidden_grad:
            self._store(part, g)
        if a.need_weight_grad:
            self.student.accumulate(g, x, self.d_weight, self.begun)
        if a.wants_bias:
            self.d_bias += s.sum(0)
        self.begun = True

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self.begun:
            self.d_weight.zero_()
        bias = self.a.bias
        return (
            self.d_hidden,
            self.d_weight.to(gradient_dtype(self.a.weight)),
            self.d_bias if bias is None else self.d_bias.to(gradient_dtype(bias)),
        )

    def _present(self, x: Tensor, part: Part) -> Tensor:
        # A row that does not count may hold anything, and 0 * NaN is no 0.
        if self.counts is None or self.counts.device.type in _KNOWN:
            return x
        return torch.where(self.counts[part].unsqueeze(1), x, 0.0)

    def _teacher_logits(self, part: Part, s: Tensor) -> Tensor:
        if self.a.alpha == 0.0:
            return s  # the labels alone decide: any will do
        given = self.a.teacher[part]
        if self.teacher is not None:
            return self.teacher.forward(self.teacher.input(given))
        if self.head is not None:
            given = self.head(given)
        # float16 only to be stored: kd_loss has no kernel for it.
        return given.to(torch.float32) if given.dtype == torch.float16 else given

    def _store(self, part: Part, g: Tensor) -> None:
        if isinstance(part, slice) and self.d_hidden.dtype == self.a.dtype:
            self.student.backward(g, self.d_hidden[part])
            return
        rows = self._empty(len(g), self.d_hidden.shape[1])
        self.student.backward(g, rows)
        self.d_hidden[part] = rows.to(self.d_hidden.dtype)

    def _row_bytes(self) -> int:
        # The logits of both sides and the hidden states, and G in half precision where the products take it.
        a, size = self.a, self.a.dtype.itemsize
        classes, features = a.weight.shape
        given = a.teacher.shape[1]
        numbers = classes + 2 * features
        if self.teacher is not None:
            numbers += len(self.teacher.weight) + given
        elif self.head is not None:
            numbers += (getattr(self.head, "out_features", None) or classes) + given
        elif self.chosen is not None or a.teacher.dtype == torch.float16:
            numbers += given  # copied
        return size * numbers + (2 * classes if self.student.native else 0)

    def _limit(self) -> int:
        if self.a.max_memory_bytes is not None:
            return self.a.max_memory_bytes
        rows = min(_ROWS, int(_SHARE * self.total))
        return max(_MEMORY.get(self.a.student.device.type, _MEMORY_ELSEWHERE), rows * self._row_bytes())

    def _empty(self, *shape: int) -> Tensor:
        return empty(shape, self.a.dtype, self.a.student.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.a.dtype, device=self.a.student.device)


class _Linear:
    # x W^T + b and the products of its gradient, with float32 results (float64 if that is what is computed in).
    # "Native" products take bfloat16 and return float32. Elsewhere a half-precision W is widened, block by block, so
    # that no whole copy of it exists; float16 everywhere, since it cannot hold a small G.

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.bias = None if bias is None else bias.to(dtype)
        half = x.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32
        self.native = half and weight.device.type in _WIDE_PRODUCTS
        classes, features = weight.shape
        self.block, self.wide = classes, None
        if weight.dtype != dtype and not self.native:
            self.block = min(classes, max(1, _BLOCK // (dtype.itemsize * (features + _ROWS))))
            self.wide = empty((self.block, features), dtype, weight.device)
        self.logits: Tensor | None = None

    def input(self, x: Tensor) -> Tensor:
        """As the products take it."""
        return x.to(torch.bfloat16 if self.native else self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The logits, until the next call; no call has more rows than the first."""
        if self.block == len(self.weight) and not self.native:
            _, w = next(self._blocks())
            if _onednn_takes(x, w):
                return _onednn(x, w, self.bias)  # fresh, where malloc may use the memory of the chunk before, or not
        if self.logits is None:
            self.logits = empty((len(x), len(self.weight)), self.dtype, x.device)
        out = self.logits[: len(x)]
        if self.native:
            torch.mm(x, self.weight.t(), out_dtype=self.dtype, out=out)
            if self.bias is not None:
                out += self.bias
            return out
        for columns, w in self._blocks():
            bias = None if self.bias is None else self.bias[columns]
            if _onednn_takes(x, w):
                out[:, columns] = _onednn(x, w, bias)
            elif bias is None:
                torch.mm(x, w.t(), out=out[:, columns])
            else:
                torch.addmm(bias, x, w.t(), out=out[:, columns])
        return out

    def backward(self, g: Tensor, out: Tensor) -> None:
        """G W."""
        if self.native:
            torch.mm(g, self.weight, out_dtype=self.dtype, out=out)
            return
        for columns, w in self._blocks():
            torch.addmm(out, g[:, columns], w, beta=1 if columns.start else 0, out=out)

    def accumulate(self, g: Tensor, x: Tensor, total: Tensor, begun: bool) -> None:
        """``total`` += G^T X, or = if it has not begun."""
        beta = 1 if begun else 0  # with 0 BLAS does not read what is there
        if self.native:
            torch.addmm(total, g.t(), x, out_dtype=self.dtype, beta=beta, out=total)
        else:
            torch.addmm(total, g.t(), x, beta=beta, out=total)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, len(self.weight), self.block):
            columns = slice(first, min(first + self.block, len(self.weight)))
            w = self.weight[columns]
            yield columns, w if self.wide is None else self.wide[: len(w)].copy_(w)


def _onednn_takes(x: Tensor, w: Tensor) -> bool:
    fits = x.is_cpu and x.dtype == w.dtype == torch.float32 and min(x.numel(), w.numel()) > 0
    return _HAS_ONEDNN and fits and x.is_contiguous() and w.is_contiguous()


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile makes of a linear layer. torch.mm takes MKL, which arranges all of W anew in every call: with
    # 171 rows, 768 features and 32000 classes on an AMD EPYC it needs 1.45 times as long.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return out
