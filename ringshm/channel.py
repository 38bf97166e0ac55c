"""Channel: the face of the ring. Objects in, objects out; who may wait, for how long, and how it ends.

A handle (Channel, Sender, Receiver) belongs to one process's attachment. It takes a role at its first `put` or `get`,
unless its class fixes it. Everything that succeeds at once is a few lines here and one critical section in ring.py; the
loops below are for what does not.
"""

from __future__ import annotations

import contextlib
import errno
import math
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any, NoReturn, TypeVar

from .attachment import Attachment
from .codecs import Codec, CustomCodec, Decodable, PickleCodec, PlainCodec
from .errors import (
    BrokenChannel,
    ChannelClosed,
    ChannelNotFound,
    EndOfChannel,
    IncompatibleChannel,
    PayloadTooLarge,
    RingshmError,
    UndecodableMessage,
)
from .layout import (
    CODECS,
    FREE,
    HEAD,
    MAX_DELIVERIES,
    MAX_ENTRIES,
    OVERSIZE,
    RECEIVER,
    RECEIVER_GONE,
    SENDER,
    SENDER_GONE,
    SHUTDOWN,
    TAIL,
    UNDECIDED,
    WAIT_STRATEGIES,
    WHEN_FULL,
    Layout,
    Options,
    parse_size,
    whole_number,
)
from .mutex import SLICE, FencedMutex
from .participants import TABLE_PATIENCE
from .ring import CONTENDED, EMPTY, NOTICE, SENT, Outcome, Ring
from .segment import CODEC_NAME_NBYTES, check_name
from .stats import ChannelStats, departure_in, take_stats
from .waiting import SHORT_SLICE, Spin, Waiters

_BUILT_IN_CODECS: dict[str, type[PickleCodec] | type[PlainCodec]] = {"pickle": PickleCodec, "plain": PlainCodec}
#: Slices that a call without time left grants a mutex whose holder has died, so that it is recovered meanwhile.
_RECOVERY_SLICES = 6

H = TypeVar("H", bound="Handle")


class _ClosedRing:
    """In place of the ring of a closed handle."""

    def __init__(self) -> None:
        self.called = [0.0]

    def _refuse(self, *_: object) -> NoReturn:
        raise ChannelClosed("this handle was closed by another thread")

    send = receive = receive_many = _refuse


_CLOSED_RING: Any = _ClosedRing()


def check_timeout(timeout: float) -> float:
    """A timeout in seconds; ValueError if negative or NaN, TypeError if no number."""
    try:
        sound = timeout >= 0
    except TypeError:
        raise TypeError(f"timeout={timeout!r} must be seconds or None, not {type(timeout).__name__}") from None
    if not sound:
        raise ValueError(f"timeout={timeout!r} must not be negative or NaN")
    return timeout


def deadline_of(block: bool, timeout: float | None) -> float:
    """When a call must answer, on the monotonic clock: 0 for at once, infinity for never."""
    if not block:
        return 0.0
    if timeout is None:
        return math.inf
    return monotonic() + timeout if check_timeout(timeout) else 0.0


class Handle:
    """What all handles on a channel have in common. Get one from `Channel(...)`, `Channel.attach`, `sender()`, ….

    A handle may be used by several threads. It pickles (a `multiprocessing` argument under `spawn` or `forkserver`, a
    message on another channel, Ray) and then attaches where it is unpickled; a forked child inherits it.
    """

    #: The role that the class fixes.
    role = UNDECIDED

    def __init__(self, attachment: Attachment, codec: Codec | None, creator: bool = False) -> None:
        """Count as an open handle of that attachment. Not for users, who get theirs from a Channel."""
        options = attachment.segment.options
        self._attachment: Attachment | None = attachment
        self._lost: ChannelNotFound | None = None
        self._custom_codec = codec
        self._codec: Decodable = CustomCodec(codec) if codec is not None else _BUILT_IN_CODECS[options.codec]()
        self._name = attachment.name
        self._layout = attachment.segment.layout
        self._options = options
        self._slot_size = self._layout.slot_size
        self._look_at = 0.0
        self._send_spin = Spin(options.wait)
        self._receive_spin = Spin(options.wait)
        self.creator = creator
        self.inherited = self.stray = False
        self.sent = self.received = False
        self.sends = self.role == SENDER
        self.receives = self.role == RECEIVER
        self._ring: Ring = attachment.ring
        attachment.add(self)

    # --- what it is

    @property
    def name(self) -> str:
        """The channel's name, for `Channel.attach`."""
        return self._name

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._layout.capacity

    @property
    def slot_size(self) -> int:
        """Largest encoded message, in bytes."""
        return self._layout.slot_size

    @property
    def closed(self) -> bool:
        """Whether this handle was closed."""
        return self._attachment is None

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<{type(self).__name__} {self._name!r} of {self.capacity} x {self.slot_size} bytes{state}>"

    def _open(self) -> Attachment:
        """The attachment of an open handle."""
        attachment = self._attachment
        if attachment is None:
            if self._lost is not None:
                raise ChannelNotFound(*self._lost.args) from self._lost
            raise ChannelClosed(f"this handle on channel {self._name!r} is closed: attach again, or close it later")
        attachment.ensure_joined()
        return attachment

    # --- looking

    def qsize(self) -> int:
        """Messages that wait to be taken, at the moment of the call."""
        return self._open().ring.ready()

    def empty(self) -> bool:
        """Whether no message waits to be taken, at the moment of the call."""
        return not self.qsize()

    def full(self) -> bool:
        """Whether no slot is free, at the moment of the call."""
        return self._open().ring.full()

    def has_space(self) -> bool:
        """Whether a slot is free, at the moment of the call."""
        return not self.full()

    def stats(self) -> ChannelStats:
        """A snapshot of counts, slots, waiters and participants, taken without a mutex."""
        attachment = self._open()
        return take_stats(attachment.segment, attachment.participants)

    def wait_for_peers(self, senders: int = 0, receivers: int = 0, timeout: float | None = None) -> bool:
        """Wait until so many other processes are attached in that role; False if not in `timeout` seconds.

        Raises:
            ChannelClosed: after `close`; after `shutdown`, if not so many are attached.
        """
        deadline = deadline_of(True, timeout)
        attachment = self._open()

        def arrived() -> bool:
            now_senders, now_receivers = attachment.participants.peers()
            return now_senders >= senders and now_receivers >= receivers

        while not arrived():
            if attachment.words[SHUTDOWN]:
                raise ChannelClosed(f"channel {self._name!r} was shut down: nobody is to be waited for")
            if not self._sleep_for_event(attachment, arrived, deadline):
                return False
        return True

    # --- ending

    def shutdown(self, immediate: bool = False) -> None:
        """End the stream for everybody, as `queue.Queue.shutdown` does.

        Senders that wait, and later `put`s, get ChannelClosed. Receivers get what is there first and then
        EndOfChannel; with `immediate` what is there is dropped (and counted). Every waiter wakes at once.
        """
        attachment = self._open()
        ring = attachment.ring
        while not ring.close_for_senders():
            pass
        if immediate:
            while ring.drop_oldest(self.capacity) is CONTENDED:
                pass
        attachment.announce_change()

    def close(self) -> None:
        """Close this handle; waits for nobody, and is not an error twice.

        Calls of other threads on it get ChannelClosed. The creator's close also removes the channel's names, once all
        handles that are on their way to other processes have arrived; those attached go on.
        """
        self._close(closing=True)

    def _close(self, closing: bool) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            self.sent = self.received = self.sends = self.receives = False
            self._ring = _CLOSED_RING  # for a thread that is on its way into it
            attachment.remove(self, closing)

    def __enter__(self: H) -> H:
        self._open()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._close(closing=False)

    def after_fork(self) -> None:
        """In a forked child (attachment.after_fork): roles begin anew."""
        self.sent = self.received = self.creator = False
        self.inherited = True
        self.sends = self.role == SENDER
        self.receives = self.role == RECEIVER

    def __reduce__(self) -> tuple[Any, ...]:
        attachment = self._open()
        ticket = attachment.participants.issue_ticket(self.role)
        return _arrive, (type(self), self._name, attachment.segment.nonce, self._layout, ticket, self._custom_codec)

    # --- waiting

    def _look_around(self) -> None:
        """Look for the dead, also while nobody ever waits."""
        self._look_at = monotonic() + SLICE
        self._open().reaper.look()

    def _check_open(self, attachment: Attachment) -> None:
        """Whether another thread has closed this handle meanwhile."""
        if self._attachment is not attachment:
            raise ChannelClosed(f"this handle on channel {self._name!r} was closed by another thread")

    def _sleep(self, attachment: Attachment, waiters: Waiters, arrived: Callable[[], Any], seconds: float) -> None:
        """Announce, look again, sleep; look for the dead if nobody woke us."""
        woken = True
        try:
            waiters.announce()
            if not arrived():
                woken = waiters.sleep(seconds)
        finally:
            try:
                waiters.withdraw()
            except BaseException:  # a handler raised in it: nobody must seem to wait who does not
                waiters.withdraw()
                raise
        if not woken:
            attachment.reaper.look()
        self._check_open(attachment)

    def _pause(self, attachment: Attachment) -> None:
        """Between two rounds of a wait that never sleeps: let other threads run, look for the dead."""
        time.sleep(0)
        attachment.reaper.look()
        self._check_open(attachment)

    def _sleep_for_event(self, attachment: Attachment, arrived: Callable[[], bool], deadline: float) -> bool:
        """Sleep until something was received or somebody came or went, a slice at most; False if time is up."""
        remaining = deadline - monotonic()
        if remaining <= 0:
            return False
        self._sleep(attachment, attachment.events, arrived, min(SLICE / 2, remaining))
        return True

    def _patience(self, attachment: Attachment, mutex: FencedMutex, deadline: float, tries: int) -> bool:
        """Whether to go on trying for a contended mutex: while there is time, or its holder is not alive."""
        if monotonic() < deadline:
            return True
        living, _ = attachment.participants.holders(mutex.offset)
        return not living and tries < _RECOVERY_SLICES

    def _gone(self, attachment: Attachment, word: int) -> str:
        """Who was the last of a role, and how it went."""
        departure = departure_in(attachment.words[word])
        return f": {departure}" if departure else ""


class _Sends(Handle):
    """The methods of a handle that may send."""

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Copy `obj` into a free slot, behind all messages whose `put` has returned.

        While the ring is full it waits, for up to `timeout` seconds (None: for ever; 0, or `block=False`: not at
        all). With `when_full="drop_oldest"` the oldest unread message goes instead. If this process is interrupted or
        dies before `put` has returned, the message was sent whole or not at all.

        Raises:
            queue.Full: if no slot came free in time.
            PayloadTooLarge: if the encoded object is larger than a slot.
            ChannelClosed: after `close` or `shutdown`.
            BrokenChannel: if there has been a receiver and none is left or may still come.
            Exception: what encoding `obj` raises; nothing was sent.
        """
        if not self.sent:
            self._start_sending()
        if timeout is not None and block:
            check_timeout(timeout)
        meta, data, description = self._codec.encode(obj)
        if meta >> 16 > self._slot_size:
            raise self._too_large(meta >> 16)
        now = self._ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()
        outcome = self._ring.send(meta, data, description)
        if outcome is not SENT:
            self._put_slowly(outcome, meta, data, description, deadline_of(block, timeout))

    def put_nowait(self, obj: Any) -> None:
        """`put(obj, block=False)`."""
        self.put(obj, False)

    def put_many(self, objs: Iterable[Any], timeout: float | None = None) -> int:
        """Send objects in order, as many as fit within `timeout` seconds (None: all of them).

        All are encoded before the first is sent, so one that cannot be sent leaves the channel as it was.

        Returns:
            How many were sent. Fewer than all: the time is up, or the channel ended after some had been sent.
        """
        deadline = deadline_of(True, timeout)
        if not self.sent:
            self._start_sending()
        encoded = [self._codec.encode(obj) for obj in objs]
        self._ring.called[0] = monotonic()
        for meta, _, _ in encoded:
            if meta >> 16 > self.slot_size:
                raise self._too_large(meta >> 16)
        for count, (meta, data, description) in enumerate(encoded):
            try:
                outcome = self._ring.send(meta, data, description)
                if outcome is not SENT:
                    self._put_slowly(outcome, meta, data, description, deadline)
            except queue.Full:
                return count
            except RingshmError:
                if not count:
                    raise
                return count
        return len(encoded)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every message that this process put has been received or dropped.

        Returns:
            False if that was not so within `timeout` seconds.

        Raises:
            BrokenChannel: if messages are left and nobody is left to receive them.
        """
        deadline = deadline_of(True, timeout)
        attachment = self._open()
        sender = attachment.participants.sender
        while attachment.ring.unfinished(sender):
            # nobody can come any more, and then look again: the last receiver may have taken them before it went
            if attachment.over_for_senders() and attachment.ring.unfinished(sender):
                attachment.reaper.look()
                raise self._broken(attachment, " that would receive what was put")
            if not self._sleep_for_event(attachment, lambda: not attachment.ring.unfinished(sender), deadline):
                return not attachment.ring.unfinished(sender)
        return True

    wait_for_all_ack = flush

    def _start_sending(self) -> None:
        attachment = self._open()
        with attachment.lock:
            try:
                self.sends = self.sent = True
                attachment.update_roles()
            except BaseException:
                self.sent = False  # interrupted: the next call tells the others
                raise
        attachment.announce_change()

    def _put_slowly(self, outcome: Outcome, meta: int, data: Any, description: bytes, deadline: float) -> None:
        """Go on after a `send` that did not succeed at once."""
        attachment = self._open()
        ring, tries, seconds = attachment.ring, 0, SHORT_SLICE
        while outcome is not SENT:
            self._check_open(attachment)
            if outcome is NOTICE:
                self._check_senders(attachment)
            elif outcome is CONTENDED:
                tries += 1
                if not self._patience(attachment, ring.senders, deadline, tries):
                    raise queue.Full(f"channel {self._name!r}: another process holds the senders' mutex")
            elif self._options.when_full == "drop_oldest":
                dropped = ring.drop_oldest()
                if dropped is CONTENDED:
                    tries += 1
                    if not self._patience(attachment, ring.receivers, deadline, tries):
                        raise queue.Full(f"channel {self._name!r}: another process holds the receivers' mutex")
                elif dropped is EMPTY and ring.full() and not attachment.reaper.look():
                    raise queue.Full(
                        f"channel {self._name!r}: all slots are being read or written, none can be dropped"
                    )
            elif monotonic() >= deadline:
                if not attachment.reaper.look():
                    self._check_senders(attachment)
                    raise queue.Full(f"channel {self._name!r}: no slot came free in time")
            elif not self._spin_for_space(ring):
                self._check_senders(attachment)
                if self._send_spin.always:
                    self._pause(attachment)
                else:
                    remaining = max(0.0, deadline - monotonic())
                    self._sleep(attachment, attachment.space, lambda: not ring.full(), min(seconds, remaining))
                    seconds = SLICE
            outcome = ring.send(meta, data, description)

    def _spin_for_space(self, ring: Ring) -> bool:
        """Look whether a slot comes free, for as long as that pays."""
        spin, words = self._send_spin, ring.words
        word = ring.space_expected()
        looks = spin.looks
        for _ in range(looks):
            if words[word] == FREE:
                spin.paid()
                return True
        if looks:
            spin.wasted()
        return False

    def _check_senders(self, attachment: Attachment) -> None:
        """Raise if nothing may be sent any more."""
        if attachment.words[SHUTDOWN]:
            raise ChannelClosed(f"channel {self._name!r} was shut down: nothing more can be sent")
        if attachment.over_for_senders():
            self._check_open(attachment)
            attachment.announce_change()  # so that the next put looks, too
            raise self._broken(attachment)

    def _broken(self, attachment: Attachment, what: str = "") -> BrokenChannel:
        gone = self._gone(attachment, RECEIVER_GONE)
        return BrokenChannel(errno.EPIPE, f"channel {self._name!r} has no receiver any more{what}{gone}")

    def _too_large(self, nbytes: int) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"channel {self._name!r}: slot holds {self.slot_size} bytes, message needs {nbytes}: "
            "make the channel with a larger slot_size, or send it in parts"
        )


class _Receives(Handle):
    """The methods of a handle that may receive."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The oldest message, which the caller owns: nothing in it points into shared memory.

        While there is none it waits, for up to `timeout` seconds (None: for ever; 0, or `block=False`: not at all).
        The message is received once it is decoded; if this process dies before, another receiver gets it.

        Raises:
            queue.Empty: if none came in time.
            EndOfChannel: if none is there and no sender is left or may still come, or after `shutdown`.
            ChannelClosed: after `close`.
            UndecodableMessage: if the codec failed on it; it counts as received.
        """
        if not self.received:
            self._start_receiving()
        if timeout is not None and block:
            check_timeout(timeout)
        now = self._ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()
        value = self._ring.receive(self._codec.decode)
        if value.__class__ is Outcome:
            value = self._receive_slowly(value, None, deadline_of(block, timeout))
        return value

    def get_nowait(self) -> Any:
        """`get(block=False)`."""
        return self.get(False)

    def get_many(self, max_messages: int, timeout: float | None = None) -> list[Any]:
        """Wait for one message, then take what is there, up to `max_messages`, without waiting again.

        They are received once all are decoded. If one cannot be decoded, those before it are returned, and the next
        call raises UndecodableMessage.

        Raises:
            As `get`.
        """
        limit = whole_number(max_messages, "max_messages")
        if not self.received:
            self._start_receiving()
        deadline = deadline_of(True, timeout)
        self._ring.called[0] = monotonic()
        values: list[Any] = self._receive_slowly(None, limit, deadline)
        return values

    def __iter__(self) -> Iterator[Any]:
        """Messages until the end of the stream."""
        while True:
            try:
                value = self.get()
            except EndOfChannel:
                return
            yield value

    def _start_receiving(self) -> None:
        attachment = self._open()
        with attachment.lock:
            try:
                self.receives = self.received = True
                attachment.update_roles()
            except BaseException:
                self.received = False  # interrupted: the next call tells the others
                raise
        attachment.announce_change()

    def _receive_slowly(self, outcome: Outcome | None, limit: int | None, deadline: float) -> Any:
        """Go on after a `receive` that gave no message, or, with a limit, receive many from the start."""
        attachment = self._open()
        ring, tries = attachment.ring, 0
        while True:
            if outcome is None:
                pass
            elif outcome.error is not None:
                raise UndecodableMessage(
                    f"channel {self._name!r}: a message could not be decoded ({outcome.error!r}); it counts as received"
                ) from outcome.error
            elif outcome is CONTENDED:
                tries += 1
                if not self._patience(attachment, ring.receivers, deadline, tries):
                    raise queue.Empty(f"channel {self._name!r}: another process holds the receivers' mutex")
            else:
                self._check_open(attachment)
                waits = monotonic() < deadline
                if not (waits and self._spin_for_message(ring)):
                    self._check_receivers(attachment)
                    if ring.ready():
                        pass
                    elif not waits:
                        if not attachment.reaper.look():
                            raise queue.Empty(f"channel {self._name!r}: no message came in time")
                    elif self._receive_spin.always:
                        self._pause(attachment)
                    else:
                        remaining = max(0.0, deadline - monotonic())
                        self._sleep(attachment, attachment.messages, ring.ready, min(SLICE, remaining))
            decode = self._codec.decode
            value = ring.receive(decode) if limit is None else ring.receive_many(limit, decode)
            if value.__class__ is not Outcome:
                return value
            outcome = value

    def _spin_for_message(self, ring: Ring) -> bool:
        """Look whether a message comes, for as long as that pays."""
        spin, words = self._receive_spin, ring.words
        looks = spin.looks
        for _ in range(looks):
            if words[HEAD] != words[TAIL]:
                spin.paid()
                return True
        if looks:
            spin.wasted()
        return False

    def _check_receivers(self, attachment: Attachment) -> None:
        """Raise if nothing can come any more: first whether anybody may send, then whether anything is left."""
        shutdown = attachment.words[SHUTDOWN]
        if (shutdown or attachment.over_for_receivers()) and attachment.ring.drained_for(attachment.participants.owner):
            self._check_open(attachment)
            reason = "was shut down" if shutdown else f"has no sender any more{self._gone(attachment, SENDER_GONE)}"
            raise EndOfChannel(f"channel {self._name!r} {reason}; all its messages were received")


class Sender(_Sends):
    """A handle that only sends; get it from `Channel.sender()`."""

    role = SENDER

    def __getattr__(self, attribute: str) -> NoReturn:
        raise _missing(self, attribute, _Receives, "receiver")


class Receiver(_Receives):
    """A handle that only receives; get it from `Channel.receiver()`."""

    role = RECEIVER

    def __getattr__(self, attribute: str) -> NoReturn:
        raise _missing(self, attribute, _Sends, "sender")


def _missing(handle: Handle, attribute: str, other: type[Handle], role: str) -> AttributeError:
    text = f"{type(handle).__name__!r} object has no attribute {attribute!r}"
    if hasattr(other, attribute):
        text += f": that is for a handle of the other role; get one with channel.{role}()"
    return AttributeError(text)


class Channel(_Sends, _Receives):
    """A preallocated ring of `capacity` slots in shared memory, between any processes and threads of one machine.

    Many may send, many may receive; each message goes to one receiver, in the order in which the `put`s completed.

    Args:
        capacity: number of slots: messages that may be on their way at once.
        slot_size: largest encoded message in bytes, or a string such as "64KiB"; a bare array or `bytes` of exactly
            that size fits.
        name: for `Channel.attach`; None makes a fresh, unguessable one. A name that only dead processes have left is
            reclaimed.
        codec: "pickle" (any picklable object), "plain" (built-in types and arrays; decoding runs no code), or an
            object with the `Codec` protocol.
        oversize: what becomes of a message larger than a slot. In this version both "stream" and "error" refuse it
            with PayloadTooLarge.
        wait: "adaptive" (spin briefly while that pays, then sleep), "block" (sleep at once) or "spin" (never sleep;
            costs a core for each waiter).
        when_full: "wait", or "drop_oldest": `put` never waits for space, the oldest unread message goes. If there is
            none to drop, since all slots are being read, it raises `queue.Full`.
        keep_open: keep both ends open while this process lives, whoever else comes and goes.
        max_deliveries: how often a message is delivered, if its receivers die on it, before it is dropped.
        prefault: map all pages now, not at their first use. They are reserved in any case.
        max_participants: how many processes may be attached at once.

    Raises:
        TypeError, ValueError: for an argument that makes no sense, by its name.
        ChannelExists: if a live process uses the name.
        InsufficientSharedMemory: if /dev/shm has not the space; nothing is left behind.
    """

    def __init__(
        self,
        capacity: int,
        slot_size: int | str,
        *,
        name: str | None = None,
        codec: str | Codec = "pickle",
        oversize: str = "stream",
        wait: str = "adaptive",
        when_full: str = "wait",
        keep_open: bool = False,
        max_deliveries: int = 3,
        prefault: bool = True,
        max_participants: int = 256,
    ) -> None:
        self._attachment = None
        capacity = whole_number(capacity, "capacity")
        slot_size = parse_size(slot_size, "slot_size")
        if name is not None:
            check_name(name)
        custom = _check_codec(codec)
        options = Options(
            codec="custom" if custom is not None else str(codec),
            oversize=_choice("oversize", oversize, OVERSIZE),
            wait=_choice("wait", wait, WAIT_STRATEGIES),
            when_full=_choice("when_full", when_full, WHEN_FULL),
            keep_open=bool(keep_open),
            max_deliveries=whole_number(max_deliveries, "max_deliveries", MAX_DELIVERIES),
        )
        layout = Layout(capacity, slot_size, whole_number(max_participants, "max_participants", MAX_ENTRIES - 2))
        attachment = Attachment.create(name, layout, options, custom.name if custom is not None else "", bool(prefault))
        super().__init__(attachment, custom, creator=True)

    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, codec: Codec | None = None) -> Channel:
        """Open a channel that any process of the same user has made.

        Args:
            timeout: how long to wait for it to appear, in seconds; None does not wait.
            codec: the channel's codec, if it is none of the built-in ones.

        Raises:
            ChannelNotFound: if there is none (in time), or only dead processes have left one.
            ChannelForbidden: if it belongs to another user.
            ChannelCorrupted: if the file of that name is no segment.
            IncompatibleChannel: if it has another layout version, or another codec than the given one.
            TooManyParticipants: if `max_participants` living processes are attached.
            BrokenChannel: if a stopped process holds the table of participants for all of `timeout` (or 10 s).
        """
        check_name(name)
        deadline = deadline_of(timeout is not None, timeout)
        pause = 0.001
        while True:
            try:
                patience = TABLE_PATIENCE if timeout is None else max(SLICE, deadline - monotonic())
                attachment = Attachment.open_named(name, patience=patience)
                break
            except ChannelNotFound:
                remaining = deadline - monotonic()
                if remaining <= 0:
                    raise
                time.sleep(min(pause, remaining))
                pause = min(2 * pause, SLICE)
        recorded = attachment.segment.options.codec
        wanted = attachment.segment.codec_name
        if codec is not None:
            _check_codec(codec)
        if (recorded == "custom") != (codec is not None) or (codec is not None and codec.name != wanted):
            made = f"codec {wanted!r}" if recorded == "custom" else f"the built-in codec {recorded!r}"
            given = "none was given" if codec is None else f"{codec.name!r} was given"
            raise IncompatibleChannel(f"channel {name!r} was made with {made}, {given}: pass the same codec to attach")
        return cls._on(attachment, codec)

    @classmethod
    def _on(cls, attachment: Attachment, codec: Codec | None) -> Channel:
        channel = cls.__new__(cls)
        Handle.__init__(channel, attachment, codec)
        return channel

    def sender(self) -> Sender:
        """Another handle on this channel, which sends only. Close it too."""
        return Sender(self._open(), self._custom_codec)

    def receiver(self) -> Receiver:
        """Another handle on this channel, which receives only. Close it too."""
        return Receiver(self._open(), self._custom_codec)


def _arrive(kind: type[Handle], name: str, nonce: str, layout: Layout, ticket: int, codec: Codec | None) -> Handle:
    """A pickled handle, in the process where it is unpickled. If its channel is gone, its first use says so."""
    handle = kind.__new__(kind)
    try:
        attachment = Attachment.open_named(name, nonce)
        Handle.__init__(handle, attachment, codec)
        attachment.participants.redeem_ticket(ticket)
    except ChannelNotFound as error:
        handle._attachment, handle._lost, handle._name, handle._layout = None, error, name, layout
        handle.sent = handle.received = False
    return handle


def _choice(argument: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{argument}={value!r} must be one of {', '.join(map(repr, choices))}")
    return value


def _check_codec(codec: str | Codec) -> Codec | None:
    """The user's own codec, or None for a built-in one."""
    if isinstance(codec, str):
        _choice("codec", codec, CODECS[:-1])
        return None
    if not isinstance(codec, Codec) or not isinstance(codec.name, str) or not codec.name:
        raise TypeError(f"codec={codec!r} must be 'pickle', 'plain' or an object with name, encode and decode")
    if len(codec.name.encode()) > CODEC_NAME_NBYTES:
        raise ValueError(f"codec name {codec.name!r} is longer than {CODEC_NAME_NBYTES} bytes")
    return codec
