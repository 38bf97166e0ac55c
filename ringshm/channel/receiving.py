"""The steps of calls that receive: wait for messages, find the end of the stream, put together a message larger than a
slot.

Blocking calls and calls in an event loop share them (steps.py). The public methods are in receiver.py.
"""

from __future__ import annotations

import queue
from asyncio import CancelledError
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..arguments import check_timeout, whole_number
from ..errors import EndOfChannel, SpecMismatch
from ..messages.codecs import Decodable
from ..messages.typed import SpecCodec
from ..process.attachment import Attachment
from ..ring.damage import corrupted
from ..ring.large import Assembly
from ..ring.mutex import SLICE
from ..ring.outcomes import CONTENDED, EMPTY, STREAM, TAKEN, Outcome
from ..ring.slots import Ring
from ..ring.take import Taken
from ..segment.layout import GIVEN_UP, HEAD, SENDER_GONE, SHUTDOWN, TAIL, UNREAD
from ..system import monotonic
from .endpoint import Endpoint
from .into import Misfit, adopt_into, into
from .steps import Between, Steps, Turn

#: Makes the object of a payload in this process's own memory, R_META and description.
Adopt = Callable[[Any, int, bytes], Any]
#: Attempts of `get_batch`: one takes how many messages must be there.
Batches = Callable[[int], Any]
#: The steps that receive a message larger than a slot; they return an outcome, or what they have received.
Stream = Callable[[], Steps[Any]]


class Receiving(Endpoint):
    """The steps of a handle that may receive."""

    # --- one message, and several

    def _between(self, turn: Turn, adopt: Adopt, kind: Any = None, many: bool = False) -> Between:
        """The steps between two attempts of `get`, or `get_many`; see `_receive_stream` for the arguments."""
        return partial(self._before_next_receive, turn, 1, partial(self._receive_stream, turn, adopt, kind, many))

    def _before_next_receive(self, turn: Turn, at_least: int, stream: Stream | None, outcome: Outcome) -> Steps[Any]:
        """Do what the outcome of an attempt asks for, or wait until so many messages are there.

        Returns:
            An Outcome, after which to try again; or what `stream` has received.

        Raises:
            What `get` raises when nothing comes, or can come.
        """
        attachment = turn.attachment
        ring = attachment.ring
        if outcome is STREAM and stream is not None:
            received = yield from stream()
            if received.__class__ is not Outcome:
                return received
            outcome = received
        if outcome.error is not None:
            self._raise_undecodable(outcome)
        if outcome is CONTENDED:
            if not (yield from turn.retry(ring.receivers)):
                raise queue.Empty(self._held("receivers"))
            return outcome
        self._check_open(attachment)
        if turn.waited(self, False, at_least):
            return outcome
        in_time = monotonic() < turn.deadline
        if in_time and at_least == 1 and turn.spin.until_changed(ring.words, TAIL, ring.words[HEAD]):
            return outcome
        self._check_receivers(attachment, at_least)
        if ring.ready() >= at_least:
            return outcome
        if in_time:
            turn.doubt("message")
            yield from turn.arrival(attachment.messages, ring.ready, at_least)
        elif not attachment.reaper.look():
            came = f"{ring.ready()} of {at_least} messages" if at_least > 1 else "no message"
            raise queue.Empty(f"channel {self._name!r}: {came} came in time{self._who_sends(attachment)}")
        return outcome

    def _who_sends(self, attachment: Attachment) -> str:
        """Whether a sender was ever there, or may come, and what to do, for the error of a call whose time is up."""
        if attachment.had_sender():
            return f"{self._nobody_left(attachment, SENDER_GONE, 'sender')}: wait longer, or send more"
        if attachment.others_may_decide() or attachment.others_may_send():
            return ", and no sender was there yet: wait longer for the processes that have a handle to send by"
        return ", and no sender was ever there: start one"

    def _check_receivers(self, attachment: Attachment, at_least: int) -> None:
        """Raise if not so many can come any more: first whether anybody may send, then whether enough are left."""
        shutdown, owner = attachment.words[SHUTDOWN], attachment.participants.owner
        over = shutdown or attachment.over_for_receivers()
        if over and attachment.ring.hides_messages():
            attachment.ring.reveal_messages()
        elif over and attachment.ring.drained_for(owner, at_least):
            self._check_open(attachment)
            attachment.listeners.wake_watched()  # so that their descriptors stay readable
            reason = "was shut down" if shutdown else f"has no sender any more{self._gone(attachment, SENDER_GONE)}"
            if not shutdown:
                reason += attachment.who_has_not_sent()
            left = attachment.ring.ready()
            unread = attachment.words[UNREAD] if shutdown else 0
            rest = f"it dropped {unread} of its messages unread" if unread else "all its messages were received"
            if left:
                rest = f"{left} messages are left, fewer than were asked for: get_batch(min=...) or get takes them"
            raise EndOfChannel(f"channel {self._name!r} {reason}; {rest}")

    # --- into memory that the caller has

    def _attempts(self, out: Any) -> tuple[Callable[[], Any], Adopt]:
        """How `get` receives with that `out`: an attempt, and an `adopt` for a message larger than a slot."""
        ring, codec = self._ring, self._codec
        if out is None:
            return lambda: ring.receive(codec.decode), codec.adopt
        try:
            decode = codec.into(out) if isinstance(codec, SpecCodec) else into(codec, out)
        except SpecMismatch as error:
            raise SpecMismatch(f"channel {self._name!r}: {error}") from None

        def attempt() -> Any:
            try:
                return ring.receive(decode, out)
            except Misfit as misfit:
                raise self._misfit(misfit) from None

        return attempt, adopt_into(codec, out)

    def _receive_into(self, out: Any) -> Any:
        """The first attempt of a `get` with `out`."""
        attempt, _ = self._attempts(out)
        return attempt()

    def _misfit(self, misfit: Misfit) -> SpecMismatch:
        return SpecMismatch(f"channel {self._name!r}: {misfit}; the message is back in its place")

    def _begin_many(self) -> tuple[Ring, Decodable]:
        """Begin a `get_many`."""
        if not self._seat.received:
            self._start_receiving()
        ring = self._open().ring
        self._begin_call(ring)
        return ring, self._codec

    # --- batches of a spec's messages

    def _begin_batch(
        self, call: str, n: int, min: int | None, timeout: float | None, out: Mapping[str, Any] | None
    ) -> tuple[int, int, Batches]:
        """Begin a `get_batch`: `n`, the least number, and the attempts."""
        codec = self._typed(call)
        if n.__class__ is not int or not 0 < n <= self._layout.capacity:
            n = whole_number(n, "n", self.capacity, ", the capacity")
        least = n if min is None else whole_number(min, "min", n)
        if timeout is not None:
            check_timeout(timeout)
        if not self._seat.received:
            self._start_receiving()
        ring = self._ring
        self._begin_call(ring)
        try:
            arrays = codec.batch_arrays(n, out)
        except SpecMismatch as error:
            raise codec.named(error) from None

        def gather(slots: list[int], metas: list[int]) -> Any:
            return codec.stack(slots, metas, ring.description_of, arrays)

        return n, least, lambda at_least: ring.receive_batch(n, at_least, gather, out)

    def _between_batches(self, turn: Turn, n: int, least: int, attempt: Batches) -> Between:
        """The steps between two attempts of `get_batch`; see `_begin_batch` for the arguments."""
        return partial(self._before_next_batch, turn, n, least, attempt)

    def _before_next_batch(self, turn: Turn, n: int, least: int, attempt: Batches, outcome: Outcome) -> Steps[Any]:
        """As `_before_next_receive`. At the time-out, or when no more can come, it receives what is there, if that is
        enough.
        """
        try:
            return (yield from self._before_next_receive(turn, n, None, outcome))
        except (queue.Empty, EndOfChannel):
            if least == n:
                raise
            batch = attempt(least)
            if batch.__class__ is Outcome:
                if batch.error is not None:
                    self._raise_undecodable(batch)
                raise
            return batch

    # --- a message that is read in its slot

    def _take(self, attachment: Attachment, taken: Taken) -> Outcome:
        """Try to take a message for a borrow: it is in `taken` before it is this process's."""
        if not self._seat.received:
            self._start_receiving()
        self._begin_call(attachment.ring)
        return attachment.ring.take(taken)

    def _until_taken(self, turn: Turn, outcome: Outcome, taken: Taken) -> Steps[None]:
        """Go on after a `_take` that did not succeed at once."""
        stream = partial(self._take_stream, turn, taken)
        while outcome is not TAKEN:
            received = yield from self._before_next_receive(turn, 1, stream, outcome)
            outcome = TAKEN if received is taken else turn.attachment.ring.take(taken)

    def _take_stream(self, turn: Turn, taken: Taken) -> Steps[Any]:
        assembly = yield from self._assemble(turn, taken)
        if assembly is None:
            return EMPTY
        if not assembly.hold():
            taken.clear()
            return EMPTY
        return taken

    # --- messages larger than a slot: see large.py

    def _receive_stream(self, turn: Turn, adopt: Adopt, kind: Any = None, many: bool = False) -> Steps[Any]:
        """Receive the oldest message, which is larger than a slot.

        Args:
            turn: of the call.
            adopt: makes the message.
            kind: as `Ring.receive`.
            many: return a list of the one message.

        Returns:
            What `adopt` gave, or an UNDECODABLE outcome; or EMPTY if it was not to be had after all.
        """
        ring, taken = turn.attachment.ring, Taken()
        value: Any = None
        try:
            assembly = yield from self._assemble(turn, taken)
            if assembly is None:
                return EMPTY
            value = assembly.decoded(adopt)
            if not assembly.end():
                return EMPTY
            return [value] if many and value.__class__ is not Outcome else value
        except BaseException as error:
            if taken.assembly is not None and taken.assembly.is_received():
                if value.__class__ is not Outcome:
                    ring.return_later(kind, value)
            else:
                ring.give_back(ring.held(taken))
            if isinstance(error, Misfit):
                raise self._misfit(error) from None
            raise

    def _assemble(self, turn: Turn, taken: Taken) -> Steps[Assembly | None]:
        """Take the oldest message, which is larger than a slot, and copy all of it. If time is up, or the call is
        cancelled, before all has come, the next call goes on with what was copied.

        Returns:
            The message, which is in `taken`, and not yet received; see Assembly.end. None if it was not to be had.

        Raises:
            queue.Empty: if time is up before all has come; the message is to be given back.
        """
        ring = turn.attachment.ring
        if ring.take_large(taken) is not TAKEN:
            return None
        assembly = self._begin_assembly(turn.attachment, taken)
        try:  # without the loop in its frame: see ring/mutex.py, 5
            complete = yield from self._copy_pieces(turn, assembly)
        except (CancelledError, queue.Empty):
            assembly.leave()
            raise
        if complete:
            return assembly
        assembly.end()
        taken.clear()
        return None

    def _copy_pieces(self, turn: Turn, assembly: Assembly) -> Steps[bool]:
        """Copy a message larger than a slot as its pieces come; False if its sender has given it up."""
        progress = monotonic()
        while True:
            if assembly.advance():
                progress = monotonic()
            if assembly.is_complete:
                return True
            if assembly.has_ended():
                return False
            # a message that went back and forth between receivers whose time was up would never arrive
            now = monotonic()
            if now >= turn.deadline and (now > progress + SLICE or not assembly.is_repeated):
                raise queue.Empty(
                    f"channel {self._name!r}: time was up when not all of a message of {assembly.nbytes} bytes, "
                    "which is larger than a slot, had come: the next call goes on with it; wait longer, or make "
                    "the channel with larger slots"
                )
            if not turn.spin.until_changed(turn.attachment.ring.words, assembly.others, assembly.seen):
                turn.doubt("message")
                yield from turn.other_end(assembly)

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
