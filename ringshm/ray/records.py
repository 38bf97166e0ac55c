"""What the registry knows of a channel, and what relays and handles are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
        node: the Ray node that the relay is on. Others may share the place.
        number: by which the ledger at home knows its ring up; each ring up has another one.
        up: the ring that its senders put into; None if there are none.
        down: the ring that its receivers get from.
        drained: whether all that its senders put has reached the ring at home.
    """

    node: str
    number: int
    up: Ring | None = None
    down: Ring | None = None
    drained: bool = True


@dataclass(frozen=True)
class Lost:
    """A node that has died, or left, with its rings of the channel.

    Attributes:
        node: the Ray node; number: of its outpost.
        how: what became of it.
        had_senders: whether it had a ring up, or was home.
        messages: how many its senders had put that home did not have, of those that home had heard of; None while that
            is not counted, and of home, of which nobody knows it.
    """

    node: str
    number: int
    how: str
    had_senders: bool
    messages: int | None = None

    def with_count(self, messages: int) -> Lost:
        """The same, counted."""
        return replace(self, messages=messages)

    def __str__(self) -> str:
        where = f"node {self.node[:8]} {self.how}"
        if self.number < 0:
            return f"{where}; it was home, and what waited in the ring there is lost"
        if not self.had_senders:
            return f"{where}; nothing was lost: what its receivers had not finished comes again"
        count = "messages" if self.messages is None else f"{self.messages} messages"
        return (
            f"{where}, and with it {count} that its senders had put and home had not; what they put in the last "
            "fifth of a second before is not known"
        )


@dataclass
class Record:
    """What the registry knows of one channel."""

    id: str
    named: str | None
    home: Ring
    maker: Process
    options: dict[str, Any]
    home_node: str = ""  #: the Ray node that the relay at home is on
    maker_gone: str = ""
    home_lost: str = ""  #: why the ring at home is there no more
    handles: dict[int, Handed] = field(default_factory=dict)
    outposts: dict[Place, Outpost] = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)  #: nodes that went, with what has gone along
    outposts_made: int = 0  #: how many numbers they were given
    ended: bool = False  #: the ring at home has given EndOfChannel to its relay
    broken: str = ""  #: why the ring at home takes nothing any more
    shut: str = ""  #: "drain" or "immediate", once somebody has called `shutdown`
    departed: dict[str, str] = field(default_factory=dict)  #: who went last, by role
    cluster_ends: bool = False  #: and the channel with it
    version: int = 0
    rings: list[RingStatus] = field(default_factory=list)  #: filled in by `status`, of relays that answer

    def __post_init__(self) -> None:
        self.home_node = self.home_node or self.maker.node

    @property
    def relays(self) -> list[tuple[Place, str]]:
        """Where its relays are, with the Ray node of each; that of home comes first."""
        return [
            (self.home.place, self.home_node),
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

    def heir_of(self, place: Place, dead_nodes: set[str]) -> str:
        """A living node of that place, where a relay may go on with its rings; "" if none is known."""
        holders = [holder.process for handle in self.handles.values() for holder in handle.holders.values()]
        nodes = [one.node for one in [self.maker, *holders] if one.place == place and one.node not in dead_nodes]
        return nodes[0] if nodes else ""

    def rings_at(self, place: Place) -> list[Ring]:
        """Those of its rings that lie there."""
        outpost = self.outposts.get(place)
        rings = [self.home] if place == self.home.place else [outpost.up, outpost.down] if outpost is not None else []
        return [ring for ring in rings if ring is not None]

    def left(self, handle: Handed, holder: Holder, how: str) -> None:
        """That holder of a handle has closed it, or has gone."""
        if handle.arrived and not handle.holders and not handle.ended:
            handle.ended = self.departed[handle.role] = how

    def lose_home(self, how: str) -> None:
        """The ring at home is there no more: nobody receives what its outposts put, and nothing more comes to them."""
        self.home_lost = self.broken = f"its home, node {self.home_node[:8]}, {how}"
        self.ended = True
        self.departed[SENDER] = self.departed[RECEIVER] = f"{self.maker}, whose node {how}"
        self.lost.append(Lost(self.home_node, -1, how, True))

    def lose_outpost(self, place: Place, how: str) -> None:
        """A place is there no more, and neither are its rings."""
        outpost = self.outposts.pop(place)
        self.lost.append(Lost(outpost.node, outpost.number, how, outpost.up is not None))

    def lose_ring(self, outpost: Outpost, ring: Ring, how: str) -> None:
        """A ring of an outpost is there no more."""
        if ring == outpost.up:
            self.lost.append(Lost(outpost.node, outpost.number, how, True))
            outpost.up, outpost.drained, outpost.number = None, True, self.next_number()
        elif ring == outpost.down:
            outpost.down = None

    def next_number(self) -> int:
        """A number for a further ring up."""
        self.outposts_made += 1
        return self.outposts_made - 1

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
        counts = any(handle.counts for handle in self.handles.values())
        return self.cluster_ends or (bool(self.maker_gone) and not counts)

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
