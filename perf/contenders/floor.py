"""No channels, but what they cannot beat: bare copies, and a bare hand-over of a semaphore's token.

- ``np.copyto``: the sender copies each array into shared memory that is warm, the receiver copies it out into one that
  is; neither waits for the other, so that the two copies overlap as well as they can.
- ``semaphores``: one message at a time in shared memory, under a pair of the semaphores that ringshm waits on. Its
  receiver blocks.
"""

from __future__ import annotations

import mmap
import secrets
from multiprocessing.context import ForkContext
from typing import Any

import numpy as np

from ringshm.segment import semaphores

from . import Contender, Pair, Receiver, Sender

_SLICE = 3600.0  # Seconds: longer than any timing.


def _copies(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    shared = np.frombuffer(mmap.mmap(-1, max(1, capacity) * largest_nbytes), np.uint8)
    slots = shared.reshape(max(1, capacity), largest_nbytes)
    shared[:] = 0

    def sender() -> Sender:
        turn = 0

        def put(array: Any) -> None:
            nonlocal turn
            turn = (turn + 1) % len(slots)
            np.copyto(slots[turn][: len(array)], array)

        return Sender(put)

    def receiver() -> Receiver:
        turn, out = 0, np.zeros(largest_nbytes, np.uint8)

        def get() -> Any:
            nonlocal turn
            turn = (turn + 1) % len(slots)
            np.copyto(out, slots[turn])
            return out

        return Receiver(get)

    return Pair(sender, receiver)


def _semaphores(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    name = f"/perf-{secrets.token_hex(8)}"
    semaphores.create(name, 0)
    token = semaphores.open_existing(name)
    shared, nbytes = mmap.mmap(-1, largest_nbytes), mmap.mmap(-1, 8)
    length = memoryview(nbytes).cast("q")

    def put(message: bytes) -> None:
        length[0] = len(message)
        shared[: len(message)] = message
        token.release()

    def get() -> bytes:
        token.wait(_SLICE)
        return shared[: length[0]]

    return Pair(lambda: Sender(put), lambda: Receiver(get), lambda: semaphores.remove(name))


CONTENDERS = [
    Contender("floor: np.copyto", make=_copies, bounded="capacity; nobody waits", floor=True),
    Contender("floor: semaphores", make=_semaphores, bounded="one message", floor=True),
]
