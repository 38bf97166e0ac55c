"""Endpoint: what all handles on a channel have in common, whether they send or receive."""

from __future__ import annotations

from typing import Any, NoReturn

from ..process.attachment import Attachment
from ..ring.outcomes import CONTENDED
from ..ring.slots import Ring
from ..ring.stats import ChannelStats, take_stats
from .handle import Handle, closed_elsewhere


class _ClosedRing:
    """Stands in for the ring of a handle that was closed."""

    def __init__(self, name: str) -> None:
        self.called = [0.0]
        self._name = name

    def _refuse(self, *_: object) -> NoReturn:
        raise closed_elsewhere(self._name)

    send = send_many = receive = receive_many = receive_batch = _refuse
    streams = False


class Endpoint(Handle):
    """A handle on a channel."""

    def _bind(self, attachment: Attachment) -> None:
        self._ring: Ring = attachment.ring
        self._drops_oldest = self._options.when_full == "drop_oldest"

    def _unbind(self) -> None:
        closed: Any = _ClosedRing(self._name)
        self._ring = closed
        super()._unbind()

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._layout.capacity

    def qsize(self) -> int:
        """Messages that wait to be taken, at the moment of the call."""
        return self._open().ring.ready()

    def empty(self) -> bool:
        """Whether no message waits to be taken, at the moment of the call."""
        return not self.qsize()

    def full(self) -> bool:
        """Whether no slot is free, at the moment of the call."""
        return self._open().ring.full()

    def has_space(self) -> bool:
        """Whether a slot is free, at the moment of the call."""
        return not self.full()

    def stats(self) -> ChannelStats:
        """A snapshot of counts, slots, waiters and participants, taken without a mutex."""
        attachment = self._open()
        return take_stats(attachment.segment, attachment.participants)

    def shutdown(self, immediate: bool = False) -> None:
        """End the stream for everybody, as `queue.Queue.shutdown` does. Every waiter wakes at once.

        Senders that wait, and later `put`s, get ChannelClosed. Receivers get what is there first and then EndOfChannel.

        Args:
            immediate: drop what is there, and count it as dropped: receivers get EndOfChannel at once, which says how
                many messages those were.

        Raises:
            ChannelClosed: after `close`.
        """
        attachment = self._open()
        ring = attachment.ring
        while not ring.close_for_senders():
            pass
        if immediate:
            while ring.drop_oldest(self.capacity, at_end=True) is CONTENDED:
                pass
        attachment.changes.everything()
