"""One process's attachment to one segment: the parts, built once, and what becomes of them at fork and at exit.

All handles of a process on the same segment share one attachment, found in a registry by the segment's (device,
inode). Parts refer downwards only, so an attachment goes when the last handle is closed and no call is inside it: its
participant leaves then (participants.Participants).

A forked child inherits the mapping and the handles. Its locks would be its parent's, so an at-fork hook drops them and
takes an entry of its own at once: a child that was started with a handle counts until it exits. Until then a ticket
counts for it, which its parent issued before the fork. Roles begin anew: undecided, or what `sender()` and `receiver()`
fixed. It inherits all of its parent's handles, also those that it was not meant to have. Of a child of
`multiprocessing` they are told apart: if its target and arguments lead to handles, all others are strays, which do not
count until they are used. In any child, once it has a role, undecided ones that it inherited no longer count.

At exit every handle is closed, in children of `multiprocessing` too, where `atexit` does not run but the finalizers of
`multiprocessing.util` do.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.process
import multiprocessing.util
import os
import threading
import time
import types
import weakref
from typing import TYPE_CHECKING, Any

from .errors import BrokenChannel, ChannelNotFound
from .layout import (
    ANYBODY,
    ATTENTION,
    CREATOR,
    EVER_RECEIVER,
    EVER_SENDER,
    FORKED,
    HEAD,
    MESSAGE_HINT,
    NAME_DOOMED,
    NEWEST,
    P_LISTENS_MESSAGE,
    P_LISTENS_PIECE,
    P_LISTENS_ROOM,
    P_LISTENS_SPACE,
    P_RECEIVER_HOLD,
    P_SENDER_HOLD,
    P_WAITING_EVENT,
    P_WAITING_MESSAGE,
    P_WAITING_PIECE,
    P_WAITING_ROOM,
    P_WAITING_SPACE,
    PIECE_HINT,
    RECEIVER,
    ROOM_HINT,
    SENDER,
    SPACE_HINT,
    TAIL,
    UNDECIDED,
    Layout,
    Options,
)
from .mutex import Fence, FencedMutex
from .participants import TABLE_PATIENCE, Participants, forking
from .reaper import Reaper
from .ring import ORDERED_STORES, Ring, rebuild
from .segment import EVENTS, MESSAGES, PIECES, RECEIVERS_EVEN, ROOM, SENDERS_EVEN, SPACE, Segment, drop_inherited_locks
from .standstill import Standstill
from .versions import Versions
from .waiting import Waiters
from .wakeup import Listeners

if TYPE_CHECKING:
    from .handle import Handle

_registry: weakref.WeakValueDictionary[tuple[int, int], Attachment] = weakref.WeakValueDictionary()
_registry_lock = threading.RLock()
#: Attachments without handles that stay until the handles they have pickled are attached elsewhere.
_lingering: list[Attachment] = []
#: What a thread (by its identity) that is forking has issued for its child.
_fork_tickets: dict[int, list[tuple[Attachment, int]]] = {}


#: Seconds that a fork waits for the table of participants, which a stopped process may hold; the child tries again.
_FORK_PATIENCE = 0.5
#: Objects among which a child looks for the handles that it was given; beyond, all that it inherited count.
_MOST_ARGUMENTS = 10_000


class Attachment:
    """Everything this process has of one channel. Make it with `create`, `open_named` or `find`."""

    def __init__(self, segment: Segment, participants: Participants) -> None:
        self.segment = segment
        self.participants = participants
        self.name = segment.name
        self.owns_names = False
        self._handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
        self.lock = threading.RLock()
        self._unpopulated = False
        self._bound = 0
        words, layout, semaphores = segment.words, segment.layout, segment.semaphores
        self.words = words
        self.fence = Fence(words, participants, lambda: rebuild(segment.name, words, layout))
        pair = slice(SENDERS_EVEN, SENDERS_EVEN + 2)
        senders = FencedMutex(words, P_SENDER_HOLD, semaphores[pair], (TAIL, NEWEST), self.fence)
        receivers = senders
        if ORDERED_STORES:
            pair = slice(RECEIVERS_EVEN, RECEIVERS_EVEN + 2)
            receivers = FencedMutex(words, P_RECEIVER_HOLD, semaphores[pair], (HEAD,), self.fence)
        self.listeners = Listeners(segment, participants)
        #: What wakes the calls of an event loop that wait, by the loop's id (aio.py).
        self.loops: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        listeners = self.listeners
        self.messages = Waiters(
            words, participants, semaphores[MESSAGES], P_WAITING_MESSAGE, MESSAGE_HINT, listeners, P_LISTENS_MESSAGE
        )
        self.space = Waiters(
            words, participants, semaphores[SPACE], P_WAITING_SPACE, SPACE_HINT, listeners, P_LISTENS_SPACE
        )
        self.events = Waiters(words, participants, semaphores[EVENTS], P_WAITING_EVENT, SPACE_HINT)
        self.pieces = Waiters(
            words, participants, semaphores[PIECES], P_WAITING_PIECE, PIECE_HINT, listeners, P_LISTENS_PIECE
        )
        self.room = Waiters(words, participants, semaphores[ROOM], P_WAITING_ROOM, ROOM_HINT, listeners, P_LISTENS_ROOM)
        self._waiters = [self.messages, self.space, self.events, self.pieces, self.room]
        streams = segment.options.oversize == "stream" and segment.options.codec != "spec"
        self.ring = Ring(
            segment.name,
            words,
            segment.memory,
            layout,
            senders,
            receivers,
            self.messages,
            self.space,
            self.events,
            (self.pieces, self.room) if streams else None,
        )
        self.reaper = Reaper(
            segment.name, segment.options.max_deliveries, participants, self.fence, self.ring, self._waiters
        )
        self.standstill = Standstill(segment.name, self.ring, participants)
        self._versions = Versions(self.ring, participants) if segment.options.kind == "Latest" else None
        self._bind()

    @property
    def versions(self) -> Versions:
        """Those of a Latest."""
        assert self._versions is not None
        return self._versions

    @classmethod
    def create(
        cls, name: str | None, layout: Layout, options: Options, codec_name: str, spec: str, prefault: bool
    ) -> Attachment:
        """Make a segment, with this process as its first participant."""
        _install_exit()
        joined: list[Participants] = []

        def fill_in(segment: Segment) -> None:
            participants = Participants(segment)
            participants.join()
            segment.words[CREATOR] = participants.owner
            segment.words[layout.ring + layout.ring_mask] = layout.capacity - 1  # the first message goes to slot 0
            joined.append(participants)

        segment = Segment.create(name, layout, options, codec_name, spec, prefault, fill_in)
        attachment = cls(segment, joined[0])
        attachment.owns_names = True
        return attachment._register()

    @classmethod
    def open_named(cls, name: str, nonce: str | None = None, patience: float = TABLE_PATIENCE) -> Attachment:
        """Attach to the channel of that name (and that nonce, if given), or find that it is attached already.

        Raises:
            What Segment.open and ensure_joined raise.
        """
        _install_exit()
        with _registry_lock:
            if nonce is not None and (found := cls.find(nonce)) is not None:
                return found
            segment = Segment.open(name, nonce)
            found = _registry.get(segment.file.identity)
            if found is not None:
                return found
            attachment = cls(segment, Participants(segment))
            attachment.ensure_joined(patience)
            if not segment.named:
                raise ChannelNotFound(f"channel {name!r} has just been closed")
            return attachment._register()

    @staticmethod
    def find(nonce: str) -> Attachment | None:
        """This process's attachment to the segment of that nonce."""
        return next((found for found in list(_registry.values()) if found.segment.nonce == nonce), None)

    def _register(self) -> Attachment:
        with _registry_lock:
            _lingering[:] = [attachment for attachment in _lingering if attachment.participants.awaits]
            _registry[self.segment.file.identity] = self
        return self

    def _bind(self) -> None:
        """Let the parts use this process's present entry; forget the threads of before a fork."""
        participants, ring = self.participants, self.ring
        for mutex in {ring.senders, ring.receivers}:
            mutex.rebind(participants.entry)
        self.fence.rebind()
        for waiters in self._waiters:
            waiters.rebind()
        self.standstill.rebind()
        ring.rebind(participants.entry, participants.owner, participants.sender)
        if self._versions is not None:
            self._versions.rebind()
        self._bound = participants.owner

    def ensure_joined(self, patience: float = TABLE_PATIENCE) -> None:
        """Take an entry in the table if this process has none (yet, or since it was forked).

        Raises:
            TooManyParticipants: if the living use all of them.
            BrokenChannel: if a stopped process holds the table for all of `patience` (seconds).
        """
        participants = self.participants
        if not participants.joined:
            spare = self.segment.layout.spare_entry
            give_up = time.monotonic() + patience
            while True:  # with a condition, CPython 3.13.0 guards the jump back to it with no `try`
                participants.join(patience)
                if participants.joined:
                    self._bind()
                    if participants.index != spare:
                        break
                    reaped = self.reaper.reap()
                    participants.give_up()
                    if not reaped and participants.full_of_the_living():
                        raise participants.too_many()
                if time.monotonic() > give_up:
                    raise participants.too_many()
                time.sleep(0.001)  # somebody else has the spare entry, or the table, and reaps
        if self._bound != participants.owner:  # an interrupt came between the two: the parts still act for a parent
            self._bind()
        if self._unpopulated:
            self._unpopulated = False
            self.segment.populate()

    # --- handles and their roles

    @property
    def handles(self) -> list[Handle]:
        """The open handles; taken in one step, since a finaliser or another thread may close one at any moment."""
        return [handle for reference in self._handles.valuerefs() if (handle := reference()) is not None]

    def add(self, handle: Handle) -> None:
        """Count an open handle."""
        with self.lock:
            self._handles[id(handle)] = handle
            self.update_roles()

    def remove(self, handle: Handle, closing: bool) -> None:
        """Stop counting a handle that is closed, or garbage (then its channel keeps its names while others use it)."""
        with self.lock:
            self._handles.pop(id(handle), None)
            self.update_roles()
            last = not self.handles
        self.announce_change()
        if self.owns_names and (last or (closing and handle.creator)):
            self.owns_names = False
            self.participants.doom_names()
        if last and self.participants.joined and self.participants.awaits:
            with _registry_lock:
                _lingering.append(self)

    def update_roles(self) -> None:
        """Write into the own entry how many handles are open, by role."""
        handles = self.handles
        senders = sum(handle.sends for handle in handles)
        receivers = sum(handle.receives for handle in handles)
        # a handle that was merely inherited, beside the one that the child was started with, decides nothing
        undecided = sum(
            handle.role == UNDECIDED
            and not (handle.sends or handle.receives)
            and not (handle.stray or (handle.inherited and (senders or receivers)))
            for handle in handles
        )
        if self.participants.joined:
            self._record_role(EVER_SENDER, bool(senders), any(handle.sent for handle in handles))
            self._record_role(EVER_RECEIVER, bool(receivers), any(handle.received for handle in handles))
            self.participants.set_roles(senders, receivers, undecided)

    def _record_role(self, word: int, taken: bool, used: bool) -> None:
        """Write down that somebody has had the role; one that was not used counts for other processes only."""
        words, owner = self.words, self.participants.owner
        if used or (taken and words[word] not in (0, owner)):
            words[word] = ANYBODY
        elif taken:
            words[word] = owner

    def announce_change(self) -> None:
        """Wake everybody, everywhere: roles, or what else ends waits, have changed."""
        self.words[ATTENTION] = 1
        for waiters in self._waiters:
            waiters.wake_all()

    # --- who is left

    def over_for_receivers(self) -> bool:
        """Whether no message can come any more but those that are there (shutdown aside)."""
        words, options = self.words, self.segment.options
        if words[EVER_SENDER] in (0, self.participants.owner) or any(handle.sent for handle in self.handles):
            return False
        if options.keep_open and self.participants.creator_present:
            return False
        return not self.participants.others_may(SENDER)

    def over_for_senders(self) -> bool:
        """Whether nobody is left or may still come to receive."""
        words, options = self.words, self.segment.options
        if words[EVER_RECEIVER] in (0, self.participants.owner) or any(handle.received for handle in self.handles):
            return False
        if options.keep_open and self.participants.creator_present:
            return False
        return not self.participants.others_may(RECEIVER)

    # --- fork and exit

    def before_fork(self) -> int:
        """Count the child that is about to be forked; the number of its ticket, or 0."""
        roles = {handle.role for handle in self.handles}
        if not roles or not self.participants.joined:
            return 0
        with contextlib.suppress(BrokenChannel):  # a stopped process has the table: nobody counts anybody now
            role = roles.pop() if len(roles) == 1 else UNDECIDED
            return self.participants.issue_ticket(FORKED | role, _FORK_PATIENCE)
        return 0

    def after_fork(self) -> None:
        """In a forked child: take an entry of one's own; a later call tries again if that fails now."""
        self.lock = threading.RLock()
        self.owns_names = False
        self._unpopulated = True
        self.listeners.disown()
        self.loops.clear()
        self.participants.disown()
        self.ring.owner = 0  # holds (loans.py) are the parent's
        if self._versions is not None:
            self._versions.disown()  # and so are pins
        for handle in self.handles:
            handle.after_fork()
        if not self.handles:
            return
        with contextlib.suppress(OSError):
            unpopulated, self._unpopulated = self._unpopulated, False
            try:
                self.ensure_joined(_FORK_PATIENCE)
            finally:
                self._unpopulated = unpopulated
            self.update_roles()


def _before_fork() -> None:
    forking.add(threading.get_ident())
    _fork_tickets[threading.get_ident()] = [
        (attachment, ticket) for attachment in list(_registry.values()) if (ticket := attachment.before_fork())
    ]


def _after_fork_in_parent() -> None:
    _fork_tickets.pop(threading.get_ident(), None)
    forking.discard(threading.get_ident())


def _after_fork() -> None:
    # CPython prints an interrupt that comes here, and goes on: the child must not be half its parent
    again: BaseException | None = None
    for _ in range(3):
        try:
            _begin_anew()
            break
        except BaseException as error:
            again = error
    if again is not None:
        raise again


def _begin_anew() -> None:
    """All that a forked child does first; the second time what the first has begun counts as dead."""
    global _registry_lock
    _registry_lock = threading.RLock()
    drop_inherited_locks()
    attachments = list(_registry.values())
    for attachment in attachments:
        attachment.after_fork()
    for attachment, ticket in _fork_tickets.get(threading.get_ident(), ()):
        with contextlib.suppress(BrokenChannel):
            attachment.participants.redeem_ticket(ticket, _FORK_PATIENCE)
    _fork_tickets.clear()
    forking.clear()
    _lingering.clear()
    if attachments:
        _install_exit()


_exit_installed_in = 0


def _install_exit() -> None:
    """Have this process close its handles when it exits."""
    global _exit_installed_in
    if _exit_installed_in != os.getpid():
        # the first before multiprocessing joins its children, which may be waiting for this process; the second after
        # that, since they may be about to attach
        multiprocessing.util.Finalize(None, _close_all, exitpriority=100)
        multiprocessing.util.Finalize(None, _leave_all, exitpriority=-100)
        _exit_installed_in = os.getpid()


def _after_multiprocessing_fork(_: object) -> None:
    """In a child of multiprocessing, which has cleared its finalizers after our at-fork hook ran."""
    global _exit_installed_in
    _exit_installed_in = 0
    _install_exit()
    _find_strays(multiprocessing.process.current_process())


def _find_strays(process: object) -> None:
    """If what a process was started with (its target, its arguments) leads to handles: all others are strays."""
    attachments = list(_registry.values())
    inherited = {id(handle): handle for attachment in attachments for handle in attachment.handles if handle.inherited}
    given: set[int] = set()
    seen: set[int] = set()
    todo = [process] if inherited else []
    while todo:
        obj = todo.pop()
        if id(obj) in inherited:
            given.add(id(obj))
        elif id(obj) not in seen and not isinstance(obj, (type, types.ModuleType, types.BuiltinFunctionType)):
            seen.add(id(obj))
            if isinstance(obj, types.FunctionType):  # of its globals those that it names
                todo += [obj.__defaults__, obj.__kwdefaults__, obj.__closure__]
                todo += [obj.__globals__.get(name) for name in obj.__code__.co_names]
            else:
                todo += gc.get_referents(obj)
        if len(seen) > _MOST_ARGUMENTS:
            return
    if given:
        for number, handle in inherited.items():
            if number not in given:
                handle.stray, handle.sends, handle.receives = True, False, False
        for attachment in attachments:
            attachment.update_roles()
            attachment.announce_change()


def _close_all() -> None:
    for attachment in list(_registry.values()):
        for handle in attachment.handles:
            with contextlib.suppress(Exception):
                handle.close()


def _leave_all() -> None:
    """Tickets end with their maker: what waits for them to arrive goes now."""
    for attachment in _lingering:
        if attachment.words[NAME_DOOMED]:
            attachment.segment.remove_names()
    _lingering.clear()
    for attachment in list(_registry.values()):  # a daemon thread is inside a call: it keeps the entry to the last
        attachment.listeners.close()
        attachment.participants.remove_names_if_alone()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)
multiprocessing.util.register_after_fork(Attachment, _after_multiprocessing_fork)
