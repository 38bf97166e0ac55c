"""Adapter: `multiprocessing.Queue`, whose feeder thread pickles and writes into a pipe."""

from __future__ import annotations

from functools import partial
from multiprocessing.context import ForkContext
from multiprocessing.queues import Queue
from typing import Any

from . import Contender, Pair, Receiver, Sender


def _finish(queue: Queue[Any]) -> None:
    queue.close()
    queue.join_thread()


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    queue: Queue[Any] = context.Queue(capacity)
    return Pair(Sender(queue.put, partial(_finish, queue)), Receiver(queue.get), queue.close)


CONTENDER = Contender("mp.Queue", _make)
