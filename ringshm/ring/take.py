"""Take: a receiver obtains the oldest READY slots for itself. slots.py tells what it then does with them.

Within the receivers' mutex a slot goes from READY to READING, with this participant as its owner, and HEAD moves on.
The caller's `Taken` names a slot before the slot's word does. An exception may come in between, or before the caller
has the outcome: then the caller gives back what is in its `Taken` (`Returns.give_back`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..segment.layout import FREE, HEAD, R_META, READING, READY, STATE_MASK, TAIL, TAKE, TAKEN_NBYTES
from .damage import corrupted
from .mutex import critical
from .observe import Held
from .outcomes import EMPTY, STREAM, TAKEN, Outcome
from .returns import Returns

#: From so many messages on it is cheaper to take a run at once.
_MANY = 6


class Taken:
    """The slots that a call has taken, in the order of their messages.

    Attributes:
        slots: their indices.
        metas: their R_META; what was checked is what is used.
        words: the slots' words after the take. Each is appended last, before the slot's own word changes.
        run: the slots as an index into arrays over all slots, if they were taken in one step; else None.
        assembly: what a message larger than a slot is copied to: a large.Assembly.
    """

    __slots__ = ("assembly", "metas", "run", "slots", "words")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is taken any more."""
        self.assembly: Any = None
        self.run: Any = None
        self.slots: list[int] = []
        self.metas: list[int] = []
        self.words: list[int] = []


class Takes(Returns):
    """The slots, how they are taken and how they go back."""

    def held(self, taken: Taken) -> list[Held]:
        """The slots of `taken`, as they go back."""
        return [(self._records[slot], word) for slot, word in zip(taken.slots, taken.words)]  # noqa: B905

    def take(self, taken: Taken, at_most: int = 1, at_least: int = 1) -> Outcome:
        """Take the oldest READY slots, as far as they hold no message larger than a slot.

        Returns:
            TAKEN (fewer than `at_least` if the ring was found damaged behind them); or EMPTY if fewer are READY,
            STREAM if the oldest is larger than a slot, or CONTENDED, and then nothing has changed.
        """

        def take_oldest() -> Outcome:
            head = self.words[HEAD]
            count = min(at_most, self.words[TAIL] - head)
            if count < 0:
                return self._distrust()
            if count < at_least:
                return EMPTY
            if _MANY <= count <= self._capacity and self._take_run(head, count, taken):
                return TAKEN
            for position in range(head, head + count):
                outcome = self._take_at(position, taken, large=False)
                if outcome is not TAKEN:
                    return TAKEN if taken.words else outcome
            return TAKEN

        return self._take(take_oldest, at_least)

    def take_large(self, taken: Taken) -> Outcome:
        """Take the oldest message, which is larger than a slot: its head.

        Returns:
            TAKEN; or EMPTY if there is none, or it is not larger than a slot; or CONTENDED.
        """

        def take_oldest() -> Outcome:
            head, tail = self.words[HEAD], self.words[TAIL]
            if head == tail:
                return EMPTY
            return self._take_at(head, taken, large=True) if head < tail else self._distrust()

        return self._take(take_oldest, 1)

    def _take(self, take_oldest: Callable[[], Outcome], at_least: int) -> Outcome:
        if self._unreturned:
            raise self._other_call()
        if 0 <= self.words[TAIL] - self.words[HEAD] < at_least:
            return EMPTY
        return critical(self.receivers, take_oldest)

    def _take_at(self, position: int, taken: Taken, large: bool) -> Outcome:
        """Take the message at that position, which is HEAD, if it is larger than a slot or not, as is said."""
        words = self.words
        slot = words[self._ring + (position & self._mask)]
        state = words[self._records[slot]] if slot < self._capacity else FREE
        if state & STATE_MASK != READY:
            return self._distrust()
        record = self._records[slot]
        meta = words[record + R_META]
        if (meta >> 16 > self._slot_size) is not large:
            self._check_streams()
            return EMPTY if large else STREAM
        own = state + TAKE + self.owner
        taken.slots.append(slot)
        taken.metas.append(meta)
        taken.words.append(own)
        words[record] = own
        words[HEAD] = position + 1
        words[TAKEN_NBYTES] += meta >> 16
        return TAKEN

    def _check_streams(self) -> None:
        """A message is larger than its slot: may that be?"""
        if not self.streams:
            raise corrupted(self.name)

    def _take_run(self, head: int, count: int, taken: Taken) -> bool:
        """Take so many messages in a few steps, if none has been delivered before, and their slots are in a row, which
        may go on from the last slot to the first.

        Returns:
            False, and nothing has changed, if they are not so.
        """
        words, begin = self.words, head & self._mask
        slots = self._ready[begin : begin + count].tolist()
        first = slots[0]
        if slots != self._cycle[first : first + count]:
            return False
        run = slice(first, first + count) if first + count <= self._capacity else np.array(slots)
        metas = self._metas[run].tolist()
        nbytes = metas[0] >> 16
        if metas == metas[:1] * count and nbytes <= self._slot_size:
            nbytes *= count
        elif max(metas) >> 16 <= self._slot_size:
            nbytes = sum([meta >> 16 for meta in metas])
        else:
            return False
        if self._states[run].tolist() != [READY] * count:
            return False
        own = READING | self.owner
        taken.run, taken.slots, taken.metas, taken.words = run, slots, metas, [own] * count
        self._states[run] = own
        words[HEAD] = head + count
        words[TAKEN_NBYTES] += nbytes
        return True
