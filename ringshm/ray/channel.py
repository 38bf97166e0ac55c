"""Channel: what a user makes, in a driver, an actor or a task. Its place is the channel's home."""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn

import ray

from ..annotations import T
from ..channel import channel as plain
from ..process.seat import caller
from . import calls, cluster, registry
from .handles import RayReceiver, RaySender, Ticket, refuse, teller
from .records import HOME, RECEIVER, SENDER, Record, Ring

#: Seconds for which `status` waits for relays to answer.
_STATUS_SECONDS = 2.0


class Channel(plain.Channel[T]):
    """A channel whose handles go to any actor or task of a Ray cluster.

    The arguments are those of `ringshm.Channel`, but for `keep_open`: the channel knows who still has a handle. The
    ring lies where it is made: at *home*. There the methods are those of `ringshm.Channel`, and the maker may `put` and
    `get` by the channel itself. Others get a handle of their own, one for each `sender()` or `receiver()` call:

        channel = ringshm.ray.Channel(capacity=64, slot_size="64KiB")
        actors = [Actor.remote(channel.sender()) for _ in range(8)]
        for message in channel: ...  # ends when the last actor has gone, or has closed its handle

    Raises:
        RingshmError: if this process has not joined a Ray cluster (`ray.init()`).
        ChannelExists: also if a channel of this Ray namespace has that name.
        As `ringshm.Channel`.
    """

    def __init__(self, capacity: int, slot_size: int | str | None = None, **options: Any) -> None:
        self._attachment = None
        self._namespace = cluster.namespace()
        if "keep_open" in options:
            raise TypeError(
                "keep_open was given: a channel of ringshm.ray is open until the last of its handles has ended, and "
                "its maker has closed it"
            )
        super().__init__(capacity, slot_size, **options)
        attachment = self._open()
        self._home = attachment.segment.origin
        self._id = attachment.segment.nonce
        attachment.confirm = calls.Nobody(self._namespace, self._id, HOME)
        attachment.owns_names = False  # they go with the last process at home, which may be the relay
        attachment.participants.heir = cluster.is_up
        self._numbers = 0
        named = options.pop("name", None)
        options.setdefault("prefault", True)
        home = Ring(self._home, self.name, self._id)
        process = cluster.this_process()
        record = Record(self._id, named, home, process, {"capacity": capacity, "slot_size": slot_size, **options})
        try:
            registry.enter(self._namespace, record)
            teller.start()
        except BaseException:
            self._id = ""
            self.close()
            raise

    def sender(self) -> RaySender[T]:
        """A handle that only sends, for one other process: pass it to an actor or a task, or on.

        It counts as a possible sender until it has arrived, and all who hold it have gone or closed it. In this process
        it counts once it is used.

        Raises:
            ChannelClosed: after `close`.
        """
        handle: RaySender[T] = RaySender._away(self._hand_out(SENDER))
        return handle

    def receiver(self) -> RayReceiver[T]:
        """As `sender`, of the other role."""
        handle: RayReceiver[T] = RayReceiver._away(self._hand_out(RECEIVER))
        return handle

    def _hand_out(self, role: str) -> Ticket:
        self._open()
        self._numbers += 1
        ticket = Ticket(
            self._namespace, self._id, self._numbers, self._name, self._home, self._layout, self._custom_codec
        )
        if why := calls.call(self._namespace, "hand_out", self._id, ticket.number, role, caller()):
            raise calls.closed(self._name, why)
        return ticket

    def _close(self, closing: bool) -> None:
        if self._attachment is not None:
            super()._close(closing)
            if self._id:
                ticket = Ticket(self._namespace, self._id, 0, self._name, self._home, self._layout, None)
                teller.tell("maker_closed", ticket)

    def shutdown(self, immediate: bool = False) -> None:
        """As `ringshm.Channel.shutdown`, for all nodes; those that are not home learn of it a moment later."""
        super().shutdown(immediate)
        calls.call(self._namespace, "shutdown", self._id, immediate)

    def __reduce__(self) -> NoReturn:
        refuse(self._name)


def status(namespace: str | None = None) -> list[Record]:
    """All channels of a Ray namespace: who holds which handle, what is in their rings, and what is on its way.

        for channel in ringshm.ray.status(): print(channel)

    Args:
        namespace: None for that of this process.
    """
    where = cluster.namespace() if namespace is None else namespace
    try:
        ray.get_actor(calls.registry_name(where), calls.ACTORS)
    except ValueError:
        return []
    records: list[Record] = calls.call(where, "status")
    asked: dict[Any, Record] = {}
    for record in records:
        for place, node in record.relays:
            with contextlib.suppress(ValueError):  # there is none just now
                relay = calls.relay(record.id, place)
                asked[relay.rings.remote(node)] = record
    answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=_STATUS_SECONDS) if asked else ([], [])
    for ref in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            asked[ref].rings += ray.get(ref)
    return records
