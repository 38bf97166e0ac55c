"""Downward: home hands messages out to the receivers of an outpost.

    home: Out                                        outpost: Down
    borrows a message for each free slot there
    deliver(numbers, messages)           ==>         puts them into the ring down, notes the last number
    report(how many are out)             ==>         answers when that has changed: which are not received yet
    ends the borrows of what was received

1. Home keeps each message borrowed until a receiver there has received it. So a message whose place is lost goes back
   to its old place at home, with one more delivery that has failed; and `flush` at home waits for it.
2. What no receiver there wants any more goes back, too. The relay there borrows it from the ring down, tells home how
   often it was delivered there, and ends the borrow when home says, in its next call, that it has it back. So if either
   relay dies meanwhile, one of the rings still has the message.
3. A message is put with the count of its failed deliveries: so a receiver there sees how often it was delivered before,
   anywhere, and `max_deliveries` is counted over all nodes.
4. Each process that is home's relay has an incarnation, one more than the one before. Numbers begin anew with it. What
   an earlier one calls is not done any more, for its borrows have gone back.
"""

from __future__ import annotations

import threading
from typing import Any

import ray

from ..channel.loans import Borrow
from ..channel.raw import Raw, give_back
from ..errors import ChannelClosed, EndOfChannel
from ..segment.ledger import Ledger
from ..system import Lock, monotonic, sleep
from . import calls
from .batches import BATCH_MESSAGES, Batch, Borrows, end, gather, give_back_all, pack, unpack
from .follower import Follower
from .keeping import Keeper
from .locality import Place
from .records import RECEIVER, Record, Ring

#: Seconds that a thread waits for messages, or an answer, before it looks what else there is to do.
_WAIT = 0.2

#: Words of the ledger: home's incarnation; its next number; the sequence of the last message put.
_INCARNATION, _NEXT, _LAST = range(3)


class Down:
    """The ring down of an outpost, as home's calls find it."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._ledger = Ledger(keeper.ring.nonce)
        self._lock = Lock()
        self._for = 0  #: the incarnation whose messages these are
        self._taken_back: dict[int, Borrow[Raw]] = {}  #: what home is told to have back, by sequence

    def deliver(self, incarnation: int, batch: Batch) -> int:
        """Put a batch into the ring, which has space for it; the sequence of its last message there."""
        words = self._ledger.words
        if incarnation < words[_INCARNATION]:
            return 0
        if incarnation != words[_INCARNATION]:
            words[_NEXT] = words[_LAST] = 0
            words[_INCARNATION] = incarnation
        for number, raw, failed in unpack(batch):
            if number >= words[_NEXT]:
                sequence = self.keeper.tail
                self.keeper.pass_on(raw, failed)
                words[_LAST] = sequence
                words[_NEXT] = number + 1
        return int(words[_LAST]) - (int(words[_NEXT]) - 1 - batch[0][-1])

    def report(
        self, incarnation: int, known: int, wanted: bool, has_back: list[int], seconds: float
    ) -> tuple[list[int], dict[int, int]]:
        """What has become of messages: the sequences of those that are not received yet; and of those that go back, how
        often each was delivered, elsewhere included.

        Args:
            known: how many were not received, as the caller knows: it waits until that has changed, or the time is up.
            wanted: whether there are receivers here. If not, all that waits goes back.
            has_back: the sequences that the caller has back.
        """
        with self._lock:
            if incarnation < self._for:
                return [], {}
            self._end_those_of(incarnation, has_back)
            if not wanted:
                self._take_back()
            taken_back = self._taken_back.copy()
        if not taken_back:
            self.keeper.wait_until(lambda: len(self.keeper.unfinished()) != known, monotonic() + seconds)
        left = [sequence for sequence in self.keeper.unfinished() if sequence not in taken_back]
        return left, {sequence: int(borrow.delivery_count) for sequence, borrow in taken_back.items()}

    def _end_those_of(self, incarnation: int, has_back: list[int]) -> None:
        if incarnation != self._for:  # what an earlier home had out is in its ring again
            self._for, has_back = incarnation, [*self._taken_back]
        for sequence in has_back:
            if (borrow := self._taken_back.pop(sequence, None)) is not None:
                end(borrow)

    def _take_back(self) -> None:
        while borrows := self._waiting():
            self._taken_back.update((int(borrow.sequence), borrow) for borrow in borrows)

    def _waiting(self) -> Borrows:
        try:
            return gather(self.keeper.receiver, 0)
        except (EndOfChannel, ChannelClosed):
            return []


class Out:
    """At home: what is handed out to one place, by two threads: one hands out, one learns what was received.

    Args:
        ring: the ring down there.
        outs: those of all places.
        incarnation: of this process as home.
    """

    def __init__(
        self, relay: Follower[Record], home: Keeper, place: Place, ring: Ring, outs: dict[Place, Out], incarnation: int
    ) -> None:
        self.ring = ring
        self._relay, self._home, self._place, self._outs = relay, home, place, outs
        self._incarnation = incarnation
        self._capacity = int(relay.record.options["capacity"])
        self._lock = threading.Condition()
        self._there: Any = None
        self._numbered: dict[int, Borrow[Raw]] = {}  #: whose place in the ring down is not known yet, by number
        self._placed: dict[int, Borrow[Raw]] = {}  #: by their sequence in the ring down
        self._has_back: list[int] = []
        self._next = 0
        self._is_lost = False
        relay.thread(self._hand_out)
        relay.thread(self._collect)

    @property
    def _ends(self) -> bool:
        return self._is_lost or self._relay.ends

    @property
    def _wanted(self) -> bool:
        return self._relay.record.working_at(self._place, RECEIVER) > 0

    @property
    def out(self) -> int:
        """How many messages are handed out and not received."""
        return len(self._numbered) + len(self._placed)

    def _ask(self, method: str, *args: Any) -> Any:
        """Call the relay there; None, after a moment, if it does not answer: it is being started again."""
        if self._there is None and (found := self._relay.find(self._place)) is not None:
            self._there = found
        if self._there is None:
            return None
        group = "deliver" if method == "deliver" else None
        call = getattr(self._there, method).options(concurrency_group=group)
        try:
            return ray.get(call.remote(self._incarnation, *args))
        except ray.exceptions.RayError:
            self._there = None
            sleep(_WAIT)
            return None

    # --- handing out

    def _hand_out(self) -> None:
        while not self._ends:
            credit = self._credit()
            if not credit:
                continue
            share = max(1, self._home.attachment.ring.ready() // (1 + len(self._outs)))
            try:
                borrows = gather(self._home.receiver, _WAIT, min(credit, share, BATCH_MESSAGES))
            except EndOfChannel:
                self._tell_ended(not any_out(self._outs))
                sleep(_WAIT)
                continue
            except ChannelClosed:
                sleep(_WAIT)
                continue
            if borrows:
                self._deliver(borrows)
                self._tell_ended(False)

    def _credit(self) -> int:
        """How many messages may be handed out; 0, after a moment, if none."""
        with self._lock:
            credit = self._capacity - self.out if self._wanted else 0
            if credit <= 0:
                self._lock.wait(_WAIT / 4)
            return max(0, credit)

    def _tell_ended(self, ended: bool) -> None:
        if self._relay.record.ended != ended:
            calls.call(self._relay.namespace, "note", self._relay.id, ended, None)

    def _deliver(self, borrows: Borrows) -> None:
        numbers = [*range(self._next, self._next + len(borrows))]
        self._next += len(borrows)
        with self._lock:
            is_lost = self._is_lost
            if not is_lost:
                self._numbered.update(zip(numbers, borrows, strict=True))
        if is_lost:  # before any of them was sent
            give_back_all(borrows, 0)
            return
        last = self._until_delivered(numbers, borrows)
        if last is not None:
            with self._lock:
                self._place_those(numbers, last)

    def _until_delivered(self, numbers: list[int], borrows: Borrows) -> int | None:
        """The sequence there of the last one; None if the place is lost, or the channel is over."""
        batch = pack(numbers, borrows, delivered=True)
        last = None
        while last is None and not self._ends:
            last = self._ask("deliver", batch)
        return last

    def _place_those(self, numbers: list[int], last: int) -> None:
        """They have their places in the ring down, where nobody else puts anything; within `_lock`."""
        for number in numbers:
            if (borrow := self._numbered.pop(number, None)) is not None:
                self._placed[last - (numbers[-1] - number)] = borrow

    # --- what has become of it

    def _collect(self) -> None:
        while not self._ends:
            with self._lock:
                placed = [*self._placed]
            if not placed and not self._has_back:
                sleep(0.005)
                continue
            told = self._ask("report", len(placed), self._wanted, self._has_back, _WAIT)
            if told is not None:
                self._settle(placed, *told)

    def _settle(self, placed: list[int], left: list[int], back: dict[int, int]) -> None:
        """Do what was told of those that were placed before it was asked for.

        What goes back may be younger than that: it may have been put there, and no answer has said so here yet. Then it
        is told of again.
        """
        there = {*left, *back}
        gone = [sequence for sequence in placed if sequence not in there]
        with self._lock:
            going_back, received = self._taken([*back]), self._taken(gone)
        for sequence, borrow in going_back.items():
            give_back(borrow, max(0, back[sequence] - borrow.delivery_count))
        for borrow in received.values():
            end(borrow)
        self._has_back = [sequence for sequence in back if sequence in going_back or sequence in self._has_back]
        with self._lock:
            self._lock.notify_all()

    def _taken(self, sequences: list[int]) -> dict[int, Borrow[Raw]]:
        """The borrows of those that are placed, which are so no more; within `_lock`."""
        return {sequence: self._placed.pop(sequence) for sequence in sequences if sequence in self._placed}

    def lost(self) -> None:
        """The place is lost: what it had comes again, and counts as delivered once."""
        with self._lock:
            self._is_lost = True
            borrows = [*self._placed.values(), *self._numbered.values()]
            self._placed.clear()
            self._numbered.clear()
            self._lock.notify_all()
        give_back_all(borrows, 1)


def any_out(outs: dict[Place, Out]) -> bool:
    """Whether anything is handed out, to any place, and not received."""
    return any(out.out for out in list(outs.values()))
