"""Adapter: `torch.multiprocessing.Queue`, which moves a tensor's memory into shared memory and sends a descriptor.

Arrays are sent as tensors that share their memory, and come back as arrays: the receiver's lies in shared memory that
nobody else writes. Anything else goes as over `multiprocessing.Queue`, which it is.
"""

from __future__ import annotations

import importlib
from multiprocessing.context import ForkContext
from typing import Any

import numpy as np

from . import Contender, Pair, Receiver, Sender
from .mp_queue import flush


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    torch: Any = importlib.import_module("torch")
    queue = importlib.import_module("torch.multiprocessing").get_context("fork").Queue(capacity)
    done = context.Event()

    def put(message: Any) -> None:
        queue.put(torch.from_numpy(message) if isinstance(message, np.ndarray) else message)

    def get() -> Any:
        message = queue.get()
        return message.numpy() if isinstance(message, torch.Tensor) else message

    def finish() -> None:
        flush(queue)
        done.wait()  # Descriptors are fetched from the process that sent them.

    return Pair(lambda: Sender(put, finish), lambda: Receiver(get, finish=done.set), queue.close)


CONTENDER = Contender("torch.mp.Queue", "torch", "torch", heavy=True, make=_make, deferred=True)
