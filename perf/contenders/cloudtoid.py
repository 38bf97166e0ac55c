"""Adapter: cloudtoid-interprocess, a queue of bytes in Rust that many senders and receivers share.

Objects are pickled, in the call that its own users would write. It has no call that waits for space: a sender of a full
queue gives its core to others and tries again. `receive` waits for a message; the variant asks again and again, which
keeps a core busy, and moves bytes as they are. What it leaves on disk lies in a folder of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Any, cast

from . import Contender, Pair, Receiver, Sender

_HEADER_NBYTES = 8  # Before each message, which is padded to a multiple of that.


def capacity_nbytes(capacity: int, largest_nbytes: int) -> int:
    """The size of a queue that holds so many messages of that size and no more."""
    return capacity * (_HEADER_NBYTES + -(-largest_nbytes // _HEADER_NBYTES) * _HEADER_NBYTES)


class _Queue:
    """A queue in a folder of its own; one subscriber keeps it, since one that nobody has open is lost."""

    def __init__(self, capacity: int, largest_nbytes: int) -> None:
        module: Any = importlib.import_module("cloudtoid_interprocess")
        self._folder = tempfile.mkdtemp(prefix="perf-", dir="/dev/shm")
        self._name = Path(self._folder).name
        where = self._name, capacity_nbytes(capacity, largest_nbytes), self._folder
        self.publisher, self.subscriber = partial(module.Publisher, *where), partial(module.Subscriber, *where)
        self._kept = self.subscriber()

    def close(self) -> None:
        """Remove it, also after a process was killed that had it open."""
        self._kept.close()
        shutil.rmtree(self._folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"/dev/shm/sem.ct3ip.{self._name}")


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    queue = _Queue(capacity, largest_nbytes)

    def sender() -> Sender:
        try_send, dumps = queue.publisher().try_send, pickle.dumps

        def put(message: Any) -> None:
            data = dumps(message, 5)
            while not try_send(data):
                os.sched_yield()

        return Sender(put)

    def receiver() -> Receiver:
        receive, loads = queue.subscriber().receive, pickle.loads
        return Receiver(lambda: loads(receive()))

    return Pair(sender, receiver, queue.close)


def _make_polling(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    queue = _Queue(capacity, largest_nbytes)

    def sender() -> Sender:
        try_send = queue.publisher().try_send

        def put(data: bytes) -> None:
            while not try_send(data):
                os.sched_yield()

        return Sender(put)

    def receiver() -> Receiver:
        try_receive = queue.subscriber().try_receive

        def get() -> bytes:
            while (data := try_receive()) is None:
                pass
            return cast(bytes, data)

        return Receiver(get)

    return Pair(sender, receiver, queue.close)


@contextlib.contextmanager
def both_ends(capacity: int, largest_nbytes: int) -> Iterator[tuple[Any, Any]]:
    """A publisher and a subscriber in this process."""
    queue = _Queue(capacity, largest_nbytes)
    publisher, subscriber = queue.publisher(), queue.subscriber()
    try:
        yield publisher, subscriber
    finally:
        publisher.close()
        subscriber.close()
        queue.close()


CONTENDERS = [
    Contender(
        "cloudtoid", "cloudtoid-interprocess", "cloudtoid_interprocess", make=_make,
        bounded="capacity, in bytes", shared=True,
    ),
    Contender(
        "cloudtoid (polling)", "cloudtoid-interprocess", "cloudtoid_interprocess", make=_make_polling,
        bounded="the same", variant=True,
    ),
]  # fmt: skip
