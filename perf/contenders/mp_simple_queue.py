"""Adapter: `multiprocessing.SimpleQueue`, a pipe with a lock at each end and no capacity of its own."""

from __future__ import annotations

from multiprocessing.context import ForkContext
from multiprocessing.queues import SimpleQueue
from typing import Any

from . import Contender, Pair, Receiver, Sender


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    queue: SimpleQueue[Any] = context.SimpleQueue()
    return Pair(lambda: Sender(queue.put), lambda: Receiver(queue.get), queue.close)


CONTENDER = Contender("mp.SimpleQueue", make=_make, bounded="the pipe's 64 KiB", shared=True)
