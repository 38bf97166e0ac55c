"""What the registry knows of a channel, and what relays and handles are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from .cluster import Process
from .locality import Place, label

SENDER, RECEIVER = "sender", "receiver"
#: The rings of a channel: one at home; at each outpost one that its senders put into, and one its receivers get from.
HOME, UP, DOWN = "home", "up", "down"


@dataclass(frozen=True)
class Ring:
    """Where a ring is: what `process.registry.attach` needs."""

    place: Place
    name: str
    nonce: str


@dataclass(frozen=True)
class RingStatus:
    """A ring at one moment, as its relay sees it.

    Attributes:
        what: "home"; elsewhere "up", which senders put into, "down", which receivers get from, or a Latest's "copy".
        ring: its name and place.
        node: the Ray node of its relay.
        waiting: messages that wait there to be taken; of a Latest 0.
        in_flight: messages that the relay has taken, and that have not arrived elsewhere; of a Latest, to how many
            places a version is on its way.
        version: of a Latest, its newest there.
    """

    what: str
    ring: Ring
    node: str
    waiting: int
    in_flight: int
    version: int = 0

    def __str__(self) -> str:
        where = f"{self.what} {self.ring.name}, node {self.node[:8]}"
        what = f"version {self.version}" if self.version else f"{self.waiting} waiting"
        return f"{where}: {what}, {self.in_flight} in flight"


@dataclass
class Holder:
    """One process that holds a handle."""

    process: Process
    idle: bool = False
    reads: bool = False  #: of a Latest: it has read, and not published


@dataclass
class Handed:
    """A handle that was handed out."""

    role: str
    made_at: str
    holders: dict[str, Holder] = field(default_factory=dict)
    arrived: bool = False
    ended: str = ""  #: how the last of its holders went

    @property
    def counts(self) -> bool:
        """Whether it may yet send, or receive."""
        return not self.ended and (not self.arrived or any(not holder.idle for holder in self.holders.values()))


@dataclass
class Outpost:
    """A place, other than home, that has handles: the relay there, and the rings that it made.

    Attributes:
        node: the Ray node that the relay is on.
        number: its row in the ledger of the relay at home.
        up: the ring that its senders put into; None if there are none.
        down: the ring that its receivers get from.
        drained: whether all that its senders put has reached the ring at home.
    """

    node: str
    number: int
    up: Ring | None = None
    down: Ring | None = None
    drained: bool = True


@dataclass
class Record:
    """What the registry knows of one channel."""

    id: str
    named: str | None
    home: Ring
    maker: Process
    options: dict[str, Any]
    maker_gone: str = ""
    home_lost: str = ""  #: why the ring at home is there no more
    handles: dict[int, Handed] = field(default_factory=dict)
    outposts: dict[Place, Outpost] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  #: nodes that went, with what may have gone along
    ended: bool = False  #: the ring at home has given EndOfChannel to its relay
    broken: str = ""  #: why the ring at home takes nothing any more
    shut: str = ""  #: "drain" or "immediate", once somebody has called `shutdown`
    departed: dict[str, str] = field(default_factory=dict)  #: who went last, by role
    version: int = 0
    rings: list[RingStatus] = field(default_factory=list)  #: filled in by `status`, of relays that answer

    @property
    def relays(self) -> list[tuple[Place, str]]:
        """Where its relays are, with the Ray node of each; that of home comes first."""
        return [
            (self.home.place, self.maker.node),
            *((place, outpost.node) for place, outpost in self.outposts.items()),
        ]

    def __str__(self) -> str:
        """Lines that say who has handles, what is in its rings and on its way, and what was lost."""
        handles = [
            f"  {handle.role} {number}, handed out at {handle.made_at}: "
            + (handle.ended or ", ".join(str(one.process) for one in handle.holders.values()) or "on its way")
            for number, handle in self.handles.items()
        ]
        made = f", which has gone ({self.maker_gone})" if self.maker_gone else ""
        head = f"{self.home.name}, made by {self.maker}{made}"
        return "\n".join(
            [head, *handles, *(f"  {ring}" for ring in self.rings), *(f"  lost: {one}" for one in self.lost)]
        )

    def left(self, handle: Handed, holder: Holder, how: str) -> None:
        """That holder of a handle has closed it, or has gone."""
        if handle.arrived and not handle.holders and not handle.ended:
            handle.ended = self.departed[handle.role] = how

    def ring_name(self, what: str, place: Place) -> str:
        """A name for a ring of a relay's, which says to a user what it is."""
        return f"{self.home.name[:60]}.{what}-at-{label(place)}.{uuid4().hex[:8]}"

    def may_come(self, role: str) -> bool:
        """Whether a handle of that role counts, or none was handed out yet and the maker may do so."""
        handed = [handle for handle in self.handles.values() if handle.role == role]
        return any(handle.counts for handle in handed) or (not handed and not self.maker_gone)

    @property
    def drained(self) -> bool:
        """Whether all that senders elsewhere have put is in the ring at home."""
        return all(outpost.drained for outpost in self.outposts.values())

    @property
    def over(self) -> bool:
        """Whether nobody can use the channel any more."""
        return bool(self.maker_gone) and not any(handle.counts for handle in self.handles.values())

    def working_at(self, place: Place, role: str) -> int:
        """How many handles of a role have a working holder at that place."""
        return sum(
            any(not holder.idle and holder.process.place == place for holder in handle.holders.values())
            for handle in self.handles.values()
            if handle.role == role
        )


class LatestRecord(Record):
    """What the registry knows of one Latest. It has one handle, of the receivers' role, which any number may claim."""

    @property
    def _handle(self) -> Handed:
        (handle,) = self.handles.values()
        return handle

    def left(self, handle: Handed, holder: Holder, how: str) -> None:
        """As `Record.left`; the handle may be claimed again while the Latest is not over."""
        if not holder.reads:
            self.departed[SENDER] = how
        if handle.arrived and not handle.holders:
            handle.ended = how

    def may_come(self, role: str) -> bool:
        """Whether somebody may yet publish, or read. A holder that has done neither may do both."""
        handle = self._handle
        if role == RECEIVER or self.home_lost:
            return role == RECEIVER and handle.counts
        return (not handle.ended and not handle.arrived) or any(
            not (holder.idle or holder.reads) for holder in handle.holders.values()
        )
