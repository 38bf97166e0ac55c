"""The relays of a Latest, one at each place that has it: at home one that sends, elsewhere one that republishes.

    publisher -> the ring at home -> readers                                              at home
                        |
                   relay at home ==> Ray's object store ==> relay there -> a ring with the same versions -> readers

1. The relay at home borrows the newest value and puts its bytes into Ray's object store, once for all places. For each
   place that has readers a thread of it then calls the relay there with that object, which Ray brings to the node, and
   waits for the answer; so each place has one value on its way at most, and gets the newest at its own pace.
2. The relay there writes the bytes into its ring under the publisher's version, unless that is not newer than what is
   there. So a value that comes twice, or late, does no harm.
3. Before a process that comes to another place gets to know its ring, the relay there asks home for what is newer. The
   same once no publisher is left anywhere, before the relay lets its ring end, and every few seconds, whereby it finds
   out that the relay at home must be made anew.
4. What a version costs, beside the copy into the ring at home: one copy into the object store, however many nodes there
   are; and for each node that has readers one call, one transfer by Ray, and one copy into the ring there, however many
   readers it has. Nothing passes through the registry. A thread at home waits for each node's answer: with some hundred
   nodes one relay would have too many, and relays would have to call others in turn.
5. A relay that dies is started again by Ray, or, if it was ended for good, by the registry, for whoever misses it. The
   rings outlive it.
"""

from __future__ import annotations

import contextlib
import queue
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from ..channel.latest import Latest
from ..channel.raw import Raw, RawPublisher, RawReader
from ..errors import ChannelClosed, TooManyBorrows
from ..system import Lock, sleep
from . import calls
from .follower import Follower
from .keeping import Kept, OnRing
from .locality import Place
from .records import RECEIVER, SENDER, LatestRecord, Ring, RingStatus

#: Seconds that a thread waits for a version before it looks what else there is to do.
_WAIT = 0.2

#: A value in Ray's object store: version, R_META, description, and the reference to its payload.
Stored = tuple[int, int, bytes, Any]


class Copy(OnRing):
    """A relay's handles on one ring of a Latest."""

    def __init__(self, ring: Ring) -> None:
        super().__init__(ring)
        self.reader = RawReader.of(self.attachment)
        self._publishers = Kept(lambda: RawPublisher.of(self.attachment))

    @property
    def newest(self) -> int:
        """Its newest version."""
        return self.attachment.versions.newest

    @property
    def publisher(self) -> RawPublisher:
        """The handle that publishes; readers wait for a further version while it is open."""
        return self._publishers.opened()

    def keep(self, publishers: bool) -> None:
        """Say whether a further version may come."""
        self._publishers.keep(publishers)

    def close(self) -> None:
        """As `OnRing.close`; no further version comes."""
        self.keep(False)
        self.reader.close()
        super().close()


class LatestRelay(Follower[LatestRecord]):
    """The actor. Home or outpost, by the place it is started at."""

    _home: Copy | None = None
    _down: Copy | None = None

    def _begin(self) -> None:
        record = self.record
        self._storing = Lock()
        self._stored: Stored | None = None
        self._spreads: dict[Place, Spread] = {}
        outpost = record.outposts.get(self.place)
        if self.place == record.home.place:
            self._home = Copy(record.home)
            self._adapt(record)
        elif outpost is not None and outpost.down is not None:
            self._down = Copy(outpost.down)

    def _leave(self) -> None:
        for copy in (self._home, self._down):
            if copy is not None:
                with contextlib.suppress(Exception):
                    copy.close()

    def _adapt(self, record: LatestRecord) -> None:
        with self._state:
            self.record = record
            self._state.notify_all()
        may_come = record.may_come(SENDER)
        if self._home is not None:
            self._home.keep(may_come)
            for place, outpost in record.outposts.items():
                if outpost.down is not None and place not in self._spreads:
                    self._spreads[place] = Spread(self, place)
            for place in [place for place in self._spreads if place not in record.outposts]:
                self._spreads.pop(place).is_lost = True
        elif self._down is not None:
            has_all = self.catch_up()
            self._down.keep(may_come or not has_all)

    def revive(self, place: Place) -> str:
        """Have the relay at a place made anew, should Ray not start it again; or why that cannot be."""
        return str(calls.call(self.namespace, "revive", self.id, place))

    def rings(self, node: str) -> list[RingStatus]:
        """For `status`: the ring here, on that Ray node."""
        copy, what = (self._down, "copy") if self._home is None else (self._home, "home")
        on_its_way = sum(spread.is_sending for spread in list(self._spreads.values()))
        return [] if copy is None else [RingStatus(what, copy.ring, node, 0, on_its_way, copy.newest)]

    # --- at home

    def publish(self, meta: int, description: bytes, payload: NDArray[Any]) -> int:
        """Publish a value that comes from elsewhere; its version."""
        assert self._home is not None
        return self._home.publisher.publish(Raw(meta, description, payload))

    def newer(self, than: int) -> tuple[int, int, bytes, list[Any]] | None:
        """The newest value, if it is newer, in the object store."""
        stored = self.stored(than, 0.0)
        return None if stored is None else (*stored[:3], [stored[3]])

    def stored(self, than: int, seconds: float) -> Stored | None:
        """The newest value, once it is newer, in the object store, where it is put once; None if none comes in time."""
        assert self._home is not None
        try:
            with self._home.reader.borrow(newer_than=than, timeout=seconds) as newest, self._storing:
                if self._stored is None or self._stored[0] < newest.version:
                    raw = newest.value
                    self._stored = newest.version, raw.meta, raw.description, ray.put(raw.payload.view(np.ndarray))
                return self._stored
        except queue.Empty:
            return None

    # --- at an outpost

    def open_ring(self, role: str) -> Ring:
        """Make the ring here, if there is none."""
        with self._state:
            if self._down is None:
                name = self.record.ring_name("copy", self.place)
                with Latest(**self.record.options, name=name) as made:
                    attachment = made._open()
                    attachment.owns_names = False
                    self._down = Copy(Ring(self.place, name, attachment.segment.nonce))
                    self._down.keep(True)
            return self._down.ring

    def republish(self, version: int, meta: int, description: bytes, payload: NDArray[Any]) -> int:
        """A value of home; the newest version here."""
        if self._down is None:
            return 0
        return self._down.publisher.republish(version, Raw(meta, description, payload))

    def catch_up(self) -> bool:
        """Get what home has that is newer; whether all of it is here, or home is lost."""
        if self._down is None or self.record.home_lost:
            return True
        try:
            relay = calls.relay(self.id, self.record.home.place)
            newer = ray.get(relay.newer.remote(self._down.newest))
            if newer is not None:
                version, meta, description, (payload,) = newer
                self.republish(version, meta, description, ray.get(payload))
            return True
        except (ray.exceptions.RayError, ValueError):
            with contextlib.suppress(ray.exceptions.RayError, ChannelClosed):
                self.revive(self.record.home.place)
            return False


class Spread:
    """At home: brings each newest value to one place, in a thread."""

    def __init__(self, relay: LatestRelay, place: Place) -> None:
        self._relay, self._place = relay, place
        self.is_lost = False
        self.is_sending = False
        relay.thread(self._run)

    @property
    def _ends(self) -> bool:
        return self.is_lost or self._relay.ends

    def _run(self) -> None:
        relay, there, there_is = self._relay, None, 0
        while not self._ends:
            if not relay.record.working_at(self._place, RECEIVER):
                with relay._state:
                    relay._state.wait(_WAIT)
                continue
            try:
                stored = relay.stored(there_is, _WAIT)
                if stored is None:
                    continue
                there = there or calls.relay(relay.id, self._place)
                self.is_sending = True
                there_is = ray.get(there.republish.remote(*stored))
            except (ray.exceptions.RayError, ValueError):  # that relay is being started again, or has ended
                there = None
                with contextlib.suppress(ray.exceptions.RayError, ChannelClosed):
                    relay.revive(self._place)
                sleep(_WAIT)
            except (ChannelClosed, TooManyBorrows):
                sleep(_WAIT)
            finally:
                self.is_sending = False
