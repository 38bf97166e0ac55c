"""The slots as one process sees them: what only looks, and takes no mutex.

Each answer is true of a moment during the call; another process may change it before the caller acts on it. What a
slot is, its own word says (layout.py); READY slots are in the ready ring besides, from HEAD to TAIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..segment import layout
from ..segment.layout import FREE, GIVEN_UP, KEPT, LEFT, OWNER_MASK, PIECE, READING, READY, STATE_MASK, WRITING, Layout

#: A slot that a participant has: its record, and its word as that participant stored or saw it.
Held = tuple[int, int]

_KIND = np.uint64(STATE_MASK)
_OWNER = np.uint64(OWNER_MASK & (1 << 64) - 1)


def records_of(numbers: NDArray[np.uint64], shape: Layout) -> NDArray[np.uint64]:
    """The slots' records where they lie among the segment's words, shape (capacity, RECORD_WORDS)."""
    table = numbers[shape.records : shape.records + shape.capacity * layout.RECORD_WORDS]
    return table.reshape(shape.capacity, layout.RECORD_WORDS)


class SlotTable:
    """The slots and their records.

    Args:
        name: the channel's, for errors.
        words: the segment's words up to the slots.
        memory: the whole segment; slices of it are copied to and from.
        streams: whether a message may be larger than a slot.

    Attributes:
        owner: what this participant's slots' words say of their owner.
        sender: what the records of its messages say of their sender.
        offsets: the byte at which each slot starts.
    """

    def __init__(self, name: str, words: memoryview, memory: Any, shape: Layout, streams: bool) -> None:
        self.name, self.streams = name, streams
        self.words, self.memory, self.layout = words, memory, shape
        self.owner = self.sender = 0
        self.offsets = [*range(shape.slot(0), shape.slot(shape.capacity), shape.slot_stride)]
        self._ring, self._mask = shape.ring, shape.ring_mask
        self._capacity, self._slot_size = shape.capacity, shape.slot_size
        self._records: list[int] = [*range(shape.record(0), shape.record(shape.capacity), layout.RECORD_WORDS)]
        self._cycle = [*range(shape.capacity)] * 2
        self._next: list[int] = [*range(1, shape.capacity), 0]
        numbers = np.frombuffer(words, np.uint64)
        self._table = records_of(numbers, shape)
        self._ready = numbers[shape.ring : shape.ring + shape.ring_mask + 1]
        self._states, self._metas = self._table[:, layout.R_STATE], self._table[:, layout.R_META]

    # --- one slot

    def description_of(self, slot: int) -> int:
        """Byte at which the description of a slot's message starts."""
        return (self._records[slot] + layout.R_DESCRIPTION) * layout.WORD_SIZE

    def slot_of(self, record: int) -> int:
        """Index of the slot whose record starts at that word."""
        return (record - self.layout.records) // layout.RECORD_WORDS

    def holds(self, slot: int, states: tuple[int, ...]) -> bool:
        """Whether a slot is this participant's, in one of those states."""
        word = self.words[self._records[slot]]
        return word & OWNER_MASK == self.owner and word & STATE_MASK in states

    def is_claimed(self, slot: int, since: int) -> bool:
        """Whether this participant is writing a slot that it claimed at that time."""
        record = self._records[slot]
        return bool(self.words[record] == WRITING | self.owner and self.words[record + layout.R_SINCE] == since)

    def is_from(self, slot: int, sender: int) -> bool:
        """Whether this participant is reading a message of that sender there."""
        return self.holds(slot, (READING,)) and bool(self.words[self._records[slot] + layout.R_SENDER] == sender)

    def is_waiting(self, slot: int) -> bool:
        """Whether a message there waits to be taken."""
        return bool(self.words[self._records[slot]] & STATE_MASK == READY)

    def space_expected(self) -> int:
        """Word of the record that most likely comes free next: a sender that spins looks at it."""
        slot = self.words[self._ring + (self.words[layout.TAIL] - 1 & self._mask)]
        return self._records[self._next[slot % self._capacity]]

    # --- the ready ring

    def ready(self) -> int:
        """Messages that wait to be taken."""
        head = self.words[layout.HEAD]
        return max(0, min(self.words[layout.TAIL] - head, self.layout.capacity))

    def ready_at(self, position: int) -> int:
        """The slot at that position of the ready ring; -1 if it is none, or not READY."""
        words = self.words
        slot = words[self._ring + (position & self._mask)]
        return slot if slot < self._capacity and words[self._records[slot]] & STATE_MASK == READY else -1

    def position_of(self, slot: int) -> int | None:
        """Where in the ready ring a slot is."""
        words = self.words
        positions = range(words[layout.HEAD], min(words[layout.HEAD] + self._capacity, words[layout.TAIL]))
        return next((at for at in positions if words[self._ring + (at & self._mask)] == slot), None)

    def hides_messages(self) -> bool:
        """Whether slots are READY that are not in the ring; for a moment it is so while a message is published."""
        return int((self.kinds() == READY).sum()) > self.ready()

    # --- all slots

    def slot_words(self) -> bytes:
        """The words of all slots, as they are."""
        return self._states.tobytes()

    def kinds(self) -> NDArray[np.uint64]:
        """The state of each slot, without its owner."""
        return self._states & _KIND

    def free(self) -> list[int]:
        """The slots that are free."""
        slots: list[int] = np.flatnonzero(self._states == FREE).tolist()
        return slots

    def free_slots(self) -> int:
        """How many slots are free."""
        return int((self._states == FREE).sum())

    def could_send(self, drops_oldest: bool) -> int:
        """How many messages could be sent now; with `drops_oldest` others may be dropped for them."""
        count = self.free_slots()
        if drops_oldest:
            waiting = self.kinds() == READY
            if self.streams:  # as Returns.drop_oldest, which drops none that is being fed
                large = self._metas >> np.uint64(16) > self._slot_size
                waiting &= ~(large & (self._table[:, layout.R_FEEDER] > LEFT))
            count += int(waiting.sum())
        return count

    def full(self) -> bool:
        """Whether no slot is free."""
        return not bool((self._states == FREE).any())

    def may_move(self) -> bool:
        """Whether a slot is FREE or READY."""
        kinds = self.kinds()
        return bool(((kinds == FREE) | (kinds == READY)).any())

    def kept(self) -> int:
        """How many slots this participant keeps for views."""
        return int(((self._states & (_OWNER | _KIND)) == self.owner | KEPT).sum())

    def owned_by(self, owner: int) -> list[Held]:
        """The slots that this owner is writing, reading or keeping."""
        states = self._states.tolist()
        return [
            (self._records[slot], state)
            for slot, state in enumerate(states)
            if state & STATE_MASK in (WRITING, READING, KEPT) and state & OWNER_MASK == owner
        ]

    def unfinished(self, sender: int | None = None) -> bool:
        """Whether a message (of that sender) was not received and may still be; KEPT ones were received."""
        kinds = self.kinds()
        pending = (kinds == READY) | (kinds == READING) | (kinds == WRITING)
        if sender is not None:
            pending &= (self._table[:, layout.R_SENDER] == sender) & (kinds != WRITING)
        return bool(pending.any())

    def drained_for(self, owner: int, at_least: int = 1) -> bool:
        """Whether that owner can never receive `at_least` messages, once nobody sends: fewer are READY, and none is
        WRITING, nor READING by others.
        """
        states = self._states
        kinds = states & _KIND
        others = (kinds == READING) & ((states & _OWNER) != owner)
        return int((kinds == READY).sum()) < at_least and not bool(((kinds == WRITING) | others).any())

    # --- messages larger than a slot: see large.py

    def pieces_of(self, head: int) -> list[int]:
        """The slots that belong to the message with that head."""
        pieces: list[int] = np.flatnonzero(self._states == (PIECE | head << layout.ENTRY_SHIFT)).tolist()
        return pieces

    def is_fed(self, slot: int, since: int | None = None) -> bool:
        """Whether its sender still writes a published message there; with `since`, whether this participant does, which
        claimed the slot at that time.
        """
        words, record = self.words, self._records[slot]
        if words[record] & STATE_MASK not in (READY, READING) or words[record + layout.R_META] >> 16 <= self._slot_size:
            return False
        feeder = words[record + layout.R_FEEDER]
        if since is None:
            return feeder > LEFT
        return bool(feeder == self.owner and words[record + layout.R_SINCE] == since)

    def feeder_of(self, slot: int) -> int:
        """The participant that writes the message larger than a slot that is there; or ALL_THERE, GIVEN_UP or LEFT."""
        return self.words[self._records[slot] + layout.R_FEEDER]

    def is_large(self, record: int) -> bool:
        """Whether the message there is larger than a slot."""
        return bool(self.words[record + layout.R_META] >> 16 > self._slot_size)

    def is_given_up(self, record: int) -> bool:
        """Whether that message's sender will not write what is missing of it."""
        return self.is_large(record) and self.words[record + layout.R_FEEDER] == GIVEN_UP

    def is_left(self, record: int) -> bool:
        """Whether only the block that holds that message has all of it: its sender has gone on."""
        return self.is_large(record) and self.words[record + layout.R_FEEDER] == LEFT

    def is_held(self, record: int) -> bool:
        """Whether a block holds that message, which is larger than a slot, and has all of it."""
        words = self.words
        pieces = -(-(words[record + layout.R_META] >> 16) // self._slot_size)
        reading = words[record] & STATE_MASK == READING
        return bool(reading and words[record + layout.R_READ] & layout.PIECES_MASK > pieces)

    def fed_by(self, owner: int) -> list[int]:
        """The heads of the messages that this participant has published and not written to the end."""
        feeders = np.flatnonzero(self._table[:, layout.R_FEEDER] == owner).tolist() if self.streams else []
        return [slot for slot in feeders if self.is_fed(slot)]
