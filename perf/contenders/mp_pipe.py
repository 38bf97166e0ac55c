"""Adapter: `multiprocessing.Pipe(duplex=False)`, for one sender and one receiver only, without locks."""

from __future__ import annotations

from functools import partial
from multiprocessing.context import ForkContext
from typing import Any

from . import Contender, Pair, Receiver, Sender


def _close(*ends: Any) -> None:
    for end in ends:
        end.close()


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    reader, writer = context.Pipe(duplex=False)
    return Pair(Sender(writer.send), Receiver(reader.recv), partial(_close, reader, writer))


CONTENDER = Contender("mp.Pipe", _make, bounded="the pipe's 64 KiB")
