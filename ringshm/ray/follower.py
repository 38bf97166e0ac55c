"""What all relays have in common: each is an actor at one place, which follows what the registry says."""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import ray

from ..errors import ChannelClosed
from ..system import sleep
from . import calls
from .keeping import OnRing
from .locality import Place, here, label
from .records import Record, Ring, RingStatus

R = TypeVar("R", bound=Record)

#: Seconds for which the registry may keep silent.
_SILENCE = 5.0
#: Seconds before another try, where the registry or a relay was not to be had.
_PAUSE = 0.2
#: Seconds after which a relay whose channel is over ends by itself, should the registry not end it.
_END_AFTER = 20.0


class Follower(Generic[R]):
    """The actor of one channel at one place: home, or an outpost.

    Attributes:
        namespace, id, place: the user's Ray namespace, the channel, and where this is.
        record: the channel, as it was last told of; it changes within `_state`.
    """

    record: R

    def __init__(self, namespace: str, record: R, place: Place) -> None:
        if here() != place:
            raise RuntimeError(f"this relay is for {label(place)}, and was started at {label(here())}")
        self.namespace, self.place, self.id = namespace, place, record.id
        self._stopping = threading.Event()
        self._state = threading.Condition()
        newest = self._watch(-1, 0.0)
        if newest is None:
            self.stop(record)
        else:
            self.record = newest
            self._begin()
            self.thread(self._follow)

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

    @property
    def ends(self) -> bool:
        """Whether the channel is over."""
        return self._stopping.is_set()

    def find(self, place: Place) -> Any:
        """The channel's relay at another place, made anew if Ray does not start it again; None, after a moment, if it
        is not to be had now.
        """
        try:
            return calls.relay(self.id, place)
        except ValueError:
            with contextlib.suppress(ray.exceptions.RayError, ChannelClosed):
                calls.call(self.namespace, "revive", self.id, place)
            sleep(_PAUSE)
            return None

    def thread(self, target: Callable[..., None], *args: Any) -> None:
        """Run something in a thread. If it fails, this process ends, and Ray starts the relay again."""
        threading.Thread(target=self._run, args=(target, *args), daemon=True, name=f"ringshm {target.__name__}").start()

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        try:
            target(*args)
        except BaseException:
            if not self.ends:
                traceback.print_exc()
                os._exit(1)

    def ready(self) -> None:
        """Answers once the relay works."""

    def stop(self, record: Record) -> None:
        """The channel is over: leave its rings, and remove their names. The registry ends this actor then; if it does
        not, it ends itself.

        Args:
            record: what is known of it, should this relay have been started again only now.
        """
        self._stopping.set()
        self._leave()
        for ring in record.rings_at(self.place):
            _remove(ring)
        self.thread(self._end)

    def _end(self) -> None:
        sleep(_END_AFTER)
        ray.kill(ray.get_runtime_context().current_actor)

    def _watch(self, version: int, seconds: float) -> R | None:
        """The record, once it is not of that version any more, or the time is up; None if the channel is over."""
        while not self.ends:
            try:
                newest: R | None = calls.call(self.namespace, "watch", self.id, version, seconds)
                return newest
            except ChannelClosed:  # the registry does not answer; one that is made anew knows all channels again
                sleep(_PAUSE)
        return None

    def _follow(self) -> None:
        version = self.record.version
        while not self.ends:
            record = self._watch(version, _SILENCE)
            if record is None:
                self.stop(self.record)
                return
            version = record.version
            if not self._has_adapted(record):
                sleep(_PAUSE)
                version = -1

    def _has_adapted(self, record: R) -> bool:
        """Adapt; False if a ring, or the registry, is held up: the next round tries again."""
        try:
            self._adapt(record)
            return True
        except Exception:
            traceback.print_exc()
            return False


def _remove(ring: Ring) -> None:
    """Remove the names of a ring, if they are there still."""
    with contextlib.suppress(Exception):
        OnRing(ring).close()
