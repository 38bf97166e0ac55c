"""Adapter: `multiprocessing.Queue`, whose feeder thread pickles and writes into a pipe."""

from __future__ import annotations

from functools import partial
from multiprocessing.context import ForkContext
from multiprocessing.queues import Queue
from typing import Any

from . import Contender, Pair, Receiver, Sender


def flush(queue: Queue[Any]) -> None:
    """Wait until the feeder thread has written everything."""
    queue.close()
    queue.join_thread()


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    queue: Queue[Any] = context.Queue(capacity)
    return Pair(lambda: Sender(queue.put, partial(flush, queue)), lambda: Receiver(queue.get), queue.close)


CONTENDER = Contender("mp.Queue", make=_make, shared=True, deferred=True)
