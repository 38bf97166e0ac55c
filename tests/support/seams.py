"""Where tests reach behind the public face: each function says why no public call does.

When an internal name changes, this file changes and the tests do not.
"""

from __future__ import annotations

import errno
import mmap
import multiprocessing.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ringshm import Latest
from ringshm.errors import ChannelUnavailable
from ringshm.ring.mutex import SLICE
from ringshm.ring.spin import Spin
from ringshm.segment import layout as at
from ringshm.segment.files import path_of


class Words:
    """The words of a channel's segment, mapped for reading beside any handle: `stats()` runs the code that is traced,
    and tells no sequence of a message.
    """

    def __init__(self, name: str) -> None:
        fd = os.open(path_of(name), os.O_RDONLY)
        try:
            header = np.frombuffer(os.pread(fd, at.HEADER_NBYTES, 0), np.uint64).tolist()
            layout = at.Layout(header[at.CAPACITY], header[at.SLOT_SIZE], header[at.MAX_PARTICIPANTS])
            end = (layout.records + layout.capacity * at.RECORD_WORDS) * at.WORD_SIZE
            self._words = memoryview(mmap.mmap(fd, end, prot=mmap.PROT_READ)).cast("Q")
        finally:
            os.close(fd)
        self._records = [layout.record(slot) for slot in range(layout.capacity)]

    @property
    def sent(self) -> int:
        """How many messages were published: their sequences are below this."""
        return self._words[at.TAIL]

    @property
    def dropped(self) -> int:
        return self._words[at.DROPPED]

    def unreceived(self) -> frozenset[int]:
        """The sequences of the messages that somebody is still to receive: they are READY, or READING."""
        words = self._words
        return frozenset(
            words[record + at.R_SEQUENCE]
            for record in self._records
            if words[record + at.R_STATE] & at.STATE_MASK in (at.READY, at.READING)
        )

    @property
    def since_last_look(self) -> float:
        """Seconds since any process has looked for the dead."""
        return (time.monotonic_ns() - self._words[at.LAST_CHECK]) / 1e9


def look_is_due(name: str) -> bool:
    """Whether the next call of any process looks for the dead: a slice has passed since the last look."""
    return Words(name).since_last_look > SLICE


def warm_up(channel: Any, sends: bool) -> None:
    """Take a role, as the first call would, and put the handle's look for the dead off: so the next call is the call
    alone, of as many bytecodes each time. No public call takes the receiver's role without receiving.
    """
    if sends:
        channel._start_sending()
    else:
        channel._start_receiving()
    channel._look_at = time.monotonic() + 60


def never_spin(latest: Latest[Any]) -> None:
    """Have waits block at once, for a spin takes a varying number of bytecodes. A Latest has no `wait="block"`."""
    latest._receive_spin = Spin("block")


def exit_as_python_does() -> None:
    """Run what the exit of a process that `multiprocessing` has started runs: its finalisers. `sys.exit` in a forked
    child would run pytest's, too.
    """
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]


def look(channel: Any) -> None:
    """Have the next call look for the dead, as after a slice of time."""
    channel._look_at = 0.0


def lock_descriptor(channel: Any) -> int:
    """The descriptor that carries the process's record locks, which other code may close. No public call tells it."""
    return int(channel._open().segment.file.lock_fd)


def shared_state(handle: Any) -> list[tuple[int, int]]:
    """The memory by which processes agree, (address, bytes): what lies before the segment's slots, and its semaphores.
    No public call tells where it is mapped.
    """
    segment = handle._open().segment
    words = np.frombuffer(segment.memory, np.uint8)
    semaphores = [(semaphore.address, 32) for semaphore in segment.semaphores]  # sizeof(sem_t)
    return [(words.ctypes.data, segment.layout.slots), *semaphores]


def header_of(channel: Any) -> list[int]:
    """The words that say what the segment is: nothing may change them, and no call shows all of them."""
    return list(channel._attachment.words[at.MAGIC : at.GEN])


def count_as_dead(channel: Any) -> None:
    """What a look for the dead does whose process counts as dead: that takes a descriptor which other code has closed,
    and a look at that very moment.
    """
    channel._attachment.ring.refuse(ChannelUnavailable(errno.EBADF, "the process counts as dead"))


@contextmanager
def waiting_for_space(channel: Any) -> Iterator[Callable[[], bool]]:
    """This thread waits for space within the block, and does not sleep; gives whether it was woken."""
    space = channel._attachment.space
    space.announce()
    try:
        yield lambda: bool(space.sleep(0))
    finally:
        space.withdraw()


class Slot:
    """The only slot of a channel, to look at the bytes that a message has there, or to damage them: no call does."""

    def __init__(self, channel: Any) -> None:
        segment = channel._open().segment
        self._memory, self._words, layout = segment.memory, segment.words, segment.layout
        self._start, self._end = layout.slot(0), layout.slot(0) + channel.slot_size
        self._meta = layout.record(0) + at.R_META

    def message(self) -> tuple[int, bytes]:
        """R_META, and the payload."""
        meta = self._words[self._meta]
        return meta, bytes(self._memory[self._start : self._start + (meta >> 16)])

    def clear(self) -> None:
        """Put zeros where a message leaves gaps."""
        self._memory[self._start : self._end] = bytes(self._end - self._start)

    def write(self, offset: int, data: bytes) -> None:
        self._memory[self._start + offset : self._start + offset + len(data)] = data

    def set_meta(self, meta: int) -> None:
        self._words[self._meta] = meta


def start_of_a_child(handle: Any) -> tuple[Callable[[], None], Callable[[], bool]]:
    """Begin the start of a child with a handle, and how to have it fail; and whether nobody is left, or on the way, who
    sends. A start that fails amid that look is too short to be met by chance.
    """
    attachment = handle._attachment
    tether = attachment.invitations.issue_forked(at.SENDER, True, 1.0)
    return tether.cancel, attachment.over_for_receivers
