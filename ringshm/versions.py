"""The versions of one value: the newest, and older ones while somebody reads them. It knows slots, not what they mean.

    publisher   write the slot of an old version --> NEWEST = version, slot --> wake who waits
    reader      pin the newest slot --> copy or view it --> clear the pin

Shared are NEWEST, one word, so that one store publishes; each slot's record, whose sequence is the version in the slot,
or 0 while it is written; and the pins: each participant has a row of cells, one byte each, that say which slots it
reads. A cell is written by the one pin that has it, and cleared for the dead by whoever reaps them.

1. A publisher holds the senders' mutex from its choice of a slot to the store of NEWEST: versions are consecutive, and
   one that dies before has published nothing. It takes the first slot that is neither the newest nor pinned.
2. A reader pins, then looks whether the slot still is the newest, as with hazard pointers (M. Michael, "Hazard
   Pointers: Safe Memory Reclamation for Lock-Free Objects", IEEE TPDS 15(6), 2004). A publisher stores NEWEST, then
   looks at the pins before it writes. With a fence between the two on either side, one of them sees the other
   [SYNC POINT p].
3. Readers pin under the receivers' mutex, since they count first: at most `borrows` of the `borrows + 2` slots are ever
   pinned, whichever they are. So beside the newest one slot is always free, and a publisher never waits for a reader.
4. Who cannot pin, because that many are pinned, or because a stopped process holds the mutex, copies the bytes unpinned
   and then sees by the record's sequence whether they were written meanwhile (a seqlock; H.-J. Boehm, "Can seqlocks get
   along with programming language memory models?", MSPC 2012). Nothing is decoded before that.
5. A pin ends when the last reference to it goes: the call that decodes, a borrow, and every view that leads to the slot
   hold on to it. Its cell is cleared by a weak reference's callback. A signal handler may raise at the very entry of
   that; so a second reference, whose callback is a C function, which nothing can interrupt, and which CPython calls
   after the first, tells that the cell may be used again: the next to pin, and the next look for the dead, clear it.
6. Who waits for an even version and who waits for an odd one are woken apart: all are woken at once, and who then
   waits for the next version must not take the token of one that has not run yet.
7. The pins of a process on the same version share one cell. A forked child has copies of its parent's pins, which are
   the parent's to clear.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from typing import Any
from weakref import ref

from .buffers import Parts, Row
from .layout import (
    DESCRIPTION_NBYTES,
    HIGH_WATER,
    MESSAGE_HINT,
    NEWEST,
    PIN_CELLS,
    R_DESCRIPTION,
    R_META,
    R_SENDER,
    R_SEQUENCE,
    SPACE_HINT,
    WORD_SIZE,
    Layout,
)
from .mutex import reentrant_call
from .participants import Participants
from .ring import CONTENDED, EMPTY, FULL, Outcome, Ring, corrupted, refuse_damage
from .waiting import Waiters

SLOT_MASK = 0xFFFF  #: the part of NEWEST that names the slot, as its index + 1


def pinned(words: memoryview, memory: Any, layout: Layout) -> bytes:
    """The cells of all entries that were ever used; `slot + 1 in` it says whether anybody has pinned the slot."""
    used = min(words[HIGH_WATER], layout.max_participants + 1)
    return bytes(memory[layout.pins : layout.pins + used * PIN_CELLS])


def holders(words: memoryview, memory: Any, layout: Layout) -> list[tuple[int, int]]:
    """(index of the participant, version) of all that is pinned."""
    found = {(at // PIN_CELLS, number - 1) for at, number in enumerate(pinned(words, memory, layout)) if number}
    return sorted(
        (index, int(words[layout.record(slot) + R_SEQUENCE])) for index, slot in found if slot < layout.capacity
    )


class Pin:
    """Holds one version in its slot; also what the pin counts by: the process's attachment, with its entry."""

    __slots__ = ("__weakref__", "attachment", "slot", "version")

    def __init__(self, attachment: object, slot: int, version: int) -> None:
        self.attachment = attachment
        self.slot = slot
        self.version = version


class _PinEnd(ref[Pin]):
    """Tells that a pin has gone, and which cell it had."""

    cell = -1  # none, should an exception come before it is known


def _clear(cells: memoryview, life: list[Participants], cell: int, _: ref[Pin]) -> None:
    if life and not life[0].in_fork():
        cells[cell] = 0


class Versions:
    """The versions as one process sees them."""

    def __init__(self, ring: Ring, participants: Participants) -> None:
        self._ring = ring
        self._participants = participants
        self._words, self._memory, self._layout = ring.words, ring.memory, ring.layout
        layout = ring.layout
        self._turns = (ring.messages, MESSAGE_HINT), (ring.space, SPACE_HINT)  # by the last bit of the version
        self._cells = memoryview(ring.memory)[layout.pins : layout.pins + (layout.max_participants + 1) * PIN_CELLS]
        self._life: list[Participants] = []  # what the pins of one entry share; empty once that is another's
        self.rebind()

    def disown(self) -> None:
        """In a forked child: what is pinned is its parent's to clear."""
        self._life.clear()

    def rebind(self) -> None:
        """Use the cells of this process's present entry; what was pinned before a fork is the parent's."""
        self.disown()
        self._life = [self._participants]
        first = max(0, self._participants.index) * PIN_CELLS
        self._free = deque(range(first, first + PIN_CELLS))
        self._ended: deque[_PinEnd] = deque()  # pins that have gone and whose cells are not among the free ones yet
        self._ends: dict[int, tuple[ref[Pin], _PinEnd]] = {}  # by cell
        self._pins: dict[int, ref[Pin]] = {}  # by slot, those that are known to hold it

    @property
    def newest(self) -> int:
        """The newest version; 0 before the first."""
        return int(self._words[NEWEST] >> 16)

    def _slot_of(self, newest: int) -> int:
        """The slot that a value of NEWEST names."""
        slot = (newest & SLOT_MASK) - 1
        if not 0 <= slot < self._layout.capacity:
            raise corrupted(self._ring.name)
        return slot

    # --- publishing

    def publish(self, meta: int, data: Any, description: bytes) -> int:
        """Write the next version and make it the newest; which it is, or 0 if the mutex was not to be had in a slice.

        Arguments are those of Ring.send.
        """
        words, memory, senders, nbytes = self._words, self._memory, self._ring.senders, meta >> 16
        if senders.owned():
            raise reentrant_call(self._ring.name)
        try:
            gen = senders.enter()
            if not gen:
                return 0
            newest = words[NEWEST]
            slot = self._writable(newest)
            record, offset = self._layout.record(slot), self._ring.offsets[slot]
            words[record + R_SEQUENCE] = 0
            threading.Lock().acquire()  # fence: large copies bypass the order in which stores become visible
            if isinstance(data, (Parts, Row)):
                data.write(memory, offset)
            elif nbytes:
                memory[offset : offset + nbytes] = data
            start = (record + R_DESCRIPTION) * WORD_SIZE
            memory[start : start + len(description)] = description
            words[record + R_META] = meta
            words[record + R_SENDER] = self._ring.sender
            version = (newest >> 16) + 1
            words[record + R_SEQUENCE] = version
            words[NEWEST] = version << 16 | slot + 1  # SYNC POINT p: the post of the mutex is the fence
            senders.leave(gen)
        except BaseException as error:
            senders.abandon()
            refuse_damage(self._ring.name, error)
            raise
        waiters, hint = self._turns[version & 1]
        if words[hint]:
            words[hint] = 0
            threading.Lock().acquire()  # fence: whoever set the hint before our store is counted now
            waiters.wake_all()
        return int(version)

    def awaiting(self, version: int) -> Waiters:
        """Those who wait for that version."""
        return self._turns[version & 1][0]

    def _writable(self, newest: int) -> int:
        """The slot to write: the first that is neither the newest nor pinned; so few are used, and stay warm."""
        taken, capacity = pinned(self._words, self._memory, self._layout), self._layout.capacity
        current = self._slot_of(newest) if newest else -1
        for slot in range(capacity):
            if slot != current and slot + 1 not in taken:
                return slot
        raise corrupted(self._ring.name)

    # --- reading

    def pin(self, attachment: object) -> Pin | Outcome:
        """Pin the newest version.

        Args:
            attachment: what the pin keeps alive, so that its entry, and its cells, stay this process's.

        Returns:
            The Pin; or EMPTY if there is no version, FULL if no further one may be pinned, CONTENDED if the mutex was
            not to be had within a slice.
        """
        newest = self._words[NEWEST]
        if not newest:
            return EMPTY
        pin: Pin | Outcome | None = self._shared(newest)
        if pin is not None:
            return pin
        receivers = self._ring.receivers
        if receivers.owned():
            raise reentrant_call(self._ring.name)
        try:
            gen = receivers.enter()
            if not gen:
                return CONTENDED
            pin = self._pin_newest(attachment)
            receivers.leave(gen)
        except BaseException as error:
            pin = None
            receivers.abandon()
            refuse_damage(self._ring.name, error)
            raise
        return pin

    def _shared(self, newest: int) -> Pin | None:
        """The pin by which this process already holds that version."""
        end = self._pins.get(self._slot_of(newest))
        pin = end() if end is not None else None
        return pin if pin is not None and pin.version == newest >> 16 else None

    def settle(self) -> None:
        """Clear the cells of pins that have gone, should that have been interrupted: they would keep others out."""
        receivers = self._ring.receivers
        if not self._ended or receivers.owned():
            return
        try:
            gen = receivers.enter()
            if gen:
                self._reclaim()
                receivers.leave(gen)
        except BaseException:
            receivers.abandon()
            raise

    def _pin_newest(self, attachment: object) -> Pin | Outcome:
        """Within the receivers' mutex."""
        words, capacity = self._words, self._layout.capacity
        self._reclaim()
        while True:
            newest = words[NEWEST]
            shared = self._shared(newest)
            if shared is not None:
                return shared
            slot, taken = self._slot_of(newest), pinned(words, self._memory, self._layout)
            if slot + 1 not in taken and sum(number in taken for number in range(1, capacity + 1)) >= capacity - 2:
                return FULL
            if not self._free:
                return FULL
            cell = self._free.popleft()
            pin = Pin(attachment, slot, newest >> 16)
            last = _PinEnd(pin, self._ended.append)  # of several callbacks the newest comes first
            last.cell = cell
            first = ref(pin, partial(_clear, self._cells, self._life, cell))
            self._ends[cell] = first, last
            self._cells[cell] = slot + 1
            threading.Lock().acquire()  # SYNC POINT p: fence between this store and this load
            if words[NEWEST] == newest:
                self._pins[slot] = first
                return pin
            del pin  # and count without it

    def _reclaim(self) -> None:
        """Clear the cells of pins that have gone, and use them again; within the receivers' mutex.

        An exception here may cost the process a cell, never give one to two pins.
        """
        ended = self._ended
        for _ in range(len(ended)):
            cell = ended[0].cell
            if cell >= 0:
                self._cells[cell] = 0
            ended.popleft()
            if cell >= 0:
                self._free.append(cell)

    def content(self, pin: Pin) -> tuple[int, int, int]:
        """Where a pinned version is: (offset of the slot, R_META, offset of the description)."""
        record = self._layout.record(pin.slot)
        meta = self._words[record + R_META]
        if meta >> 16 > self._layout.slot_size:
            raise corrupted(self._ring.name)
        return self._ring.offsets[pin.slot], meta, (record + R_DESCRIPTION) * WORD_SIZE

    def copy(self) -> tuple[int, int, bytes] | None:
        """The newest version without a pin: (version, R_META, the whole slot and behind it the description).

        None if it was overwritten meanwhile.
        """
        words, size = self._words, self._layout.slot_size
        newest = words[NEWEST]
        version, slot = newest >> 16, self._slot_of(newest)
        record, offset = self._layout.record(slot), self._ring.offsets[slot]
        meta = words[record + R_META]
        start = (record + R_DESCRIPTION) * WORD_SIZE
        with memoryview(self._memory) as memory:
            whole = b"".join((memory[offset : offset + size], memory[start : start + DESCRIPTION_NBYTES]))
        threading.Lock().acquire()  # fence: the copy, then the look
        if words[record + R_SEQUENCE] != version:
            return None
        if meta >> 16 > size:
            raise corrupted(self._ring.name)
        return int(version), int(meta), whole
