"""Sequences that a language model writes: drawn from it, greedy, or found by beam search."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distill.batch import Batch, logits
from potstill.distill.loop import mode
from potstill.distill.strategies.shapes import widened


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: Tensor,
    new_tokens: int,
    *,
    inputs: Sequence[Any] = (),
    temperature: float = 1.0,
    stop: int | None = None,
    pad: int = 0,
) -> Tensor:
    """Continues every row of ``ids`` by ``new_tokens`` tokens that the model draws one by one.

    [batch, tokens] -> [batch, tokens + new_tokens], int64. The model is called as ``model(*inputs, ids)``, in
    evaluation mode and without gradients, and returns logits [batch, tokens, classes] as :func:`logits` finds them;
    those of the last token decide the next. ``inputs`` are what a decoder needs besides (the source of a translation,
    or what an encoder made of it). At ``temperature`` T a token is drawn from softmax(logits / T) by torch's global
    generator; at 0 it is the likeliest. Behind a row's first new ``stop`` all is ``pad``.

    A model whose ``forward`` takes ``use_cache`` and ``cache`` (in transformers before 5.24 ``past_key_values``) reads
    each token once; any other reads the whole row for each new token. All rows of ``ids`` are prompts of the same
    length, without padding. Raises :class:`ValueError` for arguments out of range and logits that do not fit.

    >>> class Next(nn.Module):  # after token i comes i + 1
    ...     def forward(self, ids):
    ...         return 9.0 * F.one_hot(ids + 1, 10).float()
    >>> generate(Next(), torch.tensor([[0, 1], [3, 4]]), 3, temperature=0.0, stop=5)
    tensor([[0, 1, 2, 3, 4],
            [3, 4, 5, 0, 0]])
    """
    _check("generate", ids, new_tokens)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature is {temperature}; expected a number of at least 0")
    end = ids.shape[1] + new_tokens
    writing = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    with mode(model, training=False):
        reader = _Reader(model, inputs)
        while ids.shape[1] < end and writing.any():
            token = _draw(reader(ids), temperature).where(writing, pad)
            ids = torch.cat((ids, token.unsqueeze(1)), 1)
            if stop is not None:
                writing &= token != stop
    return F.pad(ids, (0, end - ids.shape[1]), value=pad)


@torch.no_grad()
def beam_search(
    model: nn.Module,
    ids: Tensor,
    new_tokens: int,
    *,
    beams: int,
    inputs: Sequence[Any] = (),
    stop: int | None = None,
    pad: int = 0,
    length_penalty: float = 1.0,
) -> Tensor:
    """Continues every row of ``ids`` by the likeliest tokens that a search with so many ``beams`` finds.

    Shapes, ``inputs``, ``stop`` and ``pad`` are those of :func:`generate`. Of all continuations of the kept sequences
    the best ``beams`` are kept, by log-probability / length ** ``length_penalty``; the length is the number of new
    tokens up to and with ``stop``, 0 prefers short sequences, 1 compares means over the tokens. Sequences that have
    ended keep their place as long as their score does. One beam is the greedy search, and as many beams as there are
    sequences find the best of all. Each step runs the model on batch * beams rows.

    >>> class Model(nn.Module):  # token 0 is likelier at first, but only 1 is followed by something certain
    ...     def forward(self, ids):
    ...         after = torch.tensor([[0.4, 0.3, 0.3], [0.0, 0.0, 1.0], [0.6, 0.4, 0.0]])
    ...         return after.log()[ids]
    >>> start = torch.tensor([[2]])
    >>> beam_search(Model(), start, 2, beams=1), beam_search(Model(), start, 2, beams=2)
    (tensor([[2, 0, 0]]), tensor([[2, 1, 2]]))
    """
    _check("beam_search", ids, new_tokens)
    if beams < 1:
        raise ValueError(f"beam_search: beams is {beams}; it must be at least 1")
    if not 0.0 <= length_penalty < math.inf:
        raise ValueError(f"beam_search: length_penalty is {length_penalty}; expected a number of at least 0")
    batch, end = len(ids), ids.shape[1] + new_tokens
    repeated = [x.repeat_interleave(beams, 0) if isinstance(x, Tensor) else x for x in inputs]
    found = _Beams(ids, beams, length_penalty)
    with mode(model, training=False):
        while found.rows.shape[-1] < end and not found.ended.all():
            scores = _last(model(*repeated, found.rows.flatten(0, 1)), batch * beams)
            found.extend(scores.log_softmax(-1).unflatten(0, (batch, beams)), stop, pad)
    best = found.rows[:, 0]
    return F.pad(best, (0, end - best.shape[1]), value=pad)


class _Beams:
    """The sequences kept of each example, best first."""

    def __init__(self, ids: Tensor, beams: int, length_penalty: float) -> None:
        batch = len(ids)
        self._length_penalty = length_penalty
        self.rows = ids.unsqueeze(1).repeat(1, beams, 1)
        self.lengths = torch.zeros(batch, beams, device=ids.device)
        # All begin as the same prompt: only one of them may be continued. What is impossible has ended.
        self.log_p = torch.full((batch, beams), -math.inf, device=ids.device)
        self.log_p[:, 0] = 0.0
        self.ended = self.log_p.isneginf()

    def extend(self, log_p: Tensor, stop: int | None, pad: int) -> None:
        """Takes the best continuations; ``log_p`` [batch, beams, classes] of the next token."""
        classes = log_p.shape[-1]
        ended = self.ended.unsqueeze(-1)
        certain = torch.full((classes,), -math.inf, device=log_p.device)
        certain[0] = 0.0  # an ended sequence has one continuation: itself
        sums = self.log_p.unsqueeze(-1) + torch.where(ended, certain, log_p)
        lengths = self.lengths + ~self.ended
        scores = sums / lengths.clamp(min=1).pow(self._length_penalty).unsqueeze(-1)
        chosen = scores.flatten(1).topk(self.rows.shape[1]).indices
        beam = chosen // classes
        token = (chosen % classes).where(~self.ended.gather(1, beam), pad)
        self.rows = self.rows.gather(1, beam.unsqueeze(-1).expand_as(self.rows))
        self.rows = torch.cat((self.rows, token.unsqueeze(-1)), -1)
        self.log_p, self.lengths = sums.flatten(1).gather(1, chosen), lengths.gather(1, beam)
        self.ended = self.ended.gather(1, beam) | self.log_p.isneginf()
        if stop is not None:
            self.ended |= token == stop


class _Reader:
    """The logits of the token behind ``ids``, from a model that reads again only what it does not remember."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        self._model, self._inputs = model, inputs
        known = inspect.signature(model.forward).parameters
        names = [name for name in ("cache", "past_key_values") if name in known]
        self._memory = names[0] if names and "use_cache" in known and not inputs else None
        self._past: Any = None
        self._read = 0

    def __call__(self, ids: Tensor) -> Tensor:
        if self._memory is None:
            return _last(self._model(*self._inputs, ids), len(ids))
        output = self._model(ids[:, self._read :], use_cache=True, **{self._memory: self._past})
        self._past = getattr(output, self._memory, None)
        self._read = 0 if self._past is None else ids.shape[1]  # a model may have been built to keep nothing
        return _last(output, len(ids))


def shifted(
    ids: Tensor, prompt_tokens: int, *, stop: int | None = None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Input and target of sequences [batch, tokens] whose first ``prompt_tokens`` were given, not generated.

    ``target[:, i]`` is the token that follows ``input[:, i]``: what the logits at i predict. It is ``ignore_index``
    where that token belongs to the prompt, or lies behind the first generated ``stop``; columns at the end in which
    no row counts are left out.

    >>> shifted(torch.tensor([[1, 2, 7, 8, 0, 0], [1, 2, 7, 7, 8, 0]]), 2, stop=8)
    (tensor([[1, 2, 7, 8],
            [1, 2, 7, 7]]), tensor([[-100,    7,    8, -100],
            [-100,    7,    7,    8]]))
    """
    target = ids[:, 1:].clone()
    target[:, : prompt_tokens - 1] = ignore_index
    if stop is not None:
        generated = target[:, prompt_tokens - 1 :]
        ends = generated == stop
        behind = ends.cumsum(1) > ends.long()
        generated[behind] = ignore_index
        target = target[:, : prompt_tokens - 1 + int((~behind).any(0).sum())]
    return ids[:, : target.shape[1]], target


def prompts(item: Any, prompt_tokens: int | None, device: torch.device, what: str) -> tuple[tuple[Any, ...], Tensor]:
    """The inputs before the ids in a loader's item ``(*inputs, ids, target)``, and the first tokens of the ids.

    Both on ``device``; all of the ids if ``prompt_tokens`` is None. Raises :class:`TypeError` for items of another
    form, :class:`ValueError` for ids that are too short, in the name of ``what``.

    >>> prompts((torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])), 2, torch.device("cpu"), "OnPolicy")
    ((), tensor([[1, 2]]))
    """
    batch = Batch.of(item)
    if batch.kwargs or not isinstance(batch.args[-1], Tensor):
        raise TypeError(
            f"{what}: the loader yielded a mapping, or no tensor before the target; expected (ids, target), or "
            "(source, ids, target) for a decoder that reads a source too"
        )
    *inputs, ids = batch.to(device).args
    if ids.dim() != 2 or ids.shape[1] < (prompt_tokens or 1):
        raise ValueError(
            f"{what}: the loader yielded ids {list(ids.shape)}; expected [batch, tokens] with {prompt_tokens or 1} "
            "tokens of a prompt at least"
        )
    return tuple(inputs), ids[:, :prompt_tokens]


def check_tokens(what: str, new_tokens: int, prompt_tokens: int | None) -> None:
    """Raises :class:`ValueError` in the name of ``what`` for a number of tokens below 1."""
    for name, value in (("new_tokens", new_tokens), ("prompt_tokens", prompt_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{what}: {name} is {value}; it must be at least 1")


def _check(what: str, ids: Tensor, new_tokens: int) -> None:
    check_tokens(what, new_tokens, None)
    if ids.dim() != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
        raise ValueError(
            f"{what}: ids is {ids.dtype} {list(ids.shape)}; expected int64 [batch, tokens] with a token at least in "
            "each row, such as the one that begins every sequence"
        )


def _draw(scores: Tensor, temperature: float) -> Tensor:
    if temperature == 0.0:
        return scores.argmax(-1)
    return (scores / temperature).softmax(-1).multinomial(1).squeeze(1)


def _last(output: Any, rows: int) -> Tensor:
    """The logits of the next token [rows, classes], in float32 at least."""
    found = logits(output, "model")
    if found.dim() != 3 or len(found) != rows:
        raise ValueError(f"generate: the model's logits are {list(found.shape)}; expected [{rows}, tokens, classes]")
    last = widened(found[:, -1])
    if last.isnan().any():
        raise ValueError("generate: the model's logits are NaN; look at its weights, and at NaN in its inputs")
    return last
