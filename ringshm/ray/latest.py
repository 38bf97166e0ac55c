"""Latest: one value, always the newest, for all nodes of a cluster.

Its maker's place is its home: there it is a plain Latest, and Ray has no part in what passes. Elsewhere each place has
a copy of it, with the same versions, which that place's relay keeps up to date (republish.py). So a handle is a plain
Latest of the ring at its process's place, and nothing else once it is attached. What is added is:

1. A handle that is pickled counts until one that came of it has arrived, and then while one of its holders works: so
   the registry must know of each pickling before what was pickled can go (`given`).
2. Each holder may publish, until it has read. The relays hold a publisher at each place while the registry says that
   somebody elsewhere may publish; and before a reader is told that nobody does, the registry is asked (calls.py:
   Nobody): a relay may just be started again.
3. A `publish` elsewhere than at home goes home first, by that place's relay: versions are counted there alone. So a
   handle elsewhere is a reader of its ring, whatever it does: who may publish to that ring is its relay alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

import ray

from ..annotations import T
from ..channel import latest as plain
from ..channel.raw import raw_of
from ..errors import BrokenChannel
from ..messages.specs import SpecLike
from ..process.attachment import Attachment
from ..process.seat import caller
from ..ring.mutex import SLICE
from ..segment import layout
from ..system import Lock, sleep
from . import calls, cluster, registry
from .handles import Ticket, Travelling, teller, who_went
from .locality import Place
from .records import HOME, RECEIVER, SENDER, Handed, LatestRecord, Ring

#: The number of the one handle that a Latest has for the registry.
_HANDLE = 1


class Latest(Travelling, plain.Latest[T]):
    """A value that is published once and read on all nodes of a Ray cluster, always the newest.

    The arguments and methods are those of `ringshm.Latest`. It pickles, for any number of readers, on any node; one
    that comes late finds the newest value. Where a reader shares its maker's /dev/shm, it reads the maker's slot.
    Elsewhere that place's relay republishes each value there, once for all readers; the newest wins, so a slow node
    skips versions and makes nobody wait. A value passes the network once for each node that has readers.

        weights = ringshm.ray.Latest("10MB")
        actors = [Actor.remote(weights) for _ in range(8)]
        weights.publish(policy)

    Any holder may publish. Make it where the publisher is: from elsewhere a value goes to its home first, and `publish`
    waits for that.

    It is over once its maker has closed it, and all that were unpickled are closed, or their processes gone: keep it
    open while further readers may come.

    Raises:
        RingshmError: if this process has not joined a Ray cluster (`ray.init()`).
        ChannelExists: also if a channel of this Ray namespace has that name.
        As `ringshm.Latest`.
    """

    _makes = False
    _publishes_away = False

    def __init__(
        self,
        slot_size: int | str | None = None,
        *,
        spec: SpecLike | None = None,
        name: str | None = None,
        readers: int = 256,
        borrows: int = 4,
    ) -> None:
        self._done = True
        namespace = cluster.namespace()
        # the relay is one participant more, and borrows what it sends
        options: dict[str, Any] = {"slot_size": slot_size, "spec": spec, "readers": readers + 1, "borrows": borrows + 1}
        plain.Latest.__init__(self, **options, name=name)
        assert self._attachment is not None
        self._attachment.owns_names = False  # they go with the last process at home, which may be the relay
        self._attachment.participants.heir = cluster.is_up
        self._attachment.confirm = calls.Nobody(namespace, self._attachment.segment.nonce, HOME)
        origin, nonce = self._attachment.segment.origin, self._attachment.segment.nonce
        self._ticket = Ticket(namespace, nonce, _HANDLE, self._name, origin, self._layout, None)
        self._claiming = Lock()
        self._done = False
        process = cluster.this_process()
        record = LatestRecord(nonce, name, Ring(origin, self._name, nonce), process, options)
        record.handles[_HANDLE] = Handed(RECEIVER, caller())
        try:
            registry.enter(namespace, record)
            self._makes = True
            self._register()
        except BaseException:
            self.close()
            raise

    @classmethod
    def attach(cls, name: str, **_: Any) -> NoReturn:
        """Not for this class: pass the handle itself on."""
        raise TypeError(f"ringshm.ray.Latest.attach({name!r}): pass a Latest itself to actors and tasks, it pickles")

    @property
    def borrows(self) -> int:
        """How many versions the readers of a place may hold at once."""
        return super().borrows - 1

    def publish(self, obj: T) -> int:
        """As `ringshm.Latest.publish`. Readers elsewhere get the value a moment later, or a newer one.

        Where this is not the home of the Latest, it returns once the value is there, and has its version.

        Raises:
            BrokenChannel: if the node of its home has died, or left.
            As `ringshm.Latest.publish`.
        """
        if self._open().segment.origin == self._ticket.home:
            return super().publish(obj)
        ticket, raw = self._ticket, raw_of(self, obj)
        self._note_publisher()
        payload = ray.put(raw.payload)
        while True:
            try:
                relay = calls.relay(ticket.channel, ticket.home)
                return int(ray.get(relay.publish.remote(raw.meta, raw.description, payload)))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (ray.exceptions.RayActorError, ValueError):
                if why := calls.call(ticket.namespace, "revive", ticket.channel, ticket.home):
                    raise BrokenChannel(f"{self._name!r} takes no value any more: {why}") from None
                sleep(SLICE)

    def _role_at(self, place: Place) -> int:
        return super()._role_at(place) if place == self._ticket.home else layout.RECEIVER

    @property
    def _only_reads(self) -> bool:
        return self._seat.received and not (self._seat.sent or self._publishes_away)

    def _take_role(self, counts: str, used: str) -> None:
        before = self._only_reads
        super()._take_role(counts, used)
        if self._only_reads != before:
            teller.tell("publishes" if before else "reads", self._ticket, self._token)

    def _note_publisher(self) -> None:
        """This handle publishes, elsewhere than at home."""
        self._wake()
        if self._only_reads:
            teller.tell("publishes", self._ticket, self._token)
        self._publishes_away = True

    def _wake(self) -> None:
        self._publishes_away &= not self._is_idle
        super()._wake()

    def _gone(self, attachment: Attachment, word: int) -> str:
        return who_went(self, attachment, word, SENDER)

    def _close(self, closing: bool) -> None:
        if not self._done:
            super()._close(closing)
            if self._makes:
                teller.tell("maker_closed", self._ticket)

    def __reduce__(self) -> tuple[Any, ...]:
        made = super().__reduce__()
        if why := calls.call(self._ticket.namespace, "given", self._ticket.channel, _HANDLE):
            raise calls.closed(self._name, why)
        return made
