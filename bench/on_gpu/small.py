"""A few launches of every kernel, for compute-sanitizer, under which each takes many times as long."""

from __future__ import annotations

import sys

import torch

from potstill.ops import OPS

EVERY = 7  # one of so many samples


def main() -> int:
    """0, unless a launch raises."""
    device = torch.device("cuda")
    for op in OPS.values():
        if device.type in op.kernels:
            for sample in list(op.samples("test"))[::EVERY]:
                op(**op.on(sample.make(), device))
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
