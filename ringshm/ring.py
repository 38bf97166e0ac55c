"""The slot ring: claim, publish, take, release. It knows slots and bytes, not what they mean.

    FREE --claim--> WRITING p --publish--> READY n --take--> READING p --release--> FREE
                       | discard: FREE         ^ requeue: READY n  |  reap: p died, READY n+1

1. The slot's word is the truth (layout.py): a slot is in exactly one state, and every change is one store. The ready
   ring, its head and its tail are derived, and `rebuild` makes them anew from the records.
2. Senders' mutex: which FREE slot is claimed next, TAIL, SENT_NBYTES, SHUTDOWN, the tail end of the ready ring.
   Receivers' mutex: HEAD, TAKEN_NBYTES, DROPPED, REDELIVERED, WITHDRAWN, the head end of the ready ring. Sequence and
   position of a message are the same number unless one was requeued or withdrawn; a message keeps its sequence.
3. Release takes no mutex: the owner stores FREE in its slot's word. So it may run anywhere, and slots come free in any
   order. Who claims looks onward from the slot that was published last.
4. A small message is claimed, copied and published in one critical section; its slot goes from FREE to READY in one
   store, and a sender that dies before it has sent nothing. A large one is copied outside, in a WRITING slot.
5. A receiver consumes a message before it releases the slot. If it dies or is interrupted until then, the message
   goes back to its old place.
6. A message larger than a slot has a head, which goes through the states like any other, and further slots, PIECE, that
   belong to the head: they are claimed while it is WRITING or still being fed, and whoever frees it frees them before
   it. How the pieces flow is told in stream.py. While its sender feeds it, nobody else frees it: who would drop it
   leaves that to the sender, by making it WRITING again.

Where a process dies halfway, survivors find: a hold word set, or a token lost, and recover the mutexes (mutex.py),
which calls `rebuild`; or its slots in WRITING, READING or KEPT, which are reaped (reaper.py).

On x86-64 stores become visible in their order, so a message whose TAIL is seen is seen whole. Elsewhere both ends use
one mutex, and a release takes it too, so that the semaphores order what the processor would not.
"""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .buffers import Parts, Row
from .errors import ChannelCorrupted, InterruptedCall, RingshmError
from .layout import (
    ALL_THERE,
    ATTENTION,
    COUNTING,
    COUNTING_SEQUENCE,
    COUNTING_TOTAL,
    COUNTING_WORD,
    DELIVERY,
    DELIVERY_MASK,
    DROPPED,
    ENTRY_SHIFT,
    FREE,
    GEN,
    GIVEN_UP,
    HEAD,
    KEPT,
    MAX_WORD,
    MESSAGE_HINT,
    OWNER_MASK,
    P_CALLED,
    PIECE,
    R_DESCRIPTION,
    R_FEEDER,
    R_META,
    R_PIECE,
    R_SENDER,
    R_SEQUENCE,
    R_SINCE,
    R_STATE,
    READING,
    READY,
    RECORD_WORDS,
    REDELIVERED,
    SENT_NBYTES,
    SHUTDOWN,
    SMALL_NBYTES,
    SMALL_PARTS_NBYTES,
    SPACE_HINT,
    STATE_MASK,
    TAIL,
    TAKE,
    TAKEN_NBYTES,
    WITHDRAWN,
    WORD_SIZE,
    WRITING,
    Layout,
)
from .mutex import FencedMutex, reentrant_call
from .waiting import Waiters, wake_for

#: Whether stores become visible to other processors in program order.
ORDERED_STORES = platform.machine() in ("x86_64", "AMD64", "i686", "i386")


class Outcome:
    """Why a call on the ring did not send or receive: a result, not an error."""

    __slots__ = ("error", "name")

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self.error = error

    def __repr__(self) -> str:
        return self.name


#: The kind of a call that returns a batch in new memory, for `Ring._unreturned`.
_NEW_BATCH = object()
#: From so many messages on it is cheaper to take a run at once.
_MANY = 6
#: Bytes that a batch copies under one grant of the mutex: some 0.1 ms.
_BATCH_NBYTES = 1024 * 1024
#: Slices that a sender which has copied its message waits to publish it, before it answers CONTENDED and copies again.
_PUBLISH_SLICES = 4
#: Slices that a receiver waits to give back what it could not consume: 5 s. If a process is stopped inside the mutex
#: for longer (or a damaged word says so), the call ends, and later ones go on trying.
_RETURN_SLICES = 100

SENT = Outcome("SENT")
FULL = Outcome("FULL")  # no slot is free
EMPTY = Outcome("EMPTY")  # no message is ready
CLAIMED = Outcome("CLAIMED")  # a slot, for writing
TAKEN = Outcome("TAKEN")  # one slot or more, for reading
CONTENDED = Outcome("CONTENDED")  # the mutex was not to be had within a slice
STREAM = Outcome("STREAM")  # the oldest message is larger than a slot: to be taken alone, see stream.py
NOTICE = Outcome("NOTICE")  # ATTENTION was set: the caller looks for shutdown and broken, and may try again

#: Takes (memory, offset of the slot, meta, offset of the description) and gives what the message is.
Consume = Callable[[Any, int, int, int], Any]


class Taken:
    """The slots that a call has taken, in the order of their messages.

    Attributes:
        slots: their indices.
        metas: their R_META; what was checked is what is used.
        words: their words since. The last to be appended, before a slot is the caller's: an exception may come then.
        run: the slots as an index into arrays over all slots, if they were taken in one step; else None.
        assembly: what a message larger than a slot is copied to: a stream.Assembly.
    """

    __slots__ = ("assembly", "metas", "run", "slots", "words")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is taken any more."""
        self.assembly: Any = None
        self.run: Any = None
        self.slots: list[int] = []
        self.metas: list[int] = []
        self.words: list[int] = []


def corrupted(name: str) -> ChannelCorrupted:
    """The error for words that a channel cannot hold."""
    return ChannelCorrupted(
        f"channel {name!r}: the segment's ready ring, slot records or counters do not hold what they must: make a new "
        "channel"
    )


def refuse_damage(name: str, error: BaseException) -> None:
    """Raise ChannelCorrupted if a call on the ring has failed on what the segment holds.

    An index that leads nowhere, or a sum that is no word any more, fails by itself: so what succeeds checks nothing.
    The like that a codec of the user's or a signal handler raises has passed through frames that are not ours.
    """
    if isinstance(error, (IndexError, ValueError)) and not isinstance(error, RingshmError):
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        if all(frame.f_globals.get("__package__") == __package__ for frame in frames):
            raise corrupted(name) from error


def rebuild(name: str, words: memoryview, layout: Layout) -> None:
    """Make ring, head and tail anew from the slots' records, while no live participant holds a mutex.

    The counters of bytes only ever lag behind a slot's word by one message; the one that lags is raised. So is a count
    that `Ring._store_and_count` did not come to.

    Raises:
        ChannelCorrupted: if no position is left for a message.
    """
    records = [layout.record(slot) for slot in range(layout.capacity)]
    states = [words[record + R_STATE] & STATE_MASK for record in records]
    sent = [words[r + R_SEQUENCE] for r, state in zip(records, states, strict=True) if state in (READY, READING, KEPT)]
    ready = sorted((words[records[slot] + R_SEQUENCE], slot) for slot, state in enumerate(states) if state == READY)
    tail = max([words[TAIL], len(ready), *(sequence + 1 for sequence in sent)])
    head = tail - len(ready)
    if tail >= MAX_WORD:
        raise corrupted(name)
    for position, (_, slot) in enumerate(ready, head):
        words[layout.ring + (position & layout.ring_mask)] = slot
    words[HEAD] = head
    words[TAIL] = tail
    waiting = sum(words[records[slot] + R_META] >> 16 for _, slot in ready)
    if (words[SENT_NBYTES] | words[TAKEN_NBYTES]) >> 63:  # damage, with which no message could be counted any more
        words[SENT_NBYTES] = words[TAKEN_NBYTES] = 0
    lag = words[SENT_NBYTES] - words[TAKEN_NBYTES] - waiting
    word = TAKEN_NBYTES if lag > 0 else SENT_NBYTES
    words[word] = words[word] + abs(lag) & MAX_WORD
    record, counter = words[COUNTING] >> 8, words[COUNTING] & 0xFF
    if record in records and counter in (DROPPED, REDELIVERED, WITHDRAWN):
        unchanged = words[record] == words[COUNTING_WORD] and words[record + R_SEQUENCE] == words[COUNTING_SEQUENCE]
        words[counter] = words[counter] if unchanged else words[COUNTING_TOTAL] & MAX_WORD
    words[COUNTING] = 0


def records_of(words: memoryview, layout: Layout) -> NDArray[np.uint64]:
    """The slots' records where they lie, shape (capacity, RECORD_WORDS)."""
    table = np.frombuffer(words, np.uint64, layout.capacity * RECORD_WORDS, layout.records * WORD_SIZE)
    return table.reshape(layout.capacity, RECORD_WORDS)


def _enter_patiently(mutex: FencedMutex, slices: int) -> int:
    """Enter, trying again for so many slices; the generation, or 0."""
    for _ in range(slices):
        gen = mutex.enter()
        if gen:
            return gen
    return 0


class Ring:
    """The ring as one process sees it.

    Args:
        name: the channel's, for errors.
        words: the segment's words up to the slots.
        memory: the whole segment; slices of it are copied to and from.
        senders, receivers: the two mutexes, which may be one.
        messages, space, events: who waits for a message, for a free slot, for what else happens.
        ends: who waits for a piece, and who waits for room for one; None if no message may be larger than a slot.
    """

    def __init__(
        self,
        name: str,
        words: memoryview,
        memory: Any,
        layout: Layout,
        senders: FencedMutex,
        receivers: FencedMutex,
        messages: Waiters,
        space: Waiters,
        events: Waiters,
        ends: tuple[Waiters, Waiters] | None = None,
    ) -> None:
        self.name = name
        self.streams = ends is not None
        self.pieces, self.room = ends or (events, events)
        self.words = words
        self.memory = memory
        self.layout = layout
        self.senders = senders
        self.receivers = receivers
        self.messages = messages
        self.space = space
        self.events = events
        self.owner = 0
        self.sender = 0
        #: Where calls store the time at which they begin.
        self.called: Any = [0.0]
        # What this process knows of TAIL and HEAD: each only grows, but for a requeue. While the tail seen is ahead, a
        # receiver need not read TAIL, whose cache line its senders keep writing.
        self._tail_seen = 0
        self._head_seen = 0
        #: What calls had received when they were interrupted: (for which kind of call, what it returns).
        self._unreturned: list[tuple[Any, Any]] = []
        #: What was copied of a message larger than a slot when its receiver's time was up: see stream.Assembly.leave.
        self.partial: tuple[Any, ...] | None = None
        #: Taken slots, and their words, that are still to be given back: see requeue_late.
        self.late: list[tuple[int, int]] = []
        self._held: dict[int, tuple[Callable[[], object], bool, int, int]] = {}
        self._ring = layout.ring
        self._mask = layout.ring_mask
        self._capacity = layout.capacity
        self._nearly_full = layout.capacity - max(1, layout.capacity // 4)
        self._slot_size = layout.slot_size
        self._records: list[int] = [layout.record(slot) for slot in range(layout.capacity)]
        #: Byte at which each slot starts.
        self.offsets = [layout.slot(slot) for slot in range(layout.capacity)]
        self._next: list[int] = [*range(1, layout.capacity), 0]
        self._cycle = [*range(layout.capacity)] * 2
        self._table = records_of(words, layout)
        self._states, self._metas = self._table[:, R_STATE], self._table[:, R_META]
        self._ready = np.frombuffer(words, np.uint64, layout.ring_mask + 1, layout.ring * WORD_SIZE)

    def rebind(self, entry: int, owner: int, sender: int) -> None:
        """Act for that participant; what a parent could not return is its own to return."""
        self.called = self.words[entry + P_CALLED : entry + P_CALLED + 1].cast("B").cast("d")
        self.owner = owner
        self.sender = sender
        self._unreturned.clear()
        self.partial = None
        self.late.clear()
        self._held.clear()

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
                return self._notice(gen)
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
            self._wake_receiver()
        return SENT

    def send_many(self, messages: Sequence[tuple[int, Any, bytes]], first: int) -> int:
        """As `send`, for the messages from the first on that are small, as many as there is room for, under one grant.

        Returns:
            How many were sent. 0 says nothing else than that `send` is to be asked.
        """
        words, senders, ring, mask = self.words, self.senders, self._ring, self._mask
        last, left = first, _BATCH_NBYTES
        for meta, data, _ in messages[first : first + self._capacity]:
            left -= meta >> 16
            if left < 0 or meta >> 16 > min(
                self._slot_size, SMALL_PARTS_NBYTES if data.__class__ is Parts else SMALL_NBYTES
            ):
                break
            last += 1
        if last - first < 2:
            return 0
        if senders.owned():
            raise reentrant_call(self.name)
        sent = 0
        try:
            gen = senders.enter()
            if not gen:
                return 0
            if words[ATTENTION]:
                senders.leave(gen)
                return 0
            tail = words[TAIL]
            slot = words[ring + (tail - 1 & mask)]
            for meta, data, description in messages[first:last]:
                slot = self._next[slot]
                record = self._records[slot]
                if words[record] != FREE:
                    slot = self._find_free(tail)
                    if slot < 0:
                        break
                    record = self._records[slot]
                self.write(self.offsets[slot], meta >> 16, data)
                if description:
                    offset = (record + R_DESCRIPTION) * WORD_SIZE
                    self.memory[offset : offset + len(description)] = description
                words[record + R_SEQUENCE] = tail
                words[record + R_META] = meta
                words[record + R_SENDER] = self.sender
                words[record] = READY
                words[ring + (tail & mask)] = slot
                words[TAIL] = tail = tail + 1
                words[SENT_NBYTES] += meta >> 16
                sent += 1
            senders.leave(gen)
        except BaseException as error:
            senders.abandon()
            refuse_damage(self.name, error)
            raise
        if words[MESSAGE_HINT]:
            wake_for(words, MESSAGE_HINT, self.messages, at_most=sent)
        return sent

    def write(self, offset: int, nbytes: int, data: Any) -> None:
        """Copy a message's data to that byte of the segment; `send` has it in line."""
        if data.__class__ is Parts or data.__class__ is Row:
            data.write(self.memory, offset)
        elif nbytes:
            self.memory[offset : offset + nbytes] = data

    def _send_large(self, meta: int, data: Any, description: bytes) -> Outcome:
        """As `send`, with the copy outside of the critical sections."""
        nbytes = meta >> 16
        claimed: list[tuple[int, int]] = []
        try:
            outcome = self.claim(claimed)
            for slot, since in claimed:
                self.write(self.offsets[slot], nbytes, data)
                outcome = self.publish(slot, meta, description)
                if outcome is not SENT:
                    self.discard(slot, since)
        except BaseException:
            for slot, since in claimed:
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
        words, senders = self.words, self.senders
        if senders.owned():
            raise reentrant_call(self.name)
        try:
            gen = senders.enter()
            if not gen:
                return CONTENDED
            if words[ATTENTION]:
                return self._notice(gen)
            slot = self._find_free(words[TAIL])
            if slot < 0:
                senders.leave(gen)
                return FULL
            record = self._records[slot]
            words[record + R_SINCE] = since = time.monotonic_ns()
            claimed.append((slot, since))
            words[record] = WRITING | self.owner
            senders.leave(gen)
        except BaseException as error:
            senders.abandon()
            refuse_damage(self.name, error)
            raise
        return CLAIMED

    def publish(self, slot: int, meta: int, description: bytes) -> Outcome:
        """Publish a claimed slot, which holds the payload already.

        Returns:
            SENT; or NOTICE after a shutdown, or CONTENDED, and then the slot is still the caller's.
        """
        words, senders, record = self.words, self.senders, self._records[slot]
        offset = (record + R_DESCRIPTION) * WORD_SIZE
        self.memory[offset : offset + len(description)] = description
        words[record + R_META] = meta
        words[record + R_SENDER] = self.sender
        if senders.owned():
            raise reentrant_call(self.name)
        try:
            gen = _enter_patiently(senders, _PUBLISH_SLICES)
            if not gen:
                return CONTENDED
            if words[SHUTDOWN]:
                return self._notice(gen)
            if words[record] != WRITING | self.owner:
                raise corrupted(self.name)
            tail = words[TAIL]
            words[record + R_SEQUENCE] = tail
            words[record] = READY
            words[self._ring + (tail & self._mask)] = slot
            words[TAIL] = tail + 1
            words[SENT_NBYTES] += meta >> 16
            senders.leave(gen)
        except BaseException as error:
            senders.abandon()
            refuse_damage(self.name, error)
            raise
        if words[MESSAGE_HINT]:
            self._wake_receiver()
        return SENT

    def discard(self, slot: int, since: int) -> None:
        """Give a slot back unpublished that was claimed at that time; nothing happens if it was published, or given
        back (and perhaps claimed again, by another thread), or is a parent's.
        """
        if self.is_claimed(slot, since):
            self.vacate(slot)
            self.wake_freed(self._capacity if self.streams else 1)

    def vacate(self, slot: int) -> None:
        """Free a slot that is in nobody else's hands, and before it the pieces of which it is the head."""
        if self.streams:
            self._free_pieces(slot)
            self.words[self._records[slot] + R_FEEDER] = ALL_THERE
        self.words[self._records[slot]] = FREE

    def _free_pieces(self, head: int) -> None:
        self._states[self._states == (PIECE | head << ENTRY_SHIFT)] = FREE

    def is_claimed(self, slot: int, since: int) -> bool:
        """Whether this participant is writing a slot that it claimed at that time."""
        record = self._records[slot]
        return bool(self.words[record] == WRITING | self.owner and self.words[record + R_SINCE] == since)

    def _notice(self, gen: int) -> Outcome:
        """Leave the mutex for the caller to look round; what set ATTENTION after this store sets it again."""
        self.words[ATTENTION] = self.words[SHUTDOWN]
        self.senders.leave(gen)
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

    def space_expected(self) -> int:
        """Word of the record that most likely comes free next: a hint for who spins."""
        slot = self.words[self._ring + (self.words[TAIL] - 1 & self._mask)]
        return self._records[self._next[slot % self._capacity]]

    def settle(self) -> None:
        """Let a message be seen whose sender was interrupted, or has died, between its slot's word and the ring.

        Whoever enters the mutex next recovers it, and that may be nobody: receivers and `flush`, who would wait for
        such a message in vain, call this. It waits a slice at most, and may have to be called again.
        """
        senders = self.senders
        if senders.owned():
            return
        try:
            gen = senders.enter()
            if gen:
                senders.leave(gen)
        except BaseException:
            senders.abandon()
            raise

    def close_for_senders(self) -> bool:
        """Set SHUTDOWN: no message is published after this; False if the mutex was not to be had in a slice."""
        senders = self.senders
        if senders.owned():
            raise reentrant_call(self.name)
        try:
            gen = senders.enter()
            if not gen:
                return False
            self.words[SHUTDOWN] = 1
            self.words[ATTENTION] = 1
            senders.leave(gen)
        except BaseException:
            senders.abandon()
            raise
        return True

    # --- receiving

    def receive(self, consume: Consume, kind: Any = None) -> Any:
        """Take the oldest message, consume it where it lies, release its slot.

        Args:
            kind: if the call is interrupted when the message is received, the next call of the same kind returns it:
                the memory that it was copied into, or None.

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
                if self._unreturned[0][0] is not kind:
                    raise self._other_call()
                value = self._unreturned[0][1]  # no call from here to the return: none at which a handler could run
                del self._unreturned[0]
                return value
            self._tail_seen = tail = words[TAIL]
            if words[HEAD] == tail:
                return EMPTY
        receivers, record, mine = self.receivers, 0, 0
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
                return self._distrust()
            record = self._records[slot]
            meta = words[record + R_META]
            if meta >> 16 > self._slot_size:
                self._check_streams()
                receivers.leave(gen)
                return STREAM
            mine = state + TAKE + self.owner
            words[record] = mine
            words[HEAD] = self._head_seen = head + 1
            words[TAKEN_NBYTES] += meta >> 16
            receivers.posts[gen >> 1 & 1]()  # FencedMutex.leave, in line
            words[receivers.hold] = 0
            receivers.unlock()

            try:
                value = consume(self.memory, self.offsets[slot], meta, (record + R_DESCRIPTION) * WORD_SIZE)
            except Exception as error:
                description = (record + R_DESCRIPTION) * WORD_SIZE
                value = self.consume_again(partial(consume, self.memory, self.offsets[slot], meta, description), error)

            if words[record] != mine:
                raise corrupted(self.name)
            if ORDERED_STORES:
                words[record] = FREE
            else:
                self._release_in_order(record)
        except BaseException as error:
            self.give_back([(record, mine)])
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

    def consume_again(self, again: Callable[[], Any], error: Exception) -> Outcome:
        """After a message could not be consumed: an outcome with the error, if that fails again.

        What a signal handler raises while it works is not its failure. Then it works the second time, the handler's
        exception goes on, and the message goes back to its place. So it does if memory has run out.
        """
        if isinstance(error, MemoryError):
            raise error
        try:
            again()
        except Exception:
            return Outcome("UNDECODABLE", error)
        raise error

    def receive_many(self, limit: int, consume: Consume) -> Any:
        """As `receive`, for up to `limit` messages that are there, under one grant of the mutex.

        A message that cannot be consumed ends the batch: if it is the first, its outcome is returned, else it and
        those behind it go back to their places.

        Returns:
            A list of what `consume` gave; or UNDECODABLE, EMPTY, CONTENDED or STREAM.
        """
        words = self.words
        if self._unreturned:
            if any(kind is not None for kind, _ in self._unreturned):
                raise self._other_call()
            values = [value for _, value in self._unreturned[:limit]]
            self._unreturned = self._unreturned[limit:]
            return values
        if words[HEAD] == words[TAIL]:
            return EMPTY
        taken = Taken()
        values = []
        failed: Outcome | None = None
        released = 0
        try:
            outcome = self.take(taken, limit)
            if outcome is not TAKEN:
                return outcome

            for slot, meta in zip(taken.slots, taken.metas):  # noqa: B905
                try:
                    description = (self._records[slot] + R_DESCRIPTION) * WORD_SIZE
                    value = consume(self.memory, self.offsets[slot], meta, description)
                except Exception as error:
                    again = partial(consume, self.memory, self.offsets[slot], meta, description)
                    value = self.consume_again(again, error)
                if value.__class__ is Outcome:
                    failed = value
                    break
                values.append(value)
            pairs = self.pairs(taken)
            if any(words[record] != mine for record, mine in pairs):
                raise corrupted(self.name)
            done = len(values) or 1  # a first message that failed counts as received
            self._requeue_or_later(pairs[done:])
            for record, mine in pairs[:done]:
                if not self.release(record, mine):
                    raise corrupted(self.name)
                released += 1
        except BaseException as error:
            if taken.words:
                self._tail_seen = 0
                self._unreturned += [(None, value) for value in values[:released]]
                self.give_back(self.pairs(taken)[released:])
            refuse_damage(self.name, error)
            raise
        if words[SPACE_HINT]:
            try:
                self.wake_freed()
            except BaseException:
                self._tail_seen = 0
                self._unreturned += [(None, value) for value in values]
                raise
        return values or failed

    def receive_batch(
        self, at_most: int, at_least: int, gather: Callable[[list[int], list[int]], Any], kind: Any
    ) -> Any:
        """Take up to `at_most` messages, if `at_least` are there, consume them together, release their slots.

        Args:
            gather: takes the slots, and the R_META of each, and gives what they are together.
            kind: as `receive`; None stands for new memory.

        Returns:
            What `gather` gave; or an UNDECODABLE outcome with its error, and the messages count as received; or EMPTY
            or CONTENDED, and then nothing has changed.
        """
        if kind is None:
            kind = _NEW_BATCH
        if self._unreturned:
            if self._unreturned[0][0] is not kind:
                raise self._other_call()
            value = self._unreturned[0][1]
            del self._unreturned[0]
            return value
        taken = Taken()
        try:
            outcome = self.take(taken, at_most, at_least)
            if outcome is not TAKEN:
                return outcome
            slots, metas = taken.slots, taken.metas
            if len(slots) < at_least:
                self.give_back(self.pairs(taken))
                return CONTENDED
            try:
                value = gather(slots, metas)
            except Exception as error:
                value = self.consume_again(partial(gather, slots, metas), error)
            run = taken.run
            if run is None:
                run = np.array(slots)
            if self._states[run].tolist() != taken.words:
                raise corrupted(self.name)
            if ORDERED_STORES:
                self._states[run] = FREE  # all at once: an exception comes before or after
            else:
                for record, mine in self.pairs(taken):
                    self.release(record, mine)
        except BaseException as error:
            if taken.words:
                self.give_back(self.pairs(taken))
                refuse_damage(self.name, error)
            raise
        if self.words[SPACE_HINT]:
            try:
                self.wake_freed()
            except BaseException:
                self._tail_seen = 0
                self._unreturned += [(kind, value)]  # the next call returns it, however many it asks for
                raise
        return value

    def _other_call(self) -> InterruptedCall:
        return InterruptedCall(
            f"channel {self.name!r}: an earlier call was interrupted when it had received. That comes first, and only "
            "to a call of the same kind: call get() or get_many(), or get() or get_batch() with the same `out`"
        )

    def pairs(self, taken: Taken) -> list[tuple[int, int]]:
        """The records of taken slots, and their words."""
        return [(self._records[slot], word) for slot, word in zip(taken.slots, taken.words)]  # noqa: B905

    def take(self, taken: Taken, at_most: int = 1, at_least: int = 1, stream: bool = False) -> Outcome:
        """Take the oldest READY slots, as far as they hold no message larger than a slot; or one such, with `stream`.

        Each is in `taken` before it is this participant's: an exception may come before the caller has the outcome, and
        what was taken is the caller's to give back then.

        Returns:
            TAKEN (fewer than `at_least` if the ring was found damaged behind them); or EMPTY if fewer are READY,
            STREAM if the oldest is larger than a slot (EMPTY, with `stream`, if it is not), or CONTENDED, and then
            nothing has changed.
        """
        if self._unreturned:
            raise self._other_call()
        words, receivers = self.words, self.receivers
        if 0 <= words[TAIL] - words[HEAD] < at_least:
            return EMPTY
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
            count = min(at_most, words[TAIL] - head)
            if count < 0:
                return self._distrust()
            if count < at_least:
                receivers.leave(gen)
                return EMPTY
            if _MANY <= count <= self._capacity and self._take_run(head, count, taken):
                receivers.leave(gen)
                return TAKEN
            outcome = TAKEN
            for position in range(head, head + count):
                slot = words[self._ring + (position & self._mask)]
                state = words[self._records[slot]] if slot < self._capacity else FREE
                if state & STATE_MASK != READY:
                    if not taken.words:
                        return self._distrust()
                    break
                record = self._records[slot]
                meta = words[record + R_META]
                if (meta >> 16 > self._slot_size) is not stream:
                    self._check_streams()
                    if not taken.words:
                        outcome = EMPTY if stream else STREAM
                    break
                mine = state + TAKE + self.owner
                taken.slots.append(slot)
                taken.metas.append(meta)
                taken.words.append(mine)
                words[record] = mine
                words[HEAD] = position + 1
                words[TAKEN_NBYTES] += meta >> 16
            receivers.leave(gen)
        except BaseException as error:
            receivers.abandon()
            refuse_damage(self.name, error)
            raise
        return outcome

    def _check_streams(self) -> None:
        """A message is larger than its slot: may that be?"""
        if not self.streams:
            raise corrupted(self.name)

    def _take_run(self, head: int, count: int, taken: Taken) -> bool:
        """What the loop of `take` does, in a few steps, for messages that nobody has died on, in slots in a row, which
        may go on from the last slot to the first.

        False, and nothing has changed, if they are not so.
        """
        words, begin = self.words, head & self._mask
        slots = self._ready[begin : begin + count].tolist()
        first = slots[0]
        if slots != self._cycle[first : first + count]:
            return False
        run = slice(first, first + count) if first + count <= self._capacity else np.array(slots)
        metas = self._metas[run].tolist()
        nbytes = metas[0] >> 16
        if metas == metas[:1] * count and nbytes <= self._slot_size:
            nbytes *= count
        elif max(metas) >> 16 <= self._slot_size:
            nbytes = sum([meta >> 16 for meta in metas])
        else:
            return False
        if self._states[run].tolist() != [READY] * count:
            return False
        mine = READING | self.owner
        taken.run, taken.slots, taken.metas, taken.words = run, slots, metas, [mine] * count
        self._states[run] = mine
        words[HEAD] = head + count
        words[TAKEN_NBYTES] += nbytes
        return True

    def release(self, record: int, mine: int) -> bool:
        """Hand a slot back for reuse, READING or KEPT; False if it is not this participant's (a forked child has words
        of its parent's in its memory). Whoever waits for space is to be woken then: `wake_freed`, if SPACE_HINT is set.
        """
        if (self.words[record] ^ mine) & ~STATE_MASK or mine & OWNER_MASK != self.owner:
            return False
        if ORDERED_STORES:
            self.words[record] = FREE
        else:
            self._release_in_order(record)
        return True

    def _release_in_order(self, record: int) -> None:
        """Free a slot where the processor may reorder stores: the mutex orders what was read of the slot before."""
        receivers = self.receivers
        if receivers.owned():
            raise reentrant_call(self.name)
        try:
            gen = _enter_patiently(receivers, _RETURN_SLICES)
            self.words[record] = FREE
            if gen:
                receivers.leave(gen)
        except BaseException:
            receivers.abandon()
            raise

    def _distrust(self) -> Outcome:
        """The ring leads to a slot that is not READY: leave the mutex as the dead do, so that it is rebuilt."""
        self._tail_seen = 0
        self.receivers.abandon()
        return CONTENDED

    def give_back(self, taken: list[tuple[int, int]]) -> None:
        """After an exception in a receiving call: what it had taken becomes READY again, no delivery counted.

        If the exception came inside the critical section, the token is lost and `requeue` recovers the mutex first.
        """
        words = self.words
        for _ in range(3):  # a second Ctrl-C must not keep the message from its place
            try:
                self.receivers.abandon()
                # a forked child has its parent's words in its memory
                mine = [
                    (record, state)
                    for record, state in taken
                    if state and state & OWNER_MASK == self.owner and words[record] == state
                ]
                self._requeue_or_later(mine)
                return
            except RingshmError:
                raise
            except BaseException:
                continue

    def _requeue_or_later(self, taken: list[tuple[int, int]]) -> None:
        if not self.requeue(taken):
            self.late += taken

    def watch(self, slot: int, holder: Callable[[], object], received: bool) -> None:
        """Give a slot back, at some later look for the dead, whose holder (a weak reference) has gone without it; a
        message to its place, unless it counts as received.
        """
        record = self._records[slot]
        self._held[slot] = holder, received, self.words[record + R_SEQUENCE], self.words[record + R_SINCE]

    def forget(self, slot: int, since: int | None = None) -> None:
        """The slot was given back; if it was claimed at that time, else somebody else watches it by now."""
        held = self._held.get(slot)
        if held is not None and since in (None, held[-1]):
            self._held.pop(slot, None)

    def give_back_abandoned(self) -> None:
        """Do what `watch` says. A message's sequence, and the time of a claim, tell one use of a slot from the next.
        And let go of what was copied of a message larger than a slot that is no longer there.
        """
        if self.partial is not None:
            head, since, meta, *_ = self.partial
            record = self._records[head]
            there = self.words[record] & STATE_MASK in (READY, READING)
            if not there or (self.words[record + R_SINCE], self.words[record + R_META]) != (since, meta):
                self.partial = None
        for slot, (holder, received, sequence, since) in list(self._held.items()):
            if holder() is not None:
                continue
            self._held.pop(slot, None)
            record = self._records[slot]
            word = self.words[record]
            self.withdraw(slot, self.owner, since, slices=1)
            self.discard(slot, since)
            if word & OWNER_MASK == self.owner and self.words[record + R_SEQUENCE] == sequence:
                if word & STATE_MASK == READING and not received:
                    self.late.append((record, word))
                elif word & STATE_MASK == KEPT and self.words[record + R_META] >> 16 > self._slot_size:
                    self.vacate(slot)
                    self.wake_freed(self._capacity)
                elif word & STATE_MASK in (READING, KEPT) and self.release(record, word):
                    self.wake_freed()

    def requeue_late(self) -> None:
        """Try again what could not be given back because a process was stopped inside the mutex."""
        if self.late:
            late, self.late = self.late, []
            if not self.requeue(late, slices=1):
                self.late += late

    def requeue(self, taken: list[tuple[int, int]], deliveries: int = 0, slices: int = _RETURN_SLICES) -> bool:
        """Put READING slots (their records and words) back to their old places, before newer messages.

        Args:
            deliveries: how many failed deliveries to count, 1 if the receiver died.
            slices: how often to try for the mutex.

        Returns:
            False if the mutex was not to be had, and then some are not back yet.
        """
        receivers, words = self.receivers, self.words
        if receivers.owned():
            raise reentrant_call(self.name)
        for record, state in reversed(taken):
            try:
                gen = _enter_patiently(receivers, slices)
                if not gen:
                    return False
                if words[record] == state:
                    words[TAKEN_NBYTES] = max(0, words[TAKEN_NBYTES] - (words[record + R_META] >> 16))
                    ready = (READY | state & DELIVERY_MASK) + deliveries * DELIVERY
                    self._store_and_count(record, ready, REDELIVERED, deliveries)
                    self._insert(record)
                receivers.leave(gen)
            except BaseException as error:
                receivers.abandon()
                refuse_damage(self.name, error)
                raise
            if words[MESSAGE_HINT]:
                self._wake_receiver()
        return True

    def _insert(self, record: int) -> None:
        """Put a READY slot into the ready ring by its sequence; nearly always it is the oldest."""
        words, ring, mask = self.words, self._ring, self._mask
        sequence = words[record + R_SEQUENCE]
        position = words[HEAD] - 1
        for _ in range(min(words[TAIL] - words[HEAD], self._capacity)):
            slot = words[ring + (position + 1 & mask)]
            if words[self._records[slot] + R_SEQUENCE] > sequence:
                break
            words[ring + (position & mask)] = slot
            position += 1
        words[ring + (position & mask)] = self.slot_of(record)
        words[HEAD] -= 1

    def drop_oldest(self, limit: int = 1) -> Outcome:
        """Free the oldest READY slots unread, up to `limit`; SENT if one was, else EMPTY or CONTENDED."""
        words, receivers = self.words, self.receivers
        dropped = 0
        if receivers.owned():
            raise reentrant_call(self.name)
        try:
            gen = receivers.enter()
            if not gen:
                return CONTENDED
            head = words[HEAD]
            for position in range(head, min(head + self._capacity, words[TAIL])):  # no `while`: see mutex.py, 5
                slot = words[self._ring + (position & self._mask)]
                if slot >= self._capacity or words[self._records[slot]] & STATE_MASK != READY:
                    return self._distrust()
                # the loop's body ends with no jump: see mutex.py, 5
                dropped += dropped < limit and self._drop_if_sent(position, slot)
            receivers.leave(gen)
        except BaseException as error:
            receivers.abandon()
            refuse_damage(self.name, error)
            raise
        if not dropped:
            return EMPTY
        if words[SPACE_HINT]:
            self.wake_freed()
        return SENT

    def _drop_if_sent(self, position: int, slot: int) -> bool:
        """Drop that message, unless it is being fed: then its `put` has not returned. Whether it was dropped."""
        if self.is_fed(slot):
            return False
        given_up = self.is_given_up(self._records[slot])
        self._drop_ready(position, slot, WITHDRAWN if given_up else DROPPED)
        return True

    def _drop_ready(self, position: int, slot: int, counter: int) -> None:
        """Within the receivers' mutex: take a message out of the ready ring, and free it."""
        words = self.words
        nbytes = words[self._records[slot] + R_META] >> 16
        self._free_and_count(slot, counter)
        for before in range(position, words[HEAD], -1):
            words[self._ring + (before & self._mask)] = words[self._ring + (before - 1 & self._mask)]
        words[HEAD] += 1
        words[TAKEN_NBYTES] = words[TAKEN_NBYTES] + nbytes & MAX_WORD

    def _position_of(self, slot: int) -> int | None:
        """Where in the ready ring a slot is."""
        words = self.words
        positions = range(words[HEAD], min(words[HEAD] + self._capacity, words[TAIL]))
        return next((at for at in positions if words[self._ring + (at & self._mask)] == slot), None)

    def _free_and_count(self, slot: int, counter: int) -> None:
        """Free a slot whose message nobody is to receive any more, and count that. If this process dies amid the
        pieces, the message is given up, and the next receiver drops it.
        """
        record = self._records[slot]
        if self.words[record + R_META] >> 16 > self._slot_size:
            self.words[record + R_FEEDER] = GIVEN_UP
            self._free_pieces(slot)
        self._store_and_count(record, FREE, counter, 1)

    def drop_taken(self, record: int, state: int, slices: int = 1) -> bool:
        """Free a READING slot for good whose message nobody is to receive any more: its receivers died of it too often,
        or its sender has given it up. As `requeue`.
        """
        words, receivers = self.words, self.receivers
        slot = self.slot_of(record)
        if receivers.owned():
            raise reentrant_call(self.name)
        try:
            gen = _enter_patiently(receivers, slices)
            if not gen:
                return False
            if words[record] == state:
                if self.is_fed(slot):  # its sender still writes: it is told, and frees them
                    self._store_and_count(record, WRITING | words[record + R_FEEDER], DROPPED, 1)
                else:
                    self._free_and_count(slot, WITHDRAWN if self.is_given_up(record) else DROPPED)
            receivers.leave(gen)
        except BaseException:
            receivers.abandon()
            raise
        return True

    # --- messages larger than a slot: see stream.py

    def is_fed(self, slot: int, since: int | None = None) -> bool:
        """Whether a published message there is being fed by its sender; by this one, which claimed it at that time."""
        words, record = self.words, self._records[slot]
        if words[record] & STATE_MASK not in (READY, READING) or words[record + R_META] >> 16 <= self._slot_size:
            return False
        feeder = words[record + R_FEEDER]
        if since is None:
            return feeder > GIVEN_UP
        return bool(feeder == self.owner and words[record + R_SINCE] == since)

    def feeder_of(self, slot: int) -> int:
        """Who writes the message larger than a slot that is there: a participant, ALL_THERE or GIVEN_UP."""
        return self.words[self._records[slot] + R_FEEDER]

    def is_given_up(self, record: int) -> bool:
        """Whether that message's sender will not write what is missing of it."""
        return bool(self.words[record + R_META] >> 16 > self._slot_size and self.words[record + R_FEEDER] == GIVEN_UP)

    def fed_by(self, owner: int) -> list[int]:
        """The heads of the messages that this participant has published and not written to the end."""
        feeders = np.flatnonzero(self._table[:, R_FEEDER] == owner).tolist() if self.streams else []
        return [slot for slot in feeders if self.is_fed(slot)]

    def claim_pieces(self, head: int, at_most: int) -> list[int]:
        """Claim further FREE slots for the message whose head is this participant's, WRITING or being fed.

        Returns:
            The slots; none if none is free or the mutex was not to be had within a slice.
        """
        words, senders = self.words, self.senders
        if senders.owned():
            raise reentrant_call(self.name)
        try:
            gen = senders.enter()
            if not gen:
                return []
            free: list[int] = np.flatnonzero(self._states == FREE)[:at_most].tolist()
            for slot in free:
                record = self._records[slot]
                words[record + R_PIECE] = 0
                words[record] = PIECE | head << ENTRY_SHIFT
            senders.leave(gen)
        except BaseException as error:
            senders.abandon()
            refuse_damage(self.name, error)
            raise
        return free

    def return_later(self, kind: Any, value: Any) -> None:
        """After an exception in a call that had received: the next call of the same kind returns it; see `receive`."""
        self._tail_seen = 0
        self._unreturned += [(kind, value)]

    def pieces_of(self, head: int) -> list[int]:
        """The slots that belong to the message with that head."""
        pieces: list[int] = np.flatnonzero(self._states == (PIECE | head << ENTRY_SHIFT)).tolist()
        return pieces

    def take_back(self, slot: int, since: int) -> bool:
        """After an exception in a sending call, or its end: free what it had claimed at that time, unless it was sent;
        whether it was not.
        """
        for _ in range(3):  # as in give_back
            try:
                unsent = self.is_claimed(slot, since) or self.withdraw(slot, self.owner, since)
                self.discard(slot, since)
                self.forget(slot, since)
                return unsent
            except RingshmError:
                raise
            except BaseException:
                continue
        return True  # `watch` has it

    def withdraw(self, slot: int, owner: int, since: int | None = None, slices: int = _PUBLISH_SLICES) -> bool:
        """Give up a published message that this participant, or a dead one, has not written to the end.

        One that a receiver has taken is marked, for the receiver to drop; one that waits goes at once.

        Args:
            owner: the participant that feeds it.
            since: when it was claimed, if it is this one.

        Returns:
            False if it is no longer there, or was dropped. If the mutex is not to be had, the mark alone says it.
        """
        words, receivers, record = self.words, self.receivers, self._records[slot]
        if not self.is_fed(slot, since):
            return False
        for _ in range(slices):
            if not self.hides_messages():  # unless this very call was interrupted while it published
                break
            self.settle()
        if receivers.owned():
            raise reentrant_call(self.name)
        try:
            gen = _enter_patiently(receivers, slices)
            fed = self.is_fed(slot, since) and words[record + R_FEEDER] == owner
            if fed:
                words[record + R_FEEDER] = GIVEN_UP
                position = self._position_of(slot)
                if gen and words[record] & STATE_MASK == READY and position is not None:
                    self._drop_ready(position, slot, WITHDRAWN)
            if gen:
                receivers.leave(gen)
        except BaseException as error:
            receivers.abandon()
            refuse_damage(self.name, error)
            raise
        if fed:
            self.wake_freed(self._capacity)
            self.pieces.wake_all()
        return fed

    def is_waiting(self, slot: int) -> bool:
        """Whether a message there waits to be taken."""
        return bool(self.words[self._records[slot]] & STATE_MASK == READY)

    def commit(self, record: int, state: int, slices: int = _PUBLISH_SLICES) -> bool:
        """A message larger than a slot is read and decoded: it counts as received from here on, its slot is KEPT for
        the caller to free.

        Returns:
            False if it is not received: its sender has given it up meanwhile, or the mutex was not to be had. The
            slot is as it was.
        """
        words, receivers = self.words, self.receivers
        if receivers.owned():
            raise reentrant_call(self.name)
        try:
            gen = _enter_patiently(receivers, slices)
            if not gen:
                return False
            if words[record] != state:
                raise corrupted(self.name)
            received = words[record + R_FEEDER] != GIVEN_UP
            if received:
                words[record] = state + KEPT - READING
            receivers.leave(gen)
        except BaseException as error:
            receivers.abandon()
            refuse_damage(self.name, error)
            raise
        return received

    def _store_and_count(self, record: int, word: int, counter: int, by: int) -> None:
        """Store a slot's word, and count it. Whoever dies between the two: `rebuild` counts then."""
        words = self.words
        words[COUNTING_WORD] = words[record]
        words[COUNTING_SEQUENCE] = words[record + R_SEQUENCE]
        words[COUNTING_TOTAL] = total = words[counter] + by & MAX_WORD
        words[COUNTING] = record << 8 | counter
        words[record] = word
        words[counter] = total
        words[COUNTING] = 0

    # --- waking

    def _wake_receiver(self) -> None:
        wake_for(self.words, MESSAGE_HINT, self.messages)

    def wake_freed(self, slots: int = 1) -> None:
        """Slots came free: wake as many who wait for space, and all who wait for messages to be received; but not
        before a quarter of a large ring is free, else a sender and a receiver would wake each other for each message.
        Who waits in vain for that looks when its slice is over.
        """
        words = self.words
        if words[TAIL] - words[HEAD] <= self._nearly_full:
            wake_for(words, SPACE_HINT, self.space, self.events, slots)

    # --- looking

    def description_of(self, slot: int) -> int:
        """Byte at which the description of a slot's message starts."""
        return (self._records[slot] + R_DESCRIPTION) * WORD_SIZE

    def slot_of(self, record: int) -> int:
        """Index of the slot whose record starts at that word."""
        return (record - self.layout.records) // RECORD_WORDS

    def ready(self) -> int:
        """Messages that wait to be taken, at the moment of the call."""
        head = self.words[HEAD]
        return max(0, min(self.words[TAIL] - head, self.layout.capacity))

    def slot_words(self) -> bytes:
        """The words of all slots, as they are."""
        return self._states.tobytes()

    def holds(self, slot: int, states: tuple[int, ...]) -> bool:
        """Whether a slot is this participant's, in one of those states."""
        word = self.words[self._records[slot]]
        return word & OWNER_MASK == self.owner and word & STATE_MASK in states

    def is_from(self, slot: int, sender: int) -> bool:
        """Whether this participant is reading a message of that sender there."""
        return self.holds(slot, (READING,)) and bool(self.words[self._records[slot] + R_SENDER] == sender)

    def kept(self) -> int:
        """How many slots this participant keeps for views."""
        states = self._states & np.uint64((OWNER_MASK | STATE_MASK) & (1 << 64) - 1)
        return int((states == self.owner | KEPT).sum())

    def may_move(self) -> bool:
        """Whether a slot is FREE or READY."""
        states = self._states & np.uint64(STATE_MASK)
        return bool(((states == FREE) | (states == READY)).any())

    def hides_messages(self) -> bool:
        """Whether slots are READY that are not in the ring; for a moment it is so while a message is published."""
        return int(((self._states & np.uint64(STATE_MASK)) == READY).sum()) > self.ready()

    def free_slots(self) -> int:
        """How many slots are free, at the moment of the call."""
        return int((self._states == FREE).sum())

    def full(self) -> bool:
        """Whether no slot is free."""
        return not bool((self._states == FREE).any())

    def unfinished(self, sender: int | None = None) -> bool:
        """Whether a message (of that sender) was not received and may still be; KEPT ones were received."""
        states = self._states & np.uint64(STATE_MASK)
        pending = (states == READY) | (states == READING) | (states == WRITING)
        if sender is not None:
            pending &= (self._table[:, R_SENDER] == sender) & (states != WRITING)
        return bool(pending.any())

    def drained_for(self, owner: int, at_least: int = 1) -> bool:
        """Whether fewer than `at_least` slots are READY, and none WRITING, or READING by others than that owner: no
        more can come, once nobody sends.
        """
        states = self._states
        kinds = states & np.uint64(STATE_MASK)
        others = (kinds == READING) & ((states & np.uint64(OWNER_MASK & (1 << 64) - 1)) != owner)
        return int((kinds == READY).sum()) < at_least and not bool(((kinds == WRITING) | others).any())

    def owned_by(self, owner: int) -> list[tuple[int, int]]:
        """(record, word) of the slots that this owner is writing, reading or keeping."""
        states = self._states.tolist()
        return [
            (self._records[slot], state)
            for slot, state in enumerate(states)
            if state & STATE_MASK in (WRITING, READING, KEPT) and state & OWNER_MASK == owner
        ]
