"""The steps of calls that send: encode, wait for space, feed a message larger than a slot, wait until all is received.

Blocking calls and calls in an event loop share them (steps.py). The public methods are in sender.py.
"""

from __future__ import annotations

import errno
import operator
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import ref

from ..arguments import parse_size
from ..errors import BrokenChannel, ChannelClosed, PayloadTooLarge, RingshmError, SpecMismatch, is_own
from ..messages.typed import SpecCodec
from ..process.attachment import Attachment
from ..ring.large import Feed
from ..ring.mutex import FencedMutex
from ..ring.outcomes import CLAIMED, CONTENDED, EMPTY, FULL, NOTICE, SENT, Outcome
from ..ring.slots import Ring
from ..ring.spin import Spin
from ..segment.layout import ATTENTION, FREE, RECEIVER_GONE, SHUTDOWN
from ..system import monotonic, sleep
from .endpoint import Endpoint
from .steps import Steps, Turn, finish

#: A message as `Ring.send` takes it: R_META, data, description.
Message = tuple[int, Any, bytes]
#: Seconds until a batch that waits for space for all of it looks again, if there is space for a part.
_SECONDS_BETWEEN_CLAIMS = 0.001


class Sending(Endpoint):
    """The steps of a handle that may send."""

    #: How many deliveries of what it publishes have failed, in another ring: see raw.py.
    _deliveries = 0

    # --- encoding

    def _encode_all(self, objs: Iterable[Any], deadline: float) -> Sequence[Message]:
        """Encode messages that are sent one after the other; raise if one of them can never be sent."""
        if not self._seat.sent:
            self._start_sending()
        encoded, largest = self._encode_each(objs)
        self._begin_call(self._ring)
        if largest > self._slot_size and not (self._ring.streams and deadline):
            raise self._cannot_stream(largest)
        return encoded

    def _encode_each(self, objs: Iterable[Any]) -> tuple[Sequence[Message], int]:
        """The messages of those objects, and the bytes of the largest payload."""
        encoded = [self._codec.encode(obj) for obj in objs]
        return encoded, max([meta >> 16 for meta, _, _ in encoded], default=0)

    def _encode_batch(self, call: str, batch: Mapping[str, Any]) -> Sequence[Message]:
        """Encode the messages of a batch."""
        codec = self._typed(call)
        if not self._seat.sent:
            self._start_sending()
        try:
            encoded = self._encode_rows(codec, batch)
        except SpecMismatch as error:
            raise codec.named(error) from None
        self._begin_call(self._ring)
        return encoded

    def _encode_rows(self, codec: SpecCodec, batch: Mapping[str, Any]) -> Sequence[Message]:
        """The messages of a batch."""
        return codec.encode_batch(batch)

    # --- one message, and several

    def _until_sent(self, turn: Turn, outcome: Outcome, attempt: Callable[[], Outcome]) -> Steps[None]:
        """Go on after a `send` or `claim` that did not succeed at once, by further attempts."""
        turn.begin()
        while outcome is not SENT and outcome is not CLAIMED:
            yield from self._before_next_send(turn, outcome)
            outcome = attempt()

    def _before_next_send(self, turn: Turn, outcome: Outcome) -> Steps[None]:
        """Do what that outcome asks for, or wait."""
        attachment = turn.attachment
        ring = attachment.ring
        self._check_open(attachment)
        if outcome is NOTICE:
            self._check_senders(attachment)
        elif outcome is CONTENDED:
            yield from self._retry(turn, ring.senders, "senders")
        elif self._drops_oldest and ((dropped := ring.drop_oldest()) is not EMPTY or not ring.full()):
            if dropped is CONTENDED:
                yield from self._retry(turn, ring.receivers, "receivers")
        elif monotonic() >= turn.deadline:
            if not attachment.reaper.look():
                self._check_senders(attachment)
                raise self._full(attachment)
        elif not turn.waited(self, space=True) and not self._spin_for_space(turn.spin, ring):
            self._check_senders(attachment)
            turn.doubt("space")
            yield from turn.arrival(attachment.space, partial(ring.could_send, self._drops_oldest))

    def _full(self, attachment: Attachment) -> queue.Full:
        if self._drops_oldest:
            return queue.Full(
                f"channel {self._name!r}: all slots are being read or written, none could be dropped in time: end "
                "borrows and loans, drop views, wait longer, or make it with more slots"
            )
        nobody = self._nobody_left(attachment, RECEIVER_GONE, "receiver")
        return queue.Full(
            f"channel {self._name!r}: no slot came free in time{nobody}: receive faster, wait longer, or make it with "
            "more slots"
        )

    def _retry(self, turn: Turn, mutex: FencedMutex, whose: str) -> Steps[None]:
        if not (yield from turn.retry(mutex)):
            raise queue.Full(self._held(whose))

    def _spin_for_space(self, spin: Spin, ring: Ring) -> bool:
        """Look whether a slot comes free, for as long as that pays."""
        words, word = ring.words, ring.space_expected()
        looks = spin.looks
        for _ in range(looks):
            if words[word] == FREE:
                spin.paid()
                return True
        if looks:
            spin.wasted()
        return False

    def _send_rest(self, turn: Turn, encoded: Sequence[Message], sent: list[int]) -> Steps[None]:
        """Send in order those messages that are not sent yet.

        Args:
            sent: how many are, as `Ring.send_many`.

        Raises:
            queue.Full: if the time is up.
        """
        ring = self._ring
        while sent[0] < len(encoded):
            yield from turn.breathe()
            if encoded[sent[0]][0] >> 16 > self._slot_size:
                yield from self._stream(turn, *encoded[sent[0]], sent)
            else:
                send = partial(ring.send_many, encoded, sent)
                yield from self._until_sent(turn, send(), send)

    # --- a slot that is written in place

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

    def _claim(self, attachment: Attachment, claimed: list[tuple[int, int]]) -> Outcome:
        """Try to claim a slot for writing. Its index is in `claimed` before it is this process's; see Ring.claim."""
        if not self._seat.sent:
            self._start_sending()
        self._begin_call(attachment.ring)
        return attachment.ring.claim(claimed)

    def _until_claimed(self, turn: Turn, outcome: Outcome, claimed: list[tuple[int, int]]) -> Steps[None]:
        """Go on after a `_claim` that did not succeed at once."""
        return self._until_sent(turn, outcome, partial(turn.attachment.ring.claim, claimed))

    def _put_together(self, objs: Sequence[Any], deadline: float) -> None:
        """Put all of the objects or none: claim a slot for each, fill the slots, publish them in order.

        The sender holds no slot while it waits for more, so two senders that do this do not wait for each other.
        """
        if not self._seat.sent:
            self._start_sending()
        ring = self._open().ring
        encoded = [self._codec.encode(obj) for obj in objs]
        for meta, _, _ in encoded:
            if meta >> 16 > self._slot_size:
                raise self._too_large(meta >> 16)
        if len(encoded) > self.capacity:
            raise queue.Full(
                f"channel {self._name!r}: {len(encoded)} messages never fit into {self.capacity} slots at once: put "
                "fewer, or give put_many no time limit"
            )
        claimed: list[tuple[int, int]] = []

        def give_back() -> None:
            while claimed:
                ring.discard(*claimed[-1])
                claimed.pop()

        def claim_all() -> Outcome:
            while len(claimed) < len(encoded):
                outcome = ring.claim(claimed)
                if outcome is not CLAIMED:
                    give_back()
                    return outcome
            return CLAIMED

        def claim_all_later() -> Outcome:
            outcome = claim_all()
            if outcome is FULL:  # perhaps not quite
                sleep(_SECONDS_BETWEEN_CLAIMS)
            return outcome

        self._begin_call(ring)
        try:
            outcome = claim_all()
            if outcome is not CLAIMED:
                finish(self._until_sent(self._turn(deadline, self._send_spin), outcome, claim_all_later))
            for (slot, _), (meta, data, description) in zip(claimed, encoded, strict=True):
                ring.write(slot, meta, data, description)
                self._publish(slot, meta, description)
        finally:
            give_back()

    def _publish(self, slot: int, meta: int, description: bytes) -> None:
        """Publish a loan's slot, however long a stopped process holds the mutex."""
        attachment = self._open()
        while True:
            outcome = attachment.ring.publish(slot, meta, description, self._deliveries)
            if outcome is SENT:
                break
            if outcome is NOTICE:
                raise ChannelClosed(f"channel {self._name!r} was shut down: the loan was not sent; make a new channel")

    # --- messages larger than a slot: see large.py

    def _stream(self, turn: Turn, meta: int, data: Any, description: bytes, sent: list[int]) -> Steps[None]:
        """Send a message that is larger than a slot; `sent`, as `Ring.send_many`, grows by one if it is."""
        ring, nbytes = turn.attachment.ring, meta >> 16
        if not ring.streams or not turn.deadline:
            raise self._cannot_stream(nbytes)
        claimed: list[tuple[int, int]] = []
        feed: Feed | None = None
        first = sent[0]
        try:
            yield from self._until_claimed(turn, ring.claim(claimed), claimed)
            ((head, since),) = claimed
            feed = Feed(ring, head, since, nbytes, data)
            self._prepare_feed(ring, feed)
            yield from self._publish_head(turn, head, meta, description)
            yield from self._feed(turn, feed)
            sent[0] = first + 1
        except BaseException as error:
            unsent = [feed is None]
            try:
                if not claimed or ring.take_back(*claimed[0], unsent):
                    raise
            except BaseException as interrupt:
                if interrupt is not error and not ring.take_back(*claimed[0], unsent):
                    sent[0] = first + 1
                raise
            sent[0] = first + 1
            if (isinstance(error, (queue.Full, RingshmError)) and is_own(error)) or turn.puts_off(error):
                return  # it was received at the last moment
            raise
        ring.take_back(head, since, [False])  # what a message leaves that was delivered too often

    def _prepare_feed(self, ring: Ring, feed: Feed) -> None:
        """Claim a window, before the head is published; write the message, if the window has room for all of it."""
        ring.watch(feed.head, ref(feed), received=False)
        whole = feed.claim_window()
        if self._drops_oldest:
            for _ in range(self.capacity if feed.may_fit else 0):
                if whole or ring.drop_oldest() is not SENT:
                    break
                whole = feed.claim_window()
        if whole:
            feed.write_all()

    def _publish_head(self, turn: Turn, head: int, meta: int, description: bytes) -> Steps[None]:
        ring = turn.attachment.ring
        turn.begin()
        while (outcome := ring.publish(head, meta, description, self._deliveries)) is not SENT:
            if outcome is NOTICE:
                self._check_senders(turn.attachment)
            yield from self._retry(turn, ring.senders, "senders")

    def _feed(self, turn: Turn, feed: Feed) -> Steps[None]:
        """Write the pieces of a published message until it is received, or dropped."""
        attachment = turn.attachment
        ring = attachment.ring
        while not feed.has_ended():
            if monotonic() >= turn.deadline:
                raise queue.Full(
                    f"channel {self._name!r}: a message of {feed.nbytes} bytes, larger than a slot, was not received "
                    "in time: receive faster, wait longer, or make the channel with larger slots"
                )
            if feed.advance() or turn.spin.until_changed(ring.words, feed.others, feed.seen):
                yield from turn.breathe()
                continue
            if ring.is_waiting(feed.head):
                self._check_senders(attachment)
            turn.doubt("space")
            yield from turn.other_end(feed)

    # --- until all is received

    def _until_flushed(self, turn: Turn) -> Steps[bool]:
        """Wait until what this process has sent is received or dropped; False if it is not so in time."""
        try:  # without the loop in its frame: see ring/mutex.py, 5
            return (yield from self._wait_for_receptions(turn))
        finally:
            turn.attachment.deadlocks.end(turn.task)

    def _wait_for_receptions(self, turn: Turn) -> Steps[bool]:
        attachment, deadlocks, task = turn.attachment, turn.attachment.deadlocks, turn.task
        sender, first = attachment.participants.sender, True
        while attachment.ring.unfinished(sender):
            # nobody can come any more, and then look again: the last receiver may have taken them before it went
            if attachment.over_for_senders() and attachment.ring.unfinished(sender):
                attachment.reaper.look()
                raise self._broken(attachment, " that would receive what was put")
            if attachment.ring.hides_messages():
                attachment.ring.reveal_messages()
            if turn.is_endless:
                deadlocks.check_own(sender=sender, task=task)
                deadlocks.check(first=first, task=task)
                first = False
            turn.doubt("event")
            if not (yield from turn.event(lambda: not attachment.ring.unfinished(sender))):
                return not attachment.ring.unfinished(sender)
        return True

    # --- errors

    def _check_senders(self, attachment: Attachment) -> None:
        """Raise if nothing may be sent any more."""
        if attachment.words[SHUTDOWN]:
            raise ChannelClosed(f"channel {self._name!r} was shut down: nothing more can be sent; make a new one")
        if attachment.over_for_senders():
            self._check_open(attachment)
            attachment.words[ATTENTION] = 1  # so that the next put looks, too
            raise self._broken(attachment)

    def _broken(self, attachment: Attachment, what: str = "") -> BrokenChannel:
        gone = self._gone(attachment, RECEIVER_GONE)
        return BrokenChannel(
            errno.EPIPE,
            f"channel {self._name!r} has no receiver any more{what}{gone}; start another before sending on, or make "
            "the channel with keep_open=True to let senders wait for one",
        )

    def _cannot_stream(self, nbytes: int) -> PayloadTooLarge:
        if self._ring.streams:
            return self._too_large(nbytes, "send it with put(), which waits until it is received")
        return self._too_large(nbytes, "with oversize='stream', or send it in parts")
