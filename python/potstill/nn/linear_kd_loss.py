"""The distillation loss of a linear head, without whole logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from potstill.nn.loss import DistillationLoss, as_tensor
from potstill.ops.linear_kd_chunks import Arguments
from potstill.ops.linear_kd_loss import backward, check_chunks, chunked, linear_kd_loss, setup_context


class LinearKDLoss(DistillationLoss):
    """:class:`KDLoss` of ``student_hidden @ student_weight.T``, of whose logits only a chunk of rows exists at a time.

    The loss and its gradients by the hidden states, the weight and the bias are made in one pass over chunks of rows;
    neither logits nor their gradient are ever whole. Logits are float32 also where hidden states and weights are
    bfloat16: rounded ones, as a bfloat16 model returns them, make the gradient wrong by up to half of its size where
    student and teacher nearly agree. Frozen hidden states or weights cost no gradient, and rows that do not count cost
    nothing on a CPU.

    ``max_memory_bytes`` is the memory for a chunk's logits, from which its rows follow; more is faster. None leaves the
    choice to :data:`potstill.ops.linear_kd_loss`, which says how it chooses.
    The other options are those of :class:`KDLoss`; ``reduction`` is "mean" or "sum".

    Call it inside the ``forward`` of the module that holds the head: there FSDP2 has gathered its weight.

    Raises :class:`ValueError` for options, shapes or labels out of range.

    >>> loss = LinearKDLoss(temperature=2.0)
    >>> loss
    LinearKDLoss(temperature=2.0, alpha=1.0)
    >>> head, teacher_head = nn.Linear(16, 1000, bias=False), nn.Linear(32, 1000, bias=False)
    >>> hidden, teacher_hidden = torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)
    >>> loss(hidden, head.weight, teacher_hidden, teacher_head.weight).backward()
    >>> hidden.grad.shape, head.weight.grad.shape
    (torch.Size([8, 16]), torch.Size([1000, 16]))
    """

    _op = "linear_kd_loss"

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 1.0,
        divergence: str = "forward_kl",
        beta: float | None = None,
        rest: str = "tail",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        max_memory_bytes: int | None = None,
    ) -> None:
        super().__init__(temperature, alpha, ignore_index, label_smoothing, reduction, divergence, beta, rest)
        check_chunks(reduction, max_memory_bytes)
        self.max_memory_bytes = max_memory_bytes

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | nn.Module | None,
        target: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        *,
        teacher_indices: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """[..., features], [classes, features], [..., features'], [classes', features'], [...] -> [].

        ``teacher_weight`` may be a module that makes logits of hidden states, such as an ``Int8Linear``: it is called
        with a chunk of rows at a time, without gradients. With None ``teacher_hidden`` are the teacher's logits, or its
        log-probabilities if there are ``teacher_indices``. ``teacher_indices``, ``row_weight`` and ``normalizer`` are
        those of :meth:`KDLoss.forward`.
        """
        head = None
        if isinstance(teacher_weight, nn.Module):
            head, teacher_weight = teacher_weight, None
        tensors = (
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            target,
            student_bias,
            teacher_bias,
            teacher_indices,
            row_weight,
            as_tensor(normalizer, student_hidden.device),
        )
        _check_whole(tensors)
        needed = [_needs_grad(x) for x in (student_hidden, student_weight, student_bias)]
        arguments = Arguments(*(*tensors, *self._options(), self.max_memory_bytes, *needed))
        loss: Tensor = (linear_kd_loss(*arguments) if head is None else _with_head(arguments, head))[0]
        return loss

    def extra_repr(self) -> str:
        """As for :class:`KDLoss`; ``max_memory_bytes`` if it is not None."""
        text = super().extra_repr()
        return text if self.max_memory_bytes is None else f"{text}, max_memory_bytes={self.max_memory_bytes}"


def _needs_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _check_whole(tensors: Iterable[Tensor | None]) -> None:
    for x in tensors:
        if hasattr(x, "full_tensor"):  # a DTensor: looked at from here, its class may lie in a part that torch lacks
            raise TypeError(
                "LinearKDLoss: a weight or another input is a DTensor, of which this process holds a part; expected "
                "plain tensors. Call the loss inside the forward of the module that fully_shard was applied to, or in "
                "a method given to torch.distributed.fsdp.register_fsdp_forward_method: there the weight is whole. Or "
                "pass weight.full_tensor()"
            )


def _with_head(arguments: Arguments, head: nn.Module) -> tuple[Tensor, ...]:
    teacher = _Teacher(head)
    if arguments.options().need_grad:
        found: tuple[Tensor, ...] = _Gradient.apply(teacher, *arguments)  # type: ignore[no-untyped-call]
        return found
    return chunked(arguments, teacher)


class _Teacher:
    # What the chunk loop calls for the teacher's logits.

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.out_features: int | None = getattr(head, "out_features", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.head(hidden)
        if logits.dim() != 2 or logits.shape[0] != hidden.shape[0] or logits.shape[1] == 0:
            raise ValueError(
                f"LinearKDLoss: the teacher's head made {list(logits.shape)} of hidden states {list(hidden.shape)}; "
                f"expected logits [{hidden.shape[0]}, classes]"
            )
        _check_whole([logits])
        return logits


class _Gradient(torch.autograd.Function):
    # No op: a module is no argument that one could have.

    @staticmethod
    def forward(ctx: Any, teacher: _Teacher, *arguments: Any) -> Any:
        output = chunked(Arguments(*arguments), teacher)
        setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        return None, *backward(ctx, *upstream)
