"""Messages larger than a slot: streams. They flow through a window of slots in pieces, while the receiver copies.

The head is a slot that is claimed, published, taken and released like any other. The window is the head and further
slots, PIECE, which belong to it. The sender writes the next piece into the slot whose piece was copied longest ago.

    word                  writer                 guarded by                 meaning
    R_META of the head    the sender             the head is WRITING        how large the message is
    R_WRITTEN             the sender             its one writer             attempt << 40 | pieces that it has written
    R_READ                the receiver           its one writer             attempt << 40 | pieces that it has copied
    R_FEEDER              the sender, until it   receivers' mutex, once it  the sender that still writes; or ALL_THERE,
                          is published           is published               LEFT; or GIVEN_UP: nobody writes the rest
    R_PIECE of each slot  the sender             the slot is the message's  attempt << 40 | number of its piece + 1

1. A message that the free slots can hold is written as a whole, ALL_THERE, before it is published. Its `put` returns
   then, and receivers may start over as often as need be. Any other message is published first, and its `put` goes on
   until it has been received: so what a receiver has not got is still with the sender.
2. The window is the message's until it ends, and may be the head alone. So a stream that has its head waits for no
   slot: neither other senders nor other streams can stand in its way, at any capacity.
3. A receiver that takes a message of which another has copied pieces begins a new attempt, by a store to R_READ. The
   sender sees that, and starts over; R_PIECE tells pieces of an older attempt. A receiver whose time was up, and that
   comes back, goes on where it was.
4. A message is received, or given up, under the receivers' mutex: so the sender knows which of the two. A borrow's
   block begins once it has all pieces, and says so in R_READ (`hold`). The sender waits on, since the message may yet
   go back. If the sender's time is up meanwhile, or it dies, the message is LEFT to the block: it is sent. It can go
   back no more then; if its receiver dies, it is lost, counted as dropped and warned of.
5. If the sender dies, the receiver finds GIVEN_UP (reaper.py), drops what it had and goes on. If the receiver dies, the
   message goes to the next one from its start, up to max_deliveries times.
6. Each word of progress has one writer. An end that no longer has the message stores nothing: a sender that has written
   all pieces stores again only when it has seen an attempt that lacks them.
7. Each end wakes the other as waiters.py says. An end that was woken in vain has perhaps taken the token of an end of
   another stream, and passes it on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..messages.buffers import write_range
from ..messages.pool import Pool, owned_bytes
from ..segment import layout
from ..segment.layout import (
    ALL_THERE,
    ATTEMPT,
    ENTRY_SHIFT,
    GIVEN_UP,
    KEPT,
    MAX_WORD,
    OWNER_MASK,
    PIECE,
    PIECES_MASK,
    READING,
)
from ..system import Lock, sleep
from .damage import corrupted
from .mutex import SLICE, critical
from .outcomes import consumed
from .returns import PUBLISH_SLICES, RETURN_SLICES
from .slots import Ring
from .take import Taken
from .waiters import Waiters, wake_for

#: Bytes of a window, as far as slots are small enough: so many that the ends seldom wait for each other, so few that
#: they stay in a cache that both share.
_WINDOW_NBYTES = 4 * 1024 * 1024
#: Seconds: an eighth of the first pause of an end that is woken in vain again and again.
_FIRST_PAUSE = 0.0001


class Transfer:
    """One end of a message larger than a slot: what `Feed` and `Assembly` have in common.

    Args:
        progress, others: which word of the head's record this end stores, and which the other one.
        sleepers, hint: how to wake the other end.

    Attributes:
        head: the slot.
        nbytes: of the message.
        others: the word that the other end stores.
        seen: the value of that word that this end saw last.
        done: how many of its pieces were written, or copied.
        waiters: where this end waits.
    """

    waiters: Waiters

    def __init__(
        self, ring: Ring, head: int, nbytes: int, progress: int, others: int, sleepers: Waiters, hint: int
    ) -> None:
        self.head, self.nbytes = head, nbytes
        self.seen = self.done = 0
        self._sleepers, self._hint = sleepers, hint
        self._ring, self._words = ring, ring.words
        self._record = ring.layout.record(head)
        self._progress, self.others = self._record + progress, self._record + others
        self._bytes = np.frombuffer(ring.memory, np.uint8)
        self._size = ring.layout.slot_size
        self._pieces = -(-nbytes // self._size)
        self._attempt = self._in_vain = 0

    def _look(self) -> tuple[int, int]:
        """The other end's attempt and count."""
        before, self.seen = self.seen, self._words[self.others]
        if before != self.seen:
            self._in_vain = 0
        return self.seen & ~PIECES_MASK, self.seen & PIECES_MASK

    def _store_progress(self) -> None:
        """Say to the other end how far this one is."""
        self._words[self._progress] = self._attempt | self.done

    def has_ended(self) -> bool:
        """Whether nothing more is to be expected of the other end."""
        raise NotImplementedError

    def passes_on(self) -> int:
        """After a wait: how many others to wake. All, if this end was woken in vain: it has perhaps taken the token of
        one of them. If that happens again and again, it pauses before: ends that all wait in vain wake each other.
        """
        if self.stirred():
            return 0
        self._in_vain += 1
        if self._in_vain > 2:
            sleep(min(SLICE, _FIRST_PAUSE * 2**self._in_vain))
        return layout.MAX_ENTRIES

    def stirred(self) -> bool:
        """Whether the other end has stored its word since this one looked, or nothing more is to be expected of it."""
        return self._words[self.others] != self.seen or self.has_ended()

    def _wake_other(self) -> None:
        """After a store to this end's word."""
        Lock().acquire()  # fence
        if self._words[self._hint]:
            wake_for(self._words, self._hint, self._sleepers, at_most=layout.MAX_ENTRIES)


class Feed(Transfer):
    """The sender's end of a message whose head it has claimed.

    Args:
        since: when it was claimed, see `Ring.claim`.
        data: `nbytes` bytes, as `Ring.send` takes them.
    """

    def __init__(self, ring: Ring, head: int, since: int, nbytes: int, data: Any) -> None:
        super().__init__(ring, head, nbytes, layout.R_WRITTEN, layout.R_READ, ring.pieces, layout.PIECE_HINT)
        self.waiters = ring.room
        self._since, self._data = since, data
        self._idle = deque([head])
        self._busy: deque[int] = deque()
        self._limit = max(2, min(ring.layout.capacity // 2, _WINDOW_NBYTES // self._size))
        for word in (layout.R_PIECE, layout.R_WRITTEN, layout.R_READ):
            self._words[self._record + word] = 0
        self._words[self._record + layout.R_FEEDER] = ring.owner

    @property
    def may_fit(self) -> bool:
        """Whether the ring has room for all of the message when it is empty."""
        return self._pieces <= self._ring.layout.capacity

    def claim_window(self) -> bool:
        """Claim as many free slots as the whole message needs, or else as a window has; whether it is the former."""
        missing, free = self._pieces - len(self._idle), self._ring.free_slots()
        if missing <= free:
            self._idle += self._claim_pieces(missing)
        else:
            self._widen((free + 1) // 2)
        return len(self._idle) >= self._pieces

    def _widen(self, at_most: int) -> None:
        """Claim more slots for the window, which leaves half of the free ones to others."""
        at_most = min(at_most, self._limit - len(self._idle) - len(self._busy))
        if at_most > 0:
            self._idle += self._claim_pieces(at_most)

    def _claim_pieces(self, at_most: int) -> list[int]:
        """Claim further FREE slots for the message, whose head is WRITING or being fed.

        Returns:
            The slots; none if none is free, or the mutex was not to be had within a slice.
        """
        ring, words = self._ring, self._words

        def claim() -> list[int]:
            free = ring.free()[:at_most]
            for slot in free:
                record = ring.layout.record(slot)
                words[record + layout.R_PIECE] = 0
                words[record] = PIECE | self.head << ENTRY_SHIFT
            return free

        pieces = critical(ring.senders, claim)
        return pieces if isinstance(pieces, list) else []

    def write_all(self) -> None:
        """Write the whole message, before its head is published."""
        for _ in range(self._pieces):
            self._write_next()
        self._words[self._record + layout.R_FEEDER] = ALL_THERE

    def advance(self) -> bool:
        """Write the next piece; False if the window has no room for it, or all are written."""
        attempt, copied = self._look()
        if attempt != self._attempt:
            if self.has_ended():
                return False
            self._attempt, self.done = attempt, 0
            self._idle += self._busy
            self._busy.clear()
            self._store_progress()
        for _ in range(len(self._busy) - self.done + min(copied, self.done)):
            self._idle.append(self._busy.popleft())
        if self.done == self._pieces:
            return False
        if not self._idle:
            self._widen(self._ring.free_slots() // 2)
        if not self._idle:
            return False
        self._write_next()
        self._wake_other()
        return True

    def _write_next(self) -> None:
        slot = self._idle.popleft()
        self._busy.append(slot)
        begin = self.done * self._size
        offset, nbytes = self._ring.offsets[slot], min(self._size, self.nbytes - begin)
        write_range(self._bytes[offset : offset + nbytes], self._data, begin)
        self.done += 1
        self._words[self._ring.layout.record(slot) + layout.R_PIECE] = self._attempt | self.done
        self._store_progress()

    def has_ended(self) -> bool:
        """Whether the message is no longer to be fed: it is ALL_THERE, was received, or dropped."""
        return not self._ring.is_fed(self.head, self._since)


class Assembly(Transfer):
    """The receiver's end of a message that it has taken.

    Attributes:
        payload: memory of this process's own, with all of the message once `is_complete`.
    """

    def __init__(self, ring: Ring, taken: Taken, pool: Pool | None) -> None:
        (head,), (self._meta,), (self.word,) = taken.slots, taken.metas, taken.words
        super().__init__(ring, head, self._meta >> 16, layout.R_READ, layout.R_WRITTEN, ring.room, layout.ROOM_HINT)
        self.waiters = ring.pieces
        self._since = self._words[self._record + layout.R_SINCE]
        self._order: deque[int] = deque()
        self._committed = False
        partial, ring.partial = ring.partial, None
        copied, written = self._words[self._progress], self._words[self.others]
        if self._words[self._record + layout.R_FEEDER] == ALL_THERE:
            if not written == self._pieces == 1 + len(ring.pieces_of(head)):
                raise corrupted(ring.name)
        elif partial is not None and partial[:-1] == (head, self._since, self._meta, copied):
            self._attempt, self.done = copied & ~PIECES_MASK, copied & PIECES_MASK
            self.payload: NDArray[np.uint8] = partial[-1]
            return
        else:
            self._attempt = (copied & ~PIECES_MASK) + (ATTEMPT if copied & PIECES_MASK else 0) & MAX_WORD
        self.payload = owned_bytes(self.nbytes, pool)
        self._store_progress()
        self._wake_other()

    def leave(self) -> None:
        """Keep what was copied: if nobody else copies of the message, the next Assembly goes on there."""
        copied = self._attempt | self.done
        self._ring.partial = self.head, self._since, self._meta, copied, self.payload

    @property
    def is_complete(self) -> bool:
        """Whether all pieces were copied."""
        return self.done == self._pieces

    @property
    def is_repeated(self) -> bool:
        """Whether another receiver has had pieces of it before."""
        return self._attempt > 0

    def has_ended(self) -> bool:
        """Whether the sender has given the message up."""
        return bool(self._words[self._record + layout.R_FEEDER] == GIVEN_UP)

    def advance(self) -> bool:
        """Copy the pieces that are there; False if there is none. Those of a message that was given up may be free
        already: who was to drop it has freed them, and was interrupted, or died.
        """
        attempt, written = self._look()
        if attempt != self._attempt or written == self.done or self.has_ended():
            return False
        if not self.done < written <= self._pieces:
            raise corrupted(self._ring.name)
        while self.done < written:
            self._copy_next()
            self._store_progress()
            if 2 * (written - self.done) <= len(self._order):  # not for each slot of its window
                self._wake_other()
        return True

    def _copy_next(self) -> None:
        slot, words = self._find_next(), self._words
        begin = self.done * self._size
        offset, nbytes = self._ring.offsets[slot], min(self._size, self.nbytes - begin)
        self.payload[begin : begin + nbytes] = self._bytes[offset : offset + nbytes]
        if not self._holds_next(slot) or words[self._record] != self.word:
            raise self._ring.moved()
        self.done += 1

    def _holds_next(self, slot: int) -> bool:
        return bool(self._words[self._ring.layout.record(slot) + layout.R_PIECE] == self._attempt | self.done + 1)

    def _find_next(self) -> int:
        """The slot of the next piece: most likely that whose piece was copied longest ago."""
        order = self._order
        if not order or not self._holds_next(order[0]):
            slots = [slot for slot in (self.head, *self._ring.pieces_of(self.head)) if self._holds_next(slot)]
            if not slots:
                raise corrupted(self._ring.name)
            if slots[0] in order:
                order.remove(slots[0])
            order.appendleft(slots[0])
        order.rotate(-1)
        return order[-1]

    def decoded(self, adopt: Callable[[NDArray[np.uint8], int, bytes], Any]) -> Any:
        """What `adopt` makes of the complete message, or an UNDECODABLE outcome with its error."""
        start = self._ring.description_of(self.head)
        description = self._ring.memory[start : start + (self._meta >> 8 & 0xFF)]
        return consumed(partial(adopt, self.payload, self._meta, description))

    def hold(self) -> bool:
        """A block begins with the complete message: its sender may go from here on.

        Returns:
            False if its sender has given it up, and then it is dropped; or if a stopped process keeps the mutex, and
            then it is back in its place.
        """

        def hold() -> bool:
            self.done += 1
            self._store_progress()
            return not self.has_ended()  # a sender that did not get the mutex looks first, and stores then

        return self._unless_given_up(hold)

    def let_go(self) -> bool:
        """The message is to go back when the block ends: its sender must be there then, or take it back.

        Returns:
            False if its sender has gone on, and the message cannot go back.
        """

        def let_go() -> bool:
            if self._ring.is_left(self._record):
                return False
            self._ring.begin_attempt(self._record)
            return True

        return critical(self._ring.receivers, let_go, RETURN_SLICES) is not False

    def _unless_given_up(self, step: Callable[[], bool]) -> bool:
        """Do that step under the receivers' mutex. If it is refused, the message is dropped, or goes back."""
        ring, record = self._ring, self._record
        if critical(ring.receivers, step, PUBLISH_SLICES) is True:
            return True
        if self.has_ended() and ring.drop_taken(record, self.word):
            ring.wake_freed(ring.layout.capacity)
        else:
            ring.overdue[record, self.word] = None
            ring.requeue_overdue()
        return False

    def end(self) -> bool:
        """End the message, once it is decoded: it is received; or dropped, if its sender has given it up. Its slots are
        free afterwards, unless a stopped process keeps the mutex: then the message goes back to its place.

        Returns:
            Whether it is received.
        """
        ring = self._ring
        if self.is_received():  # an exception has left an earlier call
            return True
        if not self._unless_given_up(self._commit):
            return False
        self._committed = True
        self.done += 1  # so that the sender sees a change
        self._store_progress()
        self._wake_other()
        ring.vacate(self.head)
        if self._words[layout.SPACE_HINT]:
            ring.wake_freed(ring.layout.capacity)
        return True

    def _commit(self) -> bool:
        """Under the receivers' mutex: the message counts as received from here on. Its slot is KEPT, for this receiver
        to free.

        Returns:
            False if its sender has given it up meanwhile. The slot is as it was.
        """
        words, record = self._words, self._record
        if words[record] != self.word:
            raise self._ring.moved()
        if self.has_ended():
            return False
        words[record] = self.word + KEPT - READING
        return True

    def is_received(self) -> bool:
        """Whether `end` was left by an exception after the message was received; frees what it did not."""
        words, ring = self._words, self._ring
        kept = words[self._record] == self.word + KEPT - READING and words[self._record + layout.R_SINCE] == self._since
        if kept and self.word & OWNER_MASK == ring.owner:
            ring.vacate(self.head)
            ring.wake_freed(ring.layout.capacity)
        return kept or self._committed
