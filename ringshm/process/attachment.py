"""One process's attachment to one segment: the parts, built once, and who is left of the others.

All handles of a process on the same segment share one attachment, which registry.py finds. Parts refer downwards only,
so an attachment goes when the last handle is closed and no call is inside it: its participant leaves then
(participants.Participants).

A forked child takes an entry of its own at once (registry.py): so a child that was started with a handle counts until
it exits. Roles begin anew in the child: undecided, or what `sender()` and `receiver()` fixed.
"""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections.abc import Callable
from typing import Any

from ..errors import ChannelUnavailable, again
from ..living import Living
from ..ring.acceleration import LocalLock
from ..ring.changes import NEITHER, Changes, Roles
from ..ring.deadlock import DeadlockDetector
from ..ring.listeners import Listeners
from ..ring.mutex import ORDERED_STORES, RECEIVER_HOLD, Fence, FencedMutex
from ..ring.participants import TABLE_PATIENCE, Participants
from ..ring.reaper import Reaper
from ..ring.rebuild import rebuild
from ..ring.slots import Ring
from ..ring.versions import Versions
from ..ring.waiters import Waiters
from ..segment import layout
from ..segment.files import (
    EVENTS,
    MESSAGES,
    PIECES,
    RECEIVERS_EVEN,
    ROOM,
    SENDERS_EVEN,
    SPACE,
    Segment,
)
from ..segment.layout import ANYBODY, PERHAPS, RECEIVER, SENDER, UNDECIDED
from ..system import RLock, monotonic, sleep
from . import children
from .invitations import Invitations, Tether
from .seat import Seat

#: Seconds that a fork waits for the table of participants, which a stopped process may hold; the child tries again.
FORK_PATIENCE = 0.5
#: Attachments without handles that stay until the handles they have pickled are attached elsewhere.
lingering: set[Attachment] = set()


class Attachment:
    """Everything this process has of one channel. Get it from registry.py."""

    def __init__(self, segment: Segment, participants: Participants) -> None:
        self.segment, self.participants = segment, participants
        self.name = segment.name
        self.owns_names = self._creator_closed = False
        #: asked, with a role, whether really nobody may come, where others than this segment know of more processes.
        self.confirm: Callable[[int], bool] | None = None
        self._tether: Tether | None = None
        self._seats: Living[Seat] = Living()
        self.lock, self._joining = RLock(), RLock()
        self._counting = object()  # the call of `update_roles` that has begun last
        self._unpopulated = False
        self._bound = 0
        self.words = segment.words
        words, shape, semaphores = segment.words, segment.layout, segment.semaphores
        self.invitations = Invitations(segment, participants)
        self.listeners = listeners = Listeners(segment, participants)
        #: What wakes the calls of an event loop that wait, by the loop's id (event_loop.py).
        self.loops: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.fence = fence = Fence(segment.name, words, participants, lambda: rebuild(segment.name, words, shape))

        def mutex(hold: int, even: int, counters: tuple[int, ...]) -> FencedMutex:
            return FencedMutex(words, hold, semaphores[even : even + 2], counters, fence, LocalLock)

        def waiters(semaphore: int, announced: int, hint: int, listens: int) -> Waiters:
            return Waiters(words, participants, semaphores[semaphore], announced, hint, listeners, listens)

        sent, taken = (layout.TAIL, layout.NEWEST), (layout.HEAD,)
        senders = mutex(layout.P_SENDER_HOLD, SENDERS_EVEN, sent if ORDERED_STORES else sent + taken)
        receivers = mutex(RECEIVER_HOLD, RECEIVERS_EVEN, taken) if ORDERED_STORES else senders
        self.messages = waiters(MESSAGES, layout.P_WAITING_MESSAGE, layout.MESSAGE_HINT, layout.P_LISTENS_MESSAGE)
        self.space = waiters(SPACE, layout.P_WAITING_SPACE, layout.SPACE_HINT, layout.P_LISTENS_SPACE)
        self.pieces = waiters(PIECES, layout.P_WAITING_PIECE, layout.PIECE_HINT, layout.P_LISTENS_PIECE)
        self.room = waiters(ROOM, layout.P_WAITING_ROOM, layout.ROOM_HINT, layout.P_LISTENS_ROOM)
        self.events = Waiters(words, participants, semaphores[EVENTS], layout.P_WAITING_EVENT, layout.SPACE_HINT)
        self._waiters = self.messages, self.space, self.events, self.room, self.pieces
        self.changes = changes = Changes(segment, participants, *self._waiters)
        streams = segment.options.oversize == "stream" and segment.options.codec != "spec"
        waiting = self.messages, self.space, self.events, (self.pieces, self.room) if streams else None
        self.ring = ring = Ring(segment.name, words, segment.memory, shape, senders, receivers, *waiting)
        mutexes = [*senders.semaphores, *receivers.semaphores]
        ring.compile([*mutexes, semaphores[MESSAGES], semaphores[SPACE], semaphores[EVENTS]])
        max_deliveries = segment.options.max_deliveries
        self.reaper = Reaper(segment.name, max_deliveries, participants, fence, ring, changes)
        self.deadlocks = DeadlockDetector(segment.name, self.ring, participants)
        self._versions = Versions(self.ring, participants) if segment.options.kind == "Latest" else None
        self._bind()

    @property
    def versions(self) -> Versions:
        """The versions of a Latest."""
        assert self._versions is not None
        return self._versions

    def _bind(self) -> None:
        """Let the parts use this process's present entry; forget the threads of before a fork."""
        participants, ring = self.participants, self.ring
        for mutex in {ring.senders, ring.receivers}:
            mutex.rebind(participants.entry)
        self.fence.rebind()
        for waiters in self._waiters:
            waiters.rebind()
        self.changes.rebind()
        self.deadlocks.rebind()
        ring.rebind(participants.entry, participants.owner, participants.sender)
        if self._versions is not None:
            self._versions.rebind()
        self._bound = participants.owner

    def ensure_joined(self, patience: float = TABLE_PATIENCE) -> None:
        """Take an entry in the table if this process has none (yet, or since it was forked).

        Raises:
            TooManyParticipants: if the living use all of them.
            BrokenChannel: as `Participants.table`.
        """
        participants = self.participants
        bound = participants.joined and self._bound == participants.owner
        if not bound or self._tether is not None or self._unpopulated:
            with self._joining:
                self._join(patience)

    def _join(self, patience: float) -> None:
        participants = self.participants
        if not participants.joined:
            participants.renew()
            spare = self.segment.layout.spare_entry
            give_up = monotonic() + patience
            while True:  # no condition: see mutex.py, 5
                participants.join(patience)
                if participants.joined:
                    self._bind()
                    if participants.index != spare:
                        break
                    reaped = self.reaper.reap()
                    participants.give_up()
                    if not reaped and participants.full_of_the_living():
                        raise participants.too_many()
                if monotonic() > give_up:
                    raise participants.too_many()
                sleep(0.001)  # somebody else has the spare entry, or the table, and reaps
        if self._bound != participants.owner:  # an interrupt came between the two: the parts still act for a parent
            self._bind()
        if self._tether is not None:
            with self.lock:
                self.update_roles()
            self.invitations.redeem(self._tether.number)
            self._tether.let_go()
            self._tether = None
        if self._unpopulated:
            self._unpopulated = False
            self.segment.populate()

    def is_lost(self) -> bool:
        """Whether other processes take this one for dead: see Reaper.look."""
        try:
            self.reaper.look_at_self()
        except ChannelUnavailable:
            return True
        return False

    # --- handles and their roles

    @property
    def seats(self) -> list[Seat]:
        """The seats of the open handles. A finaliser or another thread may close a handle at any moment."""
        return self._seats.all()

    def add(self, seat: Seat) -> None:
        """Count an open handle."""
        with self.lock:
            self._seats.add(seat)
            ended = self.update_roles()
        self.changes.ended(ended)

    def remove(self, seat: Seat, closing: bool, received: bool) -> None:
        """Stop counting a handle that was closed, or collected as garbage without a close.

        A creator that closes dooms the channel's names, once this process has no `sender()` or `receiver()` open, which
        a child that is still to start may be given. If the creator is merely collected, the names stay while this
        process has other handles. `received` says whether a call of the handle has used the receiver's role.
        """
        with self.lock:
            self._seats.discard(seat)
            ended = self.update_roles()
            seats = self.seats
        self.changes.ended(ended)
        self.changes.closed(received)
        self._creator_closed |= closing and seat.creator
        if self.owns_names and not any(seat.role != UNDECIDED or not self._creator_closed for seat in seats):
            self.owns_names = False
            self.invitations.doom_names()
        if not seats and self.participants.joined and self.invitations.awaited:
            lingering.add(self)

    def set_aside(self, seat: Seat) -> None:
        """Let an open handle count for nothing, until its next call takes its role again."""
        with self.lock:
            seat.vacate()
            seat.leave_to_others()
            ended = self.update_roles()
        self.changes.ended(ended)

    def update_roles(self) -> Roles:
        """Write into the own entry how many handles are open, by role; the roles that this has ended.

        A finaliser or signal handler that comes in between, and closes a handle, does so, too: then what was counted
        before is out of date.
        """
        ended = NEITHER
        while True:
            self._counting = counting = object()
            ended |= self._write_roles()
            if self._counting is counting:
                return ended

    def _write_roles(self) -> Roles:
        seats, before = self.seats, self.changes.expected_of(self.participants.index)
        senders = sum(seat.sends for seat in seats)
        receivers = sum(seat.receives for seat in seats)
        # a handle that was merely inherited, beside the one that the child was started with, decides nothing
        undecided = sum(
            seat.undecided and not (seat.stray or (seat.inherited and (senders or receivers))) for seat in seats
        )
        creators = sum(seat.creator and seat.role == UNDECIDED and not seat.receives for seat in seats)
        if self.participants.has_entry:
            sent = any(seat.sent for seat in seats)
            if sent or (receivers and not (senders or undecided)):
                self.participants.has_sent()
            elif not (senders or undecided):
                self.participants.ends_unsent()
            self.participants.set_roles(senders, receivers, undecided, may_receive=creators)
            # afterwards: whoever sees that there was a receiver sees this one
            self._record_role(layout.EVER_SENDER, bool(senders), sent)
            self._record_role(layout.EVER_RECEIVER, bool(receivers), any(seat.received for seat in seats))
        return before - self.changes.expected_of(self.participants.index)

    def _record_role(self, word: int, taken: bool, used: bool) -> None:
        """Record that the role was taken. A role that was taken and not used counts for other processes only.

        A handle that starts to use its role says so in its seat before it comes here, and `_all_gone` reads in the
        opposite order: so a thread never takes the role of its own process for that of one that has gone.
        """
        words, owner = self.words, self.participants.owner
        if used or (taken and words[word] not in (0, PERHAPS, owner)):
            words[word] = ANYBODY
        elif taken:
            words[word] = owner

    def take_role(self, seat: Seat, counts: str, used: str) -> None:
        """Count a handle in a role from now on, which it begins to use; the arguments are the seat's attributes for it.

        A sender that comes when no receiver is left any more is to find that out in its first call: ATTENTION.
        """
        with self.lock:
            try:
                setattr(seat, counts, True)
                setattr(seat, used, True)
                ended = self.update_roles()
            except BaseException:
                setattr(seat, used, False)  # interrupted: the next call tells the others
                raise
        self.changes.ended(ended)
        self.changes.begun()
        if seat.sent and self.over_for_senders():
            self.words[layout.ATTENTION] = 1

    # --- who is left

    def over_for_receivers(self) -> bool:
        """Whether no further message can come (shutdown aside); messages may still be there."""
        return self._all_gone(SENDER)

    def over_for_senders(self) -> bool:
        """Whether no receiver is left, and none may still come."""
        return self._all_gone(RECEIVER)

    def remind_senders(self) -> None:
        """Have the next sender look round if no receiver seems left: whoever was to see to that when the last one went
        may have died before it did, or have been interrupted.
        """
        if self._seem_gone(RECEIVER):
            self.words[layout.ATTENTION] = 1

    def had_sender(self) -> bool:
        """Whether a process is, or was, a sender. A creator that has not sent counts as none."""
        words = self.words
        sent = bool(words[layout.TAIL]) or words[layout.EVER_SENDER] == ANYBODY
        return sent or self.participants.others_have(SENDER)

    def others_may_send(self) -> bool:
        """Whether another process is a sender, or may still come to be."""
        return self.invitations.others_may(SENDER)

    def others_may_decide(self) -> bool:
        """Whether another process has a handle, also on its way, that may yet take either role."""
        return self.invitations.others_may_decide()

    def others_may_receive(self) -> bool:
        """Whether another process is a receiver, or has a handle, also on its way, by which it might receive."""
        return self.others_may_decide() or self.invitations.others_may(RECEIVER)

    def _all_gone(self, role: int) -> bool:
        """Whether all have gone who had that role, as `_seem_gone`; a relay of another machine is asked, too."""
        return self._seem_gone(role) and (self.confirm is None or self.confirm(role))

    def _seem_gone(self, role: int) -> bool:
        """Whether another process has had that role, and nobody has it or may still take it.

        So might have a process that was started with a handle, and the creator, if that has died. If nobody but the
        creator might have received, a handle that has not decided counts as a possible receiver, too.
        """
        sends = role == SENDER
        ever = self.words[layout.EVER_SENDER if sends else layout.EVER_RECEIVER]
        if not self._has_been(role):
            return False
        if any(seat.sent if sends else seat.received for seat in self.seats):  # in this order: see _record_role
            return False
        if self.segment.options.keep_open and self.participants.creator_present:
            return False
        if ever == PERHAPS and self._somebody_may_decide():
            return False
        if self.invitations.others_may(role):
            return False
        return self._has_been(role)  # again: a start may have failed meanwhile

    def _has_been(self, role: int) -> bool:
        """Whether another process has had that role, or was started with a handle that might take it."""
        ever = self.words[layout.EVER_SENDER if role == SENDER else layout.EVER_RECEIVER]
        return ever not in (0, self.participants.owner) or self.invitations.started(role)

    def _somebody_may_decide(self) -> bool:
        """Whether this process or another has, or may come to have, a handle that has not decided."""
        own = self.words[self.participants.entry + layout.P_UNDECIDED]
        return bool(own) or self.others_may_decide()

    def who_has_not_sent(self) -> str:
        """The processes that were started as senders and ended without sending, as text; "" if there are none."""
        ended, known = self.invitations.unsent()
        if not ended:
            return ""
        told = []
        for pid, died in known:
            end = children.end_of(pid) or ("died" if died else "exited")
            told.append(f"process {pid} ({end})" if pid else "one of unknown pid (died)")
        who = "process that was started as a sender" if ended == 1 else "processes that were started as senders"
        more = f" and {ended - len(told)} more" if ended > len(told) else ""
        return f"; {ended} {who} ended without sending: {', '.join(told)}{more}"

    # --- fork

    def before_fork(self, given: set[int] | None) -> Tether | None:
        """Count the child that is about to be forked.

        Args:
            given: the handles (by `id`) that a library starts the child with; None if it inherits all.

        Returns:
            What the child redeems; None if it has no handle on this channel that counts, or cannot be counted.
        """
        roles = {seat.role for seat in self.seats if given is None or seat.holder_id in given}
        if not roles:
            return None
        with contextlib.suppress(OSError):  # a stopped process has the table, or there is no descriptor left
            if not self.participants.joined:
                if not self.is_stray():
                    return None
                self.ensure_joined(FORK_PATIENCE)
            role = roles.pop() if len(roles) == 1 else UNDECIDED
            return self.invitations.issue_forked(role, given is not None, FORK_PATIENCE)
        return None

    def disown(self, given: set[int] | None) -> None:
        """In a forked child: nothing of it is this process's, until it has an entry of its own.

        Args:
            given: as for `before_fork`: all other handles are strays.
        """
        self.lock, self._joining = RLock(), RLock()
        self.owns_names = False
        self._unpopulated = True
        self.listeners.disown()
        self.loops.clear()
        self.participants.disown()
        self.ring.refuse(
            ChannelUnavailable(errno.EAGAIN, f"channel {self.name!r}: this process was forked amid a call: call again")
        )
        if self._versions is not None:
            self._versions.disown()  # and so are pins
        for seat in self.seats:
            seat.inherit()
            if given is not None and seat.holder_id not in given:
                seat.leave_to_others()

    def is_stray(self) -> bool:
        """Whether all handles, if there are any, were merely inherited, beside those that this process began with."""
        return all(seat.stray for seat in self.seats)

    def renew(self, tether: Tether | None) -> None:
        """In a forked child: take an entry of one's own. If that fails now, no call acts before a later one can.

        Of handles that the child was not started with, the first call takes the entry: so a child of a process that has
        many channels, each for another child, joins its own alone.

        Args:
            tether: what counts this process until it has its entry.
        """
        self._tether = tether
        if self.is_stray():
            return
        unpopulated, self._unpopulated = self._unpopulated, False
        try:
            self.ensure_joined(FORK_PATIENCE)
            self.update_roles()
        except OSError as error:
            if isinstance(error, ChannelUnavailable):
                self.ring.refuse(again(error))
        finally:
            self._unpopulated = unpopulated
