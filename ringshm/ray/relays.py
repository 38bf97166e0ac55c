"""Relays: actors that carry messages between the rings of a channel, one for each channel and place.

    sender -> ring "up" --.                              .--> ring "down" -> receiver     at each outpost
                          relay there ==Ray==> relay at home ==Ray==> relay there
                                                 |  ^
                                    senders -> the ring at home -> receivers               at home

At home the relay also *keeps* the ring: it holds a sender while senders may come, and a receiver while receivers may.
So the plain rules of the ring tell everybody at home when the stream ends, or is broken. At an outpost the relay does
the same with the rings up and down. What may come the registry says.

1. Messages pass raw (channel/raw.py), in batches: Ray copies their payloads from the slots into one object, and home
   copies them from there into slots; nothing is decoded or encoded between.
2. Upward. The relay of an outpost borrows messages, sends them in batches, a few of them in flight, and ends the
   borrows when home has acknowledged them. A message's number is its sequence in the ring up. Home takes a batch only
   if it has taken the one before, skips what it has taken already, and writes down each number once it is in the ring:
   so a batch that is sent again, by whichever process, does no harm. While the ring at home is full, home does not
   answer; so the ring up fills, and its senders wait.
3. Downward. The relay at home borrows messages only for free slots of a ring down: its credit. It keeps each borrowed
   until a receiver of that place has received it. So a message whose place is lost, or has no receiver any more, goes
   back to its old place at home; and `flush` at home waits for it.
4. The end. When no senders may come, each outpost lets its ring up end, sends what is left, and says that it is
   drained; when all are, home lets its ring end, and when its relay gets that end and nothing is out, the rings down
   end.
5. A relay that is killed is started again by Ray, with the same rings: borrows of a dead process go back to their
   places. If that of home is killed, what it had handed out comes again, marked by its delivery count, though a
   receiver elsewhere may have received it meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import uuid
from collections import deque
from pickle import PickleBuffer
from typing import Any

import numpy as np
import ray

from ..channel.channel import Channel
from ..channel.handle import spec_or_size
from ..channel.raw import Raw, RawReceiver, RawSender, give_back
from ..errors import BrokenChannel, ChannelClosed, EndOfChannel, InsufficientSharedMemory
from ..process import registry as attachments
from ..ring.stats import take_stats
from ..segment import layout
from ..system import RLock, monotonic, sleep
from . import calls
from .follower import Follower
from .ledger import Ledger
from .locality import Place, label
from .records import DOWN, HOME, RECEIVER, SENDER, UP, Record, Ring, RingStatus

#: Messages of a batch, and bytes after which no further message joins it.
BATCH_MESSAGES, BATCH_NBYTES = 256, 16 * 1024 * 1024
#: What may stand in a ring up beyond the channel's capacity, since it is on its way: messages, and bytes.
_WINDOW_MESSAGES, _WINDOW_NBYTES = 512, 32 * 1024 * 1024
#: Batches that are sent and not acknowledged, from one outpost.
IN_FLIGHT = 4
#: Seconds that a thread waits for messages before it looks what else there is to do.
_WAIT = 0.2

#: Numbers; for each message its meta and description; and its payload, a buffer.
Batch = tuple[list[int], list[tuple[int, bytes]], list[Any]]


def pack(numbers: list[int], raws: list[Raw]) -> Batch:
    """The messages for a call. Ray copies the payloads from their slots, one after the other, into one object."""
    return numbers, [raw[:2] for raw in raws], [PickleBuffer(raw.payload.data) for raw in raws]


def unpack(batch: Batch) -> list[tuple[int, Raw]]:
    """The messages, whose payloads are views of the object, with their numbers."""
    return [
        (number, Raw(meta, description, np.frombuffer(payload, np.uint8)))
        for number, (meta, description), payload in zip(*batch, strict=True)
    ]


class Keeper:
    """A relay's handles on one ring: they say that senders, or receivers, may still come. Used under its lock."""

    def __init__(self, relay: Relay, ring: Ring, which: str) -> None:
        self.ring = ring
        self._codec = relay._codec
        self.lock = RLock()
        self.attachment = attachments.attach(ring.name, ring.nonce, even_if_dead=True)
        self.attachment.owns_names = False
        self.attachment.confirm = calls.Nobody(relay._namespace, relay._id, which)
        self._sender: RawSender | None = None
        self._receiver: RawReceiver | None = None

    def sender(self) -> RawSender:
        """The handle that puts into the ring; others do not see the end of the stream while it is open."""
        with self.lock:
            if self._sender is None:
                self._sender = RawSender(self.attachment, self._codec)
                self._sender._start_sending()  # so that this process, too, counts it
            return self._sender

    def receiver(self) -> RawReceiver:
        """As `sender`, of the other role."""
        with self.lock:
            if self._receiver is None:
                self._receiver = RawReceiver(self.attachment, self._codec)
                self._receiver._start_receiving()
            return self._receiver

    def keep(self, senders: bool, receivers: bool) -> None:
        """Say who may still come."""
        with self.lock:
            if senders:
                self.sender()
            elif self._sender is not None:
                self._sender.close()
                self._sender = None
            if receivers:
                self.receiver()
            elif self._receiver is not None:
                self._receiver.close()
                self._receiver = None

    @property
    def tail(self) -> int:
        """How many messages were put into the ring."""
        return int(self.attachment.words[layout.TAIL])

    def unfinished(self, sender: int) -> list[int]:
        """The sequences of that sender's messages that are not received yet."""
        table = self.attachment.ring._table
        kinds = table[:, layout.R_STATE] & np.uint64(layout.STATE_MASK)
        waiting = ((kinds == layout.READY) | (kinds == layout.READING)) & (table[:, layout.R_SENDER] == sender)
        sequences: list[int] = table[waiting, layout.R_SEQUENCE].tolist()
        return sequences

    def status(self, what: str, node: str) -> RingStatus:
        """The ring as it is; what this process has taken is in flight."""
        stats = take_stats(self.attachment.segment, self.attachment.participants)
        taken = sum(slot.pid == os.getpid() and slot.state == "reading" for slot in stats.slots)
        return RingStatus(what, self.ring, node, stats.ready, taken)

    def close(self) -> None:
        """The channel is over: nobody needs the ring's names any more, whoever is still attached."""
        self.keep(False, False)
        self.attachment.segment.remove_names()


class Relay(Follower[Record]):
    """The actor. Home or outpost, by the place it is started at."""

    _home: Keeper | None = None
    _up: Keeper | None = None
    _down: Keeper | None = None
    _ledger: Ledger

    def _begin(self) -> None:
        record, place = self._record, self._place
        codec = record.options.get("codec")
        self._codec = None if isinstance(codec, str) else codec
        self._outs: dict[Place, Out] = {}
        self._ledger = Ledger(f"{record.id}-{label(place)}")
        if place == record.home.place:
            self._home = Keeper(self, record.home, HOME)
            self._adapt(record)
            self._thread(self._watch_home)
        elif (outpost := record.outposts.get(place)) is not None:
            if outpost.up is not None:
                self._begin_up(outpost.up)
            if outpost.down is not None:
                self._begin_down(outpost.down)

    def rings(self, node: str) -> list[RingStatus]:
        """For `status`: the rings here, on that Ray node."""
        rings = ("home", self._home), ("up", self._up), ("down", self._down)
        return [keeper.status(what, node) for what, keeper in rings if keeper is not None]

    def _leave(self) -> None:
        for keeper in (self._home, self._up, self._down):
            if keeper is not None:
                with contextlib.suppress(Exception):
                    keeper.close()
        if hasattr(self, "_ledger"):
            self._ledger.remove()

    # --- what the registry says

    def _adapt(self, record: Record) -> None:
        with self._state:
            self._record = record
            if self._home is not None:
                self._home.keep(record.may_come(SENDER) or not record.drained, record.may_come(RECEIVER))
                for place, outpost in record.outposts.items():
                    if outpost.down is not None and place not in self._outs:
                        self._outs[place] = Out(self, record, place)
                for place in [place for place in self._outs if place not in record.outposts]:
                    self._outs.pop(place).lost()
            else:
                if self._up is not None:
                    self._up.keep(record.may_come(SENDER), not record.broken)
                if self._down is not None:
                    self._down.keep(not record.ended, True)
            self._state.notify_all()
        if record.shut:
            for keeper in (self._home, self._up, self._down):
                if keeper is not None and not keeper.attachment.words[layout.SHUTDOWN]:
                    keeper.sender().shutdown(immediate=record.shut == "immediate")

    # --- an outpost's rings

    def open_ring(self, role: str) -> Ring:
        """Make the ring for that role here, if there is none."""
        with self._state:
            keeper = self._up if role == SENDER else self._down
            if keeper is not None:
                return keeper.ring
            name = self._record.ring_name("up" if role == SENDER else "down", self._place)
            with self._make(role, name) as made:
                attachment = made._open()
                attachment.owns_names = False
                ring = Ring(self._place, name, attachment.segment.nonce)
                if role == SENDER:
                    self._begin_up(ring)
                else:
                    self._begin_down(ring)
            return ring

    def _make(self, role: str, name: str) -> Channel[Any]:
        """A ring up has space for what is on its way, too, if there is enough shared memory; and if its relay dies on a
        message, however often, that is no reason to drop it.
        """
        options = self._record.options
        if role == RECEIVER:
            return Channel(**options, name=name)
        _, slot_size = spec_or_size("channel", options.get("spec"), options.get("slot_size"))
        options = {**options, "name": name, "max_deliveries": layout.MAX_DELIVERIES}
        try:
            beyond = min(_WINDOW_MESSAGES, _WINDOW_NBYTES // slot_size)
            return Channel(**{**options, "capacity": options["capacity"] + beyond})
        except InsufficientSharedMemory:
            return Channel(**options)

    def _begin_up(self, ring: Ring) -> None:
        self._up = Keeper(self, ring, UP)
        self._up.keep(True, True)
        self._thread(self._send_up, self._up)

    def _begin_down(self, ring: Ring) -> None:
        self._down = Keeper(self, ring, DOWN)
        self._down.keep(True, True)

    # --- upward: at an outpost

    def _home_relay(self) -> Any:
        return calls.relay(self._id, self._record.home.place)

    def _send_up(self, keeper: Keeper) -> None:
        """Borrow, send, and release on acknowledgement, until the relay ends."""
        flights: deque[Flight] = deque()
        home, last = self._home_relay(), -1
        while not self._stopping.is_set():
            try:
                if self._record.broken:
                    sleep(_WAIT)
                    continue
                try:
                    borrows = gather(keeper.receiver(), 0.002 if flights else _WAIT)
                except EndOfChannel:
                    borrows = []
                    if not flights:
                        self._tell_drained(True)
                        sleep(_WAIT)
                        continue
                if borrows:
                    self._tell_drained(False)
                    flights.append(Flight(last, borrows))
                    last = borrows[-1].sequence
                    flights[-1].send(home, self._number())
                while flights and (len(flights) >= IN_FLIGHT or not borrows or flights[0].is_answered()):
                    answer = flights[0].answer(_WAIT)
                    if answer is None:
                        break
                    if answer == "again":
                        sleep(0.05)
                        home = self._home_relay()
                        for flight in flights:
                            flight.send(home, self._number())
                    elif answer == "broken":
                        for flight in flights:
                            flight.give_back()
                        flights.clear()
                        last = -1
                        sleep(_WAIT)
                    else:
                        flights.popleft().end()
            except ChannelClosed:  # the keeper has closed the receiver: the stream is broken
                sleep(_WAIT)

    def _number(self) -> int:
        outpost = self._record.outposts.get(self._place)
        while outpost is None and not self._stopping.is_set():
            sleep(_WAIT / 4)
            outpost = self._record.outposts.get(self._place)
        return outpost.number if outpost is not None else 0

    def _tell_drained(self, drained: bool) -> None:
        outpost = self._record.outposts.get(self._place)
        if outpost is None or outpost.drained != drained:
            calls.call(self._namespace, "note_drained", self._id, self._place, drained, self._record.version)

    # --- upward: at home

    def write(self, number: int, after: int, batch: Batch) -> tuple[str, int]:
        """Put a batch of an outpost into the ring at home.

        Args:
            number: the outpost's.
            after: the number of the message before the batch's first; -1 if that was acknowledged.

        Returns:
            "taken" and the number of the last message taken; "again" if the batch before was not; "broken" if the ring
            takes nothing any more.
        """
        assert self._home is not None
        words, row = self._ledger.words, self._ledger.row(number)
        if after >= words[row]:
            return "again", int(words[row]) - 1
        try:
            for message, raw in unpack(batch):
                if message >= words[row]:
                    self._put(raw)
                    words[row] = message + 1
        except (BrokenChannel, ChannelClosed):
            return "broken", int(words[row]) - 1
        return "taken", int(words[row]) - 1

    def _put(self, raw: Raw) -> None:
        assert self._home is not None
        while True:
            try:
                return self._home.sender().put(raw, timeout=1.0)
            except queue.Full:  # with a time limit no wait counts as a deadlock
                if self._stopping.is_set():
                    raise ChannelClosed("the channel is over") from None

    def put_before(self, place: Place, tail: int) -> int:
        """For `flush`: how many messages home has had, once it has all that stood before `tail` in the ring up of that
        place; else -1.
        """
        assert self._home is not None
        outpost = self._record.outposts.get(place)
        has_all = outpost is not None and self._ledger.words[self._ledger.row(outpost.number)] >= tail
        return self._home.tail if has_all else -1

    def received_before(self, tail: int, seconds: float) -> bool:
        """For `flush`: whether all that this relay has put before that place at home was received; waits for it."""
        assert self._home is not None
        home = self._home
        sender = home.attachment.participants.sender

        def received() -> bool:
            return not any(sequence < tail for sequence in home.unfinished(sender))

        handle = RawSender(home.attachment, self._codec)
        try:
            return handle._until(received, handle._turn(monotonic() + seconds))
        finally:
            handle.close()

    # --- at home: what the ring has come to

    def _watch_home(self) -> None:
        """Tell the registry when the ring is broken, and when it is whole again."""
        assert self._home is not None
        while not self._stopping.is_set():
            sleep(_WAIT)
            with contextlib.suppress(Exception):
                attachment = self._home.attachment
                attachment.reaper.look()
                broken = "no receiver is left" if attachment.over_for_senders() else ""
                if broken != self._record.broken:
                    calls.call(self._namespace, "note", self._id, None, broken)

    # --- downward: at an outpost

    def deliver(self, incarnation: int, batch: Batch) -> int:
        """Put a batch of home into the ring down, which has space for it; the sequence of its last message there."""
        assert self._down is not None
        words = self._ledger.words
        sender = self._down.sender()
        if words[0] != incarnation:
            words[1] = words[2] = 0
            words[0] = incarnation
        for number, raw in unpack(batch):
            if number >= words[1]:
                sequence = self._down.tail
                while not self._stopping.is_set():
                    with contextlib.suppress(queue.Full):
                        sender.put(raw, timeout=1.0)
                        break
                words[2] = sequence
                words[1] = number + 1
        last = batch[0][-1]
        return int(words[2]) - (int(words[1]) - 1 - last)

    def report(self, known: int, wanted: bool, seconds: float) -> tuple[list[int], list[int]]:
        """The sequences of the ring down that are not received yet; and those that are given back.

        Args:
            known: how many were not received, as the caller knows: it waits until that has changed, or the time is up.
            wanted: whether there are receivers here. If not, all that waits is given back.
        """
        assert self._down is not None
        down = self._down
        returned: list[int] = []
        if not wanted:
            with contextlib.suppress(queue.Empty, EndOfChannel):
                while True:
                    with down.receiver().borrow(timeout=0) as message:
                        returned.append(message.sequence)
        sender = down.attachment.participants.sender
        if not returned:
            handle = RawSender(down.attachment, self._codec)
            try:
                handle._until(lambda: len(down.unfinished(sender)) != known, handle._turn(monotonic() + seconds))
            finally:
                handle.close()
        return down.unfinished(sender), returned


class Flight:
    """A batch on its way upward: its messages are borrowed until home has it."""

    def __init__(self, after: int, borrows: list[Any]) -> None:
        self._after, self._borrows = after, borrows
        self._ref: Any = None

    def send(self, home: Any, number: int) -> None:
        """Send it, or send it again."""
        batch = pack([one.sequence for one in self._borrows], [one.value for one in self._borrows])
        self._ref = home.write.options(concurrency_group="write").remote(number, self._after, batch)

    def is_answered(self) -> bool:
        """Whether there is an answer."""
        return bool(ray.wait([self._ref], timeout=0)[0])

    def answer(self, seconds: float) -> str | None:
        """What home says, or None if it says nothing in time."""
        try:
            return str(ray.get(self._ref, timeout=seconds)[0])
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError:  # the relay at home is being started again
            return "again"

    def end(self) -> None:
        """Home has it."""
        for borrow in self._borrows:
            borrow.__exit__(None, None, None)

    def give_back(self) -> None:
        """It was not sent."""
        for borrow in self._borrows:
            borrow.requeue()
            borrow.__exit__(None, None, None)


def gather(receiver: RawReceiver, seconds: float, at_most: int = BATCH_MESSAGES) -> list[Any]:
    """Borrow a message, and further ones that are there; [] if none comes in time.

    Raises:
        EndOfChannel: as `borrow`, if there is none.
    """
    borrows: list[Any] = []
    nbytes = 0
    while len(borrows) < at_most and nbytes < BATCH_NBYTES:
        borrow = receiver.borrow(timeout=0 if borrows else seconds)
        try:
            borrow.__enter__()
        except queue.Empty:
            break
        except EndOfChannel:
            if borrows:
                break
            raise
        borrows.append(borrow)
        nbytes += len(borrow.value.payload)
    return borrows


class Out:
    """At home: what is handed out to one place, by two threads: one hands out, one learns what was received."""

    def __init__(self, relay: Relay, record: Record, place: Place) -> None:
        assert relay._home is not None
        self._relay, self._home, self._place = relay, relay._home, place
        self._there: Any = None
        self._incarnation = uuid.uuid4().int >> 65
        self._capacity = int(record.options["capacity"])
        self._lock = threading.Condition()
        self._numbered: dict[int, Any] = {}  #: borrows whose place in the ring down is not known yet, by number
        self._placed: dict[int, Any] = {}  #: borrows by their sequence in the ring down
        self._next = 0
        self._is_lost = False
        relay._thread(self._hand_out)
        relay._thread(self._collect)

    @property
    def _ends(self) -> bool:
        return self._is_lost or self._relay._stopping.is_set()

    @property
    def _wanted(self) -> bool:
        return self._relay._record.working_at(self._place, RECEIVER) > 0

    @property
    def out(self) -> int:
        """How many messages are handed out and not received."""
        return len(self._numbered) + len(self._placed)

    def _ask(self, method: str, *args: Any) -> Any:
        """Call the relay there.

        Raises:
            ray.exceptions.RayError, ValueError: if it is being started again, or there is none.
        """
        if self._there is None:
            self._there = calls.relay(self._relay._id, self._place)
        group = "deliver" if method == "deliver" else None
        try:
            return ray.get(getattr(self._there, method).options(concurrency_group=group).remote(*args))
        except ray.exceptions.ActorDiedError:
            self._there = None
            raise

    def _hand_out(self) -> None:
        while not self._ends:
            with self._lock:
                if not self._wanted or self.out >= self._capacity:
                    self._lock.wait(_WAIT / 4)
                    continue
                credit = self._capacity - self.out
            share = max(1, self._home.attachment.ring.ready() // (1 + len(self._relay._outs)))
            try:
                borrows = gather(self._home.receiver(), _WAIT, min(credit, share, BATCH_MESSAGES))
                if borrows:
                    self._tell_ended(False)
                    self._deliver(borrows)
            except EndOfChannel:
                if not any(other.out for other in list(self._relay._outs.values())):
                    self._tell_ended(True)
                sleep(_WAIT)
            except ChannelClosed:
                sleep(_WAIT)

    def _tell_ended(self, ended: bool) -> None:
        if self._relay._record.ended != ended:
            calls.call(self._relay._namespace, "note", self._relay._id, ended, None)

    def _deliver(self, borrows: list[Any]) -> None:
        with self._lock:
            numbers = [*range(self._next, self._next + len(borrows))]
            self._next += len(borrows)
            self._numbered.update(zip(numbers, borrows, strict=True))
        batch = pack(numbers, [borrow.value for borrow in borrows])
        while not self._ends:
            try:
                last = self._ask("deliver", self._incarnation, batch)
                break
            except (ray.exceptions.RayError, ValueError):  # the relay there is being started again, or its node is lost
                sleep(_WAIT)
        else:
            return
        with self._lock:
            for number in numbers:
                if (borrow := self._numbered.pop(number, None)) is not None:
                    self._placed[last - (numbers[-1] - number)] = borrow

    def _collect(self) -> None:
        while not self._ends:
            with self._lock:
                placed = [*self._placed]
            if not placed:
                sleep(0.005)
                continue
            try:
                left, returned = self._ask("report", len(placed), self._wanted, _WAIT)
            except (ray.exceptions.RayError, ValueError):
                sleep(_WAIT)
                continue
            with self._lock:
                for sequence in placed:
                    if sequence in left:
                        continue
                    borrow = self._placed.pop(sequence, None)
                    if borrow is not None:
                        if sequence in returned:
                            borrow.requeue()
                        borrow.__exit__(None, None, None)
                self._lock.notify_all()

    def lost(self) -> None:
        """The place is lost: what it had comes again, and counts as delivered once."""
        with self._lock:
            self._is_lost = True
            for borrow in [*self._placed.values(), *self._numbered.values()]:
                give_back(borrow)
            self._placed.clear()
            self._numbered.clear()
            self._lock.notify_all()
