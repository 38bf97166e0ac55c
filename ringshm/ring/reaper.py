"""What survivors do for the dead: give their slots back, free their entries, tell everybody.

A process that waits looks for the dead after each slice. One that does not wait looks before it answers Full, Empty,
end or broken. The time of the last look stands in the header (LAST_CHECK), so that all together look once a slice.

    what a dead participant has   what the reaper does, in this order
    a hold word                   recovers the mutexes (mutex.py); if a live process holds the other, gives up for now
    a message larger than a slot  withdraws it, if it was not written to the end; or marks it, for the receiver that is
    that it was feeding           at it to drop
    a slot in WRITING or KEPT     frees it: its message was never published, or was received already
    a slot in READING             puts it back into its old place, READY, with one delivery more; drops it after
                                  max_deliveries
    roles, invitations            ends them; its entry becomes UNUSED, last of all. Then it wakes those whose answer
                                  that can have changed (changes.py)

A reaper holds the table lock and may die at any step: what it has not done is still there for the next reaper.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ..errors import ChannelUnavailable, again
from ..segment import layout
from ..segment.layout import DELIVERY, DELIVERY_MASK, READING, STATE_MASK
from ..system import monotonic_ns
from .changes import BOTH, Changes
from .mutex import SLICE, Fence
from .participants import Participants
from .slots import Ring

_SLICE_NS = int(SLICE * 1e9)
_RECOVERY_TRIES = 3  # then the caller, which has a time-out, goes on; the next look tries again


@dataclass(eq=False)
class Reaper:
    """Finds the dead of one segment and reaps them."""

    name: str
    max_deliveries: int
    participants: Participants
    fence: Fence
    ring: Ring
    changes: Changes
    _looked_at_self: int = field(default=0, init=False)

    def look(self) -> bool:
        """Reap the dead, unless somebody has looked within a slice; whether there were any.

        Raises:
            ChannelUnavailable: if others take this process itself for dead.
        """
        words, now = self.ring.words, monotonic_ns()
        if now - self._looked_at_self >= _SLICE_NS:
            self._looked_at_self = now
            self.look_at_self()
        self.ring.release_abandoned()
        self.ring.requeue_overdue()
        if 0 <= now - words[layout.LAST_CHECK] < _SLICE_NS:  # a time to come is damage: then nobody would ever look
            return False
        words[layout.LAST_CHECK] = now
        return bool(self.participants.dead()) and self.reap()

    def look_at_self(self) -> None:
        """Raise ChannelUnavailable if others take this process itself for dead: it must not act as what it was."""
        try:
            self.participants.check_own()
        except ChannelUnavailable as error:
            self.ring.refuse(again(error))
            raise

    def reap(self) -> bool:
        """Reap the dead now, unless somebody else is at it; whether any was reaped."""
        reaped = False
        with self.participants.table(patience=0) as held:
            if held:
                for index in self.participants.dead():
                    reaped |= self._reap(index)
        return reaped

    def _reap(self, index: int) -> bool:
        participants, ring, changes = self.participants, self.ring, self.changes
        roles = BOTH if participants.is_creator(index) else changes.expected_of(index)
        amid = participants.holds_mutex(index) or participants.has_tasks(index)
        for _ in range(_RECOVERY_TRIES):
            if not participants.holds_mutex(index):
                break
            self.fence.recover()
        else:
            return False  # a live but stopped process holds the other mutex
        dropped = 0
        owner = participants.owner_of(index)
        fed = ring.fed_by(owner)
        for slot in fed:
            ring.withdraw(slot, owner, slices=1)
        owned = ring.owned_by(owner)
        for record, state in owned:
            if state & STATE_MASK != READING:
                ring.vacate(ring.slot_of(record))
            elif ring.is_given_up(record):
                if not ring.drop_taken(record, state, slices=1):
                    return False
            elif (state & DELIVERY_MASK) // DELIVERY + 1 < self.max_deliveries:
                if not ring.requeue([(record, state)], deliveries=1, slices=1):
                    return False
            elif ring.drop_taken(record, state, slices=1):
                dropped += 1
            else:
                return False
        pid = participants.bury(index, len(owned))
        if amid or fed or owned:
            changes.everything()
        else:
            changes.ended(roles)
        if dropped:
            warnings.warn(
                f"channel {self.name!r}: dropped {dropped} message(s) that process {pid} was receiving when it died, "
                f"after max_deliveries={self.max_deliveries} deliveries",
                RuntimeWarning,
                stacklevel=2,
            )
        return True
