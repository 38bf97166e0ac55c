"""What survivors do for the dead: give their slots back, free their entries, tell everybody.

Any process that waits looks after each slice, and any that does not wait before it answers Full, Empty, end or broken;
the time of the last look stands in the header, so that all together look once a slice. A dead participant's

    hold word           the mutexes are recovered first (mutex.py)
    unfinished message  larger than a slot: is withdrawn, or marked for the receiver that is at it to drop
    WRITING, KEPT slot  becomes FREE: it was never published, or received already
    READING slot        becomes READY again, one delivery more, in its old place; after max_deliveries it is dropped
    roles, tickets      end; its entry becomes UNUSED, last of all

A reaper holds the table lock and may die at any step: what it has not done is still there for the next.
"""

from __future__ import annotations

import time
import warnings

from .layout import (
    ATTENTION,
    DELIVERY,
    DELIVERY_MASK,
    LAST_CHECK,
    READING,
    STATE_MASK,
)
from .mutex import SLICE, Fence
from .participants import Participants
from .ring import Ring
from .waiting import Waiters

_SLICE_NS = int(SLICE * 1e9)
_RECOVERY_TRIES = 3  # then the caller, who has a time-out, goes on; whoever looks next tries again


class Reaper:
    """Finds the dead of one segment and reaps them."""

    def __init__(
        self,
        name: str,
        max_deliveries: int,
        participants: Participants,
        fence: Fence,
        ring: Ring,
        waiters: list[Waiters],
    ) -> None:
        self._name = name
        self._max_deliveries = max_deliveries
        self._participants = participants
        self._fence = fence
        self._ring = ring
        self._waiters = waiters

    def look(self) -> bool:
        """Reap the dead, unless somebody has looked within a slice; whether there were any."""
        words = self._ring.words
        self._ring.give_back_abandoned()
        self._ring.requeue_late()
        now = time.monotonic_ns()
        if 0 <= now - words[LAST_CHECK] < _SLICE_NS:  # a time to come is damage: then nobody would ever look
            return False
        words[LAST_CHECK] = now
        return bool(self._participants.dead()) and self.reap()

    def reap(self) -> bool:
        """Reap the dead now, unless somebody else is at it; whether any was reaped."""
        reaped = False
        with self._participants.table(patience=0) as held:
            if held:
                for index in self._participants.dead():
                    reaped |= self._reap(index)
        return reaped

    def _reap(self, index: int) -> bool:
        participants, ring, words = self._participants, self._ring, self._ring.words
        for _ in range(_RECOVERY_TRIES):
            if not participants.holds_mutex(index):
                break
            self._fence.recover()
        else:
            return False  # a live but stopped process holds the other mutex
        dropped = 0
        owner = participants.owner_of(index)
        for slot in ring.fed_by(owner):
            ring.withdraw(slot, owner, slices=1)
        owned = ring.owned_by(owner)
        for record, state in owned:
            if state & STATE_MASK != READING:
                ring.vacate(ring.slot_of(record))
            elif ring.is_given_up(record):
                if not ring.drop_taken(record, state, slices=1):
                    return False
            elif (state & DELIVERY_MASK) // DELIVERY + 1 < self._max_deliveries:
                if not ring.requeue([(record, state)], deliveries=1, slices=1):
                    return False
            elif ring.drop_taken(record, state, slices=1):
                dropped += 1
            else:
                return False
        pid = participants.bury(index, len(owned))
        words[ATTENTION] = 1
        for waiters in self._waiters:
            waiters.wake_all()
        if dropped:
            warnings.warn(
                f"channel {self._name!r}: dropped {dropped} message(s) that process {pid} was receiving when it died, "
                f"after max_deliveries={self._max_deliveries} deliveries",
                RuntimeWarning,
                stacklevel=2,
            )
        return True
