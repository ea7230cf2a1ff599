"""Where a cache's contents come from: the teacher, run over a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.distill.batch import Batch, logits
from potstill.distill.cache.examples import Collate, checksums, described
from potstill.distill.cache.layout import (
    INDICES,
    INPUTS,
    LAYER,
    LOG_PROBS,
    LOGITS,
    Column,
    Manifest,
    chunk_of,
    index_dtype,
)
from potstill.distill.features import Features
from potstill.errors import CacheError
from potstill.ops.topk import top_k
from potstill.transform.observe import evaluating


@dataclass(frozen=True)
class Examples:
    """A map-style data set and how its items become a batch."""

    dataset: Any
    collate: Collate

    def batch(self, indices: range | list[int]) -> Batch:
        """The models' arguments for some examples; raises :class:`CacheError` if they do not make a batch."""
        items = [self.dataset[index] for index in indices]
        try:
            collated = self.collate(items)
        except RuntimeError as error:  # what torch.stack raises
            raise CacheError(
                f"CachedTeacher: the examples {indices[0]} to {indices[-1]} do not make a batch ({error}); all need "
                "one shape: pad them to one length"
            ) from error
        return Batch.of(collated)


@dataclass(frozen=True)
class Source:
    """The teacher, what is kept of its outputs, and the examples that it is run on."""

    teacher: nn.Module
    examples: Examples
    batch_size: int
    top_k: int | None
    temperature: float
    layers: tuple[str, ...]
    dtype: str

    def manifest(self) -> Manifest:
        """What the first batch shows of the cache that this would fill."""
        count = min(self.batch_size, len(self.examples.dataset))
        batch = self.examples.batch(range(count))
        values, classes = self._values(batch, count)
        columns = [Column(INPUTS, "uint32", ())]
        for name, tensor in values.items():
            dtype = index_dtype(classes) if name == INDICES else self.dtype
            columns.append(Column(name, dtype, tuple(tensor.shape[1:])))
        return Manifest(
            teacher=fingerprint(self.teacher),
            inputs=described(batch, count),
            examples=len(self.examples.dataset),
            chunk=chunk_of(tuple(columns), self.batch_size),
            top_k=self.top_k,
            temperature=self.temperature,
            dtype=self.dtype,
            layers=self.layers,
            columns=tuple(columns),
        )

    def records(self, manifest: Manifest, chunk: int) -> NDArray[Any]:
        """The records of the examples in a chunk: the same, bit for bit, whenever and wherever it is begun."""
        span = manifest.span(chunk)
        records = np.zeros(len(span), manifest.record)  # zeros, so that what pads the records is always the same
        for start in range(0, len(span), self.batch_size):
            part = span[start : start + self.batch_size]
            into = records[start : start + len(part)]
            batch = self.examples.batch(part)
            same_inputs(described(batch, len(part)), manifest)
            into[INPUTS] = checksums(batch, len(part))
            values, _ = self._values(batch, len(part))
            for column in manifest.columns[1:]:
                into[column.name] = column.to_array(values[column.name])
        return records

    def _values(self, batch: Batch, count: int) -> tuple[dict[str, Tensor], int]:
        """The columns but the first, and the number of classes."""
        output, features = self._run(batch)
        if self.top_k is None:
            values = {LOGITS: output}
        else:
            log_probs, indices = top_k(output, self.top_k, self.temperature)
            values = {LOG_PROBS: log_probs, INDICES: indices}
        values |= {LAYER + name: feature for name, feature in features.items()}
        for name, tensor in values.items():
            if tensor.dim() < 1 + (name in (LOGITS, LOG_PROBS, INDICES)) or tensor.shape[0] != count:
                raise CacheError(
                    f"CachedTeacher: {name} has the shape {list(tensor.shape)} for {count} examples; its first "
                    "dimension must be the examples"
                )
        return values, output.shape[-1]

    def _run(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = chain(self.teacher.parameters(), self.teacher.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        with torch.no_grad(), evaluating(self.teacher), Features(self.teacher, self.layers) as features:
            output = batch.to(device).feed(self.teacher)
        return logits(output, "teacher"), {name: features[name] for name in self.layers}


def same_inputs(found: dict[str, str], manifest: Manifest) -> None:
    """Raises :class:`CacheError` if the inputs' dtypes and shapes are not those that were cached."""
    if found != manifest.inputs:
        raise CacheError(
            f"CachedTeacher: the inputs of an example are {found}, but those of the cached ones are {manifest.inputs}. "
            "Pad all examples to one length, and prepare them as when they were cached"
        )


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and bytes of all tensors in a model's state.

    >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint(first) == fingerprint(second)
    False
    >>> _ = second.load_state_dict(first.state_dict())
    >>> fingerprint(first) == fingerprint(second)
    True
    """
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
