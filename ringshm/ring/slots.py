"""The slot ring: claim, publish, take, release. It knows slots and bytes, not what they mean.

    FREE --claim--> WRITING p --publish--> READY n --take--> READING p --release--> FREE
                       | discard: FREE         ^ requeue: READY n  |  reap: p died, READY n+1

    word                                writer                guarded by           meaning
    a slot's word                       its owner, see below                       its state and owner: the truth
    TAIL, SENT_NBYTES, the ring's tail  a sender              senders' mutex       where the next message goes
    SHUTDOWN                            any process           senders' mutex       nothing is published any more
    HEAD, TAKEN_NBYTES, the ring's head a receiver, a reaper  receivers' mutex     the oldest message
    DROPPED, REDELIVERED, WITHDRAWN     the same              receivers' mutex     counts, see returns.py
    R_* of a slot's record              its owner, WRITING    the slot's word      what the message is

1. The slot's word is the truth (layout.py): a slot is in exactly one state, and every change is one store. The ready
   ring, its head and its tail are derived; `rebuild` makes them anew from the records.
2. A FREE slot is claimed within the senders' mutex, a READY one is taken within the receivers'. Afterwards the slot is
   its owner's alone. Sequence and position of a message are the same number unless one was requeued or withdrawn; a
   message keeps its sequence.
3. Release takes no mutex on x86-64: the owner stores FREE in its slot's word. So it may run anywhere, and slots come
   free in any order. A sender looks for one onward from the slot that was published last.
4. A small message is claimed, copied and published in one critical section. Its slot goes from FREE to READY in one
   store: a sender that dies before it has sent nothing. A large one is copied outside, in a WRITING slot.
5. A receiver consumes a message before it releases the slot. If it dies or is interrupted until then, the message
   goes back to its old place.
6. A message larger than a slot has a head, which goes through the states like any other, and further slots, PIECE, that
   belong to the head (large.py).

When a process dies halfway, survivors find either a hold word set, or a token lost: they recover the mutexes
(mutex.py), and `rebuild`. Or they find its slots in WRITING, READING or KEPT: the reaper gives them back (reaper.py).

On x86-64 stores become visible in their order, so a message whose TAIL is seen is seen whole. Elsewhere both ends use
one mutex, and a release takes it too: the semaphores order what the processor would not.

The class is in four layers, each of which knows those before it: `observe.SlotTable` only looks, `returns.Returns`
gives slots and messages back, `take.Takes` takes them, `Ring` sends and receives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..errors import ChannelUnavailable
from ..messages.buffers import Parts, Row
from ..segment.layout import (
    ATTENTION,
    DELIVERY,
    FREE,
    GEN,
    HEAD,
    MESSAGE_HINT,
    OWNER_MASK,
    R_DESCRIPTION,
    R_META,
    R_SENDER,
    R_SEQUENCE,
    R_SINCE,
    READY,
    SENT_NBYTES,
    SHUTDOWN,
    SMALL_NBYTES,
    SMALL_PARTS_NBYTES,
    SPACE_HINT,
    STATE_MASK,
    TAIL,
    TAKE,
    TAKEN_NBYTES,
    WORD_SIZE,
    WRITING,
)
from ..segment.semaphores import Semaphore
from ..system import monotonic_ns
from .acceleration import compiled
from .damage import refuse_damage
from .mutex import ORDERED_STORES, critical, reentrant_call
from .observe import Held
from .outcomes import CLAIMED, CONTENDED, EMPTY, FULL, NOTICE, SENT, STREAM, TAKEN, Outcome, consume_again
from .returns import PUBLISH_SLICES, RETURN_SLICES
from .take import Taken, Takes
from .waiters import wake_for

#: The kind of a call that returns a batch in new memory, for `Ring._unreturned`.
NEW_BATCH = object()
#: Bytes that a batch copies under one grant of the mutex: some 0.1 ms.
_BATCH_NBYTES = 1024 * 1024

#: Takes (memory, offset of the slot, meta, offset of the description) and gives what the message is.
Consume = Callable[[Any, int, int, int], Any]
#: Takes slots, and the R_META of each, and gives what their messages are together.
Gather = Callable[[list[int], list[int]], Any]


class Ring(Takes):
    """The ring as one process sees it: it sends and receives.

    `send` and `receive` are written out: they hold `critical`, `FencedMutex.enter` and `leave` in line, since their
    bytecodes are counted. All other calls go through `critical`.

    Attributes:
        compiled: the same, compiled, for what succeeds at once; None if it is not in use (acceleration.py).
    """

    compiled: Any = None

    def compile(self, semaphores: Sequence[Semaphore]) -> None:
        """Use the compiled path. The semaphores are those of the senders' mutex, of the receivers', and of the waiters
        for messages, space and events.
        """
        if compiled is not None:
            self.compiled = compiled.CompiledRing(self.memory, self.layout, semaphores, self._unreturned)
            self.messages.share(self.compiled, for_space=False)
            self.space.share(self.compiled, for_space=True)

    def receive_in_python(self) -> None:
        """From now on the compiled path only sends: a subclass has more to do for each message that is received."""
        if self.compiled is not None:
            self.compiled.receives = False

    def rebind(self, entry: int, owner: int, sender: int) -> None:
        """As `Returns.rebind`."""
        super().rebind(entry, owner, sender)
        if self.compiled is not None:
            self.compiled.lock_by(self.senders.local, self.receivers.local)
            self.compiled.rebind(entry, owner, sender)

    def refuse(self, error: ChannelUnavailable) -> None:
        """As `Returns.refuse`."""
        super().refuse(error)
        if self.compiled is not None:
            self.compiled.rebind(0, 0, 0)

    # --- sending

    def send(self, meta: int, data: Any, description: bytes) -> Outcome:
        """Claim a slot, copy into it, publish it.

        Args:
            meta: the record's R_META.
            data: `meta >> 16` bytes, as a C-contiguous buffer or in Parts; or a Row, whose fields lie apart.
            description: bytes for the record's R_DESCRIPTION.

        Returns:
            SENT, or FULL, CONTENDED or NOTICE, and then nothing has changed.
        """
        nbytes = meta >> 16
        if nbytes > SMALL_PARTS_NBYTES and (nbytes > SMALL_NBYTES or data.__class__ is Parts):
            return self._send_large(meta, data, description)
        words, senders = self.words, self.senders
        if senders.owned():
            raise reentrant_call(self.name)
        try:
            senders.lock()  # FencedMutex.enter, in line
            gen = words[GEN]
            if senders.acquires[gen & 3](False):
                words[senders.hold] = gen
                if words[GEN] != gen:
                    gen = senders.back_off()
            else:
                gen = senders.enter_slowly()
            if not gen:
                senders.abandon()  # nothing, unless GEN is 0, which is damage
                return CONTENDED
            if words[ATTENTION]:
                outcome = self._notice()
                senders.leave(gen)
                return outcome
            tail = words[TAIL]
            slot = self._next[words[self._ring + (tail - 1 & self._mask)]]
            record = self._records[slot]
            if words[record] != FREE:
                slot = self._find_free(tail)
                if slot < 0:
                    senders.leave(gen)
                    return FULL
                record = self._records[slot]
            if nbytes:
                offset = self.offsets[slot]
                if data.__class__ is Parts or data.__class__ is Row:
                    data.write(self.memory, offset)
                else:
                    self.memory[offset : offset + nbytes] = data
            if description:
                offset = (record + R_DESCRIPTION) * WORD_SIZE
                self.memory[offset : offset + len(description)] = description
            words[record + R_SEQUENCE] = tail
            words[record + R_META] = meta
            words[record + R_SENDER] = self.sender
            words[record] = READY  # from here on the message is sent, whoever dies
            words[self._ring + (tail & self._mask)] = slot
            words[TAIL] = tail + 1
            words[SENT_NBYTES] += nbytes
            senders.posts[gen >> 1 & 1]()  # FencedMutex.leave, in line
            words[senders.hold] = 0
            senders.unlock()
        except BaseException as error:
            senders.abandon()
            refuse_damage(self.name, error)
            raise
        if words[MESSAGE_HINT]:
            self.wake_receiver()
        return SENT

    def send_many(self, messages: Sequence[tuple[int, Any, bytes]], sent: list[int]) -> Outcome:
        """As `send`, for the next messages that are small, as many as there is room for, under one grant; or for the
        next one alone, if it is not.

        Args:
            messages: what `send` takes, each.
            sent: one number: how many of them are sent. It is right also after an exception: a handler runs between no
                two stores in one line.

        Returns:
            SENT, if at least one was; else as `send`.
        """
        first = last = sent[0]
        if self.compiled is not None and compiled.send_many(self.compiled, messages, sent):
            if self.words[MESSAGE_HINT]:
                wake_for(self.words, MESSAGE_HINT, self.messages, at_most=sent[0] - first)
            return SENT
        left = _BATCH_NBYTES
        for meta, data, _ in messages[first : first + self._capacity]:
            left -= meta >> 16
            if left < 0 or meta >> 16 > min(
                self._slot_size, SMALL_PARTS_NBYTES if data.__class__ is Parts else SMALL_NBYTES
            ):
                break
            last += 1
        if last == first:
            return self._send_large(*messages[first], sent)
        words = self.words

        def send_each() -> Outcome:
            if words[ATTENTION]:
                return self._notice()
            tail = words[TAIL]
            slot = words[self._ring + (tail - 1 & self._mask)]
            for meta, data, description in messages[first:last]:
                slot = self._next[slot]
                record = self._records[slot]
                if words[record] != FREE:
                    slot = self._find_free(tail)
                    if slot < 0:
                        break
                    record = self._records[slot]
                self._copy(slot, meta, data)
                if description:  # from here on `_describe` and `_append`, in line: a batch of small ones is 10 % faster
                    offset = (record + R_DESCRIPTION) * WORD_SIZE
                    self.memory[offset : offset + len(description)] = description
                words[record + R_SEQUENCE] = tail
                words[record + R_META] = meta
                words[record + R_SENDER] = self.sender
                words[record], sent[0] = READY, sent[0] + 1
                words[self._ring + (tail & self._mask)] = slot
                words[TAIL] = tail = tail + 1
                words[SENT_NBYTES] += meta >> 16
            return SENT if sent[0] > first else FULL

        outcome = critical(self.senders, send_each)
        if outcome is SENT and words[MESSAGE_HINT]:
            wake_for(words, MESSAGE_HINT, self.messages, at_most=sent[0] - first)
        return outcome

    def write(self, slot: int, meta: int, data: Any, description: bytes) -> None:
        """Copy a message into a slot that is in nobody else's hands, arguments as `send`; `send` has it in line."""
        self._copy(slot, meta, data)
        self._describe(slot, meta, description)

    def _copy(self, slot: int, meta: int, data: Any) -> None:
        nbytes, offset = meta >> 16, self.offsets[slot]
        if isinstance(data, (Parts, Row)):
            data.write(self.memory, offset)
        elif nbytes:
            self.memory[offset : offset + nbytes] = data

    def _describe(self, slot: int, meta: int, description: bytes) -> None:
        """Say in a slot's record what the message in it is."""
        record = self._records[slot]
        offset = (record + R_DESCRIPTION) * WORD_SIZE
        self.memory[offset : offset + len(description)] = description
        self.words[record + R_META] = meta
        self.words[record + R_SENDER] = self.sender

    def _append(self, slot: int, meta: int, deliveries: int) -> None:
        """Within the senders' mutex: the message that was written into that slot is sent; `send` has it in line."""
        words, record = self.words, self._records[slot]
        tail = words[TAIL]
        words[record + R_SEQUENCE] = tail
        words[record] = READY + deliveries * DELIVERY  # from here on the message is sent, whoever dies
        words[self._ring + (tail & self._mask)] = slot
        words[TAIL] = tail + 1
        words[SENT_NBYTES] += meta >> 16

    def _send_large(self, meta: int, data: Any, description: bytes, sent: list[int] | None = None) -> Outcome:
        """As `send`, with the copy outside of the critical sections; `sent` as `send_many`."""
        claimed: list[tuple[int, int]] = []
        publishing = False
        if sent is None:
            sent = [0]
        first = sent[0]
        try:
            outcome = self.claim(claimed)
            if outcome is CLAIMED:
                ((slot, since),) = claimed
                self._copy(slot, meta, data)
                publishing = True
                outcome = self.publish(slot, meta, description)
                if outcome is SENT:
                    sent[0] = first + 1
                else:
                    self.discard(slot, since)
        except BaseException:
            for slot, since in claimed:
                sent[0] = first + (publishing and not self.is_claimed(slot, since))
                self.discard(slot, since)
            raise
        return outcome

    def claim(self, claimed: list[tuple[int, int]]) -> Outcome:
        """Claim a FREE slot for writing.

        It is appended to `claimed`, with the time of its claim, before it is this participant's: an exception may come
        before the caller has the outcome, and what was claimed is the caller's to `discard` then.

        Returns:
            CLAIMED; or FULL, CONTENDED or NOTICE, and then nothing has changed.
        """
        words = self.words

        def claim_free() -> Outcome:
            if words[ATTENTION]:
                return self._notice()
            slot = self._find_free(words[TAIL])
            if slot < 0:
                return FULL
            record = self._records[slot]
            words[record + R_SINCE] = since = monotonic_ns()
            claimed.append((slot, since))
            words[record] = WRITING | self.owner
            return CLAIMED

        return critical(self.senders, claim_free)

    def publish(self, slot: int, meta: int, description: bytes, deliveries: int = 0) -> Outcome:
        """Publish a claimed slot, which holds the payload already.

        Args:
            deliveries: how many deliveries of the message have failed, in other rings.

        Returns:
            SENT; or NOTICE after a shutdown, or CONTENDED, and then the slot is still the caller's.
        """
        self._describe(slot, meta, description)

        def append_claimed() -> Outcome:
            if self.words[SHUTDOWN]:
                return self._notice()
            if self.words[self._records[slot]] != WRITING | self.owner:
                raise self.moved()
            self._append(slot, meta, deliveries)
            return SENT

        outcome = critical(self.senders, append_claimed, PUBLISH_SLICES)
        if outcome is SENT and self.words[MESSAGE_HINT]:
            self.wake_receiver()
        return outcome

    def _notice(self) -> Outcome:
        """Within the senders' mutex: have the caller look round. What comes after this store sets ATTENTION again."""
        self.words[ATTENTION] = self.words[SHUTDOWN]
        return NOTICE

    def _find_free(self, tail: int) -> int:
        """The first FREE slot onward from the one that was published last, or -1."""
        if tail - self.words[HEAD] >= self.layout.capacity:
            return -1
        start = self._next[self.words[self._ring + (tail - 1 & self._mask)]]
        if self.words[self._records[start]] == FREE:
            return start
        free = np.flatnonzero(self._states == FREE)
        if not len(free):
            return -1
        return int(free[np.searchsorted(free, start) % len(free)])

    def close_for_senders(self) -> bool:
        """Set SHUTDOWN: no message is published after this; False if the mutex was not to be had in a slice."""

        def shut() -> None:
            self.words[ATTENTION] = 1  # first: who dies between the two leaves nothing that a sender does not look at
            self.words[SHUTDOWN] = 1

        return critical(self.senders, shut) is not CONTENDED

    # --- receiving

    def receive(self, consume: Consume, kind: Any = None) -> Any:
        """Take the oldest message, consume it where it lies, release its slot.

        Args:
            kind: the memory that the message is copied into, or None. If an interrupt comes when the message is
                received, the next call of the same kind returns it.

        Returns:
            What `consume` gave; or an UNDECODABLE outcome with its error, and the message counts as received; or EMPTY,
            CONTENDED or STREAM, and then nothing has changed.

        Raises:
            BaseException: what a signal handler raised; the message is back in its place.
        """
        words = self.words
        tail = self._tail_seen
        if tail <= self._head_seen:
            if self._unreturned:
                return self._return_again(kind)
            self._tail_seen = tail = words[TAIL]
            if words[HEAD] == tail:
                return EMPTY
        receivers, record, own = self.receivers, 0, 0
        if receivers.owned():
            raise reentrant_call(self.name)
        try:
            receivers.lock()  # FencedMutex.enter, in line
            gen = words[GEN]
            if receivers.acquires[gen & 3](False):
                words[receivers.hold] = gen
                if words[GEN] != gen:
                    gen = receivers.back_off()
            else:
                gen = receivers.enter_slowly()
            if not gen:
                receivers.abandon()  # as in send
                return CONTENDED
            head = words[HEAD]
            if head >= tail and head == words[TAIL]:
                receivers.leave(gen)
                return EMPTY
            slot = words[self._ring + (head & self._mask)]
            state = words[self._records[slot]] if slot < self._capacity else FREE
            if state & STATE_MASK != READY:
                self._distrust()
                receivers.abandon()
                return CONTENDED
            record = self._records[slot]
            meta = words[record + R_META]
            if meta >> 16 > self._slot_size:
                self._check_streams()
                receivers.leave(gen)
                return STREAM
            own = state + TAKE + self.owner
            words[record] = own
            words[HEAD] = self._head_seen = head + 1
            words[TAKEN_NBYTES] += meta >> 16
            receivers.posts[gen >> 1 & 1]()  # FencedMutex.leave, in line
            words[receivers.hold] = 0
            receivers.unlock()

            try:
                value = consume(self.memory, self.offsets[slot], meta, (record + R_DESCRIPTION) * WORD_SIZE)
            except Exception as error:
                description = (record + R_DESCRIPTION) * WORD_SIZE
                value = consume_again(partial(consume, self.memory, self.offsets[slot], meta, description), error)

            if words[record] - self.owner != state + TAKE:  # which code that it ran may have changed by a fork
                raise self.moved(own)
            if ORDERED_STORES:
                words[record] = FREE
            else:
                self._release_in_order(record)
        except BaseException as error:
            self.give_back([(record, own)])
            refuse_damage(self.name, error)
            raise
        if words[SPACE_HINT]:
            try:  # in line: a handler may run at the entry of any function
                self.wake_freed()
            except BaseException:
                self._tail_seen = 0  # the next call looks, and returns what this one cannot
                self._unreturned += [(kind, value)]
                raise
        return value

    def consume_failed(
        self, held: list[Held], at: int, slot: int, meta: int, consume: Consume, error: BaseException
    ) -> Outcome:
        """After `consume` has failed with that error on the message at that place of those that the compiled path has
        taken. What lies behind the messages that the call returns is back in its place: the failed one, too, unless it
        is the first.

        Returns:
            UNDECODABLE with its error, and if the first has failed, its slot is still this process's; or it raises, and
            all messages are back in their places.
        """
        try:
            if not isinstance(error, Exception):
                raise error
            description = (self._records[slot] + R_DESCRIPTION) * WORD_SIZE
            outcome = consume_again(partial(consume, self.memory, self.offsets[slot], meta, description), error)
            self.requeue_or_later(held[max(at, 1) :])
            return outcome
        except BaseException as again:
            self.give_back(held)
            refuse_damage(self.name, again)
            raise

    consume_again = staticmethod(consume_again)

    def receive_many(self, limit: int, consume: Consume) -> Any:
        """As `receive`, for up to `limit` messages that are there, under one grant of the mutex.

        A message that cannot be consumed ends the batch: if it is the first, its outcome is returned, else it and
        those behind it go back to their places.

        Returns:
            A list of what `consume` gave; or UNDECODABLE, EMPTY, CONTENDED or STREAM.
        """
        if self._unreturned:
            return self._return_again(None, limit)
        if self.words[HEAD] == self.words[TAIL]:
            return EMPTY

        def gather(slots: list[int], metas: list[int]) -> Any:
            values: list[Any] = []
            for slot, meta in zip(slots, metas):  # noqa: B905
                description = (self._records[slot] + R_DESCRIPTION) * WORD_SIZE
                try:
                    value = consume(self.memory, self.offsets[slot], meta, description)
                except Exception as error:
                    value = consume_again(partial(consume, self.memory, self.offsets[slot], meta, description), error)
                if value.__class__ is Outcome:
                    return values or value
                values.append(value)
            return values

        return self._receive_together(limit, 1, gather, None)

    def receive_batch(self, at_most: int, at_least: int, gather: Gather, kind: Any) -> Any:
        """Take up to `at_most` messages, if `at_least` are there, consume them together, release their slots.

        Args:
            gather: gives what the messages are together.
            kind: as `receive`; None stands for new memory.

        Returns:
            What `gather` gave; or an UNDECODABLE outcome with its error, and the messages count as received; or EMPTY
            or CONTENDED, and then nothing has changed.
        """
        if kind is None:
            kind = NEW_BATCH
        if self._unreturned:
            return self._return_again(kind)  # however many it asks for

        def gather_all(slots: list[int], metas: list[int]) -> Any:
            try:
                return gather(slots, metas)
            except Exception as error:
                return consume_again(partial(gather, slots, metas), error)

        return self._receive_together(at_most, at_least, gather_all, kind)

    def _receive_together(self, at_most: int, at_least: int, gather: Gather, kind: Any) -> Any:
        """Take messages, have `gather` consume them, and release their slots, all at once.

        Where `kind` is None, `gather` may give a list of the first messages only; the others go back to their places.
        """
        taken, words, released = Taken(), self.words, False
        unreturned: list[tuple[Any, Any]] = []
        run: Any = None

        def free() -> None:
            nonlocal released
            self._states[run] = FREE
            released = True

        try:
            outcome = self.take(taken, at_most, at_least)
            if outcome is not TAKEN:
                return outcome
            slots = taken.slots
            if len(slots) < at_least:
                self.give_back(self.held(taken))
                return CONTENDED
            value = gather(slots, taken.metas)
            if kind is not None:
                done, unreturned = len(slots), [(kind, value)]
            elif value.__class__ is not Outcome:
                done, unreturned = len(value), [(kind, one) for one in value]
            else:
                done = 1  # a first message that failed counts as received
            run = np.array(slots) if taken.run is None else taken.run
            if self._states[run].tolist() != taken.words or taken.words[0] & OWNER_MASK != self.owner:
                raise self.moved(taken.words[0])
            if done < len(slots):
                self.requeue_or_later(self.held(taken)[done:])
                run = slots[:done]
            if ORDERED_STORES or critical(self.receivers, free, RETURN_SLICES) is CONTENDED:
                free()
            if words[SPACE_HINT]:
                self.wake_freed()
        except BaseException as error:
            if released:
                self._tail_seen = 0  # as in receive
                self._unreturned += unreturned
            elif taken.words:
                self.give_back(self.held(taken))
            refuse_damage(self.name, error)
            raise
        return value
