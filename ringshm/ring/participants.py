"""The table of participants: which processes are attached, in which role, and which of them live.

A participant is one process's attachment to the segment. The process alone writes its entry in the table. The kernel
says whether it lives: a process holds a record lock on its own byte of the segment's file (segment/locks.py). The lock
survives zombies and the reuse of pids, and works between pid namespaces. A stopped process lives.

    UNUSED --join, under the table lock, with the byte locked--> IN_USE --leave: UNUSED, then unlock--> UNUSED
                                                                    | death: the kernel unlocks
                                                                    +--reap, under the table lock--> UNUSED

1. IN_USE with the byte unlocked means dead. The incarnation tells one use of an entry from the next.
2. An entry is used again only after a reaper has given back its slots, hold words and roles (reaper.py).
3. Roles count open handles. An UNDECIDED handle may still become either; it counts as a possible sender. As a possible
   receiver only the creator's counts, also after it has sent. A process that decides stores the count of its new role
   before it clears UNDECIDED. A reader reads UNDECIDED first, and so sees the process at least once. Handles on
   their way to another process count by their invitations (invited.py).
4. The table lock (a record lock) guards joining, reaping and the invitations. Leaving and changing roles take no lock.
5. A process writes no entry but its own. A forked child has none until it has joined. A process whose descriptors other
   code has closed has none any more, once it or another process has found that out (`check_own`): others reap it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import BrokenChannel, ChannelUnavailable, RingshmError, TooManyParticipants, again
from ..living import Living
from ..segment import fifos, layout, limits
from ..segment.files import Segment, reclaim
from ..segment.layout import (
    ANYBODY,
    IN_USE,
    KEPT,
    OWNER_MASK,
    PERHAPS,
    READING,
    READY,
    RECEIVER,
    SENDER,
    STATE_MASK,
    UNUSED,
    WRITING,
)
from ..system import RLock, monotonic, monotonic_ns, sleep

_NOTE_PATIENCE = 0.5  # a stopped process may hold the table; what is to be noted is for an error's text only
_THREADS_PATIENCE = 5.0  # at least, for a thread of the same process, which may be reaping
TABLE_PATIENCE = 10.0  # the table lock is held for microseconds, and for some slices by a reaper that recovers

#: Threads of this process that fork at the moment; in a child, until it has begun anew (registry.py).
forking: set[int] = set()
#: All of this process's.
present: Living[Participants] = Living()


def _owns(lock: Any) -> bool:
    """Whether this thread holds it."""
    return lock._is_owned()  # type: ignore[no-any-return]


class Participants:
    """The table as this process sees it, and this process's own entry in it.

    When the last reference to it goes, the process leaves: so frames that are inside a call, and later views of slots,
    keep the entry.
    """

    def __init__(self, segment: Segment) -> None:
        present.add(self)
        self._segment = segment
        self._words, self._numbers, self._layout = segment.words, segment.numbers, segment.layout
        self._table_lock, self._table_held = RLock(), False
        self.index = -1
        self._pid = self.entry = self.owner = self.sender = 0
        self._lost: ChannelUnavailable | None = None
        #: asked, where messages wait in the segment, whether somebody comes for them who is not attached just now.
        self.heir: Callable[[], bool] | None = None

    # --- the own entry

    @property
    def joined(self) -> bool:
        """Whether this process has an entry."""
        return self.index >= 0

    @property
    def has_entry(self) -> bool:
        """Whether this process has an entry, which others have not given away: then it may write there."""
        return self.index >= 0 and layout.is_owned(self._words, self.entry, self.owner)

    def renew(self) -> None:
        """Have a description of this process's own that carries its locks; a forked child opens one.

        Raises:
            ChannelUnavailable: if none is to be had; the next call tries again. Or if this process has lost its entry.
        """
        if self._lost is not None:
            raise again(self._lost)
        if not self._segment.file.is_open:
            self._segment.open_locks()

    def check_own(self) -> None:
        """See that this process still has its entry and its lock: that other processes take it for alive.

        Raises:
            ChannelUnavailable: if not. From then on this process has no entry, and gets none.
        """
        index, owner = self.index, self.owner
        if self._lost is not None:
            raise again(self._lost)
        if index < 0:
            return
        if self._segment.file.holds(layout.LOCK_ENTRIES + index):
            return
        if self.index == index and self.owner == owner:  # else another thread has just given the spare entry up
            self._lost = limits.closed(self._segment.name, reaped=not self.has_entry)
            self.index = -1
            self._segment.forget_closed()
            raise again(self._lost)

    def join(self, patience: float = TABLE_PATIENCE) -> None:
        """Take an entry; the spare one if all others are in use, from which the caller should reap and move.

        None, and `joined` stays false, while another newcomer has the spare one. Raises as `table`.
        """
        with self.table(patience):
            words, shape = self._words, self._layout
            index = self._lock_entry()
            if index < 0:
                return
            entry = shape.entry(index)
            incarnation = words[entry + layout.P_INCARNATION] % layout.MAX_INCARNATION + 1
            for word in range(entry + layout.P_INCARNATION, entry + layout.ENTRY_WORDS):
                words[word] = 0
            self._clear_pins(index)
            self._pid = pid = os.getpid()
            words[entry + layout.P_INCARNATION] = incarnation
            words[entry + layout.P_PID] = pid
            words[entry + layout.P_SINCE] = monotonic_ns()
            words[layout.HIGH_WATER] = max(words[layout.HIGH_WATER], index + 1)
            words[entry + layout.P_STATUS] = IN_USE
            self.entry = entry
            self.owner = layout.owner_value(index, incarnation)
            self.sender = layout.sender_value(pid, index, incarnation)
            self.index = index

    def _lock_entry(self) -> int:
        """Lock the first entry that may be taken, or else the spare one; -1 if another newcomer has that."""
        words, shape = self._words, self._layout
        for index in range(shape.max_participants + 1):
            # a newcomer that died on the spare one had no slots and no roles, and a token it held is found missing
            takable = words[shape.entry(index) + layout.P_STATUS] == UNUSED or index == shape.spare_entry
            if takable and self._segment.file.try_lock(layout.LOCK_ENTRIES + index):
                return index
        return -1

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
        self.ends_unsent()
        self.set_roles(0, 0, 0, 0)
        self._clear_waits(self.entry)
        self._clear_pins(index)
        self._words[self.entry + layout.P_STATUS] = UNUSED
        self._segment.file.unlock(layout.LOCK_ENTRIES + index)

    def _clear_waits(self, entry: int) -> None:
        """Nobody of that entry waits any more, whatever death or an exception has left there."""
        for word in (*layout.WAITING_WORDS, *layout.LISTENER_WORDS, layout.P_STUCK, layout.P_AWAITS):
            self._words[entry + word] = 0

    def _clear_pins(self, index: int) -> None:
        """Nothing is read by that entry any more."""
        shape = self._layout
        start = shape.pins + index * shape.pin_cells
        self._segment.memory[start : start + shape.pin_cells] = bytes(shape.pin_cells)

    def in_fork(self) -> bool:
        """Whether this is a forked child that has not begun anew yet. No system call, but while a thread forks."""
        return bool(forking) and os.getpid() != self._pid

    def leave(self) -> None:
        """Give the own entry up; the last one to leave removes the names. A fork's copy of it does nothing."""
        if self.joined and self._pid != os.getpid():
            return
        with contextlib.suppress(RingshmError):
            self.check_own()
        if self._lost is not None:
            with contextlib.suppress(RingshmError):  # it has no locks: as for the dead, whoever else lives
                reclaim(self._segment.file.path)
        elif self.joined:
            if self._owns_slots():  # an exception has left them: seem dead, so that they are reaped
                index, self.index = self.index, -1
                self._segment.file.unlock(layout.LOCK_ENTRIES + index)
            else:
                self.give_up()
            self.remove_names_if_alone()

    def _owns_slots(self) -> bool:
        start, count = self._layout.records + layout.R_STATE, self._layout.capacity * layout.RECORD_WORDS
        states = self._numbers[start : start + count : layout.RECORD_WORDS].tolist()
        held = (WRITING, READING, KEPT)
        if any(state & STATE_MASK in held and state & OWNER_MASK == self.owner for state in states):
            return True
        feeders = self._numbers[
            start + layout.R_FEEDER : start + layout.R_FEEDER + count : layout.RECORD_WORDS
        ].tolist()
        return any(
            feeder == self.owner and state & STATE_MASK in (READY, READING)
            for feeder, state in zip(feeders, states, strict=True)
        )

    def remove_names_if_alone(self) -> None:
        """Remove the names unless another process is attached, or comes for what waits there."""
        with contextlib.suppress(ChannelUnavailable):  # it counts as dead: the living remove them, or `ringshm clean`
            if not self._segment.file.used_elsewhere and not (self._holds_messages() and self._has_heir()):
                self._segment.remove_names(unless_used=True)

    def _has_heir(self) -> bool:
        return self.heir is not None and self.heir()

    def _holds_messages(self) -> bool:
        """Whether any slot is in use, be it by the dead; or a Latest has a value."""
        shape = self._layout
        states = self._numbers[shape.records + layout.R_STATE : shape.record(shape.capacity) : layout.RECORD_WORDS]
        return bool(self._words[layout.NEWEST]) or bool((states != layout.FREE).any())

    def disown(self) -> None:
        """In a forked child that has dropped the copy of its parent's locks: forget the parent's entry."""
        self.index = -1
        self._table_lock, self._table_held = RLock(), False

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError, ValueError, RuntimeWarning):
            self.leave()

    def set_roles(self, senders: int, receivers: int, undecided: int, may_receive: int) -> None:
        """Say how many open handles of this process send, receive, are undecided, or are the creator's."""
        words, entry = self._words, self.entry
        gone = os.getpid() << 1  # the low bit says that it died: see bury
        if words[entry + layout.P_SENDERS] and not senders:
            words[layout.SENDER_GONE] = gone
        if words[entry + layout.P_RECEIVERS] and not receivers:
            words[layout.RECEIVER_GONE] = gone
        words[entry + layout.P_SENDERS] = senders  # before P_UNDECIDED: a handle that decides is counted at any moment
        words[entry + layout.P_RECEIVERS] = receivers
        words[entry + layout.P_UNDECIDED] = undecided
        words[entry + layout.P_MAY_RECEIVE] = may_receive

    # --- those that were started as senders

    def begin_as(self, role: int) -> None:
        """This process was started with a handle of that role: so somebody of it has been there, whatever comes."""
        words = self._words
        if role == RECEIVER:
            words[layout.EVER_RECEIVER] = ANYBODY
        else:
            words[self.entry + layout.P_STARTED] = 1
            words[layout.EVER_SENDER] = ANYBODY

    def has_sent(self) -> None:
        """This process has begun to send, or to receive only."""
        self._words[self.entry + layout.P_STARTED] = 0

    def ends_unsent(self) -> None:
        """This process has closed the handles that it was started with, and has not sent."""
        if self._words[self.entry + layout.P_STARTED]:
            self.has_sent()
            with contextlib.suppress(BrokenChannel), self.table(patience=_NOTE_PATIENCE):
                self.note_unsent(os.getpid(), died=False)

    def note_unsent(self, pid: int, died: bool) -> None:
        """Count a process that was started as a sender and ended without sending; the caller holds the table lock."""
        words = self._words
        count = words[layout.UNSENT]
        words[layout.UNSENT + 1 + count % layout.UNSENT_KEPT] = (pid & 0x7FFFFFFF) << 1 | died
        words[layout.UNSENT] = count + 1 & layout.MAX_WORD

    def unsent(self) -> list[tuple[int, bool]]:
        """(pid, died) of the last of these; pid 0 if it is not known."""
        words = self._words
        first, count = layout.UNSENT + 1, min(words[layout.UNSENT], layout.UNSENT_KEPT)
        kept = self._numbers[first : first + count].tolist()
        return [(word >> 1, bool(word & 1)) for word in kept]

    # --- everybody

    def column(self, offset: int) -> list[int]:
        """That word of every entry that was ever used."""
        words, shape = self._words, self._layout
        count = min(words[layout.HIGH_WATER], shape.max_participants + 1)
        start = shape.entries + offset
        stop = start + count * layout.ENTRY_WORDS
        return self._numbers[start : stop : layout.ENTRY_WORDS].tolist() if count else []

    def in_use(self) -> list[int]:
        """Indices of the entries in use, by the living or the dead."""
        return [index for index, status in enumerate(self.column(layout.P_STATUS)) if status == IN_USE]

    def alive(self, index: int) -> bool:
        """Whether the process of an entry in use lives, as the kernel says."""
        return index == self.index or self._segment.file.locked_elsewhere(layout.LOCK_ENTRIES + index)

    def dead(self) -> list[int]:
        """Entries in use whose process has died."""
        dead = [index for index in self.in_use() if not self.alive(index)]
        # one that left meanwhile stored UNUSED before it unlocked its byte
        return [index for index in dead if self._words[self._layout.entry(index) + layout.P_STATUS] == IN_USE]

    def owner_of(self, index: int) -> int:
        """The owner value of the present use of an entry."""
        return layout.owner_value(index, self._words[self._layout.entry(index) + layout.P_INCARNATION])

    def is_in_use(self, owner: int) -> bool:
        """Whether that very incarnation still has its entry."""
        return any(self.owner_of(index) == owner for index in self.in_use())

    def that_may(self, role: int) -> list[int]:
        """The entries of the processes that are in that role, or may still take it."""
        # before the counts: see 3. above
        undecided = self.column(layout.P_UNDECIDED if role == SENDER else layout.P_MAY_RECEIVE)
        counts = self.column(layout.P_SENDERS if role == SENDER else layout.P_RECEIVERS)
        rows = zip(self.column(layout.P_STATUS), counts, undecided, strict=False)
        return [index for index, row in enumerate(rows) if row[0] == IN_USE and (row[1] or row[2])]

    def undecided(self) -> list[int]:
        """The entries of the processes that have a handle which has not decided."""
        rows = enumerate(zip(self.column(layout.P_STATUS), self.column(layout.P_UNDECIDED), strict=False))
        return [index for index, (status, undecided) in rows if status == IN_USE and undecided]

    def others_have(self, role: int) -> bool:
        """Whether another process is in that role, or attached and may still take it."""
        return any(index != self.index for index in self.that_may(role))

    def others_have_undecided(self) -> bool:
        """Whether another process is attached by a handle that has not decided."""
        return any(index != self.index for index in self.undecided())

    def has_handles(self, index: int) -> bool:
        """Whether the process of that entry has open handles."""
        words, entry = self._words, self._layout.entry(index)
        return any(words[entry + word] for word in (layout.P_UNDECIDED, layout.P_SENDERS, layout.P_RECEIVERS))

    def peers(self, of: int) -> tuple[int, int]:
        """How many processes but the one with that entry are attached as senders, and as receivers."""
        others = [(senders, receivers) for index, senders, receivers in self._roles() if index != of]
        return sum(bool(senders) for senders, _ in others), sum(bool(receivers) for _, receivers in others)

    def active(self) -> int:
        """How many processes are attached that send or receive."""
        return sum(bool(senders or receivers) for _, senders, receivers in self._roles())

    def _roles(self) -> list[tuple[int, int, int]]:
        """(index, senders, receivers) of the entries in use."""
        status, *roles = map(self.column, (layout.P_STATUS, layout.P_SENDERS, layout.P_RECEIVERS))
        rows = enumerate(zip(status, *roles, strict=False))
        return [(index, senders, receivers) for index, (used, senders, receivers) in rows if used == IN_USE]

    @property
    def creator_present(self) -> bool:
        """Whether the process that made the channel still has it open."""
        return self.is_in_use(self._words[layout.CREATOR])

    @property
    def creator_has_handles(self) -> bool:
        """Whether the process that made the channel has a handle open; it may stay without one, for views of slots."""
        return any(self.is_creator(index) and self.has_handles(index) for index in self.in_use())

    # --- for the mutexes (mutex.Liveness)

    def try_lock(self, byte: int) -> bool:
        """Lock that byte of the segment's file for this process, unless another holds it."""
        return self._segment.file.try_lock(byte)

    def unlock(self, byte: int) -> None:
        """Give that byte up."""
        self._segment.file.unlock(byte)

    def holders(self, offset: int) -> tuple[list[int], list[int]]:
        """Entries whose hold word at `offset` is set: those of the living, those of the dead."""
        holders = [(index, self.alive(index)) for index, hold in enumerate(self.column(offset)) if hold]
        return [index for index, alive in holders if alive], [index for index, alive in holders if not alive]

    def clear(self, entries: list[int], offset: int) -> None:
        """Clear that hold word of those dead participants."""
        for index in entries:
            self._words[self._layout.entry(index) + offset] = 0

    # --- reaping: the caller holds the table lock, and has given the entry's slots and mutexes back

    def bury(self, index: int, slots: int) -> int:
        """Free the entry of a dead participant, which was using so many slots; its pid."""
        words, entry = self._words, self._layout.entry(index)
        # cut so that two of them fit into one word, whatever damage stands there
        offsets = layout.P_PID, layout.P_SENDERS, layout.P_RECEIVERS
        pid, senders, receivers = (words[entry + offset] & 0x7FFFFFFF for offset in offsets)
        if senders:
            words[layout.SENDER_GONE], words[layout.EVER_SENDER] = pid << 1 | 1, ANYBODY
        if receivers:
            words[layout.RECEIVER_GONE], words[layout.EVER_RECEIVER] = pid << 1 | 1, ANYBODY
        if words[entry + layout.P_STARTED]:
            self.note_unsent(pid, died=True)
        if self.is_creator(index):
            for word in (layout.EVER_SENDER, layout.EVER_RECEIVER):
                words[word] = words[word] or PERHAPS
        death = layout.DEATHS + words[layout.REAPED] % layout.DEATHS_KEPT * layout.DEATH_WORDS
        words[death + layout.D_PID] = pid
        words[death + layout.D_FOUND] = monotonic_ns()
        words[death + layout.D_SLOTS] = slots
        words[death + layout.D_ROLES] = senders << 32 | receivers
        words[layout.REAPED] = words[layout.REAPED] + 1 & layout.MAX_WORD
        self._clear_waits(entry)
        self._clear_pins(index)
        for bit, made in enumerate(reversed(f"{words[entry + layout.P_FIFOS]:b}")):
            if made == "1":
                fifos.remove(fifos.path_of(self._segment.nonce, index, words[entry + layout.P_INCARNATION], bit))
        words[entry + layout.P_STATUS] = UNUSED
        return pid

    def is_creator(self, index: int) -> bool:
        """Whether the process of that entry has made the channel."""
        return self.owner_of(index) == self._words[layout.CREATOR]

    def has_tasks(self, index: int) -> bool:
        """Whether the process of that entry has tasks of a JoinableQueue."""
        return bool(self._words[self._layout.entry(index) + layout.P_TASKS])

    def holds_mutex(self, index: int) -> bool:
        """Whether a hold word of that entry is set."""
        words, entry = self._words, self._layout.entry(index)
        return bool(words[entry + layout.P_SENDER_HOLD] or words[entry + layout.P_RECEIVER_HOLD])

    # --- the table lock

    @contextlib.contextmanager
    def table(self, patience: float = TABLE_PATIENCE) -> Iterator[bool]:
        """Hold the table lock, against other processes and this one's threads; yields False if it was not to be had.

        No wait for it is without end, be it for another thread: that may wait for what this one holds, since a
        finaliser of either may come here amid anything.

        Raises:
            BrokenChannel: if another process, perhaps a stopped one, or another thread holds it for all of a patience
                (seconds) of more than 0.
        """
        lock, held = self._table_lock, False  # of this call: a fork in between makes another one
        if _owns(lock):  # a finaliser or signal handler came in between; it may do what its thread may
            if patience and not self._table_held:
                raise self._table_locked("as this call came amid another one that waits for it")
            yield self._table_held
            return
        try:
            held = self._lock_table(lock, patience)
            yield held
        finally:
            try:
                self._unlock_table(lock, held)
            except BaseException:  # a signal handler's, or the descriptor has been closed
                try:
                    self._unlock_table(lock, False)
                finally:
                    if _owns(lock):
                        lock.release()
                raise

    def _lock_table(self, lock: Any, patience: float) -> bool:
        alone = lock.acquire(timeout=max(patience, _THREADS_PATIENCE) if patience else 0)
        give_up = monotonic() + patience
        while True:
            if alone and self._segment.file.try_lock(layout.LOCK_TABLE):
                self._table_held = True
                return True
            if not patience:
                if alone:
                    lock.release()
                return False
            if not alone:
                raise self._table_locked("by another thread of this process: is it in a signal handler or finaliser?")
            if monotonic() > give_up:
                raise self._table_locked(f"for {patience:.0f} s by another process: is one stopped?")
            sleep(0.001)

    def _unlock_table(self, lock: Any, held: bool) -> None:
        """Give up what this call has. If it is in another thread, that is a finaliser, and the call's own has gone."""
        if _owns(lock):
            self._table_held = False
            self._segment.file.unlock(layout.LOCK_TABLE)
            lock.release()
        elif held and lock is self._table_lock:
            try:
                self._segment.file.unlock(layout.LOCK_TABLE)
            finally:
                self._table_lock, self._table_held = RLock(), False

    def _table_locked(self, how: str) -> BrokenChannel:
        return BrokenChannel(
            errno.ETIMEDOUT, f"channel {self._segment.name!r}: its table of participants has been locked {how}"
        )
