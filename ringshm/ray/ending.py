"""The end of a cluster that a driver has started by `ray.init()`: its rings go before it does, and so do their names.

Ray kills such a cluster's workers when the driver exits or calls `ray.shutdown()`, relays among them, which would have
removed the names. So a driver that exits first has all channels of its cluster ended, as long as there are relays; and
what it has made itself, and a `ray.shutdown()` has left, it removes last, once nobody is alive who uses it. What actors
have made stays after a `ray.shutdown()`, and so does everything where the driver is killed: `ringshm clean`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from multiprocessing import util

import ray

from ..errors import ChannelExists
from ..segment.files import path_of, reclaim
from ..system import monotonic, sleep
from . import calls, cluster
from .records import Ring

#: Seconds that the end may take: of all channels, by their relays; and of Ray's processes.
_ENDED_WITHIN, _GONE_WITHIN = 10.0, 5.0
_PAUSE = 0.02

_made: set[str] = set()
_pid = 0


def made(ring: Ring) -> None:
    """This process has made a ring: if it has started the cluster, the ring is to end with it."""
    global _pid
    if not cluster.started_here():
        return
    if _pid != os.getpid():
        _pid = os.getpid()
        _made.clear()
        util.Finalize(None, _remove, exitpriority=-200)  # when this process has left its own rings: process/registry.py
    _made.add(ring.name)


def _end_channels() -> None:
    """Have all channels ended, before the cluster is."""
    if not cluster.is_up() or not cluster.started_here():
        return
    with contextlib.suppress(Exception):
        registries = calls.registries()
        ray.get([registry.end_all.remote() for registry in registries], timeout=_ENDED_WITHIN)


def _remove() -> None:
    """Remove what the processes of a cluster have left that has been shut down, when the last of them has died."""
    give_up = monotonic() + _GONE_WITHIN
    for name in _made:
        while True:
            try:
                reclaim(path_of(name))
            except ChannelExists:
                if monotonic() < give_up:
                    sleep(_PAUSE)
                    continue
            break


atexit.register(_end_channels)  # runs before Ray's own, which was registered when Ray was imported
