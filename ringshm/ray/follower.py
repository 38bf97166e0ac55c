"""What all relays have in common: each is an actor at one place, which follows what the registry says."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..system import sleep
from . import calls
from .locality import Place, here, label
from .records import Record, RingStatus

R = TypeVar("R", bound=Record)

#: Seconds for which the registry may keep silent.
_SILENCE = 5.0
#: Seconds before another try, where the registry or a ring was not to be had; and before a relay ends by itself.
_PAUSE, _END_AFTER = 0.2, 2.0


class Follower(Generic[R]):
    """The actor of one channel at one place: home, or an outpost.

    Attributes:
        _record: the channel, as it was last told of; it changes within `_state`.
        _stopping: set once the channel is over.
    """

    _record: R

    def __init__(self, namespace: str, record: R, place: Place) -> None:
        if here() != place:
            raise RuntimeError(f"this relay is for {label(place)}, and was started at {label(here())}")
        self._namespace, self._place, self._id = namespace, place, record.id
        self._stopping = threading.Event()
        self._state = threading.Condition()
        newest = calls.call(namespace, "watch", record.id, -1, 0.0)
        if newest is None:
            self.stop()
        else:
            self._record = newest
            self._begin()
            self._thread(self._follow)

    def _begin(self) -> None:
        """Attach to the rings that there are."""
        raise NotImplementedError

    def _adapt(self, record: R) -> None:
        """The registry says so."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Leave the rings, if there are any."""
        raise NotImplementedError

    def rings(self, node: str) -> list[RingStatus]:
        """For `status`: the rings here, on that Ray node."""
        raise NotImplementedError

    def _thread(self, target: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True, name=f"ringshm {target.__name__}").start()

    def ready(self) -> None:
        """Answers once the relay works."""

    def stop(self) -> None:
        """The channel is over: leave its rings. The registry ends this actor then; if it does not, it ends itself."""
        self._stopping.set()
        self._leave()
        self._thread(self._end)

    def _end(self) -> None:
        sleep(_END_AFTER)
        os._exit(0)

    def _follow(self) -> None:
        version = self._record.version
        while not self._stopping.is_set():
            try:
                record = calls.call(self._namespace, "watch", self._id, version, _SILENCE)
                if record is None:
                    self.stop()
                    return
                version = record.version
                self._adapt(record)
            except Exception:  # the registry is being started again, or a ring is held up: the next round tries again
                sleep(_PAUSE)
                version = -1
