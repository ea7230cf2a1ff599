"""How the ranks that torchrun has started find each other, also after it has started them again."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from potstill.parallel import faults

_PAUSE = 0.02  # seconds between two looks at the store


def join(backend: str, seconds: float | None = None) -> None:
    """Makes torch's default process group of the ranks that ``torchrun`` has started; in it none waits longer.

    ``seconds``: see :func:`potstill.parallel.faults.timeout`. Torchrun keeps its store when it starts ranks again, and
    with it what the dead ones have left there: by ``init_process_group`` alone the new ranks may wait for those
    (https://github.com/pytorch/pytorch/issues/135712). Here they first agree on a part of the store that is new.

    Raises :class:`RuntimeError` that names the ranks which have not come in that time.
    """
    timeout = faults.timeout(seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*where, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    place = meet(PrefixStore("potstill/meeting", store), rank, world, timeout)
    dist.init_process_group(backend, store=PrefixStore(place, store), rank=rank, world_size=world, timeout=timeout)


def meet(store: Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that only the ranks of this start know.

    Each rank leaves a name of its own under its number, where it replaces that of an earlier start. The first rank
    answers to every name that it finds, under that name, with one of the whole start's, so that whoever reads an answer
    knows that the first rank lives; it waits until all have replied to that one, and then tells them.

    Raises :class:`RuntimeError` if others have not come in time.

    >>> meet(dist.HashStore(), 0, 1, timedelta(seconds=1)) != meet(dist.HashStore(), 0, 1, timedelta(seconds=1))
    True
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        return _invite(store, own, world, end)
    store.set(f"rank {rank}", own)
    place = _wait(store, f"answer to {own}", end)
    store.set(f"{place}/{rank}", "")
    _wait(store, f"{place}/all", end)
    return place


def _invite(store: Store, place: str, world: int, end: float) -> str:
    missing, answered = list(range(1, world)), set[str]()
    while missing:
        for rank in missing:
            if store.check([f"rank {rank}"]):
                name = str(store.get(f"rank {rank}"), "ascii")
                if name not in answered:
                    store.set(f"answer to {name}", place)
                    answered.add(name)
        missing = [rank for rank in missing if not store.check([f"{place}/{rank}"])]
        if missing and time.monotonic() > end:
            raise RuntimeError(_late(f"rank 0 of {world}", ", ".join(map(str, missing))))
        time.sleep(_PAUSE)
    store.set(f"{place}/all", "")
    return place


def _wait(store: Store, key: str, end: float) -> str:
    while not store.check([key]):
        if time.monotonic() > end:
            raise RuntimeError(_late("this rank", "0, or another that it waits for,"))
        time.sleep(_PAUSE)
    return str(store.get(key), "ascii")


def _late(who: str, missing: str) -> str:
    return (
        f"{who} waited in vain for rank {missing} at the start; their own output says more. Start all of them again; "
        f"where they may be as slow as that, set {faults.VARIABLE} to more seconds"
    )
