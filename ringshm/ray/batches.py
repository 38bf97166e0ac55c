"""Batches: messages as they pass between nodes, raw (channel/raw.py), several in one call of Ray."""

from __future__ import annotations

import queue
from pickle import PickleBuffer
from typing import Any, TypeAlias

import numpy as np

from ..channel.loans import Borrow
from ..channel.raw import Raw, RawReceiver, give_back
from ..errors import EndOfChannel

#: Messages of a batch, and bytes after which no further message joins it.
BATCH_MESSAGES, BATCH_NBYTES = 256, 16 * 1024 * 1024

#: Numbers; for each message its meta, its description, and how many of its deliveries have failed; and its payload, a
#: buffer.
Batch: TypeAlias = tuple[list[int], list[tuple[int, bytes, int]], list[Any]]
#: Messages that are borrowed until they have arrived.
Borrows: TypeAlias = list[Borrow[Raw]]


def pack(numbers: list[int], borrows: Borrows, delivered: bool) -> Batch:
    """The messages for a call. Ray copies the payloads from their slots, one after the other, into one object.

    Args:
        delivered: whether the messages go to receivers, who are to see how often others have died of them. Where relays
            alone have borrowed them, that is none of a receiver's business.
    """
    raws = [borrow.value for borrow in borrows]
    failed = [borrow.delivery_count - 1 if delivered else 0 for borrow in borrows]
    heads = [(raw.meta, raw.description, count) for raw, count in zip(raws, failed, strict=True)]
    return numbers, heads, [PickleBuffer(raw.payload.data) for raw in raws]


def unpack(batch: Batch) -> list[tuple[int, Raw, int]]:
    """The messages, whose payloads are views of the object, with their numbers and failed deliveries."""
    return [
        (number, Raw(meta, description, np.frombuffer(payload, np.uint8)), failed)
        for number, (meta, description, failed), payload in zip(*batch, strict=True)
    ]


def gather(receiver: RawReceiver, seconds: float, at_most: int = BATCH_MESSAGES) -> Borrows:
    """Borrow a message, and further ones that are there; [] if none comes in time.

    Raises:
        EndOfChannel: as `borrow`, if there is none.
    """
    borrows: Borrows = []
    nbytes = 0
    while len(borrows) < at_most and nbytes < BATCH_NBYTES:
        borrow = receiver.borrow(timeout=0 if borrows else seconds)
        try:
            borrow.__enter__()
        except queue.Empty:
            break
        except EndOfChannel:
            if borrows:
                break
            raise
        borrows.append(borrow)
        nbytes += len(borrow.value.payload)
    return borrows


def end(borrow: Borrow[Raw]) -> None:
    """The message has arrived."""
    borrow.__exit__(None, None, None)


def give_back_all(borrows: Borrows, deliveries: int) -> None:
    """Give messages back to their places, with so many more deliveries that have failed."""
    for borrow in borrows:
        give_back(borrow, deliveries)
