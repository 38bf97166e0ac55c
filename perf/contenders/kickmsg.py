"""Adapter: kickmsg, publish-subscribe in C++, whose subscriber waits on a futex.

A full ring loses its oldest message: nobody waits for space. So it takes part where messages cannot outrun their
receiver, in round trips and in place. Each subscriber gets every message.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkContext
from typing import Any

import numpy as np

from . import Contender, Pair, Receiver, Sender

_FOREVER = 3600.0  # Seconds; its `receive` must have a time limit.


def _region(module: Any, capacity: int, nbytes: int) -> Any:
    config = module.Config()
    config.max_subscribers = 1
    config.sub_ring_capacity = 1 << (capacity - 1).bit_length()  # It takes powers of two.
    config.pool_size = 2 * config.sub_ring_capacity
    config.max_payload_size = nbytes
    return module.SharedRegion.create(f"/perf-{secrets.token_hex(8)}", module.ChannelType.PubSub, config)


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    module: Any = importlib.import_module("kickmsg")
    region, subscribed = _region(module, capacity, largest_nbytes), context.Event()

    def sender() -> Sender:
        send = module.Publisher(module.SharedRegion.open(region.name)).send
        subscribed.wait()  # A subscriber gets what is sent after it has come.
        return Sender(send)

    def receiver() -> Receiver:
        receive = module.Subscriber(module.SharedRegion.open(region.name)).receive
        subscribed.set()
        return Receiver(lambda: receive(_FOREVER))

    return Pair(sender, receiver, region.unlink)


@contextmanager
def in_place(nbytes: int, typed: bool) -> Iterator[Callable[[], None]]:
    """What moves one message without a copy in this process, its first and last byte written and read.

    Its slots are bare memory; a typed message is a NumPy view of it.
    """
    module: Any = importlib.import_module("kickmsg")
    dtype = np.dtype([("obs", np.uint8, (nbytes,)), ("action", np.int64)])
    size = dtype.itemsize if typed else nbytes
    region = _region(module, 4, size)
    publisher, subscriber = module.Publisher(region), module.Subscriber(region)

    def once() -> None:
        slot = publisher.allocate()
        written = memoryview(slot)
        written[0] = written[-1] = 1
        slot.publish(size)
        with subscriber.try_receive_view() as view:
            read = memoryview(view)
            assert read[0] == read[-1] == 1

    def once_typed() -> None:
        slot = publisher.allocate()
        written = np.frombuffer(slot, dtype)[0]
        array = written["obs"]
        array[0] = array[-1] = 1
        written["action"] = 1
        slot.publish(size)
        with subscriber.try_receive_view() as view:
            read = np.frombuffer(view, dtype)[0]
            array = read["obs"]
            assert array[0] == array[-1] == read["action"] == 1

    try:
        yield once_typed if typed else once
    finally:
        region.unlink()


CONTENDER = Contender(
    "kickmsg", "kickmsg", "kickmsg", make=_make, bounded="capacity; a full one loses its oldest message", lossy=True
)
