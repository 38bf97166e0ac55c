"""Upward: the relay of an outpost sends home what its senders put.

1. It borrows messages, sends them in batches, a few of them in flight, and ends the borrows when home has acknowledged
   them. A message's number is its sequence in the ring up.
2. A batch that home has not taken since the one before it has not come ("again") is sent again, with all behind it; so
   is every batch whose call has failed, whichever process at home takes it then: home skips what it has.
3. With each batch goes how far the ring up is filled, and by a call of its own while home takes none: so home knows
   what is lost with this node, but for what is put in the last fifth of a second.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import ray

from ..errors import ChannelClosed, EndOfChannel
from ..system import sleep
from . import calls
from .batches import Borrows, end, gather, give_back_all, pack
from .follower import Follower
from .keeping import Keeper
from .records import Record

#: Batches that are sent and not acknowledged, from one outpost.
IN_FLIGHT = 4
#: Seconds that the thread waits for messages, or an answer, before it looks what else there is to do.
_WAIT = 0.2


class Flight:
    """A batch on its way: its messages are borrowed until home has it."""

    def __init__(self, after: int, borrows: Borrows) -> None:
        self._after, self._borrows = after, borrows
        self._ref: Any = None

    def send(self, home: Any, outpost: int, tail: int) -> None:
        """Send it, or send it again."""
        batch = pack([borrow.sequence for borrow in self._borrows], self._borrows, delivered=False)
        self._ref = home.write.options(concurrency_group="write").remote(outpost, self._after, batch, tail)

    def is_answered(self) -> bool:
        """Whether there is an answer."""
        return self._ref is None or bool(ray.wait([self._ref], timeout=0)[0])

    def answer(self, seconds: float) -> str | None:
        """What home says, or None if it says nothing in time; "again" if it was not sent."""
        if self._ref is None:
            return "again"
        try:
            return str(ray.get(self._ref, timeout=seconds))
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError:  # the relay at home is being started again
            return "again"

    def end(self) -> None:
        """Home has it."""
        for borrow in self._borrows:
            end(borrow)

    def give_back(self) -> None:
        """Home will not have it."""
        give_back_all(self._borrows, 0)


class Upward:
    """Sends what stands in the ring up. One thread runs it, until the relay ends."""

    def __init__(self, relay: Follower[Record], keeper: Keeper) -> None:
        self._relay, self._keeper = relay, keeper
        self._flights: deque[Flight] = deque()
        self._last = -1
        self._told = 0  #: of how many messages home was told by a call of its own
        self._home: Any = None

    def run(self) -> None:
        """Send until the relay ends."""
        while not self._relay.ends:
            if self._relay.record.broken:
                sleep(_WAIT)
            else:
                self._send_some()

    def _send_some(self) -> None:
        flights = self._flights
        borrows: Borrows = []
        try:
            if len(flights) < IN_FLIGHT:
                borrows = gather(self._keeper.receiver, 0.002 if flights else _WAIT)
        except (EndOfChannel, ChannelClosed) as error:
            if not flights:
                if isinstance(error, EndOfChannel):
                    self._tell_drained(True)
                sleep(_WAIT)
                return
        if borrows:
            flights.append(flight := Flight(self._last, borrows))
            self._last = borrows[-1].sequence
            self._send(flight)
            self._tell_drained(False)
        while flights and (len(flights) >= IN_FLIGHT or not borrows or flights[0].is_answered()):
            if not self._settle_first():
                break

    def _send(self, flight: Flight) -> None:
        home = self._home_relay()
        if home is not None:
            flight.send(home, self._number(), self._keeper.tail)

    def _settle_first(self) -> bool:
        """Do what home says of the oldest flight; False if it says nothing yet."""
        flights = self._flights
        answer = flights[0].answer(_WAIT)
        if answer is None:
            self._tell_tail()
            return False
        if answer == "again":
            sleep(_WAIT / 4)
            self._home = None
            for flight in flights:
                self._send(flight)
            return not self._relay.ends and not self._relay.record.broken
        if answer == "broken":
            for flight in flights:
                flight.give_back()
            flights.clear()
            self._last = -1
            sleep(_WAIT)
            return False
        flights.popleft().end()
        return True

    def _tell_tail(self) -> None:
        tail = self._keeper.tail
        if tail != self._told and self._home is not None:
            self._told = tail
            self._home.heard_of.remote(self._number(), tail)

    def _home_relay(self) -> Any:
        """The relay at home; None if there is none any more."""
        relay = self._relay
        while self._home is None and not relay.ends and not relay.record.broken:
            self._home = relay.find(relay.record.home.place)
        return self._home

    def _number(self) -> int:
        """The outpost's, as the registry says."""
        relay = self._relay
        while (outpost := relay.record.outposts.get(relay.place)) is None and not relay.ends:
            sleep(_WAIT / 4)
        return outpost.number if outpost is not None else 0

    def _tell_drained(self, drained: bool) -> None:
        relay = self._relay
        outpost = relay.record.outposts.get(relay.place)
        if outpost is None or outpost.drained != drained:
            calls.call(relay.namespace, "note_drained", relay.id, relay.place, drained)
