"""Adapter: `multiprocessing.Pipe(duplex=False)`, for one sender and one receiver only, without locks."""

from __future__ import annotations

from multiprocessing.context import ForkContext

from . import Contender, Pair, Receiver, Sender


def _make(as_bytes: bool, context: ForkContext) -> Pair:
    reader, writer = context.Pipe(duplex=False)

    def close() -> None:
        reader.close()
        writer.close()

    if as_bytes:
        return Pair(lambda: Sender(writer.send_bytes), lambda: Receiver(reader.recv_bytes), close)
    return Pair(lambda: Sender(writer.send), lambda: Receiver(reader.recv), close)


CONTENDERS = [
    Contender("mp.Pipe", make=lambda _, __, context: _make(False, context), bounded="the pipe's 64 KiB"),
    Contender("mp.Pipe (bytes)", make=lambda _, __, context: _make(True, context), bounded="the same", variant=True),
]
