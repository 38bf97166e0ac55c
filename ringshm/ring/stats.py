"""What `stats()` returns: a snapshot of a channel, taken without a mutex, so each figure is true of a moment nearby.

It answers the questions about a channel that seems to stand still: which process holds which slot or mutex, since when;
which process waits, and for what; which have died. The observer needs no entry in the table, only the segment
(`Segment.observe`).
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..segment import layout
from ..segment.files import Segment
from ..segment.layout import ENTRY_SHIFT, KEPT, PIECE, READING, STATE_MASK, STATES, WRITING
from ..system import monotonic_ns
from .invited import invited
from .mutex import RECEIVER_HOLD
from .observe import records_of
from .participants import Participants
from .versions import SLOT_MASK, holders

_HOLDS = (("senders", layout.P_SENDER_HOLD), ("receivers", RECEIVER_HOLD))  # where they are one, both
_SENDERS_WAIT = (layout.P_WAITING_SPACE, layout.P_WAITING_ROOM)
_RECEIVERS_WAIT = (layout.P_WAITING_MESSAGE, layout.P_WAITING_PIECE)
_SENDERS_LISTEN = (layout.P_LISTENS_SPACE, layout.P_LISTENS_ROOM)
_RECEIVERS_LISTEN = (layout.P_LISTENS_MESSAGE, layout.P_LISTENS_PIECE)


@dataclass(frozen=True)
class ParticipantStats:
    """One attached process.

    Attributes:
        pid: its process id, in its own pid namespace.
        alive: whether it lives; one that is dead here has not been reaped yet. A stopped process lives.
        senders, receivers, undecided: its open handles, by role. An undecided one may still send.
        may_receive: whether it has the creator's handle, which may still receive.
        waiting_for: "message", "space", "version" (of a Latest), "event" (`flush`, `wait_for_peers`) or "". To wait
            for more of a message larger than a slot is to wait for a message, or for space.
        holds: the mutexes that it holds: "senders", "receivers". For longer than some microseconds only if it is
            stopped, dead, or short of a core.
        called: seconds since its latest call that sends or receives began, returned or not; None before the first. So a
            process that waits or holds has done so for at most that time.
        waits: how often a call of it had to block.
        attached: seconds since it attached.
    """

    pid: int
    alive: bool
    senders: int
    receivers: int
    undecided: int
    may_receive: bool
    waiting_for: str
    holds: tuple[str, ...]
    called: float | None
    waits: int
    attached: float


@dataclass(frozen=True)
class SlotStats:
    """One slot that a process is using.

    Attributes:
        slot: its index.
        state: "writing", "reading" or "kept".
        pid: the process that uses it.
        alive: whether that process lives.
        seconds: since the slot was claimed for writing, or borrowed and then kept; while it is being read, since that
            process's latest call began, which may be a later one.
    """

    slot: int
    state: str
    pid: int
    alive: bool
    seconds: float | None


@dataclass(frozen=True)
class Departure:
    """The last process that ceased to be a sender, or a receiver, and how; as text, in words."""

    pid: int
    died: bool

    def __str__(self) -> str:
        return f"process {self.pid} {'died' if self.died else 'closed its handle or exited'}"


@dataclass(frozen=True)
class Death:
    """A process that was found dead and reaped.

    Attributes:
        pid: its process id, in its own pid namespace.
        seconds: how long ago it was found.
        senders, receivers: its open handles, by role.
        slots: how many slots it was using; they were given back, messages it was receiving to the next receiver.
    """

    pid: int
    seconds: float
    senders: int
    receivers: int
    slots: int


@dataclass(frozen=True)
class OnTheirWay:
    """A handle that counts and is not attached yet.

    Attributes:
        role: "sender", "receiver" or "undecided".
        maker: pid of the process that pickled it or started the child; 0 if that is gone.
        pid: the child that it is for; 0 if it is for nobody in particular, or that is not known.
        started: whether a library (multiprocessing, say) starts a process with it. It counts until that process ends;
            any other until its maker has closed all its handles.
        seconds: since it was pickled or forked.
        place: where in the maker's program that was: the end of "file.py:12".
    """

    role: str
    maker: int
    pid: int
    started: bool
    seconds: float
    place: str


@dataclass(frozen=True)
class HeldVersion:
    """A version of a Latest that a process reads, or keeps views of.

    Attributes:
        version: its number.
        pid: the process that holds it.
        alive: whether that process lives.
    """

    version: int
    pid: int
    alive: bool


@dataclass(frozen=True)
class SegmentStats:
    """What the stats of a Channel and of a Latest have in common. Publishers count as senders, readers as receivers.

    Attributes:
        waiting_receivers: threads that wait for a message, or for a newer version; an event loop counts as one.
        waits: how often calls of the participants attached now had to block.
        recoveries: how often the mutexes were recovered.
        recovering: whether a process recovers them now, and waits for a living holder.
        on_their_way: handles that were pickled, or go to a child, and count until they have arrived.
        reaped: how many participants were found dead and reaped.
        deaths: the last of them, newest first.
        last_sender_gone, last_receiver_gone: the last process that ceased to be one, or None.
        participants: the processes attached.
    """

    waiting_receivers: int
    waits: int
    recoveries: int
    recovering: bool
    on_their_way: tuple[OnTheirWay, ...]
    reaped: int
    deaths: tuple[Death, ...]
    last_sender_gone: Departure | None
    last_receiver_gone: Departure | None
    participants: tuple[ParticipantStats, ...]

    @property
    def dead(self) -> tuple[ParticipantStats, ...]:
        """The participants that have died and are not reaped yet."""
        return tuple(participant for participant in self.participants if not participant.alive)


@dataclass(frozen=True)
class ChannelStats(SegmentStats):
    """A channel at one moment. Counts are of messages since the channel was made; sizes are of payloads, in bytes.

    Attributes, beside those of SegmentStats:
        sent, sent_nbytes: published.
        received, received_nbytes: given back by a receiver; bytes count from the taking of a message on.
        withdrawn: larger than a slot, and taken back by their senders, or left by dead ones, before they were received
            whole: they are not among those sent.
        dropped: received by nobody: by drop_oldest, `shutdown(immediate=True)` or too many deliveries.
        redelivered: deliveries that were repeated because a receiver had died.
        capacity, free, ready: slots in all, free, and with a message that waits.
        pieces: slots that hold more of a message that is larger than one.
        slots: the slots that a process is using at the moment.
        waiting_senders: threads that wait for space; an event loop counts as one.
        shut_down: whether `shutdown` was called.
        keep_open: whether the channel was made with it.
    """

    sent: int
    sent_nbytes: int
    received: int
    received_nbytes: int
    withdrawn: int
    dropped: int
    redelivered: int
    capacity: int
    free: int
    ready: int
    pieces: int
    slots: tuple[SlotStats, ...]
    waiting_senders: int
    shut_down: bool
    keep_open: bool

    @property
    def fill(self) -> float:
        """Share of the slots that are not free, 0 to 1."""
        return 1 - self.free / self.capacity


@dataclass(frozen=True)
class LatestStats(SegmentStats):
    """A Latest at one moment.

    Attributes, beside those of SegmentStats:
        version: the newest; 0 before the first.
        nbytes: size of its encoded value.
        borrows: how many versions readers may hold at once.
        held: the versions that they hold, by process.
    """

    version: int
    nbytes: int
    borrows: int
    held: tuple[HeldVersion, ...]


def departure_in(word: int) -> Departure | None:
    """What SENDER_GONE or RECEIVER_GONE says."""
    return Departure(word >> 1, bool(word & 1)) if word else None


def _participant(segment: Segment, entry: int, alive: bool, now: int) -> ParticipantStats:
    words, at = segment.words, entry + layout.P_CALLED
    watched = words[entry + layout.P_WATCHED]
    receives, sends = (
        any(words[entry + word] for word in threads) or any(words[entry + word] & ~watched for word in loops)
        for threads, loops in ((_RECEIVERS_WAIT, _RECEIVERS_LISTEN), (_SENDERS_WAIT, _SENDERS_LISTEN))
    )
    waiting = "message" if receives else "space" if sends else ""
    called = float(segment.numbers[at : at + 1].view(np.float64)[0])
    return ParticipantStats(
        pid=words[entry + layout.P_PID],
        alive=alive,
        senders=words[entry + layout.P_SENDERS],
        receivers=words[entry + layout.P_RECEIVERS],
        undecided=words[entry + layout.P_UNDECIDED],
        may_receive=bool(words[entry + layout.P_MAY_RECEIVE]),
        waiting_for=waiting or ("event" if words[entry + layout.P_WAITING_EVENT] else ""),
        holds=tuple(name for name, word in _HOLDS if words[entry + word]),
        called=max(0.0, now / 1e9 - called) if called else None,
        waits=words[entry + layout.P_WAITS],
        attached=(now - words[entry + layout.P_SINCE]) / 1e9,
    )


def _slot(slot: int, record: NDArray[np.uint64], people: dict[int, ParticipantStats], now: int) -> SlotStats:
    word = int(record[layout.R_STATE])
    state = STATES[word & STATE_MASK]
    owner = people.get(word >> ENTRY_SHIFT & layout.MAX_ENTRIES - 1)
    seconds = (now - int(record[layout.R_SINCE])) / 1e9 if state != "reading" else owner.called if owner else None
    return SlotStats(slot, state, owner.pid if owner else 0, bool(owner and owner.alive), seconds)


def _death(segment: Segment, number: int, now: int) -> Death:
    death = layout.DEATHS + number % layout.DEATHS_KEPT * layout.DEATH_WORDS
    # D_PID, D_FOUND, D_SLOTS, D_ROLES
    pid, found, slots, roles = segment.numbers[death : death + layout.DEATH_WORDS].tolist()
    return Death(pid, (now - found) / 1e9, roles >> 32, roles & (1 << 32) - 1, slots)


def _take_common(
    segment: Segment, participants: Participants, people: dict[int, ParticipantStats], now: int
) -> dict[str, Any]:
    words, reaped = segment.words, segment.words[layout.REAPED]
    deaths = [_death(segment, number, now) for number in range(max(0, reaped - layout.DEATHS_KEPT), reaped)]
    return {
        "waits": sum(person.waits for person in people.values()),
        "recoveries": words[layout.RECOVERIES],
        "recovering": bool(words[layout.GEN] & 1),
        "on_their_way": tuple(
            OnTheirWay(layout.ROLES[i.role], i.maker, i.pid, bool(i.kind & layout.STARTED), i.seconds, i.place)
            for i in invited(segment, participants)
            if i.counts
        ),
        "reaped": reaped,
        "deaths": tuple(reversed(deaths)),
        "last_sender_gone": departure_in(words[layout.SENDER_GONE]),
        "last_receiver_gone": departure_in(words[layout.RECEIVER_GONE]),
        "participants": tuple(people.values()),
    }


def _people(segment: Segment, participants: Participants, now: int) -> dict[int, ParticipantStats]:
    entry = segment.layout.entry
    return {
        index: _participant(segment, entry(index), participants.alive(index), now) for index in participants.in_use()
    }


def _waiting(participants: Participants, people: dict[int, ParticipantStats], *offsets: int) -> int:
    """How many threads of the living say in those words that they wait."""
    living = {index for index, person in people.items() if person.alive}
    columns = map(participants.column, offsets)
    return sum(threads for column in columns for index, threads in enumerate(column) if index in living)


def _waiting_in_all(
    participants: Participants, people: dict[int, ParticipantStats], threads: tuple[int, ...], loops: tuple[int, ...]
) -> int:
    """As `_waiting`; a thread in an event loop, or in `ringshm.wait`, counts too."""
    waiting = _waiting(participants, people, *threads)
    for index, masks in enumerate(zip(*map(participants.column, (layout.P_WATCHED, *loops)), strict=False)):
        if index in people and people[index].alive:
            listening = functools.reduce(operator.or_, masks[1:])
            waiting += bin(listening & ~masks[0]).count("1")
    return waiting


def take_stats(segment: Segment, participants: Participants) -> ChannelStats:
    """Look at a channel, as a participant or from outside."""
    words, shape = segment.words, segment.layout
    head, tail = words[layout.HEAD], words[layout.TAIL]
    table = records_of(segment.numbers, shape)[
        :, : layout.R_SINCE + 1
    ].copy()  # no more of others' cache lines than is looked at
    states = table[:, layout.R_STATE] & np.uint64(STATE_MASK)
    now = monotonic_ns()
    people = _people(segment, participants, now)
    used = np.flatnonzero((states == WRITING) | (states == READING) | (states == KEPT)).tolist()
    dropped, withdrawn = words[layout.DROPPED], words[layout.WITHDRAWN]
    reading = states == READING
    being_read = int((table[reading, layout.R_META] >> np.uint64(16)).sum())
    return ChannelStats(
        sent=max(0, tail - withdrawn),
        sent_nbytes=words[layout.SENT_NBYTES],
        received=max(0, head - int(reading.sum()) - dropped - withdrawn),
        received_nbytes=max(0, words[layout.TAKEN_NBYTES] - being_read),
        withdrawn=withdrawn,
        dropped=dropped,
        redelivered=words[layout.REDELIVERED],
        capacity=shape.capacity,
        free=int((states == 0).sum()),
        ready=max(0, min(tail - head, shape.capacity)),
        pieces=int((states == PIECE).sum()),
        slots=tuple(_slot(slot, table[slot], people, now) for slot in used),
        waiting_senders=_waiting_in_all(participants, people, _SENDERS_WAIT, _SENDERS_LISTEN),
        waiting_receivers=_waiting_in_all(participants, people, _RECEIVERS_WAIT, _RECEIVERS_LISTEN),
        shut_down=bool(words[layout.SHUTDOWN]),
        keep_open=segment.options.keep_open,
        **_take_common(segment, participants, people, now),
    )


def take_latest_stats(segment: Segment, participants: Participants) -> LatestStats:
    """Look at a Latest, as a participant or from outside."""
    words, shape = segment.words, segment.layout
    now = monotonic_ns()
    people = {
        index: replace(person, waiting_for="version") if person.waiting_for in ("message", "space") else person
        for index, person in _people(segment, participants, now).items()
    }
    newest = words[layout.NEWEST]
    version, slot = newest >> 16, (newest & SLOT_MASK) - 1
    held = [
        HeldVersion(version, people[index].pid, people[index].alive)
        for index, version in holders(words, segment.memory, shape)
        if index in people
    ]
    return LatestStats(
        version=version,
        nbytes=words[shape.record(slot) + layout.R_META] >> 16 if 0 <= slot < shape.capacity else 0,
        borrows=shape.capacity - 2,
        held=tuple(held),
        waiting_receivers=_waiting(participants, people, layout.P_WAITING_MESSAGE, layout.P_WAITING_SPACE),
        **_take_common(segment, participants, people, now),
    )


def take_any_stats(segment: Segment, participants: Participants) -> SegmentStats:
    """Look at a channel or a Latest, whichever it is."""
    return (take_latest_stats if segment.options.kind == "Latest" else take_stats)(segment, participants)
