"""Sequence-level distillation: the teacher writes the targets once (Kim and Rush 2016)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from potstill.distill.generate import beam_search, check_tokens, generate, prompts, shifted


def teacher_sequences(
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    new_tokens: int,
    prompt_tokens: int | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    stop: int | None = None,
    pad: int = 0,
    ignore_index: int = -100,
) -> list[tuple[Any, ...]]:
    """The loader's items with the teacher's continuations of their prompts as what is to be learnt.

    The loader yields ``(ids, target)``, or ``(*inputs, ids, target)`` for a model called as ``model(*inputs, ids)``,
    such as (source, ids, target) of a translation; the targets are not looked at. Of the ids, [batch, tokens] of int64,
    ``prompt_tokens`` are kept, or all; the teacher goes on from there, by :func:`beam_search` if ``beams`` is more than
    1, else by :func:`generate` at ``temperature``: 0 is greedy.

    Returns items of the same form on the CPU, for a student that learns them with ``HardLabels`` as it would learn the
    real ones: target i is the token after input i, ``ignore_index`` in the prompt and behind ``stop``. The list is a
    loader; ``DataLoader(items, batch_size=None, shuffle=True)`` changes the order of its batches.
    Kim and Rush 2016, "Sequence-level knowledge distillation", section 3.2.

    >>> import torch
    >>> teacher, student = (nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10)) for _ in range(2))
    >>> loader = [(torch.randint(10, (4, 6)), torch.randint(10, (4, 6))) for _ in range(5)]
    >>> items = teacher_sequences(teacher, loader, new_tokens=8, prompt_tokens=2, beams=3)
    >>> from potstill.distill import Distiller, HardLabels, TrainingPlan
    >>> history = Distiller(None, student, HardLabels()).fit(items, TrainingPlan(epochs=20, lr=0.05))
    >>> history.epochs[-1].loss < history.epochs[0].loss
    True
    """
    check_tokens("teacher_sequences", new_tokens, prompt_tokens)
    if beams != 1 and temperature > 0.0:
        raise ValueError(
            f"teacher_sequences: beams is {beams} and temperature {temperature}; a beam search draws nothing: leave "
            "temperature at 0, or beams at 1"
        )
    device = next(teacher.parameters()).device

    def written(item: Any) -> tuple[Any, ...]:
        inputs, prompt = prompts(item, prompt_tokens, device, "teacher_sequences")
        how: dict[str, Any] = {"inputs": inputs, "stop": stop, "pad": pad}
        if beams != 1:
            whole = beam_search(teacher, prompt, new_tokens, beams=beams, length_penalty=length_penalty, **how)
        else:
            whole = generate(teacher, prompt, new_tokens, temperature=temperature, **how)
        made = *inputs, *shifted(whole, prompt.shape[1], stop=stop, ignore_index=ignore_index)
        return tuple(x.cpu() if isinstance(x, Tensor) else x for x in made)

    return [written(item) for item in loader]
