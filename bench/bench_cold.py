"""One row through layers whose weights are not in any cache, as when a decoder generates a token.

    python bench/bench_cold.py [--features 4096] [--threads 1 2]

A call walks through enough copies of the layer to exceed the caches several times; times are per layer. The floor is
the bytes of the weights at the machine's bandwidth of reads from memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.nn import Int4Linear, Int8Linear
from potstill.ops.int4_linear import dequantize_groups, quantize_groups
from potstill.ops.rivals import matmul_nbits
from potstill.report.measure import ceilings, torch_threads
from potstill.timing import compare

BEYOND_CACHES = 128 << 20  # bytes of int4 weights that one call walks through


def main() -> None:
    options = _options()
    k = options.features
    copies = max(2, BEYOND_CACHES // (k * k // 2))
    x = torch.randn(1, k)
    for threads in options.threads:
        memory = next(level for level in ceilings(threads).memory if level.name == "DRAM")
        with torch_threads(threads), torch.inference_mode():
            calls = _calls(x, k, copies)
            times = compare({name: call for name, (call, _) in calls.items()}, seconds=options.seconds, rounds=41)
        ours = times["ours int4 group 32"].median
        for name, (_, size) in calls.items():
            seconds = times[name].median / copies
            floor = size / (memory.gbytes_per_s * 1e9)
            print(
                f"{threads} threads, {name:24} {1e6 * seconds:7.0f} us  {size / seconds / 1e9:5.1f} GB/s  "
                f"{100 * floor / seconds:4.0f} % of memory's  {times[name].median / ours:5.2f} x our int4"
            )


def _calls(x: Tensor, k: int, copies: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Name -> a call of all copies, and the bytes of one copy's weights."""
    linear = nn.Linear(k, k, bias=False).requires_grad_(False)
    result: dict[str, tuple[Callable[[], object], float]] = {}
    layers: dict[str, Callable[[], nn.Module]] = {"ours int8": lambda: Int8Linear.from_float(linear)}
    for group in (32, 128):
        layers[f"ours int4 group {group}"] = lambda group=group: Int4Linear.from_float(linear, group)  # type: ignore[misc]
    for name, make in layers.items():
        made = [make() for _ in range(copies)]
        size = sum(t.nbytes for t in (*made[0].parameters(), *made[0].buffers()))
        result[name] = (partial(_all, [partial(layer, x) for layer in made]), size)
    for group in (32, 128):
        integers, scale, zero = quantize_groups(linear.weight, group)
        rivals = [matmul_nbits(x, integers, scale, zero, None, group) for _ in range(copies)]
        for name in rivals[0]:
            size = k * k / 2 + scale.numel() * 4
            result[f"onnxruntime group {group}"] = (partial(_all, [rival[name] for rival in rivals]), size)
            _check(rivals[0][name]()[0], x, dequantize_groups(integers, scale, zero, group))
    return result


def _check(y: Any, x: Tensor, weight: Tensor) -> None:
    error = float((torch.as_tensor(y) - x @ weight.t()).norm() / (x @ weight.t()).norm())
    if error > 0.03:
        raise RuntimeError(f"the rival's result is off by {error:.2g}: it was given other weights")


def _all(calls: Iterable[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
