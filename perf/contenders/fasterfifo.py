"""Adapter: `faster_fifo.Queue`, a byte ring in C++ with one mutex and two condition variables."""

from __future__ import annotations

import importlib
from functools import partial
from multiprocessing.context import ForkContext

from . import BATCH, Contender, Pair, Receiver, Sender

_HEADER_NBYTES = 8  # It stores each message's length before the message.


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    size = capacity * (largest_nbytes + _HEADER_NBYTES)
    queue = importlib.import_module("faster_fifo").Queue(max_size_bytes=size)
    many = partial(queue.get_many, max_messages_to_get=BATCH)
    return Pair(lambda: Sender(queue.put), lambda: Receiver(queue.get, many, queue.get_nowait), queue.close)


CONTENDER = Contender(
    "faster-fifo", "faster-fifo", "faster_fifo", make=_make, bounded="capacity, in bytes", batches=True, shared=True
)
