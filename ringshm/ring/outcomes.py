"""How a call on the ring ended that neither raised nor gave a message: results, not errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Outcome:
    """One of the constants below; or UNDECODABLE, which carries the error of the codec."""

    __slots__ = ("error", "name")

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self.error = error

    def __repr__(self) -> str:
        return self.name


SENT = Outcome("SENT")
FULL = Outcome("FULL")  # no slot is free
EMPTY = Outcome("EMPTY")  # no message is ready
CLAIMED = Outcome("CLAIMED")  # the caller has a slot, for writing
TAKEN = Outcome("TAKEN")  # the caller has one slot or more, for reading
CONTENDED = Outcome("CONTENDED")  # the mutex was not to be had in time: the caller tries again
STREAM = Outcome("STREAM")  # the oldest message is larger than a slot: the caller takes it alone, see large.py
NOTICE = Outcome("NOTICE")  # ATTENTION was set: the caller looks for shutdown and broken, and may try again
DISTRUSTED = Outcome("DISTRUSTED")  # within `critical`: what the mutex guards is damaged and must be rebuilt


def consumed(consume: Callable[[], Any]) -> Any:
    """What `consume` gives; or an UNDECODABLE outcome with its error, as `consume_again` says."""
    try:
        return consume()
    except Exception as error:
        return consume_again(consume, error)


def consume_again(consume: Callable[[], Any], error: Exception) -> Outcome:
    """After `consume` has failed with that error: an UNDECODABLE outcome with the error, if it fails again.

    A signal handler may have raised while the codec worked. Then the codec works the second time, the handler's
    exception goes on, and the message goes back to its place. So it does if memory has run out.
    """
    if isinstance(error, MemoryError):
        raise error
    try:
        consume()
    except Exception:
        return Outcome("UNDECODABLE", error)
    raise error
