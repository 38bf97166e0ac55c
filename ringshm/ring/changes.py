"""Whom it wakes that a process comes, goes or changes its role: those whose answer it can have changed, nobody else.

    what has changed                       whose answer it can have changed         what they wait for, or set
    a process takes a role                 a wait for so many peers, if these are   events
                                           there now
    a process will send no more            a receiver, if no other process may      messages; of a Latest, space, too
    a process will receive no more         a sender, if no other process may        space, room, events; ATTENTION, for
                                                                                    senders that do not wait
    a process closes a handle              its own calls                            anything; ATTENTION, if it has
                                                                                    received by that handle, and sends
    a process dies that held slots, tasks  anybody                                  everything; ATTENTION
    or a mutex; shutdown

1. A waiter asks whether any *other* process may still send (or receive). So if nobody is left who may, the answer of
   each waiter may have changed. If one process is left, the answer of that process alone may have changed; if two are
   left, or a handle is on its way, nobody's. So N processes that come and go wake the others a few times in all.
2. A change is stored before this looks who is left, with a fence between the two. So of two processes that go at once
   one sees both gone.
3. A waiter looks who is left, and then announces itself. If a process goes in between, or dies before it has woken
   anybody, the waiter looks again when its slice is over; as it does where a process ends that never attached.
4. A thread that waits for peers says in its process's P_AWAITS how many it needs, and then looks. A process that comes
   takes its role, fences, and reads P_AWAITS. So one sees the other.
"""

from __future__ import annotations

from ..segment import layout
from ..segment.files import Segment
from ..segment.layout import ATTENTION, AWAITING, MOST_PEERS, PERHAPS, RECEIVER, SENDER, STARTED, UNDECIDED
from ..system import Lock, RLock, get_ident
from .invited import invited, sent_off
from .participants import Participants
from .waiters import Waiters

Roles = frozenset[int]
BOTH: Roles = frozenset((SENDER, RECEIVER))
NEITHER: Roles = frozenset()


class Changes:
    """Wakes the waiters of one segment when this process has changed something, or has found it changed.

    Args:
        messages, space, events, room, pieces: the waiters, by what they wait for.
    """

    def __init__(
        self,
        segment: Segment,
        participants: Participants,
        messages: Waiters,
        space: Waiters,
        events: Waiters,
        room: Waiters,
        pieces: Waiters,
    ) -> None:
        self._segment, self._participants = segment, participants
        self._words, self._layout, self._options = segment.words, segment.layout, segment.options
        latest = self._options.kind == "Latest"
        self._receivers = [messages, space] if latest else [messages]
        self._senders = [] if latest else [space, room, events]
        self._events = events
        self._all = [messages, space, events, room, pieces]
        self.rebind()

    def rebind(self) -> None:
        """Forget the threads of before a fork."""
        self._awaited: dict[int, tuple[int, int]] = {}  # senders and receivers, by the thread that waits for so many
        self._lock = RLock()

    def everything(self) -> None:
        """Anybody's answer may have changed."""
        self._words[ATTENTION] = 1
        for waiters in self._all:
            waiters.wake_all()

    # --- a role has ended

    def expected_of(self, index: int) -> Roles:
        """The roles that others may expect the process of that entry to have, or to take yet.

        So may a handle that it has sent off to nobody in particular; that counts while the process has handles.
        """
        words, participants = self._words, self._participants
        if index < 0 or not participants.has_handles(index):
            return NEITHER
        owner, entry = participants.owner_of(index), self._layout.entry(index)
        if self._options.keep_open and owner == words[layout.CREATOR]:
            return BOTH
        away = sent_off(self._segment, owner)
        undecided = bool(words[entry + layout.P_UNDECIDED]) or UNDECIDED in away
        sends = undecided or bool(words[entry + layout.P_SENDERS]) or SENDER in away
        receives = bool(words[entry + layout.P_RECEIVERS] or words[entry + layout.P_MAY_RECEIVE]) or RECEIVER in away
        receives |= undecided and words[layout.EVER_RECEIVER] == PERHAPS  # see Attachment._all_gone
        return frozenset(role for role, expected in ((SENDER, sends), (RECEIVER, receives)) if expected)

    def ended(self, roles: Roles) -> None:
        """Nobody need expect these roles of a process any more, whose entry says so."""
        if not roles:
            return
        Lock().acquire()  # fence: see 2. above
        if self._options.keep_open and self._participants.creator_has_handles:
            return
        if SENDER in roles:
            self._wake_if_last(SENDER, self._receivers)
        if RECEIVER in roles:
            self._wake_if_last(RECEIVER, self._senders)

    def _wake_if_last(self, role: int, waiters: list[Waiters]) -> None:
        """Wake those waiters, unless a process may have that role yet and is not itself the one that waits."""
        ever = self._words[layout.EVER_SENDER if role == SENDER else layout.EVER_RECEIVER]
        perhaps = role == RECEIVER and ever == PERHAPS
        indices = {*self._participants.that_may(role), *(self._participants.undecided() if perhaps else ())}
        if len(indices) > 1:
            return
        for invitation in invited(self._segment, self._participants):
            if invitation.counts and (invitation.may(role) or (perhaps and invitation.may_send)):
                return
            ever |= bool(invitation.kind & STARTED and invitation.may(role))
        if not ever:  # nobody was there: it is not over
            return
        left = [self._layout.entry(index) for index in indices]  # one or none
        if role == RECEIVER and all(self._words[entry + layout.P_SENDERS] for entry in left):
            self._words[ATTENTION] = 1
        for some in waiters:
            if all(some.announced(entry) for entry in left):
                some.wake_all()

    def closed(self, received: bool) -> None:
        """This process has closed a handle, by which it may have received; its other threads may be in calls on it."""
        words, participants = self._words, self._participants
        if not participants.has_entry:
            return
        entry = participants.entry
        if received and words[entry + layout.P_SENDERS]:  # it counts as its own receiver no more
            words[ATTENTION] = 1
        for waiters in self._all:
            if waiters.announced(entry):
                waiters.wake_all()
        if words[entry + layout.P_TASKS]:  # which are lost, if this was the last handle
            self._events.wake_all()

    # --- a role has begun

    def begun(self) -> None:
        """This process has taken a role."""
        Lock().acquire()  # fence: see 4. above
        awaited = self._participants.column(layout.P_AWAITS)
        if any(awaited) and any(self._have_come(index, word) for index, word in enumerate(awaited) if word):
            self._events.wake_all()

    def _have_come(self, index: int, word: int) -> bool:
        """Whether as many peers are there as that P_AWAITS of the process with that entry says."""
        senders, receivers = self._participants.peers(index)
        return senders >= word >> 32 & MOST_PEERS and receivers >= word & MOST_PEERS

    def await_peers(self, senders: int, receivers: int) -> None:
        """This thread waits for so many peers from now on; for none, it waits no more."""
        with self._lock:  # its release is the fence: see 4. above
            self._awaited.pop(get_ident(), None)
            if senders > 0 or receivers > 0:
                self._awaited[get_ident()] = senders, receivers
            if self._participants.has_entry:
                self._words[self._participants.entry + layout.P_AWAITS] = self._fewest_awaited()

    def _fewest_awaited(self) -> int:
        if not self._awaited:
            return 0
        senders = min(senders for senders, _ in self._awaited.values())
        receivers = min(receivers for _, receivers in self._awaited.values())
        return AWAITING | min(max(0, senders), MOST_PEERS) << 32 | min(max(0, receivers), MOST_PEERS)
