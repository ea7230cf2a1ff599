"""Weights of which only the blocks that are not all zero are stored; a block is 4 consecutive inputs of one output.

``csrc/kernels/sparse_layout.h`` explains the packed form, which CPU kernels read; :func:`as_windows` makes that of
GPUs. What is saved in files is ``mask`` and ``values``: see :func:`to_blocks`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Literal["many", "few"]
"""For how many rows of activations a packed weight is made; it is right for any number."""

ROWS: tuple[Rows, ...] = ("many", "few")

BLOCK = 4

WINDOW = 32
"""Blocks whose bits are one mask of the form for GPUs."""

WINDOW_INPUTS = WINDOW * BLOCK

_MAGIC = 0x3173706B73746F70
_STRIP, _GROUP, _PANEL, _WINDOW, _ALIGNED = 128, 4, 16, 32, 64
_CHUNK = {torch.int8: 192, torch.float32: 48}


def to_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of a weight [n, k] that are not all zero: a mask [n, ceil(k/4)] of bool and values [blocks, 4].

    Values come row by row; those beyond k are zero. Undone by :func:`from_blocks`.

    >>> mask, values = to_blocks(torch.tensor([[0, 0, 0, 0, 5], [1, 2, 3, 4, 0]]))
    >>> mask.tolist(), values.tolist()
    ([[False, True], [True, False]], [[5, 0, 0, 0], [1, 2, 3, 4]])
    """
    n, k = weight.shape
    blocks = F.pad(weight, (0, -k % BLOCK)).view(n, -(-k // BLOCK), BLOCK)
    mask = (blocks != 0).any(-1)
    return mask, blocks[mask]


def from_blocks(mask: Tensor, values: Tensor, k: int) -> Tensor:
    """The weight [n, k] that :func:`to_blocks` was given."""
    blocks = values.new_zeros((*mask.shape, BLOCK))
    blocks[mask] = values
    return blocks.flatten(1)[:, :k].contiguous()


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask [n, m] as bits, the first one lowest: [n, ceil(m/8)] uint8. Undone by :func:`unpack_bits`.

    >>> pack_bits(torch.tensor([[True, False, True]])), unpack_bits(torch.tensor([[5]], dtype=torch.uint8), 3)
    (tensor([[5]], dtype=torch.uint8), tensor([[ True, False,  True]]))
    """
    eights = F.pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -(-mask.shape[1] // 8), 8)
    return (eights * _bit_values(mask)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """The mask [n, columns] that :func:`pack_bits` was given."""
    return ((bits.unsqueeze(-1) & _bit_values(bits)) != 0).flatten(1)[:, :columns]


def _bit_values(like: Tensor) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=like.device)


class _Order(NamedTuple):
    """Outputs in ``parts`` of ``width``, blocks in ``spans`` of ``span``; ``lanes`` outputs take theirs in step."""

    width: int
    lanes: int
    span: int

    @classmethod
    def of(cls, rows: Rows, dtype: torch.dtype) -> _Order:
        return cls(_STRIP, _GROUP, _CHUNK[dtype]) if rows == "many" else cls(_PANEL, _PANEL, _WINDOW)

    def grid(self, n: int, k: int) -> tuple[int, int]:
        return -(-n // self.width), -(-max(-(-k // BLOCK), 1) // self.span)


def pack(mask: Tensor, values: Tensor, k: int, rows: Rows) -> Tensor:
    """The blocks of a weight with k inputs, in the order that is fast for so many ``rows``: [bytes] uint8.

    ``values`` are int8 or float32. Undone by :func:`unpack`.

    >>> weight = torch.randint(-1, 2, (20, 30), dtype=torch.int8)
    >>> all(torch.equal(from_blocks(*unpack(pack(*to_blocks(weight), 30, rows)), 30), weight) for rows in ROWS)
    True
    """
    n, device = len(mask), mask.device
    order = _Order.of(rows, values.dtype)
    parts, spans = order.grid(n, k)
    whole = F.pad(mask, (0, spans * order.span - mask.shape[1], 0, parts * order.width - n))
    cells = whole.view(parts, order.width, spans, order.span).transpose(1, 2)  # [parts, spans, width, span]
    counts = cells.sum(-1)
    # Outputs of about as many blocks go in step; lanes that are outputs for good stay where they are.
    still = torch.arange(order.width, device=device).expand_as(counts)
    ranked = counts.argsort(dim=-1, descending=True, stable=True) if rows == "many" else still
    steps = counts.gather(-1, ranked).view(parts, spans, order.width // order.lanes, order.lanes).amax(-1)
    starts = (steps.flatten().cumsum(0) - steps.flatten()).view(steps.shape)
    part, output, span, block = _coordinates(mask, order)
    place = ranked.argsort(-1)[part, span, output]
    turn = (cells.cumsum(-1) - 1)[part, span, output, block]
    slot = (starts[part, span, place // order.lanes] + turn) * order.lanes + place % order.lanes
    slots = int(steps.sum()) * order.lanes
    index = torch.zeros(slots, dtype=torch.uint8, device=device)
    index[slot] = block.to(torch.uint8)
    stored = values.new_zeros((slots, BLOCK))
    stored[slot] = values
    if rows == "few" and values.dtype == torch.float32:
        stored = stored.view(-1, _PANEL, BLOCK).transpose(1, 2)
    own = steps.sum(-1).flatten() if rows == "many" else steps.flatten(1).sum(-1)
    first = F.pad(own.cumsum(0) * order.lanes, (1, 0))
    sums = torch.zeros(parts * order.width if values.dtype == torch.int8 else 0, dtype=torch.int32, device=device)
    if values.dtype == torch.int8:
        sums[:n].index_add_(0, mask.nonzero()[:, 0], values.sum(-1, dtype=torch.int32))
    head = torch.tensor([_MAGIC, ROWS.index(rows), n, k, slots, values.element_size(), 0, 0], device=device)
    outputs = ranked.to(torch.uint8) if rows == "many" else ranked.new_empty(0)
    sections = (head, first, sums, steps.to(torch.uint8), outputs, index, stored)
    return torch.cat([_bytes(section) for section in sections])


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and values that :func:`pack` was given, without blocks that are all zero."""
    _, code, n, k, slots, size, _, _ = packed[:64].view(torch.int64).tolist()
    rows, dtype = ROWS[code], torch.int8 if size == 1 else torch.float32
    order = _Order.of(rows, dtype)
    parts, spans = order.grid(n, k)
    read = _Reader(packed)
    read(8, torch.int64)
    read(parts * (spans if rows == "many" else 1) + 1, torch.int64)
    read(parts * order.width if size == 1 else 0, torch.int32)
    steps = read(parts * spans * order.width // order.lanes, torch.uint8).long()
    ranked = read(parts * spans * order.width if rows == "many" else 0, torch.uint8).long()
    index = read(slots, torch.uint8).long()
    values = read(slots * BLOCK, dtype)
    if rows == "few":
        ranked = torch.arange(_PANEL, device=packed.device).repeat(parts * spans)
        values = values.view(-1, BLOCK, _PANEL).transpose(1, 2) if size == 4 else values
    values = values.reshape(-1, BLOCK)
    # Each group of lanes is repeated for its steps.
    group = torch.arange(len(steps), device=packed.device).repeat_interleave(steps)
    part, span = group // (order.width // order.lanes) // spans, group // (order.width // order.lanes) % spans
    output = part[:, None] * order.width + ranked.view(-1, order.lanes)[group]
    block = span[:, None] * order.span + index.view(-1, order.lanes)
    real = (values != 0).any(-1)
    mask = torch.zeros(n, -(-k // BLOCK), dtype=torch.bool, device=packed.device)
    output, block, values = output.flatten()[real], block.flatten()[real], values[real]
    mask[output, block] = True
    return mask, values[(output * mask.shape[1] + block).argsort()]


def window_count(k: int) -> int:
    """How many windows k inputs take, at least 1."""
    return max(1, -(-k // WINDOW_INPUTS))


def as_windows(mask: Tensor, values: Tensor, k: int) -> Tensor:
    """The blocks of an int8 weight with k inputs in the layout of GPUs: int32 [2 windows + more, n].

    A window is 32 blocks of an output, 128 inputs. First come its masks [windows, n], whose bit j says that its block j
    is stored, then the places [windows, n] of its first blocks among the words, and the words: 4 int8 each, row by row
    as ``values`` has them, and at least 32 zeros, up to whole rows of n: a place may be that behind the last word, and
    what is read from there on stays inside. Undone by :func:`from_windows`.
    Raises :class:`ValueError` for more blocks than int32 counts.

    >>> weight = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]], dtype=torch.int8)
    >>> as_windows(*to_blocks(weight), 8)[:3].tolist(), len(as_windows(*to_blocks(weight), 8))
    ([[2], [0], [67305985]], 35)
    """
    n, windows = len(mask), window_count(k)
    if len(values) > 2**31 - 1 - WINDOW - n:
        raise ValueError(f"as_windows: {len(values)} blocks are stored, expected fewer than 2^31; split the layer")
    whole = F.pad(mask, (0, windows * WINDOW - mask.shape[1]))
    bits = pack_bits(whole).view(n, 4 * windows).view(torch.int32)
    counts = whole.view(n, windows, WINDOW).sum(-1).flatten()
    first = (counts.cumsum(0) - counts).to(torch.int32).view(n, windows)
    words = values.contiguous().view(torch.int32).flatten()
    rows = _word_rows(len(words), n)
    words = F.pad(words, (0, rows * n - len(words))).view(rows, n)
    return torch.cat([bits.t(), first.t(), words])


def from_windows(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mask and values that :func:`as_windows` was given."""
    n, windows = weight.shape[1], window_count(k)
    bits = weight[:windows].t().flatten().contiguous().view(torch.uint8).view(n, 4 * windows)
    mask = unpack_bits(bits, -(-k // BLOCK))
    words = weight[2 * windows :].flatten()[: int(mask.sum())]
    return mask, words.view(torch.int8).view(-1, BLOCK)


def _word_rows(words: int, n: int) -> int:
    return -(-(words + WINDOW) // n) if n else 0


def _coordinates(mask: Tensor, order: _Order) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Part, output in it, span, block in it, of each block that is stored."""
    output, block = mask.nonzero().unbind(1)
    return output // order.width, output % order.width, block // order.span, block % order.span


def _bytes(section: Tensor) -> Tensor:
    raw = section.contiguous().flatten().view(torch.uint8)
    return F.pad(raw, (0, -len(raw) % _ALIGNED))


def check_windows(op: str, weight: Tensor, n: int, k: int) -> None:
    """Raises :class:`ValueError` unless ``weight`` may be what :func:`as_windows` makes for k inputs and n outputs."""
    windows = window_count(k)
    least, most = (2 * windows + _word_rows(words, n) for words in (0, windows * WINDOW * n))
    if weight.dtype != torch.int32 or weight.dim() != 2 or weight.shape[1] != n or not least <= len(weight) <= most:
        raise ValueError(
            f"{op}: weight is {weight.dtype} {list(weight.shape)}, expected int32 [{least} to {most}, {n}], which "
            f"potstill.ops.sparse.as_windows makes of a weight with {k} inputs and {n} outputs"
        )


def check_packed(op: str, weight: Tensor, n: int, k: int, value_bytes: int) -> None:
    """Raises :class:`ValueError` unless ``weight`` is packed for k inputs, n outputs and values of this size."""
    head = weight[:64].view(torch.int64).tolist() if weight.dtype == torch.uint8 and weight.numel() >= 64 else None
    if head is None or (head[2], head[3], head[5]) != (n, k, value_bytes):
        of = f"{weight.dtype} {list(weight.shape)}" if head is None else f"for {head[3]} inputs and {head[2]} outputs"
        raise ValueError(
            f"{op}: weight is {of}, expected what potstill.ops.sparse.pack makes of a weight with {k} inputs and {n} "
            "outputs"
        )


class _Reader:
    """Reads the sections of a packed weight one after the other."""

    def __init__(self, packed: Tensor) -> None:
        self._rest = packed

    def __call__(self, numbers: int, dtype: torch.dtype) -> Tensor:
        size = numbers * dtype.itemsize
        section = self._rest[:size].view(dtype)
        self._rest = self._rest[-(-size // _ALIGNED) * _ALIGNED :]
        return section
