"""Listeners: FIFOs through which threads are woken that sleep in an event loop or a selector, not on a semaphore.

A thread that waits through a descriptor takes a listener from its process's `Listeners`, says in its own entry for what
the listener is to be woken (one bit in P_LISTENS_MESSAGE or P_LISTENS_SPACE; waiting.Waiters), sets the same hint as
any other waiter, looks again, and sleeps until the descriptor is readable, for a slice at most. Who wakes (waiting.py)
writes a byte to every listener that has announced itself for the kind; all of them, since one that is woken may be
cancelled, stopped or dead, and then nobody need pass the wake-up on. LISTENED in the header says whether anybody has
ever listened: until then wakers pay one look at it.

1. One FIFO has one reader: the thread that has taken the listener. It drains it, sets the hint, and then looks: so
   whatever was there before its look is seen, and for what comes later a byte comes.
2. A byte is a wake-up, not a fact. WAKE: one thing has come; CHANGE: something that each must see (a role, an end, a
   death). A byte may be missing (its writer was killed, the FIFO was full) or come in vain.
3. Writers never wait: a full FIFO (its reader is stopped) is as good as one with another byte.
4. A FIFO stays its participant's until it leaves, so a writer may keep it open: the entry's incarnation tells whether
   it is still the same. P_FIFOS says in the entry which there are, before they are made, so that a reaper finds them.
5. A forked child closes what it has inherited: a FIFO's lock says that its owner lives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from . import fifos
from .errors import ChannelClosed
from .layout import LISTENED, MAX_LISTENERS, P_FIFOS, P_INCARNATION, P_WATCHED
from .participants import Participants
from .segment import Segment

WAKE = b"w"
CHANGE = b"c"
_PIPE_NBYTES = 65536  # what a pipe holds; one call reads all of it


class Listener:
    """A FIFO of this process, and the bit that stands for it.

    Attributes:
        fd: its descriptor, readable once it was woken.
        mask: its bit.
        watch: a duplicate of `fd` that a user has by `fileno()`, or -1.
    """

    __slots__ = ("fd", "mask", "path", "watch")

    def __init__(self, fd: int, mask: int, path: str) -> None:
        self.fd = fd
        self.mask = mask
        self.path = path
        self.watch = -1

    def drain(self) -> bytes:
        """Take out what was written."""
        found = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                some = os.read(self.fd, _PIPE_NBYTES)
                found += some
                if len(some) < _PIPE_NBYTES:
                    break
        return found

    def wake(self, byte: bytes = WAKE) -> None:
        """Make its descriptor readable."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.fd, byte)

    def close_watch(self) -> None:
        """Close the user's duplicate."""
        fd, self.watch = self.watch, -1
        if fd >= 0:
            os.close(fd)


class Listeners:
    """The listeners of this process on one segment; and how it wakes those of others."""

    def __init__(self, segment: Segment, participants: Participants) -> None:
        self._words = segment.words
        self._layout = segment.layout
        self._nonce = segment.nonce
        self._name = segment.name
        self._participants = participants
        #: Those that users have descriptors of, by `fileno()`.
        self.watched: list[Listener] = []
        self._made: dict[int, Listener] = {}  # by their masks
        self._idle: list[Listener] = []
        self._others: dict[tuple[int, int], tuple[int, int]] = {}  # (entry, mask): (incarnation, descriptor)
        self._lock = threading.RLock()
        self._closed = False

    # --- the own ones

    def take(self) -> Listener:
        """A listener for this thread alone, drained; to be given back by `give_back`.

        Raises:
            OSError: if there are 64 in use, or there is no descriptor or inode left.
            ChannelClosed: if this process exits.
            ChannelCorrupted: if something else stands where its FIFO is to be.
        """
        with self._lock:
            if self._closed:
                raise ChannelClosed(f"channel {self._name!r}: this process exits, and has closed its handles")
            if self._idle:
                listener = self._idle.pop()
                listener.drain()
                return listener
            return self._make()

    def give_back(self, listener: Listener) -> None:
        """It is no longer used, nor announced; unless it is a parent's."""
        with self._lock:
            if self._made.get(listener.mask) is listener and listener not in self._idle:
                self._idle.append(listener)

    def _make(self) -> Listener:
        mask = next((1 << bit for bit in range(MAX_LISTENERS) if 1 << bit not in self._made), 0)
        if not mask:
            raise OSError(
                errno.EUSERS,
                f"channel {self._name!r}: {MAX_LISTENERS} event loops, `wait`s and `fileno`s of this process use it "
                "already: close some",
            )
        participants, words = self._participants, self._words
        entry = participants.entry
        path = fifos.path_of(self._nonce, participants.index, words[entry + P_INCARNATION], mask.bit_length() - 1)
        words[entry + P_FIFOS] |= mask
        listener = self._made[mask] = Listener(fifos.make(path), mask, path)
        words[LISTENED] = 1
        return listener

    def watch(self) -> Listener:
        """A listener whose descriptor a user gets."""
        with self._lock:
            listener = self.take()
            listener.watch = os.dup(listener.fd)
            self._words[self._participants.entry + P_WATCHED] |= listener.mask
            self.watched = [*self.watched, listener]
            return listener

    def unwatch(self, listener: Listener) -> None:
        """The user's descriptor goes."""
        with self._lock:
            self.watched = [other for other in self.watched if other is not listener]
            self._words[self._participants.entry + P_WATCHED] &= ~listener.mask
            listener.close_watch()
            self.give_back(listener)

    def wake_watched(self) -> None:
        """Make the descriptors of this process's users readable."""
        for listener in self.watched:
            listener.wake(CHANGE)

    def close(self) -> None:
        """Remove all FIFOs of this process: it leaves."""
        if not self._participants.in_fork():
            self._closed = True
            for mask, listener in list(self._made.items()):
                fifos.remove(listener.path)
                self._words[self._participants.entry + P_FIFOS] &= ~mask
            self._let_go()

    def disown(self) -> None:
        """In a forked child: close the copies of its parent's."""
        self._lock = threading.RLock()
        self._let_go()

    def _let_go(self) -> None:
        made, self._made, self._idle, self.watched = self._made, {}, [], []
        for listener in made.values():
            listener.close_watch()
            with contextlib.suppress(OSError):
                os.close(listener.fd)
            listener.fd = -1
        others, self._others = self._others, {}
        for _, fd in others.values():
            with contextlib.suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError, ValueError):
            self.close()

    # --- everybody's

    def wake(self, listens: int, byte: bytes) -> None:
        """Write a byte to every listener that has announced itself in that word of its process's entry."""
        for index, masks in enumerate(self._participants.column(listens)):
            while masks:
                mask = masks & -masks
                masks ^= mask
                self._wake(index, mask, byte)

    def _wake(self, index: int, mask: int, byte: bytes) -> None:
        with self._lock:  # nobody else closes the descriptor meanwhile, whose number may become another file's
            incarnation = self._words[self._layout.entry(index) + P_INCARNATION]
            known, fd = self._others.get((index, mask), (0, -1))
            if known != incarnation:
                if fd >= 0:
                    del self._others[index, mask]
                    os.close(fd)
                path = fifos.path_of(self._nonce, index, incarnation, mask.bit_length() - 1)
                try:
                    fd = fifos.open_existing(path)
                except OSError:  # not there yet, or no more, or something else is: its owner looks every slice
                    return
                self._others[index, mask] = incarnation, fd
            with contextlib.suppress(OSError):  # full: it is woken already
                os.write(fd, byte)
