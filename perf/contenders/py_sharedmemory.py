"""Adapter: py-sharedmemory's pair, which moves each message in a shared-memory block of its own."""

from __future__ import annotations

import importlib
from functools import partial
from multiprocessing.context import ForkContext
from typing import Any

from . import Contender, Pair, Receiver, Sender


def _finish(sender: Any) -> None:
    sender.wait_for_all_ack()
    sender.close()


def _close(*ends: Any) -> None:
    for end in ends:
        end.close()


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    module = importlib.import_module("py_sharedmemory")
    sender, receiver = module.create_shared_memory_pair(capacity, ctx=context)

    return Pair(
        Sender(sender.put, partial(_finish, sender)),
        Receiver(receiver.get, None, receiver.get_nowait, receiver.close),
        partial(_close, sender, receiver),
    )


CONTENDER = Contender("py-sharedmemory", _make, "py-sharedmemory", "py_sharedmemory")
