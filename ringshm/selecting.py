"""A channel in a selector: `fileno()`, and `wait` for many channels at once.

`fileno()` is the descriptor of a listener of its own (wakeup.py). It is level-triggered, as `selectors` expect: a byte
is in its FIFO while messages are there. The first message brings one; whoever takes the last message away in this
process drains the FIFO, announces the listener again, and looks again (`WatchedRing.quieten`); while messages are left
it lets the byte be. A message that another process has taken leaves a byte behind: the descriptor is readable, and the
call that then finds nothing drains it. So it is readable in vain once, and not in a loop. At the end of the stream it
stays readable: every call that raises EndOfChannel writes a byte.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .errors import EndOfChannel
from .handle import Handle, deadline_of
from .layout import HEAD, TAIL
from .mutex import SLICE
from .ring import _NEW_BATCH, Consume, Outcome, Ring, Taken
from .wakeup import CHANGE, Listener

if TYPE_CHECKING:
    from .attachment import Attachment

#: So many channels are looked after in a slice (for the dead, for the end) at about 1 % of a core; more wait longer.
_CHANNELS_IN_A_SLICE = 16


class WatchedRing(Ring):
    """A ring whose messages make descriptors readable that users of this process have: what a Ring becomes then.

    Each receiving call that leaves the ring empty, or finds it so, makes them unreadable before it returns. What it has
    received then is kept for the next call if an exception comes.
    """

    def receive(self, consume: Consume, kind: Any = None) -> Any:
        """As Ring.receive."""
        value = Ring.receive(self, consume, kind)
        if self.words[HEAD] == self.words[TAIL]:
            try:
                self.quieten()
            except BaseException:
                if value.__class__ is not Outcome:
                    self.return_later(kind, value)
                raise
        return value

    def receive_many(self, limit: int, consume: Consume) -> Any:
        """As Ring.receive_many."""
        values = Ring.receive_many(self, limit, consume)
        if self.words[HEAD] == self.words[TAIL]:
            try:
                self.quieten()
            except BaseException:
                if values.__class__ is not Outcome:
                    for value in values:
                        self.return_later(None, value)
                raise
        return values

    def receive_batch(
        self, at_most: int, at_least: int, gather: Callable[[list[int], list[int]], Any], kind: Any
    ) -> Any:
        """As Ring.receive_batch."""
        batch = Ring.receive_batch(self, at_most, at_least, gather, kind)
        if self.words[HEAD] == self.words[TAIL]:
            try:
                self.quieten()
            except BaseException:
                if batch.__class__ is not Outcome:
                    self.return_later(_NEW_BATCH if kind is None else kind, batch)
                raise
        return batch

    def take(self, taken: Taken, at_most: int = 1, at_least: int = 1, stream: bool = False) -> Outcome:
        """As Ring.take: what was taken is the caller's to give back, whatever is raised here."""
        outcome = Ring.take(self, taken, at_most, at_least, stream)
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


class Selectable(Handle):
    """What makes a receiving handle one that a selector takes."""

    _watch: tuple[Attachment, Listener] | None = None

    if TYPE_CHECKING:

        def _check_receivers(self, attachment: Attachment, at_least: int) -> None: ...

    def fileno(self) -> int:
        """A descriptor that is readable while a message is there: for `selectors`, `select`, `loop.add_reader`.

        It is the handle's, the same at every call until `close`; in a forked child it is another. Read nothing from it:
        the calls that receive do. It may be readable, once, though another receiver has the message already, so let
        the call that follows not wait: `get_nowait`, which raises `queue.Empty` then. Of a message larger than a slot
        the head is there: give the call time for the rest.

        It is readable at the end of the stream as well (the `get` that follows raises EndOfChannel), once that was
        noticed: at once if the last sender has closed or exited; if it was killed, by whichever call of any process
        next looks for the dead. So a program that sleeps on nothing else gives its selector a time-out of, say, a
        second, and calls `get_nowait` after it. `ringshm.wait` and the calls for asyncio look by themselves.

        The process takes the receiver's role. Closing the handle closes the descriptor: take it out of its selector
        before.

        Raises:
            ChannelClosed: after `close`.
            OSError: if there is no descriptor, or file in shared memory, left for it.
        """
        attachment = self._open()
        if self._watch is None or self._watch[1].watch < 0:
            if not self.received:
                self._start_receiving()
            self._watch = None
            listener = attachment.listeners.watch()
            self._watch = attachment, listener
            attachment.ring.__class__ = WatchedRing
            attachment.messages.listen(listener)
            if is_ready(self, attachment):
                listener.wake()
        return self._watch[1].watch

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
    """Wait until a message is there in one or more of these channels, or one has ended.

    As `multiprocessing.connection.wait`: an ended channel is in the list too, as a Pipe is at its end; the `get` that
    follows raises EndOfChannel. Between this call and the `get` another receiver may take the message: use
    `get_nowait` where there is one. Of a message larger than a slot the head is there: give the `get` time. Sleeps
    while nothing comes; looks for the dead about every 50 ms, with more than 16 channels less often. The process takes
    the receiver's role on all of them.

    >>> import ringshm
    >>> with ringshm.Channel(4, 64) as left, ringshm.Channel(4, 64) as right:
    ...     right.put("hello")
    ...     [channel.get_nowait() for channel in ringshm.wait([left, right])]
    ['hello']

    Args:
        channels: receiving handles, of the same channel or of several.
        timeout: in seconds; None waits for ever, 0 not at all.

    Returns:
        Those that are ready, in the order in which they were given; none if the time is up, or none was given.

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
        if not handle.received:
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
        return _sleep(handles, attachments, listening, poll, deadline)
    finally:
        for attachment, listener in listening.values():
            attachment.messages.unlisten(listener)
            attachment.listeners.give_back(listener)


def _sleep(
    handles: list[S],
    attachments: Iterable[Attachment],
    listening: dict[int, tuple[Attachment, Listener]],
    poll: select.poll,
    deadline: float,
) -> list[S]:
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
