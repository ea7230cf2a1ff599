"""What a cache holds of each example, and how that lies in its files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import CacheError

FORMAT = "potstill.cache/1"
INPUTS, LOGITS, LOG_PROBS, INDICES, LAYER = "inputs", "logits", "log_probs", "indices", "layer:"

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED = {
    "float16": "<f2",
    "bfloat16": "<u2",  # its bits: numpy lacks the type
    "float32": "<f4",
    "uint8": "<u1",
    "uint16": "<u2",
    "int32": "<i4",
    "uint32": "<u4",
}
_CHUNK_BYTES, _CHUNK_BATCHES = 8 << 20, 16

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """One of the things that are held of each example: its name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def to_tensor(self, values: NDArray[Any]) -> Tensor:
        """What was read of a batch, as float32 or int64."""
        if self.dtype not in FLOATS:
            return torch.from_numpy(values.astype(np.int64))
        return torch.from_numpy(values).view(FLOATS[self.dtype]).float().contiguous()

    def to_array(self, values: Tensor) -> NDArray[Any]:
        """What is written of a batch, the inverse of :meth:`to_tensor` but for rounding.

        Raises :class:`CacheError` for a shape that is not the column's, or a finite number that becomes infinite.
        """
        if tuple(values.shape[1:]) != self.shape:
            raise CacheError(
                f"CachedTeacher: {self.name} has the shape {list(values.shape[1:])} here and {list(self.shape)} in the "
                "first batch; all examples need one shape: pad them to one length"
            )
        if self.dtype not in FLOATS:
            return values.cpu().numpy()
        exact = values.detach().cpu()
        rounded = exact.to(FLOATS[self.dtype])
        lost = exact[rounded.isinf() & exact.isfinite()]
        if lost.numel():
            raise CacheError(
                f"CachedTeacher: {self.name} has the value {float(lost[0]):g}, beyond {self.dtype}; cache with "
                "dtype=torch.bfloat16 or torch.float32"
            )
        return rounded.view(torch.uint16).numpy() if self.dtype == "bfloat16" else rounded.numpy()


@dataclass(frozen=True)
class Manifest:
    """What a cache is of. Two with the same manifest are made of the same things.

    - ``teacher``: a hash of its state; ``inputs``: dtype and shape of each of its input tensors, of one example.
    - ``examples``: the length of the data set; ``chunk``: how many of them share a checksum.
    - ``top_k``, ``temperature``, ``dtype``, ``layers``: the options.
    - ``columns``: what is held of each example.
    """

    teacher: str
    inputs: Mapping[str, str]
    examples: int
    chunk: int
    top_k: int | None
    temperature: float
    dtype: str
    layers: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def record(self) -> np.dtype[Any]:
        """The columns of one example, aligned as in C."""
        return record_of(self.columns)

    @property
    def chunks(self) -> int:
        """How many chunks there are; the last may be shorter."""
        return -(-self.examples // self.chunk)

    def span(self, chunk: int) -> range:
        """The examples in a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.examples))

    def text(self) -> str:
        """As it stands in the file."""
        contents = {"format": FORMAT, **asdict(self)}
        return json.dumps({**contents, "crc32": zlib.crc32(json.dumps(contents).encode())}, indent=1) + "\n"

    @property
    def seed(self) -> int:
        """What the checksums of the chunks start from: those of another cache are wrong here."""
        return zlib.crc32(self.text().encode())

    @classmethod
    def parse(cls, text: str, path: Path) -> Manifest:
        """Reads what :meth:`text` gave; raises :class:`CacheError` for anything else."""
        try:
            contents = json.loads(text)
            found = cls._of(contents)
            whole = contents["format"] == FORMAT and found.text() == text and found.record.itemsize > 0
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise CacheError(f"{path} {_damaged()} ({error})") from error
        if not whole:
            raise CacheError(f"{path} {_damaged()} (expected the format {FORMAT}, and its own checksum)")
        return found

    @classmethod
    def _of(cls, contents: dict[str, Any]) -> Manifest:
        columns = tuple(
            Column(_checked(c["name"], str), _checked(c["dtype"], str), tuple(_size(n) for n in c["shape"]))
            for c in contents["columns"]
        )
        layers = tuple(_checked(name, str) for name in contents["layers"])
        top_k = None if contents["top_k"] is None else _size(contents["top_k"])
        heads = [LOGITS] if top_k is None else [LOG_PROBS, INDICES]
        expected = [INPUTS, *heads, *(LAYER + name for name in layers)]
        if [column.name for column in columns] != expected or not {c.dtype for c in columns} <= _STORED.keys():
            raise ValueError(f"columns is {contents['columns']}, but {expected} was expected")
        if contents["dtype"] not in FLOATS:
            raise ValueError(f"dtype is {contents['dtype']!r}")
        return cls(
            teacher=_checked(contents["teacher"], str),
            inputs={_checked(k, str): _checked(v, str) for k, v in contents["inputs"].items()},
            examples=_size(contents["examples"]),
            chunk=_size(contents["chunk"]),
            top_k=top_k,
            temperature=_checked(contents["temperature"], float),
            dtype=contents["dtype"],
            layers=layers,
            columns=columns,
        )


def record_of(columns: Sequence[Column]) -> np.dtype[Any]:
    """The columns of one example, aligned as in C."""
    return np.dtype([(c.name, _STORED[c.dtype], c.shape) for c in columns], align=True)


def chunk_of(columns: Sequence[Column], batch_size: int) -> int:
    """Examples per chunk: 1 to 16 whole batches, of about 8 MiB at most; so much a crash may cost."""
    size = record_of(columns).itemsize * batch_size
    return batch_size * min(max(_CHUNK_BYTES // size, 1), _CHUNK_BATCHES)


def index_dtype(classes: int) -> str:
    """The smallest dtype that has the numbers of so many classes.

    >>> index_dtype(256), index_dtype(257), index_dtype(151_936)
    ('uint8', 'uint16', 'int32')
    """
    return next(name for name, count in (("uint8", 2**8), ("uint16", 2**16), ("int32", 2**31)) if classes <= count)


def _damaged() -> str:
    return (
        "is damaged or not the manifest of a cache. If this is a cache, delete that one file and give the teacher: "
        "CachedTeacher writes it again, and keeps whatever else is whole"
    )


def _checked(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _size(value: Any) -> int:
    if _checked(value, int) < 1:
        raise ValueError(f"{value!r} is no size")
    return int(value)
