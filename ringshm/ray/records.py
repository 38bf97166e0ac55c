"""What the registry knows of a channel, and what relays and handles are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .cluster import Process
from .locality import Place

SENDER, RECEIVER = "sender", "receiver"


@dataclass(frozen=True)
class Ring:
    """Where a ring is: what `process.registry.attach` needs."""

    place: Place
    name: str
    nonce: str


@dataclass
class Holder:
    """One process that holds a handle."""

    process: Process
    idle: bool = False


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
    handles: dict[int, Handed] = field(default_factory=dict)
    outposts: dict[Place, Outpost] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  #: nodes that went, with what may have gone along
    ended: bool = False  #: the ring at home has given EndOfChannel to its relay
    broken: str = ""  #: why the ring at home takes nothing any more
    shut: str = ""  #: "drain" or "immediate", once somebody has called `shutdown`
    departed: dict[str, str] = field(default_factory=dict)  #: who went last, by role
    version: int = 0

    def may_come(self, role: str) -> bool:
        """Whether a handle of that role counts, or none was handed out yet and the maker may do so."""
        handed = [handle for handle in self.handles.values() if handle.role == role]
        return any(handle.counts for handle in handed) or (not handed and not self.maker_gone)

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
