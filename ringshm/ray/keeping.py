"""What relays hold on a ring, by which they say who may still come to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from ..channel.handle import Handle
from ..channel.raw import Raw, RawReceiver, RawSender
from ..errors import ChannelClosed
from ..process import registry as attachments
from ..ring.stats import take_stats
from ..segment import layout
from ..system import RLock
from . import calls, cluster
from .records import Ring, RingStatus

H = TypeVar("H", bound=Handle)
#: Seconds, a day. A wait without a time limit might count as a deadlock, and one of a moment would begin a message that
#: is larger than a slot again and again.
_NO_LIMIT = 86_400.0


class OnRing:
    """A relay's part in one ring, which it finds also where nobody has it open any more.

    Raises:
        ChannelNotFound: if the ring is not there.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.attachment = attachments.attach(ring.name, ring.nonce, even_if_dead=True)
        self.attachment.owns_names = False
        self.attachment.participants.heir = cluster.is_up

    def close(self) -> None:
        """The channel is over: nobody needs the ring's names any more, whoever is still attached."""
        self.attachment.segment.remove_names()


class Kept(Generic[H]):
    """A handle of a relay's, open while others of its role may come: so those on the ring wait for them.

    Args:
        make: opens one.
    """

    def __init__(self, make: Callable[[], H]) -> None:
        self._make = make
        self._lock = RLock()
        self._handle: H | None = None

    def keep(self, open: bool) -> None:
        """Say whether others may come."""
        with self._lock:
            if open and self._handle is None:
                self._handle = self._make()
            elif not open and self._handle is not None:
                self._handle.close()
                self._handle = None

    def opened(self) -> H:
        """It, opened if it was not: until the next `keep(False)`."""
        with self._lock:
            self.keep(True)
            return self.handle

    @property
    def handle(self) -> H:
        """It.

        Raises:
            ChannelClosed: if nobody may come any more.
        """
        handle = self._handle
        if handle is None:
            raise ChannelClosed("nobody of that role may come to this ring any more")
        return handle


class Keeper(OnRing):
    """A relay's handles on one ring of a channel.

    Args:
        codec: the user's own; None for a built-in one.
        nobody: says whether really nobody may come to it.
    """

    def __init__(self, ring: Ring, codec: Any, nobody: calls.Nobody) -> None:
        super().__init__(ring)
        self.attachment.confirm = nobody
        self._codec = codec
        self._senders, self._receivers = Kept(self._open_sender), Kept(self._open_receiver)

    def _open_sender(self) -> RawSender:
        sender = RawSender(self.attachment, self._codec)
        sender._start_sending()  # so that this process, too, counts it
        return sender

    def _open_receiver(self) -> RawReceiver:
        receiver = RawReceiver(self.attachment, self._codec)
        receiver._start_receiving()
        return receiver

    @property
    def sender(self) -> RawSender:
        """The handle that puts into the ring; ChannelClosed if it is not kept."""
        return self._senders.handle

    @property
    def receiver(self) -> RawReceiver:
        """The handle that gets from it; ChannelClosed if it is not kept."""
        return self._receivers.handle

    def keep(self, senders: bool, receivers: bool) -> None:
        """Say who may still come."""
        self._senders.keep(senders)
        self._receivers.keep(receivers)

    def pass_on(self, raw: Raw, failed: int) -> None:
        """Put a message that so many deliveries elsewhere have failed of, however long the ring is full."""
        self.sender.pass_on(raw, failed, timeout=_NO_LIMIT)

    def shut_down(self, immediate: bool) -> None:
        """End the stream for everybody who has this ring."""
        if not self.attachment.words[layout.SHUTDOWN]:
            with RawSender(self.attachment, self._codec) as sender:
                sender.shutdown(immediate)

    def wait_until(self, true: Callable[[], bool], deadline: float) -> bool:
        """Wait for something that changes when messages are received; whether it is so in time."""
        with RawSender(self.attachment, self._codec) as sender:
            return sender._until(true, sender._turn(deadline))

    @property
    def tail(self) -> int:
        """How many messages were put into the ring."""
        return int(self.attachment.words[layout.TAIL])

    def unfinished(self, sender: int | None = None) -> list[int]:
        """The sequences of messages that are not received yet: those of one sender, or all."""
        table = self.attachment.ring._table
        kinds = table[:, layout.R_STATE] & np.uint64(layout.STATE_MASK)
        waiting = (kinds == layout.READY) | (kinds == layout.READING)
        if sender is not None:
            waiting &= table[:, layout.R_SENDER] == sender
        sequences: list[int] = table[waiting, layout.R_SEQUENCE].tolist()
        return sequences

    def status(self, what: str, node: str) -> RingStatus:
        """The ring as it is; what this process has taken is in flight."""
        stats = take_stats(self.attachment.segment, self.attachment.participants)
        taken = sum(slot.pid == os.getpid() and slot.state == "reading" for slot in stats.slots)
        return RingStatus(what, self.ring, node, stats.ready, taken)

    def close(self) -> None:
        """As `OnRing.close`; nobody may come any more."""
        self.keep(False, False)
        super().close()
