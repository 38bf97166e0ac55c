"""Who may still come: handles that are on their way to another process.

A handle counts before it has arrived. The process that pickles a handle, or that forks, issues an *invitation*: a
record in the segment (layout, `I_*`), which the handle redeems where it is attached. No clock ends an invitation:

    the handle was pickled         it counts until                                               needs the names
    for a child being started      the child has attached, or has ended (ring/invited.py)        yes
    or inherited, in a fork        the same                                                      no
    for nobody in particular       it is attached, or its maker has closed all its handles,      yes
                                   exited or died

1. For a child the maker opens a description of the segment's file that holds the invitation's byte locked (a *tether*).
   The child has a copy from its first instruction on. The maker closes its own as soon as the child is there, and
   writes down the child's pid. So everybody sees the child's end, also if the maker makes no call any more.
   Where a library's start of a child fails, the maker withdraws the invitation as soon as the Popen goes; whoever keeps
   the exception keeps the Popen.
2. A process that arrives stores the new before it clears the old: first its entry and its roles, then the invitation.
   A process that looks reads in the opposite order: first the invitations, then the entries. So it sees everybody at
   least once. A process may issue an invitation behind that look, and leave before the look at the entries: so the
   reader compares NEXT_INVITATION before and after.
3. The creator's last handle dooms the names when it is closed (NAME_DOOMED); the last handle to arrive removes them.
4. The table lock guards the records. If all are in use, a handle that is for nobody in particular shares one with an
   earlier handle of its maker, which then counts until the maker has closed all its handles.
5. A process that was started with a handle has been there: if it ended before it attached, its record says so until it
   is used again, and then UNSENT does.
"""

from __future__ import annotations

import errno
import os
import weakref
from typing import Any

from ..errors import TooManyParticipants, suppress_own
from ..ring.invited import Invited, began, invited, pid_namespace
from ..ring.participants import TABLE_PATIENCE, Participants
from ..segment import layout
from ..segment.descriptors import Identity, close_own
from ..segment.files import Segment
from ..segment.layout import (
    FORKED,
    LOCK_INVITATIONS,
    MAX_WORD,
    PLACE_NBYTES,
    ROLE_MASK,
    SHARED,
    STARTED,
    TETHERED,
    WORD_SIZE,
)
from ..system import Lock, get_ident, monotonic_ns
from . import children
from .seat import caller

#: Seconds that the start of a child may take longer, since a stopped process holds the table.
_TELL_PATIENCE = 0.5
#: The tethers that this process holds for others: a forked child closes its copies, but for its own.
tethers: set[Tether] = set()


class Tether:
    """The maker's copy of what says that a child lives which has not attached yet; and the way to tell of its start.

    Attributes:
        ends_with_fork: nobody tells of the child's start: the maker closes its copy as soon as it has forked.
        thread: the one that made it.
        number, record: the invitation's.
        fd: the copy; -1 if there is none.
    """

    def __init__(self, invitations: Invitations, identity: Identity, ends_with_fork: bool) -> None:
        self._invitations, self._identity = invitations, identity
        self.ends_with_fork = ends_with_fork
        self._maker = os.getpid()
        self.thread = get_ident()
        self.number = self.record = 0
        self.fd = -1
        tethers.add(self)

    def follow(self, popen: Any) -> None:
        """Have the Popen that starts the child tell when it is there; or, if the Popen goes before that, cancel."""
        children.when_started(popen, self.started)
        weakref.finalize(popen, self.cancel).atexit = False
        self.ends_with_fork = False

    def started(self, pid: int) -> None:
        """The child is there, and has its copy. Nothing in a forked child, which comes by here, too."""
        try:
            if self._maker == os.getpid():
                with suppress_own(OSError):  # the table is locked: the tether alone says that it lives
                    self._invitations.tell(self.record, self.number, pid)
        finally:
            if self._maker == os.getpid():
                self.let_go()
            del self._invitations  # and with them the segment: a Popen, or garbage, may keep this for long

    def cancel(self) -> None:
        """No child was started, as far as its Popen knows: what raised in there may have come after the start."""
        if self._maker == os.getpid() and self in tethers:
            try:
                self._invitations.withdraw(self)
            finally:
                self.let_go()
            del self._invitations

    def let_go(self) -> None:
        """Close this process's copy."""
        tethers.discard(self)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close_own(fd, self._identity)


class Invitations:
    """The invitations of one segment, as this process issues, redeems and counts them."""

    def __init__(self, segment: Segment, participants: Participants) -> None:
        self._segment, self._participants = segment, participants
        self._words, self._layout = segment.words, segment.layout

    # --- issuing

    def issue_pickled(self, role: int) -> tuple[int, Any]:
        """Count a handle that is being pickled.

        Returns:
            The number of its invitation, and its tether as the child will get it, or None.

        Raises as `Participants.table`; TooManyParticipants if there are as many invitations as `max_participants`.
        """
        popen = children.spawning_popen()
        if popen is None:
            return self._issue(role, TABLE_PATIENCE), None
        tether = Tether(self, self._segment.file.identity, ends_with_fork=False)
        try:
            self._issue(role | TETHERED | STARTED, TABLE_PATIENCE, tether)
            passed = popen.DupFd(popen.duplicate_for_child(tether.fd))
            tether.follow(popen)
            return tether.number, passed
        except BaseException:
            tether.cancel()
            raise

    def issue_forked(self, role: int, started: bool, patience: float) -> Tether:
        """Count a child about to be forked: `started` if a library starts it with the handle. Raises as above."""
        tether = Tether(self, self._segment.file.identity, ends_with_fork=True)
        try:
            self._issue(role | TETHERED | FORKED | (STARTED if started else 0), patience, tether)
            return tether
        except BaseException:
            tether.cancel()
            raise

    def _issue(self, kind: int, patience: float, tether: Tether | None = None) -> int:
        """Write an invitation; its number. A tether gets its record and its descriptor."""
        with self._participants.table(patience):
            before = {invitation.index: invitation for invitation in self._invited()}
            record = self._free_record(before, tether)
            return self._share(kind, before) if record < 0 else self._write(record, kind, tether)

    def _write(self, record: int, kind: int, tether: Tether | None) -> int:
        words = self._words
        words[record + layout.I_NUMBER] = 0
        number = int(words[layout.NEXT_INVITATION] % MAX_WORD + 1)
        words[record + layout.I_MAKER] = self._participants.owner
        words[record + layout.I_KIND] = kind
        words[record + layout.I_SINCE] = monotonic_ns()
        for word in (layout.I_PID, layout.I_BEGAN, layout.I_NAMESPACE):
            words[record + word] = 0
        start = (record + layout.I_PLACE) * WORD_SIZE
        place = caller().encode(errors="replace")[-PLACE_NBYTES:]
        self._segment.memory[start : start + PLACE_NBYTES] = place.ljust(PLACE_NBYTES, b"\0")
        if tether is not None:
            tether.number, tether.record = number, record
        words[record + layout.I_NUMBER] = number
        words[layout.NEXT_INVITATION] = number  # after it counts, before its maker may leave: see 2. above
        return number

    def _free_record(self, before: dict[int, Invited], tether: Tether | None) -> int:
        """A record that is not in use, whose byte is locked for the tether if there is one; -1 if all are."""
        words, shape = self._words, self._layout
        for index in range(shape.max_participants):
            earlier = before.get(index)
            if earlier is not None and earlier.counts:
                continue
            if tether is not None and not self._lock(index, tether):
                continue
            if earlier is not None and earlier.lost and earlier.may_send:
                self._participants.note_unsent(earlier.pid, died=True)
            words[layout.HIGH_INVITATION] = max(words[layout.HIGH_INVITATION], index + 1)
            return shape.invitation(index)
        return -1

    def _lock(self, index: int, tether: Tether) -> bool:
        """Lock the byte of that record; False if a child of the process that it was for holds it still."""
        try:
            tether.fd = self._segment.file.lock_apart(LOCK_INVITATIONS + index)
        except BlockingIOError:
            return False
        return True

    def _share(self, kind: int, before: dict[int, Invited]) -> int:
        """Let an earlier invitation of this process stand for one handle more."""
        for invitation in before.values():
            record = self._layout.invitation(invitation.index)
            own = self._words[record + layout.I_MAKER] == self._participants.owner
            if own and invitation.counts and invitation.kind & ~SHARED == kind and not kind & TETHERED:
                self._words[record + layout.I_KIND] = kind | SHARED
                return invitation.number
        raise TooManyParticipants(
            errno.EUSERS,
            f"channel {self._segment.name!r} has {self._layout.max_participants} handles on their way to processes "
            "that have not attached yet: make it with a larger max_participants, or start fewer processes at once",
        )

    def tell(self, record: int, number: int, pid: int) -> None:
        """Write down the process that an invitation is for, unless it was redeemed; raises as `Participants.table`."""
        words, born = self._words, began(pid)
        with self._participants.table(_TELL_PATIENCE):
            if words[record + layout.I_NUMBER] == number:
                words[record + layout.I_BEGAN] = born
                words[record + layout.I_NAMESPACE] = pid_namespace()
                words[record + layout.I_PID] = pid

    def withdraw(self, tether: Tether) -> None:
        """It is for nobody; or for a child that was started after all, as long as that has a copy of the tether.

        First it is STARTED no more, or it would seem lost: the record is this process's as long as it has the tether. A
        finaliser comes here, and waits for nothing: without the table the record stays, counts not, and is used again.
        """
        words, record = self._words, tether.record
        if words[record + layout.I_NUMBER] == tether.number:
            words[record + layout.I_KIND] &= ~STARTED
        tether.let_go()
        index = (record - self._layout.invitations) // layout.INVITATION_WORDS
        with suppress_own(OSError), self._participants.table(patience=0) as held:
            still = held and words[record + layout.I_NUMBER] == tether.number
            if still and not self._segment.file.locked_elsewhere(LOCK_INVITATIONS + index):
                words[record + layout.I_NUMBER] = 0
        with suppress_own(OSError):
            self._remove_doomed_names()

    # --- redeeming

    def redeem(self, number: int) -> None:
        """The handle of that invitation is attached, and counts by itself from now on.

        With a tether nobody else writes the record: the caller closes its copy afterwards.

        Raises:
            BrokenChannel: as `Participants.table`, without a tether.
        """
        words = self._words
        for index in range(min(words[layout.HIGH_INVITATION], self._layout.max_participants)):
            record = self._layout.invitation(index)
            if words[record + layout.I_NUMBER] == number:
                kind = words[record + layout.I_KIND]
                if kind & STARTED:
                    self._participants.begin_as(kind & ROLE_MASK)
                if kind & TETHERED:
                    words[record + layout.I_NUMBER] = 0
                elif not kind & SHARED:
                    with self._participants.table():
                        if words[record + layout.I_NUMBER] == number:
                            words[record + layout.I_NUMBER] = 0
        self._remove_doomed_names()

    # --- counting

    def _invited(self) -> list[Invited]:
        return invited(self._segment, self._participants)

    def others_may(self, role: int) -> bool:
        """Whether another process is in that role, or may still come to be."""
        issued = self._words[layout.NEXT_INVITATION]
        return (
            any(invitation.counts and invitation.may(role) for invitation in self._invited())
            or self._participants.others_have(role)  # in this order, and NEXT_INVITATION once more: see 2. above
            or self._words[layout.NEXT_INVITATION] != issued
        )

    def others_may_decide(self) -> bool:
        """Whether another process has, or may come to have, a handle that has not decided."""
        return (
            any(invitation.counts and invitation.may_send for invitation in self._invited())
            or self._participants.others_have_undecided()
        )

    def started(self, role: int) -> bool:
        """Whether a process was started with a handle that may take that role, and has not attached (yet)."""
        return any(invitation.kind & STARTED and invitation.may(role) for invitation in self._invited())

    def unsent(self) -> tuple[int, list[tuple[int, bool]]]:
        """How many processes were started as senders and ended without sending; (pid, died) of the last of them."""
        lost = [(invitation.pid, True) for invitation in self._invited() if invitation.lost and invitation.may_send]
        known = self._participants.unsent()
        return self._words[layout.UNSENT] + len(lost), known + lost

    # --- the names

    def _needing_names(self) -> list[Invited]:
        """The handles on their way that need the names."""
        return [invitation for invitation in self._invited() if invitation.counts and not invitation.kind & FORKED]

    @property
    def awaited(self) -> bool:
        """Whether a handle that this process has pickled is still on its way."""
        words, shape, owner = self._words, self._layout, self._participants.owner
        return any(
            words[shape.invitation(invitation.index) + layout.I_MAKER] == owner for invitation in self._needing_names()
        )

    def _remove_doomed_names(self) -> None:
        """Remove the names, if the creator's last handle has left that to others, and none is on its way any more."""
        if self._words[layout.NAME_DOOMED] and not self._needing_names():
            self._segment.remove_names()

    def doom_names(self) -> None:
        """Remove the names; or, while handles are on their way that need them, have the last to arrive do it."""
        self._words[layout.NAME_DOOMED] = 1
        Lock().acquire()  # fence: this store, then the look; `redeem` clears its invitation, then looks here
        if not self._needing_names():
            self._segment.remove_names()
