"""Streams: messages larger than a slot. They flow through a window of slots in pieces, while the receiver copies.

    head    claimed, published, taken and released like any message; its record says how large the message is, and
            R_WRITTEN   attempt << 40 | pieces that the sender has written
            R_READ      attempt << 40 | pieces that the receiver has copied
            R_FEEDER    who writes: the sender; nobody any more (GIVEN_UP); nobody, since it is ALL_THERE
    window  the head and further slots, which belong to it (PIECE). The sender writes the next piece into the slot whose
            piece was copied longest ago, and says there which it is: R_PIECE, attempt << 40 | its number + 1

1. A message that the free slots can hold is written as a whole, ALL_THERE, before it is published: `put` returns then,
   and whoever receives it may start over as often as need be. Any other is published first, and its `put` goes on until
   it has been received: so what a receiver has not got is still with the sender.
2. The window is the message's until it ends, and may be the head alone. So a stream that has its head waits for no
   slot: neither other senders nor other streams can stand in its way, at any capacity.
3. A receiver that takes a message of which another has copied pieces begins a new attempt, by a store to R_READ; the
   sender sees that, and starts over. Pieces of an older attempt are told by R_PIECE. A receiver that comes back to what
   it has itself left, since its time was up, goes on where it was.
4. A message is received, or given up, under the receivers' mutex: so the sender knows which of the two.
5. If the sender dies, the receiver finds GIVEN_UP (reaper.py), drops what it had and goes on. If the receiver dies, the
   message goes to the next one from its start, up to max_deliveries times.

No word is stored by both ends, and none by an end that has not the message any more: a sender whose pieces are all
written stores only once it has seen an attempt that lacks them. Each end wakes the other as waiting.py tells; one that
was woken in vain has perhaps taken the token of the end of another stream, and passes it on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .buffers import write_range
from .layout import (
    ALL_THERE,
    GIVEN_UP,
    KEPT,
    MAX_ENTRIES,
    MAX_WORD,
    OWNER_MASK,
    PIECE_HINT,
    R_FEEDER,
    R_PIECE,
    R_READ,
    R_SINCE,
    R_WRITTEN,
    READING,
    ROOM_HINT,
    SPACE_HINT,
)
from .mutex import SLICE
from .pool import Pool, owned_bytes
from .ring import Ring, Taken, corrupted
from .waiting import Waiters, wake_for

_ATTEMPT = 1 << 40
_COUNT = _ATTEMPT - 1
#: Bytes of a window, as far as slots are small enough: so many that the ends seldom wait for each other, so few that
#: they stay in a cache that both share.
_WINDOW_NBYTES = 4 * 1024 * 1024
#: Seconds: an eighth of the first pause of an end that is woken in vain again and again.
_FIRST_PAUSE = 0.0001


class End:
    """What both ends of a stream have in common.

    Args:
        mine, others: which words of the head's record this end, and the other one, stores.
        sleepers, hint: how to wake the other end.

    Attributes:
        head: the slot.
        nbytes: of the message.
        done: how many of its pieces were written, or copied.
        waiters: where this end waits.
    """

    waiters: Waiters

    def __init__(
        self, ring: Ring, head: int, nbytes: int, mine: int, others: int, sleepers: Waiters, hint: int
    ) -> None:
        self.head = head
        self.nbytes = nbytes
        self.done = 0
        self._ring = ring
        self._sleepers = sleepers
        self._hint = hint
        self._words = ring.words
        self._record = ring.layout.record(head)
        self._mine = self._record + mine
        #: The word that the other end stores, and as which it was seen.
        self.others = self._record + others
        self.seen = 0
        self._bytes = np.frombuffer(ring.memory, np.uint8)
        self._size = ring.layout.slot_size
        self._pieces = -(-nbytes // self._size)
        self._attempt = 0
        self._in_vain = 0

    def _look(self) -> tuple[int, int]:
        """The other end's attempt and count."""
        before, self.seen = self.seen, self._words[self.others]
        if before != self.seen:
            self._in_vain = 0
        return self.seen & ~_COUNT, self.seen & _COUNT

    def _tell(self) -> None:
        self._words[self._mine] = self._attempt | self.done

    def has_ended(self) -> bool:
        """Whether nothing more is to be expected of the other end."""
        raise NotImplementedError

    def passes_on(self) -> int:
        """How many others to wake: all, if this end was woken in vain, since it has perhaps taken the token of one of
        them; after a while, if that happens again and again, since ends that all wait in vain wake each other.
        """
        if self.stirred():
            return 0
        self._in_vain += 1
        if self._in_vain > 2:
            time.sleep(min(SLICE, _FIRST_PAUSE * 2**self._in_vain))
        return MAX_ENTRIES

    def stirred(self) -> bool:
        """Whether the other end has stored its word since this one looked, or nothing more is to be expected of it."""
        return self._words[self.others] != self.seen or self.has_ended()

    def _wake_other(self) -> None:
        """After a store to this end's word."""
        threading.Lock().acquire()  # fence
        if self._words[self._hint]:
            wake_for(self._words, self._hint, self._sleepers, at_most=MAX_ENTRIES)


class Feed(End):
    """The sender's end of a message whose head it has claimed.

    Args:
        since: when it was claimed, see `Ring.claim`.
        data: `nbytes` bytes, as `Ring.send` takes them.
    """

    def __init__(self, ring: Ring, head: int, since: int, nbytes: int, data: Any) -> None:
        super().__init__(ring, head, nbytes, R_WRITTEN, R_READ, ring.pieces, PIECE_HINT)
        self.waiters = ring.room
        self._since = since
        self._data = data
        self._idle = deque([head])
        self._busy: deque[int] = deque()
        self._limit = max(2, min(ring.layout.capacity // 2, _WINDOW_NBYTES // self._size))
        for word in (R_PIECE, R_WRITTEN, R_READ):
            self._words[self._record + word] = 0
        self._words[self._record + R_FEEDER] = ring.owner

    @property
    def may_fit(self) -> bool:
        """Whether the ring has room for all of the message when it is empty."""
        return self._pieces <= self._ring.layout.capacity

    def claim_window(self) -> bool:
        """Claim as many free slots as the whole message needs, or else as a window has; whether it is the former."""
        missing, free = self._pieces - len(self._idle), self._ring.free_slots()
        if missing <= free:
            self._idle += self._ring.claim_pieces(self.head, missing)
        else:
            self._widen((free + 1) // 2)
        return len(self._idle) >= self._pieces

    def _widen(self, at_most: int) -> None:
        """Claim more slots for the window, which leaves half of the free ones to others."""
        at_most = min(at_most, self._limit - len(self._idle) - len(self._busy))
        if at_most > 0:
            self._idle += self._ring.claim_pieces(self.head, at_most)

    def write_all(self) -> None:
        """Write the whole message, before its head is published."""
        for _ in range(self._pieces):
            self._write_next()
        self._words[self._record + R_FEEDER] = ALL_THERE

    def advance(self) -> bool:
        """Write the next piece; False if the window has no room for it, or all are written."""
        attempt, copied = self._look()
        if attempt != self._attempt:
            if self.has_ended():
                return False
            self._attempt, self.done = attempt, 0
            self._idle += self._busy
            self._busy.clear()
            self._tell()
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
        self._words[self._ring.layout.record(slot) + R_PIECE] = self._attempt | self.done
        self._tell()

    def has_ended(self) -> bool:
        """Whether the message is no longer to be fed: it is ALL_THERE, was received, or dropped."""
        return not self._ring.is_fed(self.head, self._since)


class Assembly(End):
    """The receiver's end of a message that it has taken.

    Attributes:
        payload: memory of this process's own, with all of the message once `is_complete`.
    """

    def __init__(self, ring: Ring, taken: Taken, pool: Pool | None) -> None:
        (head,), (self._meta,), (self.word,) = taken.slots, taken.metas, taken.words
        super().__init__(ring, head, self._meta >> 16, R_READ, R_WRITTEN, ring.room, ROOM_HINT)
        self.waiters = ring.pieces
        self._since = self._words[self._record + R_SINCE]
        self._order: deque[int] = deque()
        self._committed = False
        partial, ring.partial = ring.partial, None
        copied, written = self._words[self._mine], self._words[self.others]
        if self._words[self._record + R_FEEDER] == ALL_THERE:
            if not written == self._pieces == 1 + len(ring.pieces_of(head)):
                raise corrupted(ring.name)
        elif partial is not None and partial[:-1] == (head, self._since, self._meta, copied):
            self._attempt, self.done = copied & ~_COUNT, copied & _COUNT
            self.payload: NDArray[np.uint8] = partial[-1]
            return
        else:
            self._attempt = (copied & ~_COUNT) + (_ATTEMPT if copied & _COUNT else 0) & MAX_WORD
        self.payload = owned_bytes(self.nbytes, pool)
        self._tell()
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
        return bool(self._words[self._record + R_FEEDER] == GIVEN_UP)

    def advance(self) -> bool:
        """Copy the pieces that are there; False if there is none."""
        attempt, written = self._look()
        if attempt != self._attempt or written == self.done:
            return False
        if not self.done < written <= self._pieces:
            raise corrupted(self._ring.name)
        while self.done < written:
            self._copy_next()
            self._tell()
            if 2 * (written - self.done) <= len(self._order):  # not for each slot of its window
                self._wake_other()
        return True

    def _copy_next(self) -> None:
        slot, words = self._find_next(), self._words
        begin = self.done * self._size
        offset, nbytes = self._ring.offsets[slot], min(self._size, self.nbytes - begin)
        self.payload[begin : begin + nbytes] = self._bytes[offset : offset + nbytes]
        if not self._holds_next(slot) or words[self._record] != self.word:
            raise corrupted(self._ring.name)
        self.done += 1

    def _holds_next(self, slot: int) -> bool:
        return bool(self._words[self._ring.layout.record(slot) + R_PIECE] == self._attempt | self.done + 1)

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
        ring, start = self._ring, self._ring.description_of(self.head)
        again = partial(adopt, self.payload, self._meta, ring.memory[start : start + (self._meta >> 8 & 0xFF)])
        try:
            return again()
        except Exception as error:
            return ring.consume_again(again, error)

    def end(self) -> bool:
        """The message is received, when it is decoded; or dropped, as its sender has given it up. Its slots are free
        afterwards, unless a stopped process keeps the mutex: then it goes back to its place.

        Returns:
            Whether it is received.
        """
        ring, record = self._ring, self._record
        if self.is_received():  # an exception has left an earlier call
            return True
        if not ring.commit(record, self.word):
            if self.has_ended() and ring.drop_taken(record, self.word):
                ring.wake_freed(ring.layout.capacity)
            else:
                ring.late.append((record, self.word))
                ring.requeue_late()
            return False
        self._committed = True
        self.done += 1  # so that the sender sees a change
        self._tell()
        self._wake_other()
        ring.vacate(self.head)
        if self._words[SPACE_HINT]:
            ring.wake_freed(ring.layout.capacity)
        return True

    def is_received(self) -> bool:
        """Whether `end` was left by an exception after the message was received; frees what it did not."""
        words, ring = self._words, self._ring
        kept = words[self._record] == self.word + KEPT - READING and words[self._record + R_SINCE] == self._since
        if kept and self.word & OWNER_MASK == ring.owner:
            ring.vacate(self.head)
            ring.wake_freed(ring.layout.capacity)
        return kept or self._committed
