"""Channel: the face of the ring. Objects in, objects out; who may wait, for how long, and how it ends.

A handle (Channel, Sender, Receiver) belongs to one process's attachment. It takes a role at its first `put` or `get`,
unless its class fixes it. Everything that succeeds at once is a few lines here and one critical section in ring.py; the
loops below are for what does not.
"""

from __future__ import annotations

import contextlib
import errno
import math
import operator
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from time import monotonic
from typing import Any, NoReturn, TypeVar

from .attachment import Attachment
from .codecs import Codec, CustomCodec, Decodable, PickleCodec, PlainCodec
from .errors import (
    BrokenChannel,
    ChannelClosed,
    ChannelCorrupted,
    ChannelNotFound,
    EndOfChannel,
    IncompatibleChannel,
    PayloadTooLarge,
    RingshmError,
    SpecMismatch,
    UndecodableMessage,
)
from .layout import (
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
from .loans import Borrow, Loan, Misfit, into
from .mutex import SLICE, FencedMutex
from .participants import TABLE_PATIENCE
from .ring import CLAIMED, CONTENDED, EMPTY, NOTICE, SENT, TAKEN, Outcome, Ring
from .segment import CODEC_NAME_NBYTES, check_name
from .specs import Spec
from .stats import ChannelStats, departure_in, take_stats
from .typed import Batch, SpecCodec
from .waiting import SHORT_SLICE, Spin, Waiters

_BUILT_IN_CODECS: dict[str, type[PickleCodec] | type[PlainCodec]] = {"pickle": PickleCodec, "plain": PlainCodec}
#: Slices that a call without time left grants a mutex whose holder has died, so that it is recovered meanwhile.
_RECOVERY_SLICES = 6

H = TypeVar("H", bound="Handle")


def _codec_of(attachment: Attachment, codec: Codec | None) -> Decodable:
    """The channel's codec, as this handle uses it."""
    segment, layout = attachment.segment, attachment.segment.layout
    if codec is not None:
        return CustomCodec(codec)
    if segment.options.codec != "spec":
        return _BUILT_IN_CODECS[segment.options.codec]()
    try:
        spec = Spec.from_text(segment.spec)
    except ValueError as error:
        raise ChannelCorrupted(f"channel {segment.name!r}: the segment's spec is damaged: {error}") from None
    if spec.slot_size != layout.slot_size:
        raise ChannelCorrupted(
            f"channel {segment.name!r}: the segment's spec needs slots of {spec.slot_size} bytes, it has slots of "
            f"{layout.slot_size}"
        )
    return SpecCodec(spec, segment.memory, layout.slots, layout.slot_stride, layout.capacity, segment.name)


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
        self._codec = _codec_of(attachment, codec)
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
    def spec(self) -> Spec | None:
        """What each message is, if the channel was made with a spec."""
        return self._codec.spec if isinstance(self._codec, SpecCodec) else None

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

    def _typed(self, call: str) -> SpecCodec:
        if not isinstance(self._codec, SpecCodec):
            raise TypeError(f"channel {self._name!r} has no spec, which {call} needs: make it with one")
        return self._codec

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Let a SpecMismatch name the channel."""
        try:
            yield
        except SpecMismatch as error:
            raise SpecMismatch(f"channel {self._name!r}: {error}") from None

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
            send = partial(self._ring.send, meta, data, description)
            self._send_slowly(outcome, send, deadline_of(block, timeout))

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
        return self._send_all(encoded, deadline)

    def _send_all(self, encoded: Iterable[tuple[int, Any, bytes]], deadline: float) -> int:
        """Send in order, as many as can be; raises what ends the channel only if none was."""
        count = 0
        for meta, data, description in encoded:
            try:
                outcome = self._ring.send(meta, data, description)
                if outcome is not SENT:
                    self._send_slowly(outcome, partial(self._ring.send, meta, data, description), deadline)
            except queue.Full:
                break
            except RingshmError:
                if not count:
                    raise
                break
            count += 1
        return count

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

    def put_batch(self, batch: Any, timeout: float | None = None) -> int:
        """Send `n` messages, stacked: nested mappings of arrays of shape `(n, *shape)`; for channels with a spec.

        All are checked before the first is sent. An UpTo field's array may be shorter than its maximum; a Batch's
        `lengths` say how much of each row is sent.

        Returns:
            How many were sent within `timeout` seconds (None: all), as put_many.

        Raises:
            SpecMismatch: names the field; nothing was sent.
            TypeError: if the channel has no spec.
            As put_many.
        """
        codec = self._typed("put_batch")
        deadline = deadline_of(True, timeout)
        if not self.sent:
            self._start_sending()
        with self._naming():
            encoded = codec.encode_batch(batch)
        self._ring.called[0] = monotonic()
        return self._send_all(encoded, deadline)

    # --- loans

    def loan(self, timeout: float | None = None, nbytes: int | None = None) -> Loan:
        """Write straight into a free slot: `with channel.loan() as loan: loan.array((84, 84), np.uint8)[...] = frame`.

        Nothing is copied: the message is what was written when the block ends. While the block waits for a slot, what
        is said at `put` holds.

        Args:
            timeout: for a free slot, in seconds, when the block begins; None waits for ever.
            nbytes: how many bytes of the loan's `buffer` to send, settable until the block ends.

        Raises:
            PayloadTooLarge: if `nbytes` is more than a slot holds.
            As `put`, when the block begins; ChannelClosed also when it ends. Then nothing was sent.
        """
        if timeout is not None:
            check_timeout(timeout)
        return Loan(self, timeout, nbytes if nbytes is None else self._fitting(nbytes))

    def _fitting(self, nbytes: int) -> int:
        """A size in bytes that a slot holds, checked."""
        if operator.index(nbytes) < 0:
            raise ValueError(f"nbytes={nbytes} must not be negative")
        if nbytes > self._slot_size:
            raise self._too_large(nbytes)
        return nbytes

    def _claim(self, claimed: list[tuple[int, int]], timeout: float | None) -> None:
        """Claim a slot for a loan: its index is in `claimed` before it is this process's; see Ring.claim."""
        if not self.sent:
            self._start_sending()
        attachment = self._open()
        attachment.ring.called[0] = monotonic()
        attempt = partial(attachment.ring.claim, claimed)
        outcome = attempt()
        if outcome is not CLAIMED:
            self._send_slowly(outcome, attempt, deadline_of(True, timeout))

    def _publish(self, slot: int, meta: int, description: bytes) -> None:
        """Publish a loan's slot, however long a stopped process holds the mutex."""
        attachment = self._open()
        while True:
            outcome = attachment.ring.publish(slot, meta, description)
            if outcome is SENT:
                break
            if outcome is NOTICE:
                raise ChannelClosed(f"channel {self._name!r} was shut down: the loan was not sent")

    # --- when it does not succeed at once

    def _send_slowly(self, outcome: Outcome, attempt: Callable[[], Outcome], deadline: float) -> None:
        """Go on after a `send` or `claim` that did not succeed at once, by further attempts."""
        attachment = self._open()
        try:
            self._send_when_possible(attachment, outcome, attempt, deadline)
        except BaseException:
            attachment.standstill.end()
            raise

    def _send_when_possible(
        self, attachment: Attachment, outcome: Outcome, attempt: Callable[[], Outcome], deadline: float
    ) -> None:
        ring, tries, seconds, waits = attachment.ring, 0, SHORT_SLICE, 0
        while outcome is not SENT and outcome is not CLAIMED:
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
                if deadline == math.inf:
                    attachment.standstill.check(first=not waits)
                    waits += 1
                if self._send_spin.always:
                    self._pause(attachment)
                else:
                    remaining = max(0.0, deadline - monotonic())
                    self._sleep(attachment, attachment.space, lambda: not ring.full(), min(seconds, remaining))
                    seconds = SLICE
                if waits:
                    attachment.standstill.end()
            outcome = attempt()

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

    def get(self, block: bool = True, timeout: float | None = None, out: Any = None) -> Any:
        """The oldest message, which the caller owns: nothing in it points into shared memory.

        While there is none it waits, for up to `timeout` seconds (None: for ever; 0, or `block=False`: not at all).
        The message is received once it is decoded; if this process dies before, another receiver gets it.

        Args:
            out: memory to copy array data into: an array or writable buffer, for a message that is one array (or
                `bytes`, for a buffer); or a dict of them, nested as the message is, for one of which it names arrays.
                It is returned; whatever else is in a message that is a dict is put into it.

        Raises:
            queue.Empty: if none came in time.
            SpecMismatch: if the message does not go into `out`, by its form, shape or dtype; it stays in its place.
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
        if out is not None:
            return self._get_into(out, deadline_of(block, timeout))
        value = self._ring.receive(self._codec.decode)
        if value.__class__ is Outcome:
            value = self._receive_slowly(
                value, lambda: self._ring.receive(self._codec.decode), deadline_of(block, timeout)
            )
        return value

    def _get_into(self, out: Any, deadline: float) -> Any:
        codec = self._codec
        with self._naming():
            decode = codec.into(out) if isinstance(codec, SpecCodec) else into(codec, out)
        try:
            value = self._ring.receive(decode)
            if value.__class__ is Outcome:
                value = self._receive_slowly(value, lambda: self._ring.receive(decode), deadline)
            return value
        except Misfit as misfit:
            raise SpecMismatch(f"channel {self._name!r}: {misfit}; the message is back in its place") from None

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
        ring = self._open().ring
        ring.called[0] = monotonic()
        values: Any = ring.receive_many(limit, self._codec.decode)
        if values.__class__ is Outcome:
            values = self._receive_slowly(values, lambda: ring.receive_many(limit, self._codec.decode), deadline)
        return values  # type: ignore[no-any-return]

    # --- batches of a spec's messages

    def get_batch(self, n: int, *, min: int | None = None, timeout: float | None = None, out: Any = None) -> Batch:
        """The `n` oldest messages, stacked: nested dicts of arrays of shape `(n, *shape)`; for channels with a spec.

        It waits until all are there and copies each once. They are received together, when all are copied. If a signal
        handler raises when they have been received, the next call returns that batch, however many it asks for.

        Args:
            n: how many, at most the capacity.
            min: at the time-out, or when no more can come, take what is there, if it is at least so many.
            timeout: in seconds; None waits for ever, 0 not at all.
            out: nested mappings of arrays of shape `(n or more, *shape)` to copy into.

        Returns:
            A dict, whose `lengths` say for each UpTo field how much of each row is the message's, shape `(n,)`; the
            rest of the row is zeros.

        Raises:
            queue.Empty: if too few came in time; nothing was taken.
            EndOfChannel: as `get`; also if too few are left and no more can come. They stay.
            SpecMismatch: if `out` has not the spec's fields; nothing was taken.
            TypeError: if the channel has no spec.
        """
        codec = self._typed("get_batch")
        n = whole_number(n, "n", self.capacity)
        least = n if min is None else whole_number(min, "min", n)
        deadline = deadline_of(True, timeout)
        if not self.received:
            self._start_receiving()
        ring = self._open().ring
        ring.called[0] = monotonic()
        with self._naming():
            arrays = codec.batch_arrays(n, out)

        def gather(found: list[tuple[int, int]]) -> Batch:
            return codec.stack(found, ring.description_of, arrays)

        batch: Any = ring.receive_batch(n, n, gather)
        if batch.__class__ is Outcome:
            try:
                batch = self._receive_slowly(batch, lambda: ring.receive_batch(n, n, gather), deadline, n)
            except (queue.Empty, EndOfChannel):
                batch = ring.receive_batch(n, least, gather) if least < n else EMPTY
                if batch.__class__ is Outcome:
                    raise
        return batch  # type: ignore[no-any-return]

    # --- borrows

    def borrow(self, timeout: float | None = None) -> Borrow:
        """Read the next message in its slot: `with channel.borrow() as message: learn(message.value)`.

        Arrays in it are read-only views of the slot; nothing is copied. The message is received when the block ends,
        also by an exception, unless the block has called `requeue`. If views are alive then, the slot stays this
        process's until the last of them has gone; the ring has fewer slots meanwhile. If this process dies before the
        block ends, another receiver gets the message.

        Args:
            timeout: for a message, in seconds, when the block begins; None waits for ever.

        Raises:
            As `get`, when the block begins.
        """
        if timeout is not None:
            check_timeout(timeout)
        return Borrow(self, timeout)

    def _take(self, attachment: Attachment, taken: list[tuple[int, int]], timeout: float | None) -> tuple[int, int]:
        """Take a message for a borrow: its record and word are in `taken` before it is this process's.

        Returns:
            The slot and its R_META.
        """
        if not self.received:
            self._start_receiving()
        attachment.ring.called[0] = monotonic()
        found: list[tuple[int, int]] = []

        def attempt() -> Any:
            outcome = attachment.ring.take(taken, found)
            return found if outcome is TAKEN else outcome

        value = attempt()
        if value is not found:
            self._receive_slowly(value, attempt, deadline_of(True, timeout))
        ((slot, meta),) = found
        return slot, meta

    # --- when it does not succeed at once

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

    def _undecodable(self, error: Exception | None) -> UndecodableMessage:
        """The error for a message that the codec has failed on."""
        return UndecodableMessage(
            f"channel {self._name!r}: a message could not be decoded ({error!r}); it counts as received"
        )

    def _receive_slowly(self, value: Any, attempt: Callable[[], Any], deadline: float, at_least: int = 1) -> Any:
        """Go on after an attempt that gave an outcome in place of (so many) messages, by further attempts.

        `attempt` is a Python function, and nothing is called once it has given a message: there a signal handler could
        raise, and the message would be lost.
        """
        attachment = self._open()
        try:
            return self._receive_when_possible(attachment, value, attempt, deadline, at_least)
        except BaseException:
            attachment.standstill.end()
            raise

    def _receive_when_possible(
        self, attachment: Attachment, value: Any, attempt: Callable[[], Any], deadline: float, at_least: int
    ) -> Any:
        ring, tries, rounds = attachment.ring, 0, 0

        def arrived() -> bool:
            return ring.ready() >= at_least

        while value.__class__ is Outcome:
            if value.error is not None:
                raise self._undecodable(value.error) from value.error
            if value is CONTENDED:
                tries += 1
                if not self._patience(attachment, ring.receivers, deadline, tries):
                    raise queue.Empty(f"channel {self._name!r}: another process holds the receivers' mutex")
            else:
                self._check_open(attachment)
                waits = monotonic() < deadline
                if not (waits and at_least == 1 and self._spin_for_message(ring)):
                    self._check_receivers(attachment, at_least)
                    if arrived():
                        pass
                    elif not waits:
                        if not attachment.reaper.look():
                            raise queue.Empty(f"channel {self._name!r}: no message came in time")
                    else:
                        if deadline == math.inf:
                            attachment.standstill.check(first=not rounds)
                            rounds += 1
                        if self._receive_spin.always:
                            self._pause(attachment)
                        else:
                            remaining = max(0.0, deadline - monotonic())
                            self._sleep(attachment, attachment.messages, arrived, min(SLICE, remaining))
                        if rounds:
                            attachment.standstill.end()
            value = attempt()
        return value

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

    def _check_receivers(self, attachment: Attachment, at_least: int) -> None:
        """Raise if not so many can come any more: first whether anybody may send, then whether enough are left."""
        shutdown, owner = attachment.words[SHUTDOWN], attachment.participants.owner
        if (shutdown or attachment.over_for_receivers()) and attachment.ring.drained_for(owner, at_least):
            self._check_open(attachment)
            reason = "was shut down" if shutdown else f"has no sender any more{self._gone(attachment, SENDER_GONE)}"
            left = attachment.ring.ready()
            rest = f"{left} messages are left, fewer than asked for" if left else "all its messages were received"
            raise EndOfChannel(f"channel {self._name!r} {reason}; {rest}")


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
        spec: in place of slot_size and codec, what each message is: fields of fixed dtype and shape, see `Spec`.
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
        slot_size: int | str | None = None,
        *,
        spec: Any = None,
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
        if (slot_size is None) == (spec is None):
            given = "neither" if spec is None else "both"
            raise TypeError(f"a channel takes slot_size or spec, {given} was given: slot_size follows from a spec")
        declared = None if spec is None else Spec(spec)
        nbytes = parse_size(slot_size, "slot_size") if slot_size is not None else Spec(spec).slot_size
        if declared is not None and codec != "pickle":
            raise TypeError(f"codec={codec!r} and spec were given: a channel with a spec needs no codec")
        if name is not None:
            check_name(name)
        custom = _check_codec(codec)
        options = Options(
            codec="spec" if declared is not None else "custom" if custom is not None else str(codec),
            oversize=_choice("oversize", oversize, OVERSIZE),
            wait=_choice("wait", wait, WAIT_STRATEGIES),
            when_full=_choice("when_full", when_full, WHEN_FULL),
            keep_open=bool(keep_open),
            max_deliveries=whole_number(max_deliveries, "max_deliveries", MAX_DELIVERIES),
        )
        text = "" if declared is None else declared.to_text()
        participants = whole_number(max_participants, "max_participants", MAX_ENTRIES - 2)
        layout = Layout(capacity, nbytes, participants, len(text.encode()))
        codec_name = custom.name if custom is not None else ""
        attachment = Attachment.create(name, layout, options, codec_name, text, bool(prefault))
        super().__init__(attachment, custom, creator=True)

    @classmethod
    def attach(
        cls, name: str, *, timeout: float | None = None, codec: Codec | None = None, spec: Any = None
    ) -> Channel:
        """Open a channel that any process of the same user has made.

        Args:
            timeout: how long to wait for it to appear, in seconds; None does not wait.
            codec: the channel's codec, if it is none of the built-in ones.
            spec: the spec that the channel is expected to have; None takes any, which the segment records.

        Raises:
            SpecMismatch: if the channel has another spec than the given one.
            ChannelNotFound: if there is none (in time), or only dead processes have left one.
            ChannelForbidden: if it belongs to another user.
            ChannelCorrupted: if the file of that name is no segment.
            IncompatibleChannel: if it has another layout version, or another codec than the given one.
            TooManyParticipants: if `max_participants` living processes are attached.
            BrokenChannel: if a stopped process holds the table of participants for all of `timeout` (or 10 s).
        """
        check_name(name)
        declared = None if spec is None else Spec(spec)
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
        channel = cls._on(attachment, codec)
        if declared is not None and declared != channel.spec:
            has = "no spec" if channel.spec is None else f"the spec\n{channel.spec.describe()}"
            channel.close()
            raise SpecMismatch(f"channel {name!r} has {has}\nattach was given the spec\n{declared.describe()}")
        return channel

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
        _choice("codec", codec, tuple(_BUILT_IN_CODECS))
        return None
    if not isinstance(codec, Codec) or not isinstance(codec.name, str) or not codec.name:
        raise TypeError(f"codec={codec!r} must be 'pickle', 'plain' or an object with name, encode and decode")
    if len(codec.name.encode()) > CODEC_NAME_NBYTES:
        raise ValueError(f"codec name {codec.name!r} is longer than {CODEC_NAME_NBYTES} bytes")
    return codec
