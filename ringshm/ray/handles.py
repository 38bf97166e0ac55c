"""Handles that travel: senders and receivers with a number and a home, and no invitation.

A handle is a plain Sender or Receiver of the ring at its process's place, and nothing else once it is attached: so
calls, waits and speed are the plain ones. What is added is where it attaches, and who knows of it:

    away        it has a ticket alone: as `sender()` has made it, or unpickled and not used
    claimed     the registry knows this process as its holder, and the handle is attached
    idle        claimed by a worker that runs no task now: it counts for nothing until it is used

1. Unpickling claims at once: the registry must know of the holder before what has passed the handle on may go.
2. A finaliser may run anywhere, also inside of Ray; so it only notes what to tell, in a queue, and a thread of this
   process tells the registry.
3. A token names one claim. So a claim that comes after a close is not taken for what was closed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import uuid
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NoReturn
from weakref import WeakSet, ref

import ray

from ..annotations import T_co, T_contra
from ..channel.channel import Receiver, Sender
from ..channel.handle import Handle
from ..channel.steps import Steps, Turn
from ..errors import BrokenChannel
from ..messages.codecs import Codec
from ..process import registry as attachments
from ..process.attachment import Attachment
from ..process.seat import Seat
from ..ring.stats import departure_in
from ..segment import layout
from ..segment.layout import RECEIVER_GONE, TAIL, Layout
from ..system import Lock
from . import calls, cluster
from .locality import Place
from .records import DOWN, HOME, RECEIVER, SENDER, UP, Ring

#: Seconds for which home waits, until it says to a `flush` that not all is received yet.
_FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Ticket:
    """What a handle is, wherever it goes.

    Attributes:
        namespace: the Ray namespace of its registry.
        channel, number: which channel, and which of its handles.
        name: what errors call the channel.
        home: where its ring lies.
        layout: of all its rings.
        codec: the user's own codec; None for a built-in one.
    """

    namespace: str
    channel: str
    number: int
    name: str
    home: Place
    layout: Layout
    codec: Codec[Any] | None


class Travelling(Handle):
    """What both roles have. A base class before the plain one."""

    _ticket: Ticket
    _claiming: Any  #: held while a thread claims
    _token = ""  #: of the claim; "" while the handle is away
    _given = False  #: whether this object was pickled
    _done = False  #: whether it was closed
    _is_idle = False

    @classmethod
    def _away(cls, ticket: Ticket) -> Any:
        handle = cls.__new__(cls)
        handle._ticket = ticket
        handle._attachment, handle._lost = None, None
        handle._name, handle._layout = ticket.name, ticket.layout
        handle._seat = Seat(ref(handle), cls.role)
        handle._claiming = Lock()
        return handle

    def _register(self) -> Ring:
        """Have the registry know of this holder; where the ring is."""
        ticket, token = self._ticket, uuid.uuid4().hex
        process = cluster.this_process()
        found: Ring | str = calls.call(ticket.namespace, "claim", ticket.channel, ticket.number, token, process)
        if isinstance(found, str):
            raise calls.closed(ticket.name, found)
        teller.claimed(self)
        self._token = token
        return found

    def _attach_by_claim(self) -> None:
        found, ticket = self._register(), self._ticket
        attachment = attachments.attach(found.name, found.nonce, even_if_dead=True)  # its relay may just be away
        attachment.participants.heir = cluster.is_up
        ring = HOME if found.place == ticket.home else UP if self.role == layout.SENDER else DOWN
        attachment.confirm = calls.Nobody(ticket.namespace, ticket.channel, ring)
        self.role = self._role_at(found.place)
        Handle.__init__(self, attachment, ticket.codec)
        self._name = ticket.name

    def _role_at(self, place: Place) -> int:
        """What it is to the ring of that place."""
        return type(self).role

    def _open(self) -> Attachment:
        if self._attachment is None and not self._done:
            with self._claiming:
                if self._attachment is None and not self._done:
                    self._attach_by_claim()
        return super()._open()

    def _take_role(self, counts: str, used: str) -> None:
        self._wake()
        super()._take_role(counts, used)

    def _wake(self) -> None:
        """Count again, if this process ran no task before."""
        if self._is_idle:
            ticket = self._ticket
            found = calls.call(
                ticket.namespace, "claim", ticket.channel, ticket.number, self._token, cluster.this_process()
            )
            if isinstance(found, str):
                raise calls.closed(ticket.name, found)
            self._is_idle = False

    def shutdown(self: Any, immediate: bool = False) -> None:
        """As `ringshm.Channel.shutdown`, for all nodes; the others learn of it a moment later."""
        super().shutdown(immediate)  # type: ignore[misc]
        calls.call(self._ticket.namespace, "shutdown", self._ticket.channel, immediate)

    def _rest(self) -> None:
        """This process runs no task: the handle counts for nothing until its next call takes its role again."""
        attachment = self._attachment
        if attachment is not None and not self._is_idle and self._token:
            self._is_idle = True
            self._bind_compiled(attachment, self._codec)
            attachment.set_aside(self._seat)
            calls.call(self._ticket.namespace, "idle", self._ticket.channel, self._ticket.number, self._token)

    @property
    def closed(self) -> bool:
        """Whether this handle was closed."""
        return self._done

    def _close(self, closing: bool) -> None:
        if self._done:
            return
        self._done = True
        super()._close(closing)
        if self._token:
            teller.tell("release", self._ticket, self._token)
        elif not self._given:
            teller.tell("discard", self._ticket)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._close(closing=False)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._done:
            self._open()  # raises
        self._given = True
        return _unpickled, (type(self), self._ticket)


def _unpickled(kind: type[Travelling], ticket: Ticket) -> Travelling:
    handle: Travelling = kind._away(ticket)
    handle._given = True
    handle._open()
    return handle


class RaySender(Travelling, Sender[T_contra]):
    """A sender that goes to any process of the cluster: see `ringshm.ray`."""

    def _wait_for_receptions(self, turn: Turn) -> Steps[bool]:
        """First until all has left the ring here. Elsewhere than at home, then until home has had it all received."""
        tail = turn.attachment.words[TAIL]
        if not (yield from super()._wait_for_receptions(turn)):
            return False
        received = _Received(self._ticket, turn.attachment.segment.origin, tail)
        while not received.is_at_home and not received():
            if turn.attachment.over_for_senders():
                raise self._broken(turn.attachment, " that would receive what was put")
            if not (yield from turn.event(received)):
                return received()
        return True

    def _broken(self, attachment: Attachment, what: str = "") -> BrokenChannel:
        gone = who_went(self, attachment, RECEIVER_GONE, RECEIVER)
        return BrokenChannel(
            errno.EPIPE,
            f"channel {self._name!r} has no receiver any more{what}{gone}; hand out another before the last has gone, "
            "or close the channel itself only when all have arrived",
        )


class RayReceiver(Travelling, Receiver[T_co]):
    """A receiver that goes to any process of the cluster: see `ringshm.ray`."""

    def _gone(self, attachment: Attachment, word: int) -> str:
        return who_went(self, attachment, word, SENDER)


def who_went(handle: Travelling, attachment: Attachment, word: int, role: str) -> str:
    """Which holder was the last of a role, and how it went: the registry knows those of all nodes."""
    with contextlib.suppress(Exception):
        who = calls.call(handle._ticket.namespace, "departed", handle._ticket.channel, role)
        if who:
            return f": {who}"
    departure = departure_in(attachment.words[word])
    return f": {departure}" if departure else ""


class _Received:
    """Asks home, without waiting, whether it has had all messages received that stood in a ring before its tail."""

    def __init__(self, ticket: Ticket, place: Place, tail: int) -> None:
        self.is_at_home = place == ticket.home
        self._ticket, self._place, self._tail = ticket, place, tail
        self._home_tail = -1
        self._relay: Any = None
        self._ref: Any = None

    def __call__(self) -> bool:
        try:
            if self._relay is None:
                self._relay = calls.relay(self._ticket.channel, self._ticket.home)
            if self._ref is None:
                if self._home_tail < 0:
                    self._ref = self._relay.put_before.remote(self._place, self._tail)
                else:
                    self._ref = self._relay.received_before.remote(self._home_tail, _FLUSH_SECONDS)
            if not ray.wait([self._ref], timeout=0)[0]:
                return False
            ref, self._ref = self._ref, None
            answer = ray.get(ref)
        except (ray.exceptions.RayError, ValueError):  # the relay at home is being started again
            self._relay = self._ref = None
            return False
        if self._home_tail < 0:
            self._home_tail = answer
            return False
        return bool(answer)


class Teller:
    """Tells the registry what becomes of this process's handles."""

    def __init__(self) -> None:
        self._pid = 0
        self._exiting = False
        self._news: SimpleQueue[tuple[str, Ticket, tuple[str, ...]]] = SimpleQueue()
        self._held: WeakSet[Travelling] = WeakSet()

    def claimed(self, handle: Travelling) -> None:
        """Look after a handle."""
        self._held.add(handle)
        self.start()

    def tell(self, what: str, ticket: Ticket, token: str = "") -> None:
        """Have the thread tell it. Takes no lock."""
        args = (token, f"process {os.getpid()} closed it") if what == "release" else (token,) if token else ()
        self._news.put((what, ticket, args))

    def start(self) -> None:
        """Have the thread run in this process."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            atexit.register(self._exit)
            Thread(target=self._run, name="ringshm.ray", daemon=True).start()

    def _exit(self) -> None:
        self._exiting = True

    def _run(self) -> None:
        looks = 0
        while not self._exiting:
            try:
                what, ticket, args = self._news.get(timeout=0.5)
            except Empty:
                looks = looks + 1 if cluster.is_idle_worker() else 0
                if looks >= 2:
                    for handle in list(self._held):
                        with contextlib.suppress(Exception):
                            handle._rest()
                continue
            numbers = (ticket.number,) if what != "maker_closed" else ()
            if self._exiting:  # Ray may be gone already; and the registry learns of the end of this process
                return
            with contextlib.suppress(Exception):
                calls.tell(ticket.namespace, what, ticket.channel, *numbers, *args)


teller = Teller()


def refuse(name: str) -> NoReturn:
    """A channel itself does not travel."""
    raise TypeError(
        f"channel {name!r}: the channel of ringshm.ray itself cannot be pickled: hand out channel.sender() or "
        "channel.receiver()"
    )
