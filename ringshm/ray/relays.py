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
2. Upward (upward.py). Home takes a batch only if it has taken the one before, skips what it has taken already, and
   writes down each number once it is in the ring: so a batch that is sent again, by whichever process, does no harm.
   While the ring at home is full, home does not answer; so the ring up fills, and its senders wait.
3. Downward (downward.py). The relay at home borrows messages only for free slots of a ring down: its credit.
4. The end. When no senders may come, each outpost lets its ring up end, sends what is left, and says that it is
   drained; when all are, home lets its ring end, and when its relay gets that end and nothing is out, the rings down
   end. If home is lost, the registry says so, and its outposts' rings are broken and end.
5. A relay that is killed is started again by Ray, with the same rings: borrows of a dead process go back to their
   places. One that finds that it cannot go on ends, for the same. If that of home is killed, what it had handed out
   comes again, marked by its delivery count, though a receiver elsewhere may have received it meanwhile.
6. A ring outlives its relay, and also all others who have it open, while messages wait in it (ring/participants.py:
   `heir`). Its names go when the channel is over; if its machine is not in the cluster any more, with `ringshm clean`.
7. What is lost with a node: home knows how many messages of its ring up it has had, and of how many it has heard. The
   difference is what the registry notes, and `status` tells.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import ray

from ..channel.channel import Channel
from ..channel.handle import spec_or_size
from ..errors import BrokenChannel, ChannelClosed, ChannelNotFound, InsufficientSharedMemory
from ..segment import layout
from ..segment.ledger import Ledger
from ..system import monotonic, sleep
from . import calls
from .batches import Batch, unpack
from .downward import Down, Out
from .follower import Follower
from .keeping import Keeper
from .locality import Place
from .records import DOWN, HOME, RECEIVER, SENDER, UP, Lost, Record, Ring, RingStatus
from .upward import Upward

#: What may stand in a ring up beyond the channel's capacity, since it is on its way: messages, and bytes.
_WINDOW_MESSAGES, _WINDOW_NBYTES = 512, 32 * 1024 * 1024
#: Seconds between two looks at what the ring at home has come to.
_LOOK_SECONDS = 0.2

#: Words of the ledger at home: how many processes have been home's relay; of each outpost, by its number, how many
#: messages of its ring up are taken, and of how many home has heard.
_BEGUN = 0


def _taken(outpost: int) -> int:
    return 1 + 2 * outpost


def _heard(outpost: int) -> int:
    return 2 + 2 * outpost


class Relay(Follower[Record]):
    """The actor. Home or outpost, by the place it is started at."""

    _home: Keeper | None = None
    _up: Keeper | None = None
    _down: Down | None = None
    _ledger: Ledger

    def _begin(self) -> None:
        record, place = self.record, self.place
        codec = record.options.get("codec")
        self._codec = None if isinstance(codec, str) else codec
        self._outs: dict[Place, Out] = {}
        self._counting: set[int] = set()
        outpost = record.outposts.get(place)
        if place == record.home.place:
            self._begin_home(record)
        elif outpost is not None:
            for ring, begin in ((outpost.up, self._begin_up), (outpost.down, self._begin_down)):
                if ring is not None:
                    self._begin_again(ring, begin)
            self._adapt(record)

    def _begin_again(self, ring: Ring, begin: Callable[[Ring], None]) -> None:
        try:
            begin(ring)
        except ChannelNotFound:  # somebody has removed it
            calls.call(self.namespace, "ring_gone", self.id, ring)

    def _begin_home(self, record: Record) -> None:
        try:
            self._home = self._keeper(record.home, HOME)
        except ChannelNotFound:
            calls.call(self.namespace, "ring_gone", self.id, record.home)
            return
        self._ledger = Ledger(record.home.nonce)
        self._ledger.words[_BEGUN] += 1
        self._adapt(record)
        self.thread(self._watch_home)

    def _keeper(self, ring: Ring, which: str) -> Keeper:
        return Keeper(ring, self._codec, calls.Nobody(self.namespace, self.id, which))

    @property
    def _keepers(self) -> list[tuple[str, Keeper]]:
        down = None if self._down is None else self._down.keeper
        keepers = (HOME, self._home), (UP, self._up), (DOWN, down)
        return [(what, keeper) for what, keeper in keepers if keeper is not None]

    def rings(self, node: str) -> list[RingStatus]:
        """For `status`: the rings here, on that Ray node."""
        return [keeper.status(what, node) for what, keeper in self._keepers]

    def _leave(self) -> None:
        for _, keeper in self._keepers:
            with contextlib.suppress(Exception):
                keeper.close()

    # --- what the registry says

    def _adapt(self, record: Record) -> None:
        with self._state:
            self.record = record
            self._keep(record)
        if record.shut:
            for _, keeper in self._keepers:
                keeper.shut_down(record.shut == "immediate")

    def _keep(self, record: Record) -> None:
        """Say in the rings who may come; within `_state`."""
        if self._home is not None:
            self._home.keep(record.may_come(SENDER) or not record.drained, record.may_come(RECEIVER))
            self._hand_out(self._home, record)
            self._count(record)
        if self._up is not None:
            self._up.keep(record.may_come(SENDER), not record.broken)
        if self._down is not None:
            self._down.keeper.keep(not record.ended, True)

    def _hand_out(self, home: Keeper, record: Record) -> None:
        """Have an Out for each ring down that there is."""
        rings = {place: outpost.down for place, outpost in record.outposts.items() if outpost.down is not None}
        for place in [place for place, out in self._outs.items() if rings.get(place) != out.ring]:
            self._outs.pop(place).lost()
        for place, ring in rings.items():
            if place not in self._outs:
                incarnation = int(self._ledger.words[_BEGUN])
                self._outs[place] = Out(self, home, place, ring, self._outs, incarnation)

    def _count(self, record: Record) -> None:
        """Have what is lost counted, behind all batches that have arrived."""
        for lost in record.lost:
            if lost.had_senders and lost.messages is None and lost.number not in self._counting:
                self._counting.add(lost.number)
                me = ray.get_runtime_context().current_actor
                me.count_lost.options(concurrency_group="write").remote(lost)

    # --- an outpost's rings

    def open_ring(self, role: str) -> Ring:
        """Make the ring for that role here, if there is none."""
        with self._state:
            what, keepers = UP if role == SENDER else DOWN, dict(self._keepers)
            if what in keepers:
                return keepers[what].ring
            name = self.record.ring_name(what, self.place)
            with self._make(role, name) as made:
                attachment = made._open()
                attachment.owns_names = False
                ring = Ring(self.place, name, attachment.segment.nonce)
                if role == SENDER:
                    self._begin_up(ring)
                else:
                    self._begin_down(ring)
            return ring

    def _make(self, role: str, name: str) -> Channel[Any]:
        """A ring up has space for what is on its way, too, if there is enough shared memory; and if its relay dies on a
        message, however often, that is no reason to drop it.
        """
        options = self.record.options
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
        self._up = self._keeper(ring, UP)
        self._up.keep(True, True)
        self.thread(Upward(self, self._up).run)

    def _begin_down(self, ring: Ring) -> None:
        keeper = self._keeper(ring, DOWN)
        keeper.keep(True, True)
        self._down = Down(keeper)

    # --- upward: at home

    def write(self, outpost: int, after: int, batch: Batch, tail: int) -> str:
        """Put a batch of an outpost into the ring at home.

        Args:
            outpost: its number.
            after: the number of the message before the batch's first; -1 if that was acknowledged.
            tail: how many messages were put into its ring.

        Returns:
            "taken"; "again" if the batch before was not; "broken" if the ring takes nothing any more.
        """
        assert self._home is not None
        self.heard_of(outpost, tail)
        words, row = self._ledger.words, _taken(outpost)
        if after >= words[row]:
            return "again"
        try:
            self._take(self._home, batch, words, row)
        except (BrokenChannel, ChannelClosed):
            return "broken"
        return "taken"

    def _take(self, home: Keeper, batch: Batch, words: memoryview, row: int) -> None:
        for message, raw, _ in unpack(batch):
            if message >= words[row]:
                home.pass_on(raw, 0)
                words[row] = message + 1

    def heard_of(self, outpost: int, tail: int) -> None:
        """So many messages were put into the ring up of that outpost."""
        self._ledger.reserve(_heard(outpost) + 1)
        words, row = self._ledger.words, _heard(outpost)
        words[row] = max(words[row], tail)

    def count_lost(self, lost: Lost) -> None:
        """Note what a node has taken along."""
        words = self._ledger.words
        known = _heard(lost.number) < len(words)
        messages = max(0, words[_heard(lost.number)] - words[_taken(lost.number)]) if known else 0
        calls.call(self.namespace, "note_lost", self.id, lost.number, messages)
        if messages:
            told = lost.with_count(messages)
            warnings.warn(f"channel {self.record.home.name!r}: {told}", RuntimeWarning, stacklevel=2)

    # --- at home: what was received

    def put_before(self, place: Place, tail: int) -> int:
        """For `flush`: how many messages home has had, once it has all that stood before `tail` in the ring up of that
        place; else -1.
        """
        assert self._home is not None
        outpost = self.record.outposts.get(place)
        if outpost is None:
            return -1
        self._ledger.reserve(_heard(outpost.number) + 1)
        return self._home.tail if self._ledger.words[_taken(outpost.number)] >= tail else -1

    def received_before(self, tail: int, seconds: float) -> bool:
        """For `flush`: whether all that relays have put before that place at home was received; waits for it.

        A relay that was started again does not know what the one before has put, so it waits for all senders' messages.
        """
        assert self._home is not None
        home, is_first = self._home, self._ledger.words[_BEGUN] == 1
        sender = home.attachment.participants.sender if is_first else None
        return home.wait_until(lambda: min(home.unfinished(sender), default=tail) >= tail, monotonic() + seconds)

    def _watch_home(self) -> None:
        """Tell the registry when the ring is broken, and when it is whole again."""
        assert self._home is not None
        while not self.ends:
            sleep(_LOOK_SECONDS)
            self._look_at(self._home)

    def _look_at(self, home: Keeper) -> None:
        attachment = home.attachment
        with contextlib.suppress(Exception):  # the registry is being started again: the next look tells it
            attachment.reaper.look()
            broken = "no receiver is left" if attachment.over_for_senders() else ""
            if broken != self.record.broken:
                calls.call(self.namespace, "note", self.id, None, broken)

    # --- downward: at an outpost

    def deliver(self, incarnation: int, batch: Batch) -> int:
        """As `Down.deliver`."""
        assert self._down is not None
        return self._down.deliver(incarnation, batch)

    def report(
        self, incarnation: int, known: int, wanted: bool, has_back: list[int], seconds: float
    ) -> tuple[list[int], dict[int, int]]:
        """As `Down.report`."""
        assert self._down is not None
        return self._down.report(incarnation, known, wanted, has_back, seconds)
