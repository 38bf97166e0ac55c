"""Adapter: `ringshm.Channel`, with its default wait strategy, with the two pure ones, and without copies."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkContext

import numpy as np

from . import BATCH, Contender, Pair, Receiver, Sender


def _make(wait: str, capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    channel = importlib.import_module("ringshm").Channel(capacity, largest_nbytes, wait=wait)
    return Pair(
        lambda: Sender(channel.put),
        lambda: Receiver(channel.get, partial(channel.get_many, BATCH), channel.get_nowait),
        channel.close,
    )


def _make_in_place(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    """Messages are numbers, the first and the last word of an array that is as large as a slot."""
    channel = importlib.import_module("ringshm").Channel(capacity, largest_nbytes)
    words = largest_nbytes // 8

    def put(number: int | None) -> None:
        with channel.loan() as loan:
            array = loan.array(words, np.int64)
            array[0] = array[-1] = -1 if number is None else number

    def get() -> int | None:
        with channel.borrow() as message:
            first, last = int(message.value[0]), int(message.value[-1])
        if first != last:
            raise ValueError(f"the array begins with {first} and ends with {last}")
        return None if first < 0 else first

    return Pair(lambda: Sender(put), lambda: Receiver(get), channel.close)


@contextmanager
def in_place(nbytes: int, typed: bool) -> Iterator[Callable[[], None]]:
    """What moves one message without a copy in this process, its first and last byte written and read."""
    make = importlib.import_module("ringshm").Channel
    spec = {"obs": (np.uint8, (nbytes,)), "action": np.int64}
    with make(4, spec=spec) if typed else make(4, nbytes) as channel:

        def once() -> None:
            with channel.loan() as loan:
                written = loan.buffer
                written[0] = written[-1] = 1
            with channel.borrow() as message:
                read = message.value
                assert read[0] == read[-1] == 1

        def once_typed() -> None:
            with channel.loan() as loan:
                array = loan["obs"]
                array[0] = array[-1] = 1
                loan["action"] = 1
            with channel.borrow() as message:
                array = message["obs"]
                assert array[0] == array[-1] == message["action"] == 1

        yield once_typed if typed else once


CONTENDERS = [
    Contender(
        name, "ringshm", "ringshm", make=partial(_make, wait), batches=True, variant=wait != "adaptive", shared=True
    )
    for name, wait in [("ringshm", "adaptive"), ("ringshm (block)", "block"), ("ringshm (spin)", "spin")]
]  # fmt: skip
IN_PLACE = Contender("ringshm", "ringshm", "ringshm", make=_make_in_place)
