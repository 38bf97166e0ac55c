"""The seed system's API on a channel: `create_shared_memory_pair` and its two ends. Vocabulary, no mechanism."""

from __future__ import annotations

import os
import queue

from .annotations import T, T_co, T_contra
from .channel import Channel, Receiver, Sender
from .layout import whole_number
from .semaphores import SHM_DIRECTORY

_DEFAULT_TOTAL = 256 << 20
_LARGEST_DEFAULT = 64 << 20
_SMALLEST_DEFAULT = 1 << 20


class SharedMemorySender(Sender[T_contra]):
    """The sending end of a pair: `put`, `has_space`, `wait_for_all_ack`, and all that a Sender has."""


class SharedMemoryReceiver(Receiver[T_co]):
    """The receiving end of a pair: `get`, `get_nowait`, and all that a Receiver has."""

    def get_nowait(self) -> T_co | None:  # type: ignore[override]  # the seed's
        """The next object, or None if there is none, which raises nothing here: so send no None."""
        try:
            return self.get(False)
        except queue.Empty:
            return None


def create_shared_memory_pair(
    capacity: int, slot_size: int | str | None = None
) -> tuple[SharedMemorySender[T], SharedMemoryReceiver[T]]:
    """A channel as its two ends, each of which may go to another process.

    >>> import ringshm
    >>> sender, receiver = ringshm.create_shared_memory_pair(4, "1KiB")
    >>> with sender, receiver:
    ...     sender.put([1, 2])
    ...     receiver.get(timeout=1), receiver.get_nowait()
    ([1, 2], None)

    Args:
        capacity: number of objects that may be on their way.
        slot_size: largest encoded object, in bytes or as "64KiB". None gives 256 MiB in all, shared among the slots,
            with 1 to 64 MiB each, and a quarter of the free shared memory at most.

    Returns:
        The sending end and the receiving end.

    Ownership:
        Both ends must be closed (or dropped) in the process that made them for the channel's names to go before it
        exits.

    Raises:
        As `Channel`.
    """
    whole_number(capacity, "capacity")
    if slot_size is None:
        space = os.statvfs(SHM_DIRECTORY)
        total = min(_DEFAULT_TOTAL, space.f_bavail * space.f_frsize // 4)
        slot_size = max(_SMALLEST_DEFAULT, min(_LARGEST_DEFAULT, total // capacity))
    with_roles: Channel[T] = Channel(capacity, slot_size)
    attachment = with_roles._open()
    # the channel's own handle goes at the end of this call; the names stay until both ends are closed
    return SharedMemorySender(attachment, None), SharedMemoryReceiver(attachment, None)
