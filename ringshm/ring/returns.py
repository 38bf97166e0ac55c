"""What goes back: a slot becomes FREE, or a message that was taken goes to its old place in the ready ring.

    READING, KEPT  --release--> FREE                          by its owner, without a mutex
    WRITING        --discard--> FREE                          by its owner, without a mutex
    READING        --requeue--> READY, in its old place       by its owner, or by the reaper of a dead one
    READY          --drop_oldest, withdraw--> FREE            within the receivers' mutex
    READING        --drop_taken--> FREE                       within the receivers' mutex

1. The pieces of a message larger than a slot are freed before its head. If the process dies amid them, the message is
   given up, and the next receiver drops it.
2. While its sender feeds a message, nobody else frees it: a receiver that would drop it makes it WRITING again, and so
   leaves that to the sender.
3. A message is dropped and counted by several stores. COUNTING* say beforehand what is to be counted: `rebuild` counts
   for a process that dies between them.
4. What a call cannot give back, since a stopped process keeps the mutex, is `overdue`: each later look for the dead
   tries again.
5. What a call has received when an interrupt comes is returned by the next call of the same kind.
6. An interrupt may come where a finaliser begins, and nothing can catch it there. So this process writes down (`watch`)
   which object holds a slot, and each look for the dead gives back what objects that are gone have left.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import ChannelUnavailable, InterruptedCall, RingshmError, is_own
from ..segment import layout, limits
from ..segment.layout import FREE, GIVEN_UP, KEPT, LEFT, OWNER_MASK, PIECE, READING, READY, STATE_MASK, WRITING, Layout
from ..system import get_ident
from .damage import corrupted
from .mutex import ORDERED_STORES, FencedMutex, critical
from .observe import Held, SlotTable
from .outcomes import CONTENDED, DISTRUSTED, EMPTY, SENT, Outcome
from .waiters import Waiters, wake_for

#: Slices that a sender which has copied its message waits to publish it, before it answers CONTENDED and copies again.
PUBLISH_SLICES = 4
#: Slices that a receiver waits to give back what it could not consume: 5 s. If a process is stopped inside the mutex
#: for longer (or a damaged word says so), the call ends, and later ones go on trying.
RETURN_SLICES = 100


class Returns(SlotTable):
    """The slots, and how they and their messages go back.

    Args:
        senders, receivers: the two mutexes, which may be one.
        messages, space, events: the waiters for a message, for a free slot, for anything else.
        ends: the waiters for a piece, and for room for one; None if no message may be larger than a slot.

    Attributes:
        called: where calls store the time at which they begin.
        overdue: taken slots that are still to be given back, as keys: threads add and take them out in one step each.
        partial: what was copied of a message larger than a slot when its receiver's time was up: see large.Assembly.
    """

    def __init__(
        self,
        name: str,
        words: memoryview,
        memory: Any,
        shape: Layout,
        senders: FencedMutex,
        receivers: FencedMutex,
        messages: Waiters,
        space: Waiters,
        events: Waiters,
        ends: tuple[Waiters, Waiters] | None = None,
    ) -> None:
        super().__init__(name, words, memory, shape, streams=ends is not None)
        self.senders, self.receivers = senders, receivers
        self.messages, self.space, self.events = messages, space, events
        self.pieces, self.room = ends or (events, events)
        self.partial: tuple[Any, ...] | None = None
        self.called: Any = [0.0]
        self._entry = 0
        self.overdue: dict[Held, None] = {}
        #: What calls had received when they were interrupted: (for which kind of call, what it returns).
        self._unreturned: list[tuple[Any, Any]] = []
        #: The thread that returns some of that, by the key 0. It takes its turn, and ends it, without a call.
        self._returning: dict[int, int] = {}
        #: By slot: its holder (a weak reference), whether the message counts as received, R_SEQUENCE and R_SINCE.
        self._watched: dict[int, tuple[Callable[[], object], bool, int, int]] = {}
        self._nearly_full = shape.capacity - max(1, shape.capacity // 4)
        # TAIL and HEAD as this process saw them: each only grows, but for a requeue. While the tail seen is ahead, a
        # receiver need not read TAIL, whose cache line its senders keep writing.
        self._tail_seen = self._head_seen = 0

    def rebind(self, entry: int, owner: int, sender: int) -> None:
        """Act for the participant with that entry; what a parent has not given back, or returned, is the parent's."""
        self.called = self.words[entry + layout.P_CALLED : entry + layout.P_CALLED + 1].cast("B").cast("d")
        self._entry, self.owner, self.sender = entry, owner, sender
        self.partial = None
        self.overdue.clear()
        self._unreturned.clear()
        self._returning.clear()
        self._watched.clear()

    def refuse(self, error: ChannelUnavailable) -> None:
        """This process has no entry (any more): until `rebind` its calls raise that error, and nothing goes back."""
        self.owner = self.sender = 0
        self.called = [0.0]
        self.senders.refuse(error)
        self.receivers.refuse(error)

    @property
    def reaped(self) -> bool:
        """Whether others have taken this process for dead, and given what it had to others; see Reaper.look."""
        return bool(self.owner) and not layout.is_owned(self.words, self._entry, self.owner)

    def moved(self, own: int = 0) -> RingshmError:
        """The error for a slot that is this participant's, and whose word says otherwise.

        The word may be `own`, of when this process was another participant.
        """
        if own and own & OWNER_MASK != self.owner:
            return ChannelUnavailable(
                errno.EAGAIN,
                f"channel {self.name!r}: this process was forked, or came to count as dead, amid a call that receives "
                "(in the code that unpickled a message?): the message is not this process's; call again",
            )
        return limits.closed(self.name, reaped=True) if self.reaped else corrupted(self.name)

    # --- a slot becomes free

    def release(self, record: int, word: int) -> bool:
        """Hand a READING or KEPT slot back for reuse. Call `wake_freed` afterwards, if SPACE_HINT is set.

        Returns:
            False if it is not this participant's: a forked child has words of its parent's in its memory.
        """
        if (self.words[record] ^ word) & ~STATE_MASK or word & OWNER_MASK != self.owner:
            return False
        if ORDERED_STORES:
            self.words[record] = FREE
        else:
            self._release_in_order(record)
        return True

    def _release_in_order(self, record: int) -> None:
        """Free a slot where the processor may reorder stores: the mutex orders what was read of the slot before."""

        def free() -> None:
            self.words[record] = FREE

        if critical(self.receivers, free, RETURN_SLICES) is CONTENDED:
            free()

    def discard(self, slot: int, since: int) -> None:
        """Give a slot back unpublished that this participant claimed at that time.

        Nothing happens if it was published, or given back (and perhaps claimed again, by another thread), or is a
        parent's.
        """
        if self.is_claimed(slot, since):
            self.vacate(slot)
            self.wake_freed(self._capacity if self.streams else 1)

    def vacate(self, slot: int) -> None:
        """Free a slot that is in nobody else's hands, and before it the pieces of which it is the head."""
        if self.streams:
            self._free_pieces(slot)
            self.words[self._records[slot] + layout.R_FEEDER] = layout.ALL_THERE
        self.words[self._records[slot]] = FREE

    def _free_pieces(self, head: int) -> None:
        self._states[self._states == (PIECE | head << layout.ENTRY_SHIFT)] = FREE

    def wake_freed(self, slots: int = 1) -> None:
        """Slots came free: wake as many senders that wait for space, and all waiters for messages to be received.

        But not before a quarter of a large ring is free, else a sender and a receiver would wake each other for each
        message. A sender that waits in vain for that looks when its slice is over.
        """
        words = self.words
        if words[layout.TAIL] - words[layout.HEAD] <= self._nearly_full:
            wake_for(words, layout.SPACE_HINT, self.space, self.events, slots)

    # --- what a call has received goes to its caller, later

    def return_later(self, kind: Any, value: Any) -> None:
        """After an exception in a call that had received: the next call of the same kind returns it; see `receive`."""
        self._tail_seen = 0
        self._unreturned += [(kind, value)]

    def _return_again(self, kind: Any, limit: int = 0) -> Any:
        """What an interrupted call of that kind had received: the first of it, or with a limit a list.

        No other thread gets the same. And no handler runs between the line that takes it from `_unreturned` and the
        return, since there is no call, nor a jump backward.

        Returns:
            That; or EMPTY, if another thread was faster, or is at it.

        Raises:
            InterruptedCall: if it was a call of another kind.
        """
        thread, unreturned, values = get_ident(), self._unreturned, []
        try:
            if self._returning.setdefault(0, thread) != thread or not unreturned:
                return EMPTY
            if unreturned[0][0] is not kind:
                raise self._other_call()
            if limit:
                values = self._returnable(limit)
            count = len(values)
            if limit:
                del unreturned[:count]
                return values
            value = unreturned[0][1]
            del unreturned[0]
            return value
        finally:
            if self._returning == {0: thread}:
                del self._returning[0]

    def _returnable(self, limit: int) -> list[Any]:
        """So many of what calls that return lists had received."""
        unreturned = self._unreturned.copy()
        if any(kind is not None for kind, _ in unreturned):
            raise self._other_call()
        return [value for _, value in unreturned[:limit]]

    def _other_call(self) -> InterruptedCall:
        return InterruptedCall(
            f"channel {self.name!r}: an earlier call was interrupted when it had received. That comes first, and only "
            "to a call of the same kind: call get() or get_many(), or get() or get_batch() with the same `out`"
        )

    # --- a message goes back to its place

    def give_back(self, taken: list[Held]) -> None:
        """After an exception in a receiving call: what it had taken becomes READY again, no delivery counted.

        If the exception came inside the critical section, the token is lost, and `requeue` recovers the mutex first.

        Args:
            taken: is emptied. What has gone back may have been taken again, by another thread, when an interrupt comes.

        Raises:
            BaseException: at the end, what a signal handler has raised meanwhile.
        """
        interrupt: BaseException | None = None
        for _ in range(3):  # a second Ctrl-C must not keep the message from its place
            try:
                self.receivers.abandon()
                self.requeue_or_later(taken)
                break
            except BaseException as error:
                if isinstance(error, RingshmError) and is_own(error):
                    raise
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _own(self, taken: list[Held]) -> list[Held]:
        """Those that are still this participant's: a forked child has its parent's words in its memory."""
        return [
            (record, word)
            for record, word in taken
            if word and word & OWNER_MASK == self.owner and self.words[record] == word
        ]

    def requeue_or_later(self, taken: list[Held], deliveries: int = 0) -> None:
        """Requeue; what cannot go back now is overdue. `taken` is emptied."""
        taken[:] = self._own(taken)
        if not self.requeue(taken, deliveries):
            self.overdue.update(dict.fromkeys(taken))
            taken.clear()

    def requeue_overdue(self, wait: bool = True) -> None:
        """Try again what could not be given back because a process was stopped inside the mutex.

        Args:
            wait: as `critical` has it.
        """
        for held in [*self.overdue]:
            if not self._requeue_overdue(held, wait):
                break

    def requeue_abandoned(self, held: Held) -> None:
        """From a finaliser: the message goes back now; or by the next look for the dead, if a thread of this process is
        inside the mutex, which may be the finaliser's own.
        """
        self.overdue[held] = None
        receivers = self.receivers
        if not (receivers.owned() or self.senders.owned() or receivers.recovers):
            self.requeue_overdue(wait=False)

    def _requeue_overdue(self, held: Held, wait: bool) -> bool:
        """Try one of them again, unless another thread is at it; False if the mutex is still not to be had."""
        try:
            del self.overdue[held]  # which one thread can do; no call, at whose end a handler might run
        except KeyError:
            return True
        try:
            if self.requeue([held], slices=1, wait=wait):
                return True
        except BaseException:
            self.overdue.update(dict.fromkeys(self._own([held])))
            raise
        self.overdue[held] = None
        return False

    def requeue(self, taken: list[Held], deliveries: int = 0, slices: int = RETURN_SLICES, wait: bool = True) -> bool:
        """Put READING slots back to their old places, before newer messages.

        Args:
            taken: loses those that have gone back.
            deliveries: how many failed deliveries to count, 1 if the receiver died.
            slices, wait: how often to try for the mutex, and whether to wait for other threads: see `critical`.

        Returns:
            False if the mutex was not to be had, and then some are not back yet.

        Warns:
            RuntimeWarning: if one of them was LEFT to its receiver, and is lost; see large.py.
        """
        while taken:
            put_back = critical(self.receivers, partial(self._put_last_back, taken, deliveries), slices, wait)
            if put_back is CONTENDED:
                return False
            if put_back is False:
                self.wake_freed(self._capacity)
                self._warn_of_loss()
            elif self.words[layout.MESSAGE_HINT]:
                self.wake_receiver()
        return True

    def _put_last_back(self, taken: list[Held], deliveries: int) -> bool:
        """Within the receivers' mutex, as long as no other thread may take it again: `_put_back`, for the last one."""
        is_back = self._put_back(*taken[-1], deliveries)
        taken.pop()
        return is_back

    def _put_back(self, record: int, word: int, deliveries: int) -> bool:
        """Within the receivers' mutex: put a message back to its place; False if it is dropped, since nobody has it."""
        words = self.words
        if words[record] != word:
            return True
        if self.is_left(record):
            self._free_and_count(self.slot_of(record), layout.DROPPED)
            return False
        if self.is_large(record) and self.is_held(record):
            self.begin_attempt(record)
        words[layout.TAKEN_NBYTES] = max(0, words[layout.TAKEN_NBYTES] - (words[record + layout.R_META] >> 16))
        ready = (READY | word & layout.DELIVERY_MASK) + deliveries * layout.DELIVERY
        # in this order: as long as the word is the caller's, it tries again; and once HEAD < TAIL, others come into the
        # mutex, and recover what an interrupt has left
        self._insert(record)
        self._store_and_count(record, ready, layout.REDELIVERED, deliveries)
        return True

    def begin_attempt(self, record: int) -> None:
        """Within the receivers' mutex: have the sender of a message larger than a slot start over."""
        word = record + layout.R_READ
        self.words[word] = (self.words[word] & ~layout.PIECES_MASK) + layout.ATTEMPT & layout.MAX_WORD

    def _warn_of_loss(self) -> None:
        warnings.warn(
            f"channel {self.name!r}: dropped a message that did not fit into the ring: the receiver that had all of it "
            "died, or was interrupted, before it had received it, and the sender has gone on; send it again, give put "
            "more time, or make the channel with larger slots",
            RuntimeWarning,
            stacklevel=2,
        )

    def _insert(self, record: int) -> None:
        """Put a READY slot into the ready ring by its sequence; nearly always it is the oldest."""
        words, ring, mask = self.words, self._ring, self._mask
        sequence = words[record + layout.R_SEQUENCE]
        position = words[layout.HEAD] - 1
        for _ in range(min(words[layout.TAIL] - words[layout.HEAD], self._capacity)):
            slot = words[ring + (position + 1 & mask)]
            if words[self._records[slot] + layout.R_SEQUENCE] > sequence:
                break
            words[ring + (position & mask)] = slot
            position += 1
        words[ring + (position & mask)] = self.slot_of(record)
        words[layout.HEAD] -= 1

    def wake_receiver(self) -> None:
        """A message came: wake a receiver that waits for one."""
        wake_for(self.words, layout.MESSAGE_HINT, self.messages)

    # --- a message is received by nobody

    def drop_oldest(self, limit: int = 1, at_end: bool = False) -> Outcome:
        """Free the oldest READY slots unread, up to `limit`; SENT if one was, else EMPTY or CONTENDED.

        Args:
            at_end: count them as dropped by a shutdown.
        """
        words, dropped = self.words, 0

        def drop() -> Outcome | None:
            nonlocal dropped
            head = words[layout.HEAD]
            for position in range(head, min(head + self._capacity, words[layout.TAIL])):
                slot = self.ready_at(position)
                if slot < 0:
                    return self._distrust()
                if dropped < limit and self._drop_if_sent(position, slot):
                    dropped += 1
                    words[layout.UNREAD] = words[layout.UNREAD] + at_end & layout.MAX_WORD
            return None

        if critical(self.receivers, drop) is CONTENDED:
            return CONTENDED
        if not dropped:
            return EMPTY
        if words[layout.SPACE_HINT]:
            self.wake_freed()
        return SENT

    def _distrust(self) -> Outcome:
        """The ready ring leads to a slot that is not READY: for `critical`, which leaves it to be rebuilt."""
        self._tail_seen = 0
        return DISTRUSTED

    def _drop_if_sent(self, position: int, slot: int) -> bool:
        """Drop that message, unless it is being fed: then its `put` has not returned. Whether it was dropped."""
        if self.is_fed(slot):
            return False
        given_up = self.is_given_up(self._records[slot])
        self._drop_ready(position, slot, layout.WITHDRAWN if given_up else layout.DROPPED)
        return True

    def _drop_ready(self, position: int, slot: int, counter: int) -> None:
        """Within the receivers' mutex: take a message out of the ready ring, and free it."""
        words = self.words
        nbytes = words[self._records[slot] + layout.R_META] >> 16
        self._free_and_count(slot, counter)
        for before in range(position, words[layout.HEAD], -1):
            words[self._ring + (before & self._mask)] = words[self._ring + (before - 1 & self._mask)]
        words[layout.HEAD] += 1
        words[layout.TAKEN_NBYTES] = words[layout.TAKEN_NBYTES] + nbytes & layout.MAX_WORD

    def _free_and_count(self, slot: int, counter: int) -> None:
        """Free a slot whose message nobody is to receive any more, its pieces first, and count that."""
        record = self._records[slot]
        if self.words[record + layout.R_META] >> 16 > self._slot_size:
            self.words[record + layout.R_FEEDER] = GIVEN_UP
            self._free_pieces(slot)
        self._store_and_count(record, FREE, counter, 1)

    def drop_taken(self, record: int, word: int, slices: int = 1) -> bool:
        """Free a READING slot whose message nobody is to receive any more: its receivers died of it too often, or its
        sender has given it up. Returns as `requeue`.
        """
        words, slot = self.words, self.slot_of(record)

        def drop() -> None:
            if words[record] == word:
                if self.is_fed(slot):  # its sender still writes: it sees the WRITING, and frees them
                    self._store_and_count(record, WRITING | words[record + layout.R_FEEDER], layout.DROPPED, 1)
                else:
                    self._free_and_count(slot, layout.WITHDRAWN if self.is_given_up(record) else layout.DROPPED)

        return critical(self.receivers, drop, slices) is not CONTENDED

    def withdraw(
        self,
        slot: int,
        owner: int,
        since: int | None = None,
        slices: int = PUBLISH_SLICES,
        unsent: list[bool] | None = None,
    ) -> None:
        """Give up a published message that this participant, or a dead one, has not written to the end.

        One that waits goes at once. One that a receiver has taken is marked, for the receiver to drop; so is any if the
        mutex is not to be had. One that a block holds whole is sent: it is LEFT to that.

        Args:
            owner: the participant that feeds it.
            since: when this participant claimed it; None for a dead one.
            unsent: its item becomes True if the message is given up: not if it is no longer there, was dropped, or is
                sent. It is right also after an exception, as with `Ring.send_many`.
        """
        given_up = [False] if unsent is None else unsent
        if self.is_fed(slot, since):
            self._give_up(slot, owner, since, slices, given_up)
        if given_up[0]:
            self.wake_freed(self._capacity)
            self.pieces.wake_all()

    def _give_up(self, slot: int, owner: int, since: int | None, slices: int, given_up: list[bool]) -> None:
        """`withdraw`, but for waking those who wait."""
        words, record = self.words, self._records[slot]
        for _ in range(slices):
            if not self.hides_messages():  # unless this very call was interrupted while it published
                break
            self.reveal_messages()

        def mark() -> bool:
            fed = self.is_fed(slot, since) and words[record + layout.R_FEEDER] == owner
            if fed and self.is_held(record):
                words[record + layout.R_FEEDER] = LEFT
                return False
            if fed:
                words[record + layout.R_FEEDER], given_up[0] = GIVEN_UP, True
            return fed

        def mark_and_drop() -> None:
            position = self.position_of(slot) if mark() and self.is_waiting(slot) else None
            if position is not None:
                self._drop_ready(position, slot, layout.WITHDRAWN)

        if critical(self.receivers, mark_and_drop, slices) is CONTENDED:
            mark()

    def take_back(self, slot: int, since: int, unsent: list[bool]) -> bool:
        """After an exception in a sending call, or its end: free what it had claimed at that time, unless it was sent.
        If an interrupt ends this, call it again.

        Args:
            unsent: its item becomes True as soon as it is known that the message is not sent.

        Returns:
            Whether the message is not sent.
        """
        unsent[0] = unsent[0] or self.is_claimed(slot, since)
        self.withdraw(slot, self.owner, since, unsent=unsent)
        self.discard(slot, since)
        self.forget(slot, since)
        return unsent[0]

    def reveal_messages(self) -> None:
        """Recover the senders' mutex, if it is lost; this waits a slice at most, and may have to be called again.

        A sender that was interrupted, or has died, between a slot's word and the ready ring hides its message until a
        process enters the mutex. Receivers and `flush` would wait for that message in vain: so they call this.
        """
        if not self.senders.owned():
            critical(self.senders, lambda: None)

    def _store_and_count(self, record: int, word: int, counter: int, by: int) -> None:
        """Store a slot's word, and count it (3. above)."""
        words = self.words
        words[layout.COUNTING_WORD] = words[record]
        words[layout.COUNTING_SEQUENCE] = words[record + layout.R_SEQUENCE]
        words[layout.COUNTING_TOTAL] = total = words[counter] + by & layout.MAX_WORD
        words[layout.COUNTING] = record << 8 | counter
        words[record] = word
        words[counter] = total
        words[layout.COUNTING] = 0

    # --- slots that objects hold

    def watch(self, slot: int, holder: Callable[[], object], received: bool) -> None:
        """Write down which object holds a slot, for `release_abandoned`.

        Args:
            holder: a weak reference to the object.
            received: whether the message in the slot counts as received; else it goes to its place.
        """
        words, record = self.words, self._records[slot]
        self._watched[slot] = holder, received, words[record + layout.R_SEQUENCE], words[record + layout.R_SINCE]

    def forget(self, slot: int, since: int | None = None, sequence: int | None = None) -> None:
        """Stop watching a slot that was given back, if the watch is of that claim, or of that message: by now another
        thread may have the slot.
        """
        watched = self._watched.get(slot)
        if watched is not None and (sequence == watched[2] if since is None else since == watched[3]):
            self._watched.pop(slot, None)

    def release_abandoned(self) -> None:
        """Release slots whose holders were collected without releasing them, and drop a stale partial assembly.

        A message's sequence, and the time of a claim, tell one use of a slot from the next. A finaliser may change the
        dict at any allocation: `dict.copy` makes none between two items, a list of `items()` makes a tuple for each.
        """
        self._drop_stale_partial()
        for slot, (holder, received, sequence, since) in self._watched.copy().items():
            if holder() is not None:
                continue
            record = self._records[slot]
            word = self.words[record]
            self.withdraw(slot, self.owner, since, slices=1)
            self.discard(slot, since)
            if word & OWNER_MASK == self.owner and self.words[record + layout.R_SEQUENCE] == sequence:
                if word & STATE_MASK == READING and not received:
                    self.overdue[record, word] = None
                elif word & STATE_MASK == KEPT and self.words[record + layout.R_META] >> 16 > self._slot_size:
                    self.vacate(slot)
                    self.wake_freed(self._capacity)
                elif word & STATE_MASK in (READING, KEPT) and self.release(record, word):
                    self.wake_freed()
            self.forget(slot, sequence=sequence)  # last: a look that is interrupted leaves it to the next one

    def _drop_stale_partial(self) -> None:
        partial = self.partial
        if partial is not None:
            head, since, meta, *_ = partial
            record = self._records[head]
            there = self.words[record] & STATE_MASK in (READY, READING)
            if not there or (self.words[record + layout.R_SINCE], self.words[record + layout.R_META]) != (since, meta):
                self.partial = None
