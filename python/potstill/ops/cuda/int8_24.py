"""A linear layer with a 2:4 int8 weight on sparse tensor cores: ``mma.sp``, for GPUs of capability 8.0 to 8.9.

It is off: no op calls it before it has been measured to be faster on such a GPU. It computes tiles of 128 outputs and
128 rows, so that it is meant for many rows. What it computes is tested on the CPU (``tests/csrc/int8_24.cpp``) and its
machine code is checked (``.ci/cuda``); it has never run on a GPU, and its speed is unknown.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS = 128
"""Whose multiple a packed weight has; also of inputs."""

BLOCK = 64
"""Outputs, and inputs, whose weights are packed together: 2048 bytes of values, then 512 of indices."""

_FIRST_TWO = 0x44  # the indices of two groups of which the first two weights are kept


def why_not(device: torch.device) -> str | None:
    """What stands against running the kernel on ``device``; None if nothing does.

    >>> print(why_not(torch.device("cpu")))
    it needs a CUDA device, not cpu
    """
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if not _is_built():
        return "potstill was built without its CUDA C++ kernels; build it with -DPOTSTILL_CUDA=ON"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 8:
        return f"it is made for GPUs of capability 8.0 to 8.9, {device} has {major}.{minor}"
    return None


@cache
def _is_built() -> bool:
    return importlib.util.find_spec("potstill._CUDA") is not None


def lay_out(values: Tensor, indices: Tensor) -> Tensor:
    """Packs a 2:4 weight as the kernel takes it: [2 ceil(n/128), 2 ceil(k/128), 2560] uint8, on the weight's device.

    ``values`` [n, k/2] int8 are the two weights that each group of four inputs keeps, ``indices`` [n, k/8] uint8 their
    places: byte j has those of group 2j in its low half, those of group 2j + 1 in its high half, as ``i0 | i1 << 2``
    with i0 < i1. The bytes of 64 outputs and 64 inputs are in the order in which a warp loads them into registers,
    which ``csrc/cuda/fragments.h`` derives. Outputs and inputs that are missing are zeros.

    >>> lay_out(torch.ones(5, 16, dtype=torch.int8), torch.full((5, 4), 0xE4, dtype=torch.uint8)).shape
    torch.Size([2, 2, 2560])
    """
    _check(values, indices)
    n, k = values.shape[0], values.shape[1] * 2
    missing_n, missing_k = -n % OUTPUTS, -k % OUTPUTS
    kept = F.pad(values, (0, missing_k // 2, 0, missing_n)).view(torch.uint8)
    places = F.pad(indices, (0, missing_k // 8, 0, missing_n), value=_FIRST_TWO)
    blocks, steps = (n + missing_n) // BLOCK, (k + missing_k) // BLOCK
    # output: 64 block + 16 tile + 8 low + group; kept weight: 32 step + 16 high + 4 lane + byte
    kept = kept.view(blocks, 4, 2, 8, steps, 2, 4, 4).permute(0, 4, 1, 3, 6, 5, 2, 7)
    # bytes of indices: 8 step + 4 half + byte
    places = places.view(blocks, 4, 2, 8, steps, 2, 4).permute(0, 4, 3, 5, 2, 1, 6)
    return torch.cat([kept.reshape(blocks, steps, -1), places.reshape(blocks, steps, -1)], dim=2)


def _check(values: Tensor, indices: Tensor) -> None:
    wrong = values.dim() != 2 or indices.dim() != 2 or values.shape != (indices.shape[0], indices.shape[1] * 4)
    if wrong or values.dtype != torch.int8 or indices.dtype != torch.uint8:
        raise ValueError(
            f"lay_out: values is {values.dtype} {list(values.shape)}, indices {indices.dtype} {list(indices.shape)}; "
            "expected int8 [out_features, in_features / 2] and uint8 [out_features, in_features / 8]"
        )
    halves = torch.stack([indices & 15, indices >> 4], dim=2).flatten(1)
    if bool((bad := (halves & 3) >= halves >> 2).any()):
        output, group = bad.nonzero()[0].tolist()
        raise ValueError(
            "lay_out: indices has groups whose two places are not in ascending order, such as "
            f"{int(halves[output, group])} in output {output}"
        )


def launch(
    xq: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``(xq @ w.t()) * (x_scale[:, None] * scale) + bias`` in ``out_dtype``: float32, bfloat16 or float16.

    ``xq`` [m, k] int8 and its scales [m] are what ``quantize_rows`` makes, ``weight`` what :func:`lay_out` makes of w
    [n, k], ``scale`` and ``bias`` are [n]. The sums are exact. Never waits for the device. Raises :class:`RuntimeError`
    where :func:`why_not` says something.
    """
    reason = why_not(xq.device)
    if reason is not None:
        raise RuntimeError(f"int8_24: {reason}")
    from potstill import _CUDA

    if xq.shape[1] % 16 != 0:  # rows at multiples of 16 bytes; the weight has zeros for the rest
        xq = F.pad(xq, (0, -xq.shape[1] % 16))
    y = xq.new_empty((xq.shape[0], scale.shape[0]), dtype=out_dtype)
    if y.numel() > 0:
        with torch.cuda.device_of(xq):
            _CUDA.int8_24_linear(xq, x_scale, weight, scale, bias, y)
    return y
