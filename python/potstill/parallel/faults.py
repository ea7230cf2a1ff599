"""What is said, and on which rank, when another rank has died or hangs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

VARIABLE = "POTSTILL_TIMEOUT"
"""The variable of the environment with the seconds that a rank waits for another one."""

SECONDS = 600.0
"""How long a rank waits for another one where nothing else is said: longer than what one rank does alone."""

_ANSWER = 5.0  # seconds: ranks that wait for the same message give up at about the same time
_PAUSE = 0.05


def timeout(seconds: float | None = None) -> timedelta:
    """``seconds``, or those of the variable ``POTSTILL_TIMEOUT``, or ten minutes, for ``init_process_group``.

    Raises :class:`ValueError` for anything but a positive number.

    >>> timeout(90.0)
    datetime.timedelta(seconds=90)
    """
    name, given = ("timeout", seconds) if seconds is not None else (VARIABLE, os.environ.get(VARIABLE, SECONDS))
    try:
        found = float(given)
    except ValueError:
        found = math.nan
    if not 0.0 < found < math.inf:
        raise ValueError(f"{name} is {given!r}; expected a positive number of seconds")
    return timedelta(seconds=found)


@contextmanager
def named(
    where: Callable[[], str],
    what_next: str,
    leaving: Callable[[], bool] = lambda: False,
    *,
    group: dist.ProcessGroup | None = None,
    mixed: bool = False,
) -> Iterator[None]:
    """Around collectives: turns the :class:`RuntimeError` of one that failed into one that names the ranks at fault.

    These are the ranks of ``group`` that do not report within a few seconds, on the store by which all have met, that a
    collective has failed for them too: they have died, hang, have stopped with an error of their own, or are late.
    Nothing is sent as long as nothing fails. The message begins with ``where()`` and ends with ``what_next``; nobody is
    waited for any more once ``leaving()``. ``mixed``: there is more inside than collectives, and what they raise is
    known by its text.
    """
    try:
        yield
    except RuntimeError as error:
        if mixed and not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(
            f"{where()}: rank {dist.get_rank()} of {dist.get_world_size()} waited for the others in vain: "
            f"{_found(ranks, leaving)}. {what_next} [{' '.join(str(error).split())}]"
        ) from error


def _found(ranks: Iterable[int], leaving: Callable[[], bool]) -> str:
    try:
        missing = _missing(ranks, leaving)
    except RuntimeError:  # DistError is one
        return "nor can the store be reached by which they met; its process has probably died"
    if not missing:
        return "all of them have failed alike; look at the network"
    if len(missing) == 1:
        return f"rank {missing[0]} does not answer; it has died, hangs, or has stopped with an error of its own"
    return f"ranks {', '.join(map(str, missing))} do not answer; they have died, hang, or have stopped with errors"


def _missing(ranks: Iterable[int], leaving: Callable[[], bool]) -> list[int]:
    store = dist.distributed_c10d._get_default_store()
    own = dist.get_rank()
    store.set(_key(own), "")
    missing = [rank for rank in ranks if rank != own]
    end = time.monotonic() + _ANSWER
    while missing and time.monotonic() < end and not leaving():
        missing = [rank for rank in missing if not store.check([_key(rank)])]
        time.sleep(_PAUSE)
    return missing


def _key(rank: int) -> str:
    return f"potstill/failed/{rank}"
