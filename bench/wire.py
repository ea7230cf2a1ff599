"""Counts what a rank sends."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Wire(TorchDispatchMode):
    """The bytes that this rank sends in the collectives and messages made inside, as a ring would send them.

    ``gathered``: those of all-gathers alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0
        self.gathered = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.note(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, args: Any) -> None:
        """Adds one operation's bytes; raises :class:`NotImplementedError` for one that is not known."""
        if name in ("wait_tensor", "_wrap_tensor_autograd", "recv_"):
            return
        if name == "all_reduce":
            ranks = dist.distributed_c10d._resolve_process_group(args[2]).size()
            self.sent += 2 * (ranks - 1) / ranks * args[0].nbytes
        elif name == "allreduce_":
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self.sent += 2 * (ranks - 1) / ranks * sum(x.nbytes for x in args[0])
        elif name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole, share = sorted((args[0].nbytes, args[1].nbytes), reverse=True)
            self.sent += whole - share
            self.gathered += (whole - share) * (name == "_allgather_base_")
        elif name == "allgather_":
            ranks = dist.ProcessGroup.unbox(args[2]).size()
            self.sent += (ranks - 1) * sum(x.nbytes for x in args[1])
        elif name in ("send", "broadcast_"):
            self.sent += sum(x.nbytes for x in args[0])
        else:
            raise NotImplementedError(f"the bytes of {name} are not counted")
