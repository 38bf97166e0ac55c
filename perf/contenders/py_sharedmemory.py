"""Adapter: py-sharedmemory's pair, which moves each message in a shared-memory block of its own."""

from __future__ import annotations

import importlib
from multiprocessing.context import ForkContext

from . import Contender, Pair, Receiver, Sender


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    module = importlib.import_module("py_sharedmemory")
    sender, receiver = module.create_shared_memory_pair(capacity, ctx=context)

    def finish() -> None:
        sender.wait_for_all_ack()
        sender.close()

    def close() -> None:
        sender.close()
        receiver.close()

    return Pair(
        lambda: Sender(sender.put, finish),
        lambda: Receiver(receiver.get, None, receiver.get_nowait, receiver.close),
        close,
    )


CONTENDER = Contender("py-sharedmemory", "py-sharedmemory", "py_sharedmemory", make=_make)
