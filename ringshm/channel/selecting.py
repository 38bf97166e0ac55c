"""A channel in a selector: `fileno()`, and `wait` for many channels at once.

`fileno()` is the descriptor of a listener of its own (listeners.py). It is level-triggered, as `selectors` expect: a
byte is in its FIFO while messages are there.

1. The first message brings a byte. The call of this process that takes the last message drains the FIFO, announces the
   listener again, and looks again (`WatchedRing.quieten`). A call that leaves messages leaves the byte.
2. If another process takes the last message, the byte stays. The descriptor is readable then, and the call that finds
   nothing drains it. So the descriptor is readable in vain once, and not in a loop.
3. At the end of the stream the descriptor stays readable: every call that raises EndOfChannel writes a byte.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from ..arguments import deadline_of
from ..errors import EndOfChannel
from ..process.attachment import Attachment
from ..ring.listeners import CHANGE, Listener
from ..ring.mutex import SLICE
from ..ring.outcomes import Outcome
from ..ring.slots import NEW_BATCH, Consume, Gather, Ring
from ..ring.take import Taken
from ..segment.layout import HEAD, TAIL
from ..system import monotonic
from .handle import Handle
from .receiving import Receiving

#: To look at so many channels in a slice, for the dead and for the end, takes about 1 % of a core. For more channels
#: the slice is longer.
_CHANNELS_IN_A_SLICE = 16


class WatchedRing(Ring):
    """A ring whose messages make descriptors readable that users of this process have: what a Ring becomes then.

    Each receiving call that leaves the ring empty, or finds it so, makes them unreadable before it returns. If an
    exception comes meanwhile, the next call returns what this one has received.
    """

    def receive(self, consume: Consume, kind: Any = None) -> Any:
        """As Ring.receive."""
        return self._receive_quietly(lambda: Ring.receive(self, consume, kind), lambda value: [(kind, value)])

    def receive_many(self, limit: int, consume: Consume) -> Any:
        """As Ring.receive_many."""
        return self._receive_quietly(
            lambda: Ring.receive_many(self, limit, consume), lambda values: [(None, value) for value in values]
        )

    def receive_batch(self, at_most: int, at_least: int, gather: Gather, kind: Any) -> Any:
        """As Ring.receive_batch."""
        return self._receive_quietly(
            lambda: Ring.receive_batch(self, at_most, at_least, gather, kind),
            lambda batch: [(NEW_BATCH if kind is None else kind, batch)],
        )

    def _receive_quietly(self, receive: Callable[[], Any], unreturned: Callable[[Any], list[Any]]) -> Any:
        """Receive, then `quieten`; `receive` is a Python function: behind one in C a signal handler may run."""
        received = receive()
        if self.words[HEAD] == self.words[TAIL]:
            try:
                self.quieten()
            except BaseException:
                if received.__class__ is not Outcome:
                    self._tail_seen = 0
                    self._unreturned += unreturned(received)
                raise
        return received

    def return_later(self, kind: Any, value: Any) -> None:
        """As Ring.return_later; the descriptors are readable then."""
        Ring.return_later(self, kind, value)
        self.quieten()

    def take(self, taken: Taken, at_most: int = 1, at_least: int = 1) -> Outcome:
        """As Ring.take: what was taken is the caller's to give back, whatever is raised here."""
        outcome = Ring.take(self, taken, at_most, at_least)
        if self.words[HEAD] == self.words[TAIL]:
            self.quieten()
        return outcome

    def take_large(self, taken: Taken) -> Outcome:
        """As Ring.take_large; see `take`."""
        outcome = Ring.take_large(self, taken)
        if self.words[HEAD] == self.words[TAIL]:
            self.quieten()
        return outcome

    def quieten(self) -> None:
        """Nothing is there: make the descriptors unreadable, and readable again if something has come meanwhile."""
        listeners = self.messages.listeners
        watched = listeners.watched if listeners is not None else []
        for listener in watched:
            listener.drain()
        self.messages.listen_on()
        if self.words[HEAD] != self.words[TAIL] or self._unreturned:
            for listener in watched:
                listener.wake()


class Selectable(Receiving):
    """A receiving handle that a selector takes."""

    _watch: tuple[Attachment, Listener] | None = None

    def fileno(self) -> int:
        """A descriptor that is readable while a message is there: for `selectors`, `select`, `loop.add_reader`.

        Every call returns the same descriptor until `close`; a forked child gets another. Read nothing from it: the
        calls that receive do that. It may be readable, once, although another receiver has the message already. So use
        a call that does not wait: `get_nowait`, which raises `queue.Empty` then. If the message is larger than a slot,
        only its beginning is there: use a call with a time-out.

        It is readable at the end of the stream as well; the `get` that follows raises EndOfChannel. If the last sender
        has closed or exited, that is so at once. If the last sender was killed, it is so when a call of any process
        next looks for the dead. So a program that sleeps on nothing else gives its selector a time-out of, say, a
        second, and calls `get_nowait` after it. `ringshm.wait` and the calls for asyncio look by themselves.

        The process takes the receiver's role. `close` closes the descriptor: unregister it from the selector before.

        Raises:
            ChannelClosed: after `close`.
            ChannelUnavailable: if there is no descriptor, or file in shared memory, left for it.
        """
        attachment = self._open()
        with attachment.lock:  # another thread may call, too
            return self._watched(attachment).watch

    def _watched(self, attachment: Attachment) -> Listener:
        if self._watch is None or self._watch[1].watch < 0:
            if not self._seat.received:
                self._start_receiving()
            self._watch = None
            listener = attachment.listeners.watch()
            self._watch = attachment, listener
            attachment.ring.__class__ = WatchedRing
            attachment.ring.receive_in_python()
            attachment.messages.listen(listener)
            if is_ready(self, attachment):
                listener.wake()
        return self._watch[1]

    def _unbind(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            attachment, listener = watch
            if listener in attachment.listeners.watched:  # else it was a parent's
                attachment.messages.unlisten(listener)
                attachment.listeners.unwatch(listener)
        super()._unbind()


S = TypeVar("S", bound=Selectable)


def is_ready(handle: Selectable, attachment: Attachment, thoroughly: bool = True) -> bool:
    """Whether a `get` would not wait: a message is there, or (if looked for) the end."""
    ring = attachment.ring
    if ring.ready() or ring._unreturned:
        return True
    if thoroughly:
        try:
            handle._check_receivers(attachment, 1)
        except EndOfChannel:
            return True
    return False


@overload
def wait(channels: Iterable[S], timeout: float | None = None) -> list[S]: ...
@overload  # for channels of different types, of which mypy makes a list of object
def wait(  # type: ignore[overload-cannot-match]
    channels: Iterable[Selectable], timeout: float | None = None
) -> list[Any]: ...
def wait(channels: Iterable[Any], timeout: float | None = None) -> list[Any]:
    """Wait until a message is there in one or more of these channels, or one of them has ended.

    It works as `multiprocessing.connection.wait`. A channel that has ended is in the list, too, as a Pipe is at its
    end; the `get` that follows raises EndOfChannel. Another receiver may take the message between this call and the
    `get`: if there is one, use `get_nowait`. If a message is larger than a slot, only its beginning is there: give the
    `get` time. The call sleeps while nothing comes. It looks for the dead about every 50 ms, and with more than 16
    channels less often. The process takes the receiver's role on all of them.

    >>> import ringshm
    >>> with ringshm.Channel(4, 64) as left, ringshm.Channel(4, 64) as right:
    ...     right.put("hello")
    ...     [channel.get_nowait() for channel in ringshm.wait([left, right])]
    ['hello']

    Args:
        channels: receiving handles, of the same channel or of several.
        timeout: in seconds; None waits for ever, 0 not at all.

    Returns:
        The channels that are ready, in the order in which they were given. An empty list: the time is up, or no channel
        was given.

    Raises:
        ChannelClosed: if one is closed, or another thread closes it meanwhile.
        TypeError: if one does not receive.
    """
    deadline = deadline_of(True, timeout)
    if isinstance(channels, Handle):  # to iterate over it would receive its messages
        raise TypeError(f"wait takes several channels, and was given one: {channels!r}; give a list of it")
    handles = list(channels)
    attachments: dict[Attachment, None] = {}
    for handle in handles:
        if not isinstance(handle, Selectable):
            raise TypeError(f"wait takes channels and receivers, not {type(handle).__name__}: {handle!r}")
        attachments[handle._open()] = None
        if not handle._seat.received:
            handle._start_receiving()
    ready = _ready(handles)
    if ready or not handles:
        return ready
    if monotonic() >= deadline:
        return _ready(handles) if _look(attachments) else []
    listening: dict[int, tuple[Attachment, Listener]] = {}
    poll = select.poll()
    try:
        for attachment in attachments:
            listener = attachment.listeners.take()
            listening[listener.fd] = attachment, listener
            attachment.messages.listen(listener)
            poll.register(listener.fd, select.POLLIN)
        return _sleep(handles, listening, poll, deadline)
    finally:
        for attachment, listener in listening.values():
            attachment.messages.unlisten(listener)
            attachment.listeners.give_back(listener)


def _sleep(
    handles: list[S], listening: dict[int, tuple[Attachment, Listener]], poll: select.poll, deadline: float
) -> list[S]:
    attachments = [attachment for attachment, _ in listening.values()]
    seconds = SLICE * max(1.0, len(listening) / _CHANNELS_IN_A_SLICE)
    look_at, thoroughly = monotonic() + seconds, False
    while True:
        ready = _ready(handles, thoroughly)
        now = monotonic()
        if ready:
            return ready
        thoroughly = now >= min(look_at, deadline)
        if thoroughly:
            look_at = now + seconds
            if not _look(attachments) and now >= deadline:
                return _ready(handles)
            continue
        milliseconds = math.ceil(max(0.0, min(look_at, deadline) - now) * 1000)
        for fd, _ in poll.poll(milliseconds):
            attachment, listener = listening[fd]
            thoroughly |= CHANGE in listener.drain()
            attachment.messages.listen_on()


def _ready(handles: list[S], thoroughly: bool = True) -> list[S]:
    ready: dict[Attachment, bool] = {}  # two handles on one channel are ready at the same time
    for handle in handles:
        attachment = handle._open()
        if attachment not in ready:
            ready[attachment] = is_ready(handle, attachment, thoroughly)
    return [handle for handle in handles if ready[handle._open()]]


def _look(attachments: Iterable[Attachment]) -> bool:
    """Look for the dead; whether there were any."""
    dead = [attachment.reaper.look() for attachment in attachments]
    return any(dead)
