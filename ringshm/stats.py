"""What `stats()` returns: a snapshot of a channel, taken without a mutex, so each figure is true of a moment nearby."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from .layout import (
    DROPPED,
    ENTRY_SHIFT,
    HEAD,
    INCARNATION_SHIFT,
    P_PID,
    P_RECEIVERS,
    P_SENDERS,
    P_SINCE,
    P_UNDECIDED,
    P_WAITING_EVENT,
    P_WAITING_MESSAGE,
    P_WAITING_SPACE,
    P_WAITS,
    R_META,
    R_SINCE,
    R_STATE,
    READING,
    READY,
    REAPED,
    RECOVERIES,
    REDELIVERED,
    SENT_NBYTES,
    STATE_MASK,
    STATES,
    TAIL,
    TAKEN_NBYTES,
)
from .participants import Participants
from .ring import Ring


@dataclass(frozen=True)
class ParticipantStats:
    """One attached process.

    Attributes:
        pid: its process id, in its own pid namespace.
        alive: whether it lives; one that is dead here has not been reaped yet.
        senders, receivers, undecided: its open handles, by role.
        waiting_for: "message", "space", "event" (`flush`, `wait_for_peers`) or "", and
        waits: how often a call of it had to block.
        attached: seconds since it attached.
    """

    pid: int
    alive: bool
    senders: int
    receivers: int
    undecided: int
    waiting_for: str
    waits: int
    attached: float


@dataclass(frozen=True)
class SlotStats:
    """One slot that a process is using.

    Attributes:
        slot: its index.
        state: "writing", "reading" or "kept".
        pid: who uses it.
        seconds: since when, or None for a slot that was taken by a `get`, which does not look at the clock.
    """

    slot: int
    state: str
    pid: int
    seconds: float | None


@dataclass(frozen=True)
class ChannelStats:
    """A channel at one moment. Counts are of messages since the channel was made; sizes are of payloads, in bytes.

    Attributes:
        sent, sent_nbytes: published.
        received, received_nbytes: given back by a receiver; bytes count from the taking of a message on.
        dropped: received by nobody: by drop_oldest, `shutdown(immediate=True)` or too many deliveries.
        redelivered: deliveries that were repeated because a receiver had died.
        capacity, free, ready: slots in all, free, and with a message that waits.
        slots: the slots that a process is using at the moment.
        waiting_senders, waiting_receivers: threads that wait for space, and for a message.
        waits: how often calls of the participants attached now had to block.
        recoveries: how often the mutexes were recovered.
        reaped: how many participants were found dead and reaped.
        participants: the processes attached.
    """

    sent: int
    sent_nbytes: int
    received: int
    received_nbytes: int
    dropped: int
    redelivered: int
    capacity: int
    free: int
    ready: int
    slots: tuple[SlotStats, ...]
    waiting_senders: int
    waiting_receivers: int
    waits: int
    recoveries: int
    reaped: int
    participants: tuple[ParticipantStats, ...]

    @property
    def fill(self) -> float:
        """Share of the slots that are not free, 0 to 1."""
        return 1 - self.free / self.capacity

    @property
    def dead(self) -> tuple[ParticipantStats, ...]:
        """The participants that have died and are not reaped yet."""
        return tuple(participant for participant in self.participants if not participant.alive)


def take_stats(ring: Ring, participants: Participants) -> ChannelStats:
    """Look at a channel."""
    words, capacity, now = ring.words, ring.layout.capacity, time.monotonic_ns()
    head, tail = words[HEAD], words[TAIL]
    table = ring.snapshot()
    states = table[:, R_STATE] & np.uint64(STATE_MASK)
    column = participants.column
    in_use = participants.in_use()  # first: columns only grow
    pids = column(P_PID)
    slots = []
    for slot in np.flatnonzero(states > READY).tolist():
        state, word = STATES[min(int(states[slot]), len(STATES) - 1)], int(table[slot, R_STATE])
        entry = word >> ENTRY_SHIFT & (1 << INCARNATION_SHIFT - ENTRY_SHIFT) - 1
        since = (now - int(table[slot, R_SINCE])) / 1e9 if state == "writing" else None
        slots.append(SlotStats(slot, state, pids[entry] if entry < len(pids) else 0, since))
    rows = list(
        zip(
            pids,
            column(P_SENDERS),
            column(P_RECEIVERS),
            column(P_UNDECIDED),
            column(P_WAITING_MESSAGE),
            column(P_WAITING_SPACE),
            column(P_WAITING_EVENT),
            column(P_WAITS),
            column(P_SINCE),
            strict=False,
        )
    )
    people = []
    for index in in_use:
        pid, senders, receivers, undecided, message, space, event, waits, since_ns = rows[index]
        waiting = "message" if message else "space" if space else "event" if event else ""
        seconds = (now - since_ns) / 1e9
        people.append(
            ParticipantStats(pid, participants.alive(index), senders, receivers, undecided, waiting, waits, seconds)
        )
    reading = states == READING
    dropped = words[DROPPED]
    return ChannelStats(
        sent=tail,
        sent_nbytes=words[SENT_NBYTES],
        received=max(0, head - int(reading.sum()) - dropped),
        received_nbytes=max(0, words[TAKEN_NBYTES] - int((table[reading, R_META] >> np.uint64(16)).sum())),
        dropped=dropped,
        redelivered=words[REDELIVERED],
        capacity=capacity,
        free=int((states == 0).sum()),
        ready=max(0, min(tail - head, capacity)),
        slots=tuple(slots),
        waiting_senders=sum(column(P_WAITING_SPACE)),
        waiting_receivers=sum(column(P_WAITING_MESSAGE)),
        waits=sum(person.waits for person in people),
        recoveries=words[RECOVERIES],
        reaped=words[REAPED],
        participants=tuple(people),
    )
