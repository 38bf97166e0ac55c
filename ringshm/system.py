"""The system's own clock, sleep, locks and descriptors, also where a library has put others in their place.

Tests freeze the clock (freezegun, time-machine): a wait by the frozen one would never end, and nobody would look for
the dead. gevent replaces what waits by functions that let other greenlets run: these would come into the middle of a
call, in the same thread, past its locks. So all of ringshm takes these things from here.

- freezegun replaces `time.monotonic` wherever a module has it, under any name; time-machine changes C functions in
  place. Neither touches `time.clock_gettime` of the monotonic clock, of which `time.monotonic` is a shorter name.
- gevent keeps what it has replaced, and gives it out. If ringshm is imported before that, it has the originals anyway.

A call that waits therefore stops all greenlets of its thread, as those of `multiprocessing` do.
"""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def _original(module: str, name: str) -> Any:
    """That function, or the one for which gevent has put another."""
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None:
        return gevent.get_original(module, name)
    return getattr(importlib.import_module(module), name)


#: Seconds of the monotonic clock, as `time.monotonic`.
monotonic: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
#: Its nanoseconds, as `time.monotonic_ns`.
monotonic_ns: Callable[[], int] = partial(time.clock_gettime_ns, time.CLOCK_MONOTONIC)
#: As `time.sleep`.
sleep: Callable[[float], None] = _original("time", "sleep")
#: As `threading.Lock`. Taking a new one is also the cheapest locked instruction there is: a fence.
Lock: Callable[[], threading.Lock] = _original("_thread", "allocate_lock")
#: As `threading.RLock`.
RLock: Callable[[], threading.RLock] = _original("_thread", "RLock")
#: As `threading.get_ident`: a number for the thread.
get_ident: Callable[[], int] = _original("_thread", "get_ident")
#: As `os.close`.
close: Callable[[int], None] = _original("os", "close")
