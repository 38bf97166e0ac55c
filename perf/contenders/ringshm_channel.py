"""Adapter: `ringshm.Channel`, with its default wait strategy and with the two pure ones."""

from __future__ import annotations

import importlib
from functools import partial
from multiprocessing.context import ForkContext

from . import BATCH, Contender, Pair, Receiver, Sender


def _make(wait: str, capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    channel = importlib.import_module("ringshm").Channel(capacity, largest_nbytes, wait=wait)
    return Pair(
        Sender(channel.put),
        Receiver(channel.get, partial(channel.get_many, BATCH), channel.get_nowait),
        channel.close,
    )


CONTENDERS = [
    Contender(name, partial(_make, wait), "ringshm", "ringshm", batches=True, variant=wait != "adaptive")
    for name, wait in [("ringshm", "adaptive"), ("ringshm (block)", "block"), ("ringshm (spin)", "spin")]
]
