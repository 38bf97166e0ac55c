"""The versions of one value: the newest, and older ones while somebody reads them. It knows slots, not what they mean.

    publisher   write the slot of an old version --> NEWEST = version, slot --> wake those that wait
    reader      pin the newest slot --> copy or view it --> clear the pin

    word                   writer                       guarded by         meaning
    NEWEST                 a publisher                  senders' mutex     version << 16 | slot + 1: one store publishes
    R_SEQUENCE of a slot   a publisher                  senders' mutex     the version in it; 0 while it is written
    a cell of the pins     the one pin that has it; a   receivers' mutex,  slot + 1 that a process of this participant
                           reaper, for the dead         to set it          reads; 0: none. A row of cells, a byte each

1. A publisher holds the senders' mutex from its choice of a slot to the store of NEWEST: versions are consecutive, and
   one that dies before has published nothing. It takes the first slot that is neither the newest nor pinned. Who
   republishes another Latest's values keeps their versions, of which some are missing, and none comes twice.
2. A reader pins, then looks whether the slot still is the newest, as with hazard pointers (M. Michael, "Hazard
   Pointers: Safe Memory Reclamation for Lock-Free Objects", IEEE TPDS 15(6), 2004). A publisher stores NEWEST, then
   looks at the pins before it writes. With a fence between the two on either side, one of them sees the other
   [SYNC POINT p].
3. Readers pin under the receivers' mutex, since they count first: at most `borrows` of the `borrows + 2` slots are ever
   pinned, whichever they are. So beside the newest one slot is always free, and a publisher never waits for a reader.
4. A reader that cannot pin, because that many are pinned, or because a stopped process holds the mutex, copies the
   bytes unpinned; in the compiled path so does each that has little to copy. The record's sequence then says whether
   they were written meanwhile (a seqlock; H.-J. Boehm, "Can seqlocks get along with programming language memory
   models?", MSPC 2012). Nothing is decoded before that.
5. A pin ends when the last reference to it goes: the call that decodes, a borrow, and every view that leads to the slot
   hold on to it. A weak reference's Python callback (`_clear`) clears its cell; a signal handler may interrupt it on
   entry. A second weak reference with a C callback (`deque.append`) cannot be interrupted, and CPython calls it after
   the first: it queues the cell for `_reclaim`, which clears it again before it is used anew.
6. Even and odd versions have waiters of their own. So a reader that already waits for the next version cannot take the
   token of one that has not run yet: all readers of a version are woken at once. Where versions are skipped, both are
   woken; then a reader may have to look again after a slice.
7. The pins of a process on the same version share one cell. A forked child has copies of its parent's pins, which are
   the parent's to clear.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

from ..segment import layout
from ..segment.layout import WORD_SIZE, Layout
from ..system import Lock
from .damage import corrupted
from .mutex import critical
from .outcomes import EMPTY, FULL, Outcome
from .participants import Participants
from .slots import Ring
from .waiters import Waiters

SLOT_MASK = 0xFFFF  #: the part of NEWEST that names the slot, as its index + 1


def pinned(words: memoryview, memory: Any, shape: Layout) -> bytes:
    """The cells of all entries that were ever used; `slot + 1 in` it says whether anybody has pinned the slot."""
    used = min(words[layout.HIGH_WATER], shape.max_participants + 1)
    return bytes(memory[shape.pins : shape.pins + used * layout.PIN_CELLS])


def holders(words: memoryview, memory: Any, shape: Layout) -> list[tuple[int, int]]:
    """(index of the participant, version) of all that is pinned."""
    found = {(at // layout.PIN_CELLS, number - 1) for at, number in enumerate(pinned(words, memory, shape)) if number}
    return sorted(
        (index, int(words[shape.record(slot) + layout.R_SEQUENCE])) for index, slot in found if slot < shape.capacity
    )


@dataclass(eq=False)
class Pin:
    """Holds one version in its slot, and keeps the attachment alive, by whose entry the pin counts."""

    attachment: object
    slot: int
    version: int


class _PinEnd(ref[Pin]):
    """Tells that a pin has gone, and which cell it had."""

    cell = -1  # none, should an exception come before it is known


def _clear(cells: memoryview, life: list[Participants], cell: int, _: ref[Pin]) -> None:
    if life and life[0].has_entry and not life[0].in_fork():
        cells[cell] = 0


class Versions:
    """The versions as one process sees them."""

    def __init__(self, ring: Ring, participants: Participants) -> None:
        self._ring = ring
        self._participants = participants
        self._words, self._memory, self._layout = ring.words, ring.memory, ring.layout
        shape = ring.layout
        # by the last bit of the version
        self._turns = (ring.messages, layout.MESSAGE_HINT), (ring.space, layout.SPACE_HINT)
        self._cells = memoryview(ring.memory)[shape.pins : shape.pins + (shape.max_participants + 1) * layout.PIN_CELLS]
        self._life: list[Participants] = []  # the pins of one entry share it; empty once the entry is another's
        self.rebind()

    def disown(self) -> None:
        """In a forked child: what is pinned is its parent's to clear."""
        self._life.clear()

    def rebind(self) -> None:
        """Use the cells of this process's present entry; what was pinned before a fork is the parent's."""
        self.disown()
        self._life = [self._participants]
        first, cells = max(0, self._participants.index) * layout.PIN_CELLS, layout.PIN_CELLS
        if self._ring.compiled is not None and self._layout.capacity <= layout.PIN_CELLS // 2:
            cells //= 2  # the others are the compiled path's: one for each slot
        self._free = deque(range(first, first + cells))
        self._ended: deque[_PinEnd] = deque()  # pins that have gone and whose cells are not among the free ones yet
        self._ends: dict[int, tuple[ref[Pin], _PinEnd]] = {}  # by cell
        self._pins: dict[int, ref[Pin]] = {}  # by slot, for a slot known to be held

    @property
    def newest(self) -> int:
        """The newest version; 0 before the first."""
        return int(self._words[layout.NEWEST] >> 16)

    def _slot_of(self, newest: int) -> int:
        """The slot that a value of NEWEST names."""
        slot = (newest & SLOT_MASK) - 1
        if not 0 <= slot < self._layout.capacity:
            raise corrupted(self._ring.name)
        return slot

    # --- publishing

    def publish(self, meta: int, data: Any, description: bytes, number: int = 0) -> int:
        """Write the next version and make it the newest; arguments as Ring.send.

        Args:
            number: the version that it is to be, 0 for the next one. If the newest is not older, nothing is written.

        Returns:
            The newest version; 0 if the mutex was not to be had within a slice.
        """
        words = self._words
        before = 0

        def write_next() -> int:
            nonlocal before
            newest = words[layout.NEWEST]
            before = newest >> 16
            if 0 < number <= before:
                return before
            slot = self._writable(newest)
            record = self._layout.record(slot)
            words[record + layout.R_SEQUENCE] = 0
            Lock().acquire()  # fence: large copies bypass the order in which stores become visible
            self._ring.write(slot, meta, data, description)
            version = number or before + 1
            words[record + layout.R_SEQUENCE] = version
            words[layout.NEWEST] = version << 16 | slot + 1  # SYNC POINT p: the post of the mutex is the fence
            return version

        version = critical(self._ring.senders, write_next)
        if isinstance(version, Outcome):
            return 0
        if version > before:
            self.wake(version)
        if version > before + 1:
            self.wake(version - 1)  # those that wait for the one after `before`, which was skipped
        return version

    def wake(self, version: int) -> None:
        """That version is published: wake those that wait for it."""
        waiters, hint = self._turns[version & 1]
        if self._words[hint]:
            self._words[hint] = 0
            Lock().acquire()  # fence: a waiter that set the hint before this store is counted now
            waiters.wake_all()

    def awaiting(self, version: int) -> Waiters:
        """The waiters for that version."""
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
            attachment: the pin keeps it alive, so that its entry, and its cells, stay this process's.

        Returns:
            The Pin; or EMPTY if there is no version, FULL if no further one may be pinned, CONTENDED if the mutex was
            not to be had within a slice.
        """
        newest = self._words[layout.NEWEST]
        if not newest:
            return EMPTY
        pin = self._shared(newest)
        return critical(self._ring.receivers, partial(self._pin_newest, attachment)) if pin is None else pin

    def _shared(self, newest: int) -> Pin | None:
        """The pin by which this process already holds that version."""
        end = self._pins.get(self._slot_of(newest))
        pin = end() if end is not None else None
        return pin if pin is not None and pin.version == newest >> 16 else None

    def clear_ended(self) -> None:
        """Clear the cells of pins that have gone, should that have been interrupted: they would keep others out."""
        receivers = self._ring.receivers
        if self._ended and not receivers.owned():
            critical(receivers, self._reclaim)

    def _pin_newest(self, attachment: object) -> Pin | Outcome:
        """Within the receivers' mutex."""
        words, capacity = self._words, self._layout.capacity
        self._reclaim()
        while True:
            newest = words[layout.NEWEST]
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
            Lock().acquire()  # SYNC POINT p: fence between this store and this load
            if words[layout.NEWEST] == newest:
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
        meta = self._words[record + layout.R_META]
        if meta >> 16 > self._layout.slot_size:
            raise corrupted(self._ring.name)
        return self._ring.offsets[pin.slot], meta, (record + layout.R_DESCRIPTION) * WORD_SIZE

    def copy(self) -> tuple[int, int, bytes] | None:
        """The newest version without a pin: (version, R_META, the whole slot and behind it the description).

        None if it was overwritten meanwhile.
        """
        words, size = self._words, self._layout.slot_size
        newest = words[layout.NEWEST]
        version, slot = newest >> 16, self._slot_of(newest)
        record, offset = self._layout.record(slot), self._ring.offsets[slot]
        meta = words[record + layout.R_META]
        start = (record + layout.R_DESCRIPTION) * WORD_SIZE
        with memoryview(self._memory) as memory:
            whole = b"".join((memory[offset : offset + size], memory[start : start + layout.DESCRIPTION_NBYTES]))
        Lock().acquire()  # fence: the copy, then the look
        if words[record + layout.R_SEQUENCE] != version:
            return None
        if meta >> 16 > size:
            raise corrupted(self._ring.name)
        return int(version), int(meta), whole
