"""On-policy distillation: the student writes, the teacher judges (Agarwal et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from potstill.distill.generate import check_tokens, generate, prompts, shifted
from potstill.errors import CheckpointError


class OnPolicy:
    """A loader in whose items the student has continued the prompts itself, as it is at that moment of the training.

    The student is trained on what it writes, with its own mistakes, instead of on texts that it would never have got
    into. Made for a divergence from the teacher at each generated token, which leaves the targets alone::

        strategy = SoftTargets(temperature=1.0, alpha=1.0, divergence="reverse_kl")  # or "jsd", "forward_kl"
        Distiller(teacher, student, strategy).fit(OnPolicy(loader, student, new_tokens=64, prompt_tokens=16), plan)

    - ``loader`` yields ``(ids, target)``, or ``(*inputs, ids, target)`` for a model called as ``model(*inputs, ids)``;
      ids are [batch, tokens], int64. ``prompt_tokens`` are kept of each row, and all if it is None; of a translation
      only the token that begins every sentence, so that the student writes it from the source alone.
    - ``student`` continues them by ``new_tokens``, drawn at ``temperature``; behind ``stop`` a row is ``pad``. See
      :func:`generate`, which runs it once for each new token: with as many as are read in training, sampling is what
      takes the time.
    - The item becomes ``(*inputs, ids, target)`` with the shift of a causal language model: target i is the token after
      input i, ``ignore_index`` in the prompt and behind ``stop``, so that only what was written counts.
    - ``share`` of the items, drawn from torch's global generator, become so; the others pass unchanged: the lambda of
      algorithm 1 of Agarwal et al. 2024, "On-policy distillation of language models: learning from self-generated
      mistakes". No gradient flows through the drawing, as there; Gu et al. 2024, "MiniLLM", add that by a policy
      gradient.

    A strategy that learns the targets (``HardLabels``, ``alpha`` below 1) would only confirm the student in what it
    wrote. A run resumes exactly: items that were consumed are passed over without writing them again. Random numbers
    are those of the student's device; under ``torchrun`` every process writes the whole batch.
    Raises :class:`ValueError` for numbers out of range, :class:`TypeError` for items of another form.

    >>> student = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10))
    >>> loader = [(torch.randint(10, (4, 6)), torch.randint(10, (4, 6)))]
    >>> ids, target = next(iter(OnPolicy(loader, student, new_tokens=3, prompt_tokens=2)))
    >>> ids.shape, torch.equal(ids[:, :2], loader[0][0][:, :2]), torch.equal(target[:, 1:-1], ids[:, 2:])
    (torch.Size([4, 4]), True, True)
    >>> target[:, 0].tolist()
    [-100, -100, -100, -100]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        student: nn.Module,
        *,
        new_tokens: int,
        prompt_tokens: int | None = None,
        share: float = 1.0,
        temperature: float = 1.0,
        stop: int | None = None,
        pad: int = 0,
        ignore_index: int = -100,
    ) -> None:
        check_tokens("OnPolicy", new_tokens, prompt_tokens)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"OnPolicy: share is {share}; expected a number from 0 to 1")
        self.loader, self.student = loader, student
        self.new_tokens, self.prompt_tokens = new_tokens, prompt_tokens
        self.share, self.temperature = share, temperature
        self.stop, self.pad, self.ignore_index = stop, pad, ignore_index
        # Where a Distiller looks for the generators that belong to a loader.
        self.generator = getattr(loader, "generator", None)
        self.sampler = getattr(loader, "sampler", None)
        self.batch_sampler = getattr(loader, "batch_sampler", None)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return self._items(iter(self.loader))

    def skip(self, items: int) -> Iterator[Any]:
        """An iterator that begins behind so many items, which are loaded but not written again."""
        further = getattr(self.loader, "skip", None)
        if callable(further):
            return self._items(iter(further(items)))
        rest = iter(self.loader)
        skipped = sum(1 for _ in islice(rest, items))
        if skipped < items:
            raise CheckpointError(
                f"OnPolicy: {items} items of an epoch were consumed, but the loader yields only {skipped}; resume with "
                "the same data"
            )
        return self._items(rest)

    def _items(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            yield self._written(item) if float(torch.rand(())) < self.share else item

    def _written(self, item: Any) -> tuple[Any, ...]:
        inputs, prompt = prompts(item, self.prompt_tokens, next(self.student.parameters()).device, "OnPolicy")
        whole = generate(
            self.student,
            prompt,
            self.new_tokens,
            inputs=inputs,
            temperature=self.temperature,
            stop=self.stop,
            pad=self.pad,
        )
        return *inputs, *shifted(whole, prompt.shape[1], stop=self.stop, ignore_index=self.ignore_index)
