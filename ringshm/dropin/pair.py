"""`create_shared_memory_pair` and its two ends, on a channel: the seed system's API. Vocabulary, no mechanism."""

from __future__ import annotations

import os
import queue

from ..annotations import T, T_co, T_contra
from ..arguments import whole_number
from ..channel.channel import Channel, Receiver, Sender
from ..segment.semaphores import SHM_DIRECTORY

#: Objects on their way in a pair that was given no capacity.
DEFAULT_CAPACITY = 64
#: Bytes of all slots together if no `slot_size` is given, and the bounds of each slot. A container of Docker's has 64
#: MiB of shared memory by default: of its quarter each of 64 slots gets the smallest size.
_DEFAULT_TOTAL = 256 << 20
_LARGEST_SLOT = 64 << 20
_SMALLEST_SLOT = 256 << 10


class SharedMemorySender(Sender[T_contra]):
    """The sending end of a pair: a Sender, with its `put`, `has_space` and `wait_for_all_ack`."""


class SharedMemoryReceiver(Receiver[T_co]):
    """The receiving end of a pair: a Receiver whose `get_nowait` gives None if there is no object."""

    def get_nowait(self) -> T_co | None:  # type: ignore[override]  # the seed's
        """The next object, or None if there is none. So send no None: a receiver cannot tell it from that."""
        try:
            return self.get(False)
        except queue.Empty:
            return None


def create_shared_memory_pair(
    capacity: int | None = 0, slot_size: int | str | None = None, *, ctx: object = None
) -> tuple[SharedMemorySender[T], SharedMemoryReceiver[T]]:
    """Make a channel and return its two ends. Each may go to another process.

    >>> import ringshm
    >>> sender, receiver = ringshm.create_shared_memory_pair(4, "1KiB")
    >>> with sender, receiver:
    ...     sender.put([1, 2])
    ...     receiver.get(timeout=1), receiver.get_nowait()
    ([1, 2], None)

    Args:
        capacity: the number of objects that may be on their way; a further `put` waits. 0 or None means 64, not "any
            number", since a ring is preallocated.
        slot_size: bytes that a slot has for an encoded object, or a string such as "64KiB"; a larger object is sent in
            pieces. None divides 256 MiB among the slots, but at most a quarter of the free shared memory, and 256 KiB
            to 64 MiB for each slot.
        ctx: accepted and not used: nothing depends on how processes are started.

    Returns:
        The sending end and the receiving end.

    Ownership:
        The channel's names go when the process that made the pair has closed (or dropped) both ends, or has exited.

    Raises:
        As `Channel`.
    """
    if capacity is None or (capacity == 0 and not isinstance(capacity, bool)):
        capacity = DEFAULT_CAPACITY
    whole_number(capacity, "capacity")
    if slot_size is None:
        space = os.statvfs(SHM_DIRECTORY)
        total = min(_DEFAULT_TOTAL, space.f_bavail * space.f_frsize // 4)
        slot_size = max(_SMALLEST_SLOT, min(_LARGEST_SLOT, total // capacity))
    with_roles: Channel[T] = Channel(capacity, slot_size)
    attachment = with_roles._open()
    # `with_roles` itself is garbage after this call; the names stay until both ends are closed
    return SharedMemorySender(attachment, None), SharedMemoryReceiver(attachment, None)
