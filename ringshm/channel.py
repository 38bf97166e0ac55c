"""Channel: the face of the ring. Objects in, objects out; who may wait, for how long, and how it ends.

A handle (Channel, Sender, Receiver) belongs to one process's attachment. It takes a role at its first `put` or `get`,
unless its class fixes it. Everything that succeeds at once is a few lines here and one critical section in ring.py; the
loops below are for what does not.
"""

from __future__ import annotations

import errno
import math
import operator
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload
from weakref import ref

import numpy as np

from .aio import AsyncReceives, AsyncSends
from .annotations import M, Oversize, T, T_co, T_contra, V, WaitStrategy, WhenFull
from .attachment import Attachment
from .codecs import Codec
from .errors import (
    BrokenChannel,
    ChannelClosed,
    EndOfChannel,
    PayloadTooLarge,
    RingshmError,
    SpecMismatch,
)
from .handle import Handle, check_codec, check_timeout, choice, closed_elsewhere, deadline_of, spec_or_size
from .layout import (
    FREE,
    GIVEN_UP,
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
    WAIT_STRATEGIES,
    WHEN_FULL,
    Layout,
    Options,
    parse_size,
    whole_number,
)
from .loans import Borrow, Loan, Misfit, adopt_into, into
from .mutex import SLICE
from .ring import CLAIMED, CONTENDED, EMPTY, NOTICE, SENT, STREAM, TAKEN, Outcome, Ring, Taken, corrupted
from .segment import check_name
from .specs import Spec, SpecLike
from .stats import ChannelStats, take_stats
from .stream import Assembly, Feed
from .typed import Batch, SpecCodec
from .waiting import IDLE_SLICE, IDLE_SLICES, SHORT_SLICE

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .annotations import ChannelOptions


class _ClosedRing:
    """In place of the ring of a closed handle."""

    def __init__(self, name: str) -> None:
        self.called = [0.0]
        self._name = name

    def _refuse(self, *_: object) -> NoReturn:
        raise closed_elsewhere(self._name)

    send = send_many = receive = receive_many = receive_batch = _refuse
    streams = False


class _Endpoint(Handle):
    """What all handles on a ring have in common."""

    def _bind(self, attachment: Attachment) -> None:
        self._ring: Ring = attachment.ring

    def _unbind(self) -> None:
        closed: Any = _ClosedRing(self._name)
        self._ring = closed

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._layout.capacity

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

    def shutdown(self, immediate: bool = False) -> None:
        """End the stream for everybody, as `queue.Queue.shutdown` does. Every waiter wakes at once.

        Senders that wait, and later `put`s, get ChannelClosed. Receivers get what is there first and then EndOfChannel.

        Args:
            immediate: drop what is there, and count it as dropped: receivers get EndOfChannel at once.

        Raises:
            ChannelClosed: after `close`.
        """
        attachment = self._open()
        ring = attachment.ring
        while not ring.close_for_senders():
            pass
        if immediate:
            while ring.drop_oldest(self.capacity) is CONTENDED:
                pass
        attachment.announce_change()


class _Sends(AsyncSends[T_contra], _Endpoint):
    """The methods of a handle that may send."""

    def put(self, obj: T_contra, block: bool = True, timeout: float | None = None) -> None:
        """Copy `obj` into a free slot, behind all messages whose `put` has returned.

        While the ring is full it waits. With `when_full="drop_oldest"` the oldest unread message goes instead. If this
        process is interrupted or dies before `put` has returned, the message was sent whole or not at all.

        A message larger than a slot takes as many free slots as it needs, and `put` returns. If there are not so many,
        it goes through some of them piece by piece while its receiver copies, and `put` returns when it is received;
        `timeout` is for all of that, and when it is over the message is taken back. It has its place in the order from
        its beginning. If its receiver dies, another gets it from the start.

        Args:
            obj: what the channel's codec takes; with a spec, a mapping of its fields to arrays or scalars.
            block: False does not wait, whatever `timeout` is.
            timeout: in seconds; None waits for ever, 0 not at all.

        Raises:
            queue.Full: if no slot came free in time, or a message larger than a slot was not received in time.
            PayloadTooLarge: if the encoded object is larger than a slot, and `put` must not wait, or the channel was
                made with `oversize="error"`.
            SpecMismatch: if `obj` is not what the spec says; names the field.
            ChannelClosed: after `close` or `shutdown`.
            BrokenChannel: if there has been a receiver and none is left or may still come.
            ChannelDeadlock: if `timeout` is None and threads that wait themselves hold all slots.
            Exception: what encoding `obj` raises; nothing was sent.
        """
        if not self.sent:
            self._start_sending()
        if timeout is not None and block:
            check_timeout(timeout)
        meta, data, description = self._codec.encode(obj)
        now = self._ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()
        if meta >> 16 > self._slot_size:
            self._stream(meta, data, description, deadline_of(block, timeout))
            return
        outcome = self._ring.send(meta, data, description)
        if outcome is not SENT:
            send = partial(self._ring.send, meta, data, description)
            self._send_slowly(outcome, send, deadline_of(block, timeout))

    def put_nowait(self, obj: T_contra) -> None:
        """`put(obj, block=False)`: what does not fit into a free slot at once raises."""
        self.put(obj, False)

    def put_many(self, objs: Iterable[T_contra], timeout: float | None = None) -> int:
        """Send objects in order, as many as fit in time.

        All are encoded before the first is sent, so one that cannot be sent leaves the channel as it was. Small ones
        are sent together, under one grant of the senders' mutex for each MiB; others may send between those.

        Args:
            objs: what `put` takes, each.
            timeout: for all of them, in seconds; None waits for ever, 0 not at all.

        Returns:
            How many were sent. Fewer than all: the time is up, or the channel ended after some had been sent.

        Raises:
            As `put`, except queue.Full, and only if none was sent.
        """
        deadline = deadline_of(True, timeout)
        if not self.sent:
            self._start_sending()
        encoded = [self._codec.encode(obj) for obj in objs]
        self._begin_call(self._ring)
        for meta, _, _ in encoded:
            if meta >> 16 > self._slot_size and not (self._ring.streams and deadline):
                raise self._cannot_stream(meta >> 16)
        return self._send_all(encoded, deadline)

    def _send_all(self, encoded: Sequence[tuple[int, Any, bytes]], deadline: float) -> int:
        """Send in order, as many as can be; raises what ends the channel only if none was."""
        count = 0
        while count < len(encoded):
            meta, data, description = encoded[count]
            try:
                if meta >> 16 > self._slot_size:
                    self._stream(meta, data, description, deadline)
                elif run := self._ring.send_many(encoded, count):
                    count += run
                    continue
                else:
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

        Args:
            timeout: in seconds; None waits for ever, 0 not at all.

        Returns:
            False if that was not so in time.

        Raises:
            BrokenChannel: if messages are left and nobody is left to receive them.
            ChannelDeadlock: if `timeout` is None and this thread has borrowed one of them itself, or threads that wait
                hold all slots.
            ChannelClosed: after `close`.
        """
        deadline = deadline_of(True, timeout)
        attachment = self._open()
        sender, standstill, rounds = attachment.participants.sender, attachment.standstill, 0
        try:
            while attachment.ring.unfinished(sender):
                # nobody can come any more, and then look again: the last receiver may have taken them before it went
                if attachment.over_for_senders() and attachment.ring.unfinished(sender):
                    attachment.reaper.look()
                    raise self._broken(attachment, " that would receive what was put")
                if attachment.ring.hides_messages():
                    attachment.ring.settle()
                if deadline == math.inf:
                    standstill.check_own(sender=sender)
                    standstill.check(first=not rounds)
                    rounds += 1
                if not self._sleep_for_event(attachment, lambda: not attachment.ring.unfinished(sender), deadline):
                    return not attachment.ring.unfinished(sender)
        finally:
            standstill.end()
        return True

    wait_for_all_ack = flush

    def put_batch(self, batch: Mapping[str, Any], timeout: float | None = None) -> int:
        """Send `n` messages, stacked; for channels with a spec. The mirror of `get_batch`.

        All are checked before the first is sent.

        Args:
            batch: nested mappings of arrays of shape `(n, *shape)`. An UpTo field's array may be shorter than its
                maximum; a Batch's `lengths` say how much of each row is sent.
            timeout: for all of them, in seconds; None waits for ever, 0 not at all.

        Returns:
            How many were sent, as `put_many`.

        Raises:
            SpecMismatch: names the field; nothing was sent.
            TypeError: if the channel has no spec.
            As `put_many`.
        """
        codec = self._typed("put_batch")
        deadline = deadline_of(True, timeout)
        if not self.sent:
            self._start_sending()
        try:
            encoded = codec.encode_batch(batch)
        except SpecMismatch as error:
            raise codec.named(error) from None
        self._begin_call(self._ring)
        return self._send_all(encoded, deadline)

    # --- loans

    def loan(self, timeout: float | None = None, nbytes: int | str | None = None) -> Loan:
        """Write straight into a free slot, within a `with` block: nothing is copied.

        The message is what was written when the block ends. While the block waits for a slot, what is said at `put`
        holds; a loan has one slot, so it never sends a message larger than that.

        >>> import numpy as np, ringshm
        >>> with ringshm.Channel(4, "64KiB") as channel:
        ...     with channel.loan() as loan:
        ...         loan.array((2, 3), np.uint8)[...] = 7
        ...     channel.get()
        array([[7, 7, 7],
               [7, 7, 7]], dtype=uint8)

        Args:
            timeout: for a free slot, in seconds, when the block begins; None waits for ever, 0 not at all.
            nbytes: how many bytes of the loan's `buffer` to send, settable until the block ends; a string such as
                "64KiB" also does. None sends the whole slot.

        Returns:
            A context manager, see Loan.

        Ownership:
            The slot is this process's from the block's beginning to its end: sent then, or given back unsent if the
            block raises, calls `discard`, or the process dies.

        Raises:
            PayloadTooLarge: if `nbytes` is more than a slot holds.
            TypeError: if `nbytes` is given, and the channel has a spec.
            As `put`, when the block begins; ChannelClosed also when it ends. Then nothing was sent.
        """
        if timeout is not None:
            check_timeout(timeout)
        return Loan(self, timeout, nbytes if nbytes is None else self._fitting(nbytes))

    def _fitting(self, nbytes: int | str) -> int:
        """How many bytes of a loan's buffer to send, checked."""
        if self.spec is not None:
            raise TypeError(f"nbytes={nbytes!r} was given for a loan of a channel with a spec, which says what is sent")
        try:
            size = parse_size(nbytes, "nbytes") if isinstance(nbytes, str) else operator.index(nbytes)
        except TypeError:
            raise TypeError(f"nbytes={nbytes!r} must be an int, or a string such as '64KiB'") from None
        if size < 0:
            raise ValueError(f"nbytes={size} must not be negative")
        if size > self._slot_size:
            raise self._too_large(size)
        return size

    def _claim(self, claimed: list[tuple[int, int]], timeout: float | None) -> None:
        """Claim a slot for writing: its index is in `claimed` before it is this process's; see Ring.claim."""
        if not self.sent:
            self._start_sending()
        attachment = self._open()
        self._begin_call(attachment.ring)
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
                raise ChannelClosed(f"channel {self._name!r} was shut down: the loan was not sent; make a new channel")

    # --- messages larger than a slot

    def _stream(self, meta: int, data: Any, description: bytes, deadline: float) -> None:
        """Send a message that is larger than a slot: see stream.py."""
        nbytes = meta >> 16
        attachment = self._open()
        ring = attachment.ring
        if not ring.streams or not deadline:
            raise self._cannot_stream(nbytes)
        claimed: list[tuple[int, int]] = []
        try:
            outcome = ring.claim(claimed)
            if outcome is not CLAIMED:
                self._send_slowly(outcome, partial(ring.claim, claimed), deadline)
            ((head, since),) = claimed
            feed = Feed(ring, head, since, nbytes, data)
            self._prepare_feed(ring, feed)
            self._publish_stream(attachment, head, meta, description, deadline)
            self._feed(attachment, feed, deadline)
        except (queue.Full, RingshmError):
            if not claimed or ring.take_back(*claimed[0]):
                raise
            return  # it was received at the last moment
        except BaseException:
            for claim in claimed:
                ring.take_back(*claim)
            raise
        ring.take_back(head, since)  # what a message leaves that was delivered too often

    def _prepare_feed(self, ring: Ring, feed: Feed) -> None:
        """Claim a window, before the head is published; write the message, if the window has room for all of it."""
        ring.watch(feed.head, ref(feed), received=False)
        whole = feed.claim_window()
        if self._options.when_full == "drop_oldest":
            for _ in range(self.capacity if feed.may_fit else 0):
                if whole or ring.drop_oldest() is not SENT:
                    break
                whole = feed.claim_window()
        if whole:
            feed.write_all()

    def _cannot_stream(self, nbytes: int) -> PayloadTooLarge:
        if self._ring.streams:
            return self._too_large(nbytes, "send it with put(), which waits until it is received")
        return self._too_large(nbytes, "with oversize='stream', or send it in parts")

    def _publish_stream(
        self, attachment: Attachment, head: int, meta: int, description: bytes, deadline: float
    ) -> None:
        tries = 0
        while True:
            outcome = attachment.ring.publish(head, meta, description)
            if outcome is SENT:
                break
            if outcome is NOTICE:
                self._check_senders(attachment)
            tries += 1
            if not self._patience(attachment, attachment.ring.senders, deadline, tries):
                raise queue.Full(self._held("senders"))

    def _feed(self, attachment: Attachment, feed: Feed, deadline: float) -> None:
        """Write the pieces of a published message until it is received, or dropped."""
        ring, spin = attachment.ring, self._send_spin
        while not feed.has_ended():
            if monotonic() >= deadline:
                raise self._not_received(feed)
            if feed.advance() or spin.until_changed(ring.words, feed.others, feed.seen):
                continue
            if ring.is_waiting(feed.head):
                self._check_senders(attachment)
            self._wait_for_other_end(attachment, feed, spin, deadline)

    def _not_received(self, feed: Feed) -> queue.Full:
        return queue.Full(
            f"channel {self._name!r}: a message of {feed.nbytes} bytes, larger than a slot, was not received in time: "
            "receive faster, wait longer, or make the channel with larger slots"
        )

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
        ring, tries, seconds, waits, slices = attachment.ring, 0, SHORT_SLICE, 0, 0
        while outcome is not SENT and outcome is not CLAIMED:
            self._check_open(attachment)
            if outcome is NOTICE:
                self._check_senders(attachment)
            elif outcome is CONTENDED:
                tries += 1
                if not self._patience(attachment, ring.senders, deadline, tries):
                    raise queue.Full(self._held("senders"))
            elif self._options.when_full == "drop_oldest":
                dropped = ring.drop_oldest()
                if dropped is CONTENDED:
                    tries += 1
                    if not self._patience(attachment, ring.receivers, deadline, tries):
                        raise queue.Full(self._held("receivers"))
                elif dropped is EMPTY and ring.full() and not attachment.reaper.look():
                    raise self._none_to_drop()
            elif monotonic() >= deadline:
                if not attachment.reaper.look():
                    self._check_senders(attachment)
                    raise self._no_space_in_time()
            elif not self._spin_for_space(ring):
                self._check_senders(attachment)
                if deadline == math.inf:
                    attachment.standstill.check(first=not waits)
                    waits += 1
                if self._send_spin.always:
                    self._pause(attachment)
                else:
                    remaining = max(0.0, deadline - monotonic())
                    self._sleep(
                        attachment,
                        attachment.space,
                        lambda: not ring.full(),
                        min(seconds, remaining),
                        lambda: ring.free_slots() > 1,
                    )
                    slices += 1
                    seconds = SLICE if slices < IDLE_SLICES else IDLE_SLICE
                if waits:
                    attachment.standstill.end()
            outcome = attempt()

    def _none_to_drop(self) -> queue.Full:
        return queue.Full(
            f"channel {self._name!r}: all slots are being read or written, none can be dropped: end borrows and loans, "
            "drop views, or make it with more slots"
        )

    def _no_space_in_time(self) -> queue.Full:
        return queue.Full(
            f"channel {self._name!r}: no slot came free in time: receive faster, wait longer, or make it with more "
            "slots"
        )

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
            raise ChannelClosed(f"channel {self._name!r} was shut down: nothing more can be sent; make a new one")
        if attachment.over_for_senders():
            self._check_open(attachment)
            attachment.announce_change()  # so that the next put looks, too
            raise self._broken(attachment)

    def _broken(self, attachment: Attachment, what: str = "") -> BrokenChannel:
        gone = self._gone(attachment, RECEIVER_GONE)
        return BrokenChannel(
            errno.EPIPE,
            f"channel {self._name!r} has no receiver any more{what}{gone}; start another before sending on, or make "
            "the channel with keep_open=True to let senders wait for one",
        )


class _Receives(AsyncReceives[T_co], _Endpoint):
    """The methods of a handle that may receive."""

    @overload
    def get(self, block: bool = True, timeout: float | None = None, out: Mapping[str, Any] | None = None) -> T_co: ...
    @overload
    def get(self, block: bool, timeout: float | None, out: V) -> V: ...
    @overload
    def get(self, block: bool = True, timeout: float | None = None, *, out: V) -> V: ...
    def get(self, block: bool = True, timeout: float | None = None, out: Any = None) -> Any:
        """The oldest message, which the caller owns: nothing in it points into shared memory.

        While there is none it waits. The message is received once it is decoded; if this process dies before, another
        receiver gets it. If time is up when a message larger than a slot has come in part, it stays in its place, and
        the next call goes on with it.

        Args:
            block: False does not wait, whatever `timeout` is.
            timeout: in seconds; None waits for ever, 0 not at all.
            out: memory to copy array data into: an array or writable buffer, for a message that is one array (or
                `bytes`, for a buffer); or a dict of them, nested as the message is, for one of which it names arrays.

        Returns:
            The message. With `out`, that: whatever else is in a message that is a dict is put into it, and arrays among
            that are named by it from then on. With `out` and a spec, a dict of the arrays in `out`, UpTo ones cut to
            the message's length, and of the scalars that `out` does not name.

        Raises:
            queue.Empty: if none came in time.
            SpecMismatch: if the message does not go into `out`, by its form, shape or dtype; it stays in its place.
            EndOfChannel: if none is there and no sender is left or may still come, or after `shutdown`.
            ChannelClosed: after `close`.
            ChannelDeadlock: if `timeout` is None and threads that wait themselves hold all slots.
            UndecodableMessage: if the codec failed on it; it counts as received.
            InterruptedCall: if a signal handler has raised in an earlier call of another kind that had just received.
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
            ring, codec = self._ring, self._codec
            value = self._receive_slowly(
                value,
                lambda: ring.receive(codec.decode),
                deadline_of(block, timeout),
                stream=lambda deadline: self._receive_stream(codec.adopt, deadline),
            )
        return value

    def _get_into(self, out: Any, deadline: float) -> Any:
        codec = self._codec
        try:
            decode = codec.into(out) if isinstance(codec, SpecCodec) else into(codec, out)
        except SpecMismatch as error:
            raise SpecMismatch(f"channel {self._name!r}: {error}") from None
        try:
            value = self._ring.receive(decode, out)
            if value.__class__ is Outcome:
                value = self._receive_slowly(
                    value,
                    lambda: self._ring.receive(decode, out),
                    deadline,
                    stream=lambda deadline: self._receive_stream(adopt_into(codec, out), deadline, out),
                )
            return value
        except Misfit as misfit:
            raise SpecMismatch(f"channel {self._name!r}: {misfit}; the message is back in its place") from None

    def get_nowait(self) -> T_co:
        """`get(block=False)`: raises queue.Empty if no message is there."""
        return self.get(False)

    def get_many(self, max_messages: int, timeout: float | None = None) -> list[T_co]:
        """Wait for one message, then take what is there, up to `max_messages`, without waiting again.

        They are received once all are decoded. If one cannot be decoded, those before it are returned, and the next
        call raises UndecodableMessage. A message larger than a slot comes alone.

        Args:
            max_messages: at most so many, at least 1.
            timeout: for the first, in seconds; None waits for ever, 0 not at all.

        Returns:
            The messages in their order, at least one; the caller owns them, as by `get`.

        Raises:
            As `get`.
        """
        limit = whole_number(max_messages, "max_messages")
        if not self.received:
            self._start_receiving()
        deadline = deadline_of(True, timeout)
        ring = self._open().ring
        self._begin_call(ring)
        values: Any = ring.receive_many(limit, self._codec.decode)
        if values.__class__ is Outcome:
            codec = self._codec
            values = self._receive_slowly(
                values,
                lambda: ring.receive_many(limit, codec.decode),
                deadline,
                stream=lambda deadline: self._receive_stream(codec.adopt, deadline, many=True),
            )
        return values  # type: ignore[no-any-return]

    # --- batches of a spec's messages

    def get_batch(
        self, n: int, *, min: int | None = None, timeout: float | None = None, out: Mapping[str, Any] | None = None
    ) -> Batch:
        """The `n` oldest messages, stacked; for channels with a spec.

        It waits until all are there and copies each once. They are received together, when all are copied. If a signal
        handler raises when they have been received, the next call with the same `out` returns that batch, however many
        it asks for.

        >>> import ringshm
        >>> with ringshm.Channel(8, spec={"obs": ("f4", 2), "reward": "f4"}) as channel:
        ...     for k in range(4):
        ...         channel.put({"obs": [k, k], "reward": k / 2})
        ...     batch = channel.get_batch(4)
        >>> batch["obs"].shape, batch["reward"].tolist()
        ((4, 2), [0.0, 0.5, 1.0, 1.5])

        Args:
            n: how many, at most the capacity.
            min: at the time-out, or when no more can come, take what is there, if it is at least so many. None: all or
                none.
            timeout: in seconds; None waits for ever, 0 not at all.
            out: nested mappings of arrays of shape `(n or more, *shape)` to copy into.

        Returns:
            Nested dicts of arrays of shape `(n, *shape)`, which the caller owns: new ones, or the first rows of those
            in `out`. Its `lengths` say for each UpTo field how much of each row is the message's, shape `(n,)`; the
            rest of the row is zeros.

        Raises:
            queue.Empty: if too few came in time; nothing was taken.
            EndOfChannel: as `get`; also if too few are left and no more can come. They stay.
            SpecMismatch: if `out` has not the spec's fields; nothing was taken.
            TypeError: if the channel has no spec.
            As `get`.
        """
        codec = self._typed("get_batch")
        if n.__class__ is not int or not 0 < n <= self._layout.capacity:
            n = whole_number(n, "n", self.capacity, ", the capacity")
        least = n if min is None else whole_number(min, "min", n)
        if timeout is not None:
            check_timeout(timeout)
        if not self.received:
            self._start_receiving()
        ring = self._ring
        self._begin_call(ring)
        try:
            arrays = codec.batch_arrays(n, out)
        except SpecMismatch as error:
            raise codec.named(error) from None

        def gather(slots: list[int], metas: list[int]) -> Batch:
            return codec.stack(slots, metas, ring.description_of, arrays)

        batch: Any = ring.receive_batch(n, n, gather, out)
        if batch.__class__ is Outcome:
            deadline = deadline_of(True, timeout)
            try:
                batch = self._receive_slowly(batch, lambda: ring.receive_batch(n, n, gather, out), deadline, n)
            except (queue.Empty, EndOfChannel):
                if least == n:
                    raise
                batch = ring.receive_batch(n, least, gather, out)
                if batch.__class__ is Outcome:
                    if batch.error is not None:
                        raise self._undecodable(batch.error) from batch.error
                    raise
        return batch  # type: ignore[no-any-return]

    # --- borrows

    def borrow(self, timeout: float | None = None) -> Borrow[T_co]:
        """Read the next message in its slot, within a `with` block: nothing is copied.

        The message is received when the block ends, also by an exception, unless the block has called `requeue`. If
        this process dies before the block ends, another receiver gets the message. While none is there when the block
        begins, it waits.

        A message larger than a slot is copied to memory of this process, of which there are views then; they keep no
        slot. Until the block ends its sender still waits, if it does not fit into the ring, and may take it back when
        its time is up.

        >>> import numpy as np, ringshm
        >>> with ringshm.Channel(4, "64KiB") as channel:
        ...     channel.put({"obs": np.arange(4), "reward": 1.0})
        ...     with channel.borrow() as message:
        ...         print(message.value["obs"].sum(), message.value["obs"].flags.writeable)
        6 False

        Args:
            timeout: for a message, in seconds, when the block begins; None waits for ever, 0 not at all.

        Returns:
            A context manager, see Borrow.

        Ownership:
            Arrays in the message are read-only views of the slot. If some are alive when the block ends, the slot stays
            this process's until the last of them has gone; the ring has fewer slots meanwhile.

        Raises:
            As `get`, when the block begins.
        """
        if timeout is not None:
            check_timeout(timeout)
        return Borrow(self, timeout)

    def _take(self, attachment: Attachment, taken: Taken, timeout: float | None) -> None:
        """Take a message for a borrow: it is in `taken` before it is this process's."""
        if not self.received:
            self._start_receiving()
        self._begin_call(attachment.ring)

        def attempt() -> Any:
            outcome = attachment.ring.take(taken)
            return taken if outcome is TAKEN else outcome

        def stream(deadline: float) -> Any:
            return taken if self._assemble(attachment, taken, deadline) else EMPTY

        value = attempt()
        if value is not taken:
            self._receive_slowly(value, attempt, deadline_of(True, timeout), stream=stream)

    # --- messages larger than a slot

    def _receive_stream(
        self, adopt: Callable[[Any, int, bytes], Any], deadline: float, kind: Any = None, many: bool = False
    ) -> Any:
        """Receive the oldest message, which is larger than a slot: see stream.py.

        Args:
            adopt: makes the object of the payload in this process's own memory, R_META and description.
            kind: as `Ring.receive`.
            many: return a list of the one message.

        Returns:
            What `adopt` gave, or an UNDECODABLE outcome; or EMPTY if it was not to be had after all.
        """
        attachment = self._open()
        ring, taken = attachment.ring, Taken()
        value: Any = None
        try:
            assembly = self._assemble(attachment, taken, deadline)
            if assembly is None:
                return EMPTY
            value = assembly.decoded(adopt)
            if not assembly.end():
                return EMPTY
            return [value] if many and value.__class__ is not Outcome else value
        except BaseException:
            if taken.assembly is not None and taken.assembly.is_received():
                if value.__class__ is not Outcome:
                    ring.return_later(kind, value)
            else:
                ring.give_back(ring.pairs(taken))
            raise

    def _begin_assembly(self, attachment: Attachment, taken: Taken) -> Assembly:
        """The receiver's end of the message in `taken`, in which it is then, too."""
        feeder = attachment.ring.feeder_of(taken.slots[0])
        unknown = feeder > GIVEN_UP and not attachment.participants.is_in_use(feeder)
        if unknown and attachment.ring.feeder_of(taken.slots[0]) == feeder:  # its length is not to be trusted
            raise corrupted(self._name)
        try:
            taken.assembly = assembly = Assembly(attachment.ring, taken, self._pool)
        except MemoryError as error:
            raise MemoryError(
                f"channel {self._name!r}: no memory for a message of {taken.metas[0] >> 16} bytes, which is back in "
                f"its place ({error}): free some, or send less at once"
            ) from None
        return assembly

    def _assemble(self, attachment: Attachment, taken: Taken, deadline: float) -> Assembly | None:
        """Take the oldest message, which is larger than a slot, and copy all of it.

        Returns:
            The message, which is in `taken`, and not yet received; see Assembly.end. None if it was not to be had.

        Raises:
            queue.Empty: if time is up before all has come; the message is to be given back.
        """
        ring, spin = attachment.ring, self._receive_spin
        if ring.take(taken, stream=True) is not TAKEN:
            return None
        assembly = self._begin_assembly(attachment, taken)
        progress = monotonic()
        while True:
            if assembly.advance():
                progress = monotonic()
            if assembly.is_complete:
                return assembly
            if assembly.has_ended():
                assembly.end()
                taken.clear()
                return None
            # a message that went back and forth between receivers whose time was up would never arrive
            now = monotonic()
            if now >= deadline and (now > progress + SLICE or not assembly.is_repeated):
                assembly.leave()
                raise self._not_all_came(assembly)
            if not spin.until_changed(ring.words, assembly.others, assembly.seen):
                self._wait_for_other_end(attachment, assembly, spin, deadline)

    def _not_all_came(self, assembly: Assembly) -> queue.Empty:
        return queue.Empty(
            f"channel {self._name!r}: time was up when not all of a message of {assembly.nbytes} bytes, which is "
            "larger than a slot, had come: the next call goes on with it; wait longer, or make the channel with larger "
            "slots"
        )

    # --- when it does not succeed at once

    def __iter__(self) -> Iterator[T_co]:
        """Messages until the end of the stream, each as by `get()`."""
        while True:
            try:
                value = self.get()
            except EndOfChannel:
                return
            yield value

    def _receive_slowly(
        self,
        value: Any,
        attempt: Callable[[], Any],
        deadline: float,
        at_least: int = 1,
        stream: Callable[[float], Any] | None = None,
    ) -> Any:
        """Go on after an attempt that gave an outcome in place of (so many) messages, by further attempts, and by
        `stream` where the oldest message is larger than a slot.

        `attempt` is a Python function, and nothing is called once it has given a message: there a signal handler could
        raise, and the message would be lost.
        """
        attachment = self._open()
        try:
            return self._receive_when_possible(attachment, value, attempt, deadline, at_least, stream)
        except BaseException:
            attachment.standstill.end()
            raise

    def _receive_when_possible(
        self,
        attachment: Attachment,
        value: Any,
        attempt: Callable[[], Any],
        deadline: float,
        at_least: int,
        stream: Callable[[float], Any] | None,
    ) -> Any:
        ring, tries, rounds, slices = attachment.ring, 0, 0, 0

        def arrived() -> bool:
            return ring.ready() >= at_least

        while value.__class__ is Outcome:
            if value.error is not None:
                raise self._undecodable(value.error) from value.error
            if value is STREAM and stream is not None:
                value = stream(deadline)
                if value.__class__ is not Outcome:
                    return value  # not by way of `continue`, at which a handler may run
                continue
            if value is CONTENDED:
                tries += 1
                if not self._patience(attachment, ring.receivers, deadline, tries):
                    raise queue.Empty(self._held("receivers"))
            else:
                self._check_open(attachment)
                waits = monotonic() < deadline
                if not (waits and at_least == 1 and self._spin_for_message(ring)):
                    self._check_receivers(attachment, at_least)
                    if arrived():
                        pass
                    elif not waits:
                        if not attachment.reaper.look():
                            came = f"{ring.ready()} of {at_least} messages" if at_least > 1 else "no message"
                            raise queue.Empty(f"channel {self._name!r}: {came} came in time: wait longer, or send more")
                    else:
                        if deadline == math.inf:
                            attachment.standstill.check_own(at_least)
                            attachment.standstill.check(first=not rounds)
                            rounds += 1
                        if self._receive_spin.always:
                            self._pause(attachment)
                        else:
                            remaining = max(0.0, deadline - monotonic())
                            slices += 1
                            self._sleep(
                                attachment,
                                attachment.messages,
                                arrived,
                                min(SLICE if slices < IDLE_SLICES else IDLE_SLICE, remaining),
                                lambda: ring.ready() > at_least,
                            )
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
        over = shutdown or attachment.over_for_receivers()
        if over and attachment.ring.hides_messages():
            attachment.ring.settle()
        elif over and attachment.ring.drained_for(owner, at_least):
            self._check_open(attachment)
            attachment.listeners.wake_watched()  # so that their descriptors stay readable
            reason = "was shut down" if shutdown else f"has no sender any more{self._gone(attachment, SENDER_GONE)}"
            left = attachment.ring.ready()
            rest = "all its messages were received"
            if left:
                rest = f"{left} messages are left, fewer than were asked for: get_batch(min=...) or get takes them"
            raise EndOfChannel(f"channel {self._name!r} {reason}; {rest}")


class Sender(_Sends[T_contra]):
    """A handle that only sends; get it from `Channel.sender()`."""

    role = SENDER

    if not TYPE_CHECKING:  # to a type checker it would say that the other role's methods are there

        def __getattr__(self, attribute: str) -> NoReturn:
            raise _missing(self, attribute, _Receives, "receiver")


class Receiver(_Receives[T_co]):
    """A handle that only receives; get it from `Channel.receiver()`."""

    role = RECEIVER

    if not TYPE_CHECKING:  # as Sender

        def __getattr__(self, attribute: str) -> NoReturn:
            raise _missing(self, attribute, _Sends, "sender")


def _missing(handle: Handle, attribute: str, other: type[Handle], role: str) -> AttributeError:
    text = f"{type(handle).__name__!r} object has no attribute {attribute!r}"
    if hasattr(other, attribute):
        text += f": that is for a handle of the other role; get one with channel.{role}()"
    return AttributeError(text)


class Channel(_Sends[T], _Receives[T]):
    """A preallocated ring of `capacity` slots in shared memory, between any processes and threads of one machine.

    Many may send, many may receive; each message goes to one receiver, in the order in which the `put`s completed. When
    it is full `put` waits, when it is empty `get` does. A process that dies takes nothing with it: what it was about to
    send was not sent, what it had not received whole goes to another. `Channel[Step](…)` says what its messages are to
    a type checker; a `spec=Spec[Step](…)` or a codec says so, too.

    >>> import ringshm
    >>> with ringshm.Channel(capacity=64, slot_size="4KiB") as channel:
    ...     channel.put({"reward": 1.0})
    ...     channel.get()
    {'reward': 1.0}

    Args:
        capacity: number of slots: messages that may be on their way at once.
        slot_size: largest encoded message in bytes, or a string such as "64KiB"; a bare array or `bytes` of exactly
            that size fits.
        spec: in place of slot_size and codec, what each message is: fields of fixed dtype and shape, see `Spec`.
        name: for `Channel.attach`; None makes a fresh, unguessable one. A name that only dead processes have left is
            reclaimed.
        codec: "pickle" (any picklable object), "plain" (built-in types and arrays; decoding runs no code), or an
            object with the `Codec` protocol.
        oversize: what becomes of a message larger than a slot: "stream" sends it in pieces of a slot's size, through
            as many slots as are free for it, even one alone, see `put`; "error" refuses it with PayloadTooLarge.
        wait: "adaptive" (spin briefly while that pays, then sleep), "block" (sleep at once) or "spin" (never sleep;
            costs a core for each waiter).
        when_full: "wait", or "drop_oldest": `put` never waits for space, the oldest unread message goes. If there is
            none to drop, since all slots are being read, it raises `queue.Full`.
        keep_open: keep both ends open while this process lives, whoever else comes and goes.
        max_deliveries: how often a message is delivered, if its receivers die on it, before it is dropped.
        prefault: map all pages now, not at their first use. They are reserved in any case.
        max_participants: how many processes may be attached at once.
        reuse_memory: receive arrays of 1 MiB and more into memory that the process has used for such before and that
            nothing refers to any more, of which it keeps up to 256 MiB: without page faults. They are yours as any
            other, but do not own their data (`flags.owndata`), so that `resize` in place refuses.

    Raises:
        TypeError, ValueError: for an argument that makes no sense, by its name.
        ChannelExists: if a live process uses the name.
        InsufficientSharedMemory: if /dev/shm has not the space; nothing is left behind.

    Any call raises ChannelCorrupted if it finds what no channel holds in the segment, and ReentrantCall if a signal
    handler or finaliser makes it while it has interrupted one that holds the mutex.
    """

    @overload
    def __init__(
        self, capacity: int, slot_size: None = None, *, spec: Spec[T], **options: Unpack[ChannelOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: Channel[dict[str, Any]],
        capacity: int,
        slot_size: None = None,
        *,
        spec: Mapping[str, Any] | np.dtype[Any],
        **options: Unpack[ChannelOptions],
    ) -> None: ...
    @overload
    def __init__(
        self,
        capacity: int,
        slot_size: int | str,
        *,
        codec: Literal["pickle", "plain"] | Codec[T] = "pickle",
        **options: Unpack[ChannelOptions],
    ) -> None: ...
    def __init__(
        self,
        capacity: int,
        slot_size: int | str | None = None,
        *,
        spec: SpecLike | None = None,
        name: str | None = None,
        codec: Literal["pickle", "plain"] | Codec[T] = "pickle",
        oversize: Oversize = "stream",
        wait: WaitStrategy = "adaptive",
        when_full: WhenFull = "wait",
        keep_open: bool = False,
        max_deliveries: int = 3,
        prefault: bool = True,
        max_participants: int = 256,
        reuse_memory: bool = True,
    ) -> None:
        self._attachment = None
        capacity = whole_number(capacity, "capacity")
        declared, nbytes = spec_or_size("channel", spec, slot_size)
        if declared is not None and codec != "pickle":
            raise TypeError(f"codec={codec!r} and spec were given: a channel with a spec needs no codec")
        if name is not None:
            check_name(name)
        custom = check_codec(codec)
        options = Options(
            codec="spec" if declared is not None else "custom" if custom is not None else str(codec),
            oversize=choice("oversize", oversize, OVERSIZE),
            wait=choice("wait", wait, WAIT_STRATEGIES),
            when_full=choice("when_full", when_full, WHEN_FULL),
            keep_open=bool(keep_open),
            max_deliveries=whole_number(max_deliveries, "max_deliveries", MAX_DELIVERIES),
            kind=self.kind,
            reuse_memory=bool(reuse_memory),
        )
        text = "" if declared is None else declared.to_text()
        participants = whole_number(max_participants, "max_participants", MAX_ENTRIES - 2)
        layout = Layout(capacity, nbytes, participants, len(text.encode()))
        codec_name = custom.name if custom is not None else ""
        attachment = Attachment.create(name, layout, options, codec_name, text, bool(prefault))
        super().__init__(attachment, custom, creator=True)

    @overload
    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, codec: Codec[V]) -> Channel[V]: ...
    @overload
    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, spec: Spec[M]) -> Channel[M]: ...
    @overload
    @classmethod
    def attach(
        cls, name: str, *, timeout: float | None = None, spec: Mapping[str, Any] | np.dtype[Any] | None = None
    ) -> Channel[T]: ...
    @classmethod
    def attach(
        cls,
        name: str,
        *,
        timeout: float | None = None,
        codec: Codec[Any] | None = None,
        spec: SpecLike | None = None,
    ) -> Channel[Any]:
        """Open a channel that any process of the same user has made.

        What type its messages have is known from `codec` or `spec`, or said: `Channel[Step].attach(name)`.

        Args:
            name: the one that it was made with, or its `name`.
            timeout: how long to wait for it to appear, in seconds; None does not wait.
            codec: the channel's codec, if it is none of the built-in ones, which the segment records.
            spec: the spec that the channel is expected to have; None takes any, which the segment records.

        Returns:
            A handle on it, of no role yet. Close it.

        Raises:
            SpecMismatch: if the channel has another spec than the given one.
            ChannelNotFound: if there is none (in time), or only dead processes have left one.
            ChannelForbidden: if it belongs to another user.
            ChannelCorrupted: if the file of that name is no segment.
            IncompatibleChannel: if it has another layout version, or another codec than the given one, or is a Latest.
            TooManyParticipants: if `max_participants` living processes are attached.
            BrokenChannel: if a stopped process holds the table of participants for all of `timeout` (or 10 s).
        """
        return cls._attach(name, timeout, codec, spec)

    def sender(self) -> Sender[T]:
        """Another handle on this channel, which sends only. Close it too.

        While it is open this process counts as a sender, from now on, whether it sends or not.

        Raises:
            ChannelClosed: after `close`.
        """
        return Sender(self._open(), self._custom_codec)

    def receiver(self) -> Receiver[T]:
        """Another handle on this channel, which receives only. Close it too.

        While it is open this process counts as a receiver, from now on, whether it receives or not.

        Raises:
            ChannelClosed: after `close`.
        """
        return Receiver(self._open(), self._custom_codec)
