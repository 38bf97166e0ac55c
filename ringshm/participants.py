"""Who takes part, in which role, and who lives.

A participant is one process's attachment to the segment. Its entry in the table is written by itself alone; the kernel
says whether it lives: it holds a record lock on its own byte of the segment's file (segment.py), which survives zombies
and the reuse of pids, and works between pid namespaces. A stopped process lives.

    UNUSED --join, under the table lock, with the byte locked--> IN_USE --leave: UNUSED, then unlock--> UNUSED
                                                                    | death: the kernel unlocks
                                                                    +--reap, under the table lock--> UNUSED

1. IN_USE with the byte unlocked means dead; the incarnation tells one use of an entry from the next.
2. An entry is used again only after its slots, hold words and roles were reaped (reaper.py).
3. Roles count open handles. UNDECIDED ones may still become either; so may tickets: handles that were pickled and
   have not been attached yet. A ticket ends when it is attached, when its maker leaves or dies, or after 60 s.
   A fork makes a ticket, too, for the moment until the child has its own entry; its parent may close meanwhile.
   Who arrives or decides stores the new before it clears the old: roles, then the ticket; a role's count, then
   UNDECIDED. Who looks reads the other way round, so that it sees everybody at least once; and looks again if a
   ticket was made meanwhile.
4. The table lock (a record lock) guards joining, reaping and the tickets; leaving and changing roles take no lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator

from . import fifos
from .errors import BrokenChannel, TooManyParticipants
from .layout import (
    CREATOR,
    D_FOUND,
    D_PID,
    D_ROLES,
    D_SLOTS,
    DEATH_WORDS,
    DEATHS,
    DEATHS_KEPT,
    ENTRY_WORDS,
    FORKED,
    HIGH_TICKET,
    HIGH_WATER,
    IN_USE,
    KEPT,
    LOCK_ENTRIES,
    LOCK_TABLE,
    MAX_INCARNATION,
    MAX_WORD,
    NAME_DOOMED,
    NEXT_TICKET,
    OWNER_MASK,
    P_FIFOS,
    P_INCARNATION,
    P_LISTENS_MESSAGE,
    P_LISTENS_PIECE,
    P_LISTENS_ROOM,
    P_LISTENS_SPACE,
    P_PID,
    P_RECEIVER_HOLD,
    P_RECEIVERS,
    P_SENDER_HOLD,
    P_SENDERS,
    P_SINCE,
    P_STATUS,
    P_STUCK,
    P_UNDECIDED,
    P_WAITING_EVENT,
    P_WAITING_MESSAGE,
    P_WAITING_PIECE,
    P_WAITING_ROOM,
    P_WAITING_SPACE,
    P_WATCHED,
    R_FEEDER,
    R_STATE,
    READING,
    READY,
    REAPED,
    RECEIVER,
    RECEIVER_GONE,
    RECORD_WORDS,
    SENDER,
    SENDER_GONE,
    STATE_MASK,
    T_EXPIRES,
    T_MAKER,
    T_NUMBER,
    T_ROLE,
    TICKET_WORDS,
    UNUSED,
    WRITING,
    owner_value,
    sender_value,
)
from .segment import Segment

TICKET_SECONDS = 60.0
_FORK_SECONDS = 10.0  # the first thing that a forked child does is to redeem its ticket; none comes if the fork failed
TABLE_PATIENCE = 10.0  # the table lock is held for microseconds, and for some slices by a reaper that recovers

#: Threads of this process that fork at the moment; in a child, until it has begun anew (attachment.py).
forking: set[int] = set()

_WAITING = (P_WAITING_MESSAGE, P_WAITING_SPACE, P_WAITING_EVENT, P_WAITING_PIECE, P_WAITING_ROOM)
_LISTENS = (P_LISTENS_MESSAGE, P_LISTENS_SPACE, P_LISTENS_PIECE, P_LISTENS_ROOM, P_WATCHED)


class Participants:
    """The table as this process sees it, and this process's own entry in it.

    When the last reference to it goes, the process leaves: so frames that are inside a call, and later views of slots,
    keep the entry.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._words = segment.words
        self._layout = segment.layout
        self._table_lock = threading.RLock()
        self._table_held = False
        self._pid = 0
        self.index = -1
        self.entry = 0
        self.owner = 0
        self.sender = 0

    # --- the own entry

    @property
    def joined(self) -> bool:
        """Whether this process has an entry."""
        return self.index >= 0

    def join(self, patience: float = TABLE_PATIENCE) -> None:
        """Take an entry; the spare one if all others are in use, from which the caller should reap and move.

        None, and `joined` stays false, while another newcomer has the spare one.

        Raises:
            BrokenChannel: if a stopped process holds the table for all of `patience` (seconds).
        """
        with self.table(patience):
            words, layout = self._words, self._layout
            for index in range(layout.max_participants + 1):
                entry = layout.entry(index)
                # a newcomer that died on the spare one had no slots and no roles, and a token it held is found missing
                takable = words[entry + P_STATUS] == UNUSED or index == layout.spare_entry
                if takable and self._segment.file.try_lock(LOCK_ENTRIES + index):
                    break
            else:
                return
            incarnation = words[entry + P_INCARNATION] % MAX_INCARNATION + 1
            for word in range(entry + P_INCARNATION, entry + ENTRY_WORDS):
                words[word] = 0
            self._clear_pins(index)
            self._pid = pid = os.getpid()
            words[entry + P_INCARNATION] = incarnation
            words[entry + P_PID] = pid
            words[entry + P_SINCE] = time.monotonic_ns()
            words[HIGH_WATER] = max(words[HIGH_WATER], index + 1)
            words[entry + P_STATUS] = IN_USE
            self.entry = entry
            self.owner = owner_value(index, incarnation)
            self.sender = sender_value(pid, index, incarnation)
            self.index = index

    def full_of_the_living(self) -> bool:
        """Whether every entry but the spare one is in use, and nobody dead is left to reap."""
        spare = self._layout.spare_entry
        return sum(index != spare for index in self.in_use()) == spare and not self.dead()

    def too_many(self) -> TooManyParticipants:
        """The error for a full table."""
        return TooManyParticipants(
            errno.EUSERS,
            f"channel {self._segment.name!r} has max_participants={self._layout.max_participants} processes attached, "
            "all alive: make it with a larger max_participants, or close handles that are not needed",
        )

    def give_up(self) -> None:
        """Give the own entry up: first its word, then its lock, so that it never looks dead."""
        index, self.index = self.index, -1
        self.set_roles(0, 0, 0)
        self._clear_waits(self.entry)
        self._clear_pins(index)
        self._words[self.entry + P_STATUS] = UNUSED
        self._segment.file.unlock(LOCK_ENTRIES + index)

    def _clear_waits(self, entry: int) -> None:
        """Nobody of that entry waits any more, whatever death or an exception has left there."""
        for word in (*_WAITING, *_LISTENS, P_STUCK):
            self._words[entry + word] = 0

    def _clear_pins(self, index: int) -> None:
        """Nothing is read by that entry any more."""
        layout = self._layout
        start = layout.pins + index * layout.pin_cells
        self._segment.memory[start : start + layout.pin_cells] = bytes(layout.pin_cells)

    def in_fork(self) -> bool:
        """Whether this is a forked child that has not begun anew yet: what is there is its parent's. No system call,
        but while a thread forks.
        """
        return bool(forking) and os.getpid() != self._pid

    def leave(self) -> None:
        """Give the own entry up; the last one to leave removes the names. A fork's copy of it does nothing."""
        if self.joined and self._pid == os.getpid():
            if self._owns_slots():  # an exception has left them: seem dead, so that they are reaped
                index, self.index = self.index, -1
                self._segment.file.unlock(LOCK_ENTRIES + index)
            else:
                self.give_up()
            self.remove_names_if_alone()

    def _owns_slots(self) -> bool:
        start, count = self._layout.records + R_STATE, self._layout.capacity * RECORD_WORDS
        states = self._words[start : start + count : RECORD_WORDS].tolist()
        held = (WRITING, READING, KEPT)
        if any(state & STATE_MASK in held and state & OWNER_MASK == self.owner for state in states):
            return True
        feeders = self._words[start + R_FEEDER : start + R_FEEDER + count : RECORD_WORDS].tolist()
        return any(
            feeder == self.owner and state & STATE_MASK in (READY, READING)
            for feeder, state in zip(feeders, states, strict=True)
        )

    def remove_names_if_alone(self) -> None:
        """Remove the names unless another process is attached."""
        if not self._segment.file.locked_elsewhere(LOCK_ENTRIES, 0):
            self._segment.remove_names(unless_used=True)

    def disown(self) -> None:
        """In a forked child that has dropped the copy of its parent's locks: forget the parent's entry."""
        self.index = -1
        self._table_lock = threading.RLock()
        self._table_held = False
        self._segment.file.open_locks()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError, ValueError):
            self.leave()

    def set_roles(self, senders: int, receivers: int, undecided: int) -> None:
        """Say how many open handles of this process send, receive, or may still do either."""
        words, entry = self._words, self.entry
        gone = os.getpid() << 1  # the low bit says that it died: see bury
        if words[entry + P_SENDERS] and not senders:
            words[SENDER_GONE] = gone
        if words[entry + P_RECEIVERS] and not receivers:
            words[RECEIVER_GONE] = gone
        words[entry + P_SENDERS] = senders  # before P_UNDECIDED: a handle that decides is counted at any moment
        words[entry + P_RECEIVERS] = receivers
        words[entry + P_UNDECIDED] = undecided

    # --- everybody

    def column(self, offset: int) -> list[int]:
        """That word of every entry that was ever used."""
        words, layout = self._words, self._layout
        count = min(words[HIGH_WATER], layout.max_participants + 1)
        start = layout.entries + offset
        return words[start : start + count * ENTRY_WORDS : ENTRY_WORDS].tolist() if count else []

    def in_use(self) -> list[int]:
        """Indices of the entries in use, by the living or the dead."""
        return [index for index, status in enumerate(self.column(P_STATUS)) if status == IN_USE]

    def alive(self, index: int) -> bool:
        """Whether the process of an entry in use lives: what the kernel says."""
        return index == self.index or self._segment.file.locked_elsewhere(LOCK_ENTRIES + index)

    def dead(self) -> list[int]:
        """Entries in use whose process has died."""
        dead = [index for index in self.in_use() if not self.alive(index)]
        # one that left meanwhile stored UNUSED before it unlocked its byte
        return [index for index in dead if self._words[self._layout.entry(index) + P_STATUS] == IN_USE]

    def owner_of(self, index: int) -> int:
        """The owner value of the present use of an entry."""
        return owner_value(index, self._words[self._layout.entry(index) + P_INCARNATION])

    def is_in_use(self, owner: int) -> bool:
        """Whether that very incarnation still has its entry."""
        return any(self.owner_of(index) == owner for index in self.in_use())

    def others_may(self, role: int) -> bool:
        """Whether another process is in that role, or may still come to be."""
        own, issued = self.index, self._words[NEXT_TICKET]
        if any(ticket_role & ~FORKED != RECEIVER + SENDER - role for _, ticket_role in self._tickets()):
            return True
        undecided = self.column(P_UNDECIDED)  # in this order: see 3. above
        counts = self.column(P_SENDERS if role == SENDER else P_RECEIVERS)
        rows = zip(self.column(P_STATUS), counts, undecided, strict=False)
        if any(row[0] == IN_USE and (row[1] or row[2]) and index != own for index, row in enumerate(rows)):
            return True
        # somebody may have made a ticket behind our look at them, and left before our look at the entries
        return bool(self._words[NEXT_TICKET] != issued)

    def peers(self) -> tuple[int, int]:
        """How many other processes are attached as senders, and as receivers."""
        own = self.index
        rows = list(zip(self.column(P_STATUS), self.column(P_SENDERS), self.column(P_RECEIVERS), strict=False))
        others = [row for index, row in enumerate(rows) if row[0] == IN_USE and index != own]
        return sum(bool(row[1]) for row in others), sum(bool(row[2]) for row in others)

    def active(self) -> int:
        """How many processes are attached that send or receive."""
        rows = zip(self.column(P_STATUS), self.column(P_SENDERS), self.column(P_RECEIVERS), strict=False)
        return sum(row[0] == IN_USE and bool(row[1] or row[2]) for row in rows)

    @property
    def creator_present(self) -> bool:
        """Whether the process that made the channel still has it open."""
        return self.is_in_use(self._words[CREATOR])

    # --- what a mutex asks (mutex.Liveness)

    def try_lock(self, byte: int) -> bool:
        """Lock that byte of the segment's file for this process, unless another holds it."""
        return self._segment.file.try_lock(byte)

    def unlock(self, byte: int) -> None:
        """Give that byte up."""
        self._segment.file.unlock(byte)

    def holders(self, offset: int) -> tuple[list[int], list[int]]:
        """Entries whose hold word at `offset` is set: those of the living, those of the dead."""
        living: list[int] = []
        dead: list[int] = []
        for index, hold in enumerate(self.column(offset)):
            if hold:
                (living if self.alive(index) else dead).append(index)
        return living, dead

    def clear(self, entries: list[int], offset: int) -> None:
        """Clear that hold word of those dead participants."""
        for index in entries:
            self._words[self._layout.entry(index) + offset] = 0

    # --- reaping: the caller holds the table lock, and has given the entry's slots and mutexes back

    def bury(self, index: int, slots: int) -> int:
        """Free the entry of a dead participant, which was using so many slots; its pid."""
        words, entry = self._words, self._layout.entry(index)
        # cut to what two of them fit into one word with, whatever damage stands there
        pid, senders, receivers = (words[entry + word] & 0x7FFFFFFF for word in (P_PID, P_SENDERS, P_RECEIVERS))
        if senders:
            words[SENDER_GONE] = pid << 1 | 1
        if receivers:
            words[RECEIVER_GONE] = pid << 1 | 1
        death = DEATHS + words[REAPED] % DEATHS_KEPT * DEATH_WORDS
        words[death + D_PID] = pid
        words[death + D_FOUND] = time.monotonic_ns()
        words[death + D_SLOTS] = slots
        words[death + D_ROLES] = senders << 32 | receivers
        words[REAPED] = words[REAPED] + 1 & MAX_WORD
        self._clear_waits(entry)
        self._clear_pins(index)
        for bit, made in enumerate(reversed(f"{words[entry + P_FIFOS]:b}")):
            if made == "1":
                fifos.remove(fifos.path_of(self._segment.nonce, index, words[entry + P_INCARNATION], bit))
        words[entry + P_STATUS] = UNUSED
        return pid

    def holds_mutex(self, index: int) -> bool:
        """Whether a hold word of that entry is set."""
        words, entry = self._words, self._layout.entry(index)
        return bool(words[entry + P_SENDER_HOLD] or words[entry + P_RECEIVER_HOLD])

    # --- the table lock

    @contextlib.contextmanager
    def table(self, patience: float = TABLE_PATIENCE) -> Iterator[bool]:
        """Hold the table lock, against other processes and this one's threads; yields False if it was not to be had.

        Raises:
            BrokenChannel: if somebody holds it for all of a patience (seconds) of more than 0.
        """
        with self._table_lock:
            if self._table_held:  # a finaliser or signal handler came in between; it may do what its thread may
                yield True
                return
            give_up = time.monotonic() + patience
            self._table_held = True
            try:
                while True:  # with a condition, CPython 3.13.0 guards the jump back to it with no `try`
                    held = self._segment.file.try_lock(LOCK_TABLE)
                    if held or not patience:
                        break
                    if time.monotonic() > give_up:
                        raise BrokenChannel(
                            errno.ETIMEDOUT,
                            f"channel {self._segment.name!r}: its table of participants has been locked for "
                            f"{patience:.0f} s by another process: is one stopped?",
                        )
                    time.sleep(0.001)
                yield held
            finally:
                self._table_held = False
                self._segment.file.unlock(LOCK_TABLE)

    # --- tickets

    def _tickets(self) -> list[tuple[int, int]]:
        """(number, role) of the tickets that still count."""
        words, layout = self._words, self._layout
        start, count = layout.tickets, min(words[HIGH_TICKET], layout.max_participants)
        if not count:
            return []
        numbers = words[start + T_NUMBER : start + count * TICKET_WORDS : TICKET_WORDS].tolist()
        if not any(numbers):
            return []
        now = time.monotonic_ns()
        found = []
        for index, number in enumerate(numbers):
            ticket = layout.ticket(index)
            role = words[ticket + T_ROLE]
            if (
                number
                and words[ticket + T_EXPIRES] > now
                and (role & FORKED or self.is_in_use(words[ticket + T_MAKER]))
            ):
                found.append((number, role))
        return found

    @property
    def on_their_way(self) -> int:
        """How many tickets count."""
        return len(self._tickets())

    def _pickled(self) -> set[int]:
        """Numbers of the tickets that still count and need the names."""
        return {number for number, role in self._tickets() if not role & FORKED}

    def issue_ticket(self, role: int, patience: float = TABLE_PATIENCE) -> int:
        """Count a handle that is on its way to another process, pickled or (`role | FORKED`) in a fork; its number."""
        with self.table(patience):
            words, layout = self._words, self._layout
            valid = {number for number, _ in self._tickets()}
            tickets = [layout.ticket(index) for index in range(layout.max_participants)]
            free = [ticket for ticket in tickets if words[ticket + T_NUMBER] not in valid]
            # all on their way at once: the oldest one makes room
            ticket = free[0] if free else min(tickets, key=lambda ticket: words[ticket + T_EXPIRES])
            number = words[NEXT_TICKET] % MAX_WORD + 1
            words[HIGH_TICKET] = max(words[HIGH_TICKET], (ticket - layout.tickets) // TICKET_WORDS + 1)
            words[ticket + T_NUMBER] = 0
            words[ticket + T_MAKER] = self.owner
            words[ticket + T_ROLE] = role
            seconds = _FORK_SECONDS if role & FORKED else TICKET_SECONDS
            words[ticket + T_EXPIRES] = time.monotonic_ns() + int(seconds * 1e9)
            words[ticket + T_NUMBER] = number
            words[NEXT_TICKET] = number  # after the ticket counts, before its maker may leave: see others_may
            return int(number)

    def redeem_ticket(self, number: int, patience: float = TABLE_PATIENCE) -> None:
        """The handle of that ticket is attached, and counts by itself from now on."""
        words, layout = self._words, self._layout
        with self.table(patience):
            for index in range(layout.max_participants):
                ticket = layout.ticket(index)
                if words[ticket + T_NUMBER] == number:
                    words[ticket + T_NUMBER] = 0
        if words[NAME_DOOMED] and not self._pickled():
            self._segment.remove_names()

    def doom_names(self) -> None:
        """Remove the names; or, while handles are on their way that need them, have the last of those do it."""
        self._words[NAME_DOOMED] = 1
        threading.Lock().acquire()  # fence: this store, then the look; redeem_ticket clears its ticket, then looks here
        if not self._pickled():
            self._segment.remove_names()

    @property
    def awaits(self) -> bool:
        """Whether a handle that this process has pickled is still on its way."""
        words, layout = self._words, self._layout
        valid = self._pickled()
        tickets = map(layout.ticket, range(layout.max_participants))
        return any(words[t + T_NUMBER] in valid and words[t + T_MAKER] == self.owner for t in tickets)
