"""Listeners: FIFOs through which threads are woken that sleep in an event loop or a selector, not on a semaphore.

A thread that waits through a descriptor takes a listener from its process's `Listeners`. It says in its own entry for
what the listener is to be woken (one bit in P_LISTENS_*), sets the same hint as any other waiter (waiters.py), looks
again, and sleeps until the descriptor is readable, for a slice at most. A waker writes a byte to every listener that
has announced itself for the kind: one of them may be cancelled, stopped or dead, and so nobody need pass the wake-up
on.

    word          writer            guarded by       meaning
    P_FIFOS       its participant   its own lock     bits of the listeners whose FIFOs there are, or are being made
    P_LISTENS_*   its participant   its own lock     bits of the listeners that want to be woken for that
    P_WATCHED     its participant   its own lock     bits of the listeners whose descriptors users have
    LISTENED      anyone            only ever set    somebody has listened: until then wakers pay one look at this

1. One FIFO has one reader: the thread that has taken the listener. It drains it, sets the hint, and then looks: so it
   sees all that was there before, and a byte comes for all that comes later.
2. A byte is a wake-up, not a fact. WAKE: one thing has come; CHANGE: something that each must see (a role, an end, a
   death). A byte may be missing (its writer was killed, the FIFO was full) or come in vain.
3. Writers never wait: a full FIFO (its reader is stopped) is as good as one with another byte.
4. A FIFO stays its participant's until that leaves, so a writer may keep it open: the entry's incarnation says whether
   it is still the same. P_FIFOS is written before a FIFO is made, so that a reaper finds it.
5. A forked child closes what it has inherited: a FIFO's lock says that its owner lives.
6. Other code may close the descriptors, and open its own files under their numbers (segment/descriptors.py). So nothing
   is read, written or closed through a number before it was seen to lead to the FIFO.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
from dataclasses import dataclass, field
from functools import partial

from ..errors import ChannelClosed, ChannelUnavailable, RingshmError, is_own, suppress_own
from ..segment import fifos, limits
from ..segment.descriptors import Identity, close_own, identity_of, is_still
from ..segment.files import Segment
from ..segment.layout import LISTENED, MAX_LISTENERS, P_FIFOS, P_INCARNATION, P_WATCHED
from ..system import RLock
from .participants import Participants

WAKE = b"w"
CHANGE = b"c"
_NO_FIFO = "cannot wake an event loop, a `wait` or a selector"
_PIPE_NBYTES = 65536  # what a pipe holds; one call reads all of it


@dataclass(eq=False)
class Listener:
    """A FIFO of this process, and the bit that stands for it.

    Attributes:
        fd: its descriptor, readable once it was woken.
        mask: its bit.
        watch: a duplicate of `fd` that a user has by `fileno()`, or -1.
        identity: the FIFO's.
    """

    fd: int
    mask: int
    path: str
    watch: int = -1
    identity: Identity = field(init=False)

    def __post_init__(self) -> None:
        self.identity = identity_of(self.fd)

    def drain(self) -> bytes:
        """Take out what was written."""
        found = b""
        if not is_still(self.fd, self.identity):
            return found
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
            if is_still(self.fd, self.identity):
                os.write(self.fd, byte)

    def close_watch(self) -> None:
        """Close the user's duplicate."""
        fd, self.watch = self.watch, -1
        close_own(fd, self.identity)

    def close(self) -> None:
        """Close all that this process has of it."""
        self.close_watch()
        fd, self.fd = self.fd, -1
        close_own(fd, self.identity)


class Listeners:
    """The listeners of this process on one segment; and how it wakes those of others."""

    def __init__(self, segment: Segment, participants: Participants) -> None:
        self._words, self._layout = segment.words, segment.layout
        self._name, self._nonce = segment.name, segment.nonce
        self._participants = participants
        #: The listeners whose descriptors users have, by `fileno()`.
        self.watched: list[Listener] = []
        self._made: dict[int, Listener] = {}  # by their masks
        self._idle: list[Listener] = []
        #: By entry and mask: its incarnation, and the descriptor.
        self._others: dict[tuple[int, int], tuple[int, int, Identity]] = {}
        self._lock = RLock()
        self._closed = False

    # --- the own ones

    def take(self) -> Listener:
        """A listener for this thread alone, drained; to be given back by `give_back`.

        Raises:
            ChannelUnavailable: if there are 64 in use, or there is no descriptor or inode left.
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
            raise ChannelUnavailable(
                errno.EUSERS,
                f"channel {self._name!r}: {MAX_LISTENERS} event loops, `wait`s and `fileno`s of this process use it "
                "already: close some",
            )
        participants, words = self._participants, self._words
        entry = participants.entry
        path = fifos.path_of(self._nonce, participants.index, words[entry + P_INCARNATION], mask.bit_length() - 1)
        words[entry + P_FIFOS] |= mask
        try:
            listener = self._made[mask] = Listener(fifos.make(path), mask, path)
        except BaseException as error:  # or a signal handler's: nobody else knows of the FIFO
            if isinstance(error, RingshmError) and is_own(error):
                raise
            fifos.remove(path)
            if not isinstance(error, OSError):
                raise
            raise limits.unavailable(self._name, _NO_FIFO, error) from error
        words[LISTENED] = 1
        return listener

    def watch(self) -> Listener:
        """A listener whose descriptor a user gets."""
        with self._lock:
            listener = self.take()
            try:
                listener.watch = os.dup(listener.fd)
            except OSError as error:
                self.give_back(listener)
                raise limits.unavailable(self._name, _NO_FIFO, error) from error
            self._words[self._participants.entry + P_WATCHED] |= listener.mask
            self.watched = [*self.watched, listener]
            return listener

    def unwatch(self, listener: Listener) -> None:
        """The user's descriptor goes."""
        with self._lock:
            self.watched = list(filter(partial(operator.is_not, listener), self.watched))
            if self._participants.has_entry:
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
            for mask, listener in self._made.copy().items():
                fifos.remove(listener.path)
                if self._participants.has_entry:
                    self._words[self._participants.entry + P_FIFOS] &= ~mask
            self._let_go()

    def disown(self) -> None:
        """In a forked child: close the copies of its parent's."""
        self._lock = RLock()
        self._let_go()

    def _let_go(self) -> None:
        made, self._made, self._idle, self.watched = self._made, {}, [], []
        for listener in made.values():
            listener.close()
        others, self._others = self._others, {}
        for _, fd, identity in others.values():
            close_own(fd, identity)

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
            known, fd, identity = self._others.get((index, mask), (0, -1, (0, 0)))
            if known != incarnation or not is_still(fd, identity):
                if fd >= 0:
                    del self._others[index, mask]
                    close_own(fd, identity)
                path = fifos.path_of(self._nonce, index, incarnation, mask.bit_length() - 1)
                try:
                    fd = fifos.open_existing(path)
                except OSError as error:
                    if not is_own(error):
                        raise
                    return  # not there yet, or no more, or something else is: its owner looks every slice
                self._others[index, mask] = incarnation, fd, identity_of(fd)
            with suppress_own(OSError):  # full: it is woken already
                os.write(fd, byte)
