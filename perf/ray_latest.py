"""When do eight readers on two nodes of a Ray cluster have new weights of 10 MB?

Four readers on each node follow a `ringshm.ray.Latest`. Beside it: a `ray.put`, whose reference one actor of each node
is told, and their two `ray.get`s; and the same with eight actors. Both give views of memory that all readers of a node
share. The time is from the call until the last reader has seen the weights, by a clock that both nodes have, since they
are on this machine: the second has a /dev/shm of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from .contenders import Contender, Entrant
from .measure import WAY_METRIC, Case, Measurement, Options, Way, Ways, timed_by_itself, ways_in_turn
from .workers import Failed

_MEGABYTES = 10
_CASE = Case("ray_latest", f"weights of {_MEGABYTES} MB, two nodes")
_NEAR_AND_FAR = (0, 1)
_TWO, _EIGHT = "ray.put, two ray.get", "ray.put, eight ray.get"


def _weights(number: int) -> dict[str, Any]:
    return {"number": number, "layers": [np.full(_MEGABYTES * 2**20 // 16, number, np.float32) for _ in range(4)]}


def _seen(weights: Any, number: int) -> float:
    """When they were seen, whole."""
    if weights["number"] != number or any(layer[0] != number or layer[-1] != number for layer in weights["layers"]):
        raise Failed(f"these are not the weights of number {number}")
    return time.monotonic()


class _Follows:
    """An actor that reads each version as soon as it can."""

    def __init__(self, latest: Any) -> None:
        self._latest = latest
        self._seen: dict[int, float] = {}
        self._news = threading.Condition()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        version = 0
        while True:
            with self._latest.borrow(newer_than=version) as weights:
                version = weights.version
                at = _seen(weights.value, version)
            with self._news:
                self._seen[version] = at
                self._news.notify_all()

    def when(self, version: int) -> float:
        """When it has seen that version."""
        with self._news:
            while version not in self._seen:
                self._news.wait()
            return self._seen[version]


class _Gets:
    """An actor that is told of references."""

    def when(self, boxed: list[Any], number: int) -> float:
        """When it has seen what the reference leads to."""
        import ray

        return _seen(ray.get(boxed[0]), number)


def _publishing(latest: Any, readers: list[Any]) -> Way:
    import ray

    def once() -> float:
        weights = _weights(latest.version + 1)
        began = time.monotonic()
        version = latest.publish(weights)
        # one is asked at once, and the others when it has answered: so many calls would only be in the way
        last = ray.get(readers[-1].when.remote(version))
        return float(max(last, *ray.get([reader.when.remote(version) for reader in readers[:-1]]))) - began

    return timed_by_itself(once)


def _putting(getters: list[Any]) -> Way:
    import ray

    def once() -> float:
        weights = _weights(7)
        began = time.monotonic()
        reference = ray.put(weights)
        return float(max(ray.get([getter.when.remote([reference], 7) for getter in getters]))) - began

    return timed_by_itself(once)


@contextmanager
def _everyone() -> Iterator[Ways]:
    import ray

    import ringshm.ray
    from tests.support.ray_nodes import nodes, on

    with nodes(2), ringshm.ray.Latest(f"{_MEGABYTES + 1}MB") as latest:
        follows, gets = ray.remote(_Follows), ray.remote(_Gets)
        readers = [follows.options(**on(node)).remote(latest) for node in _NEAR_AND_FAR for _ in range(4)]
        two = [gets.options(**on(node)).remote() for node in _NEAR_AND_FAR]
        eight = [gets.options(**on(node)).remote() for node in _NEAR_AND_FAR for _ in range(4)]
        yield {"ringshm": _publishing(latest, readers), _TWO: _putting(two), _EIGHT: _putting(eight)}


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return int(find_spec("ray") is not None)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Publish, and put, in turn."""
    if find_spec("ray") is None:
        left_out = [Entrant(name) for name in ("ringshm", _TWO, _EIGHT)]
        return _CASE.left_out(left_out, {WAY_METRIC: False}, "Ray is not installed (extra [ray])")
    return ways_in_turn(_CASE, _everyone, replace(options, margin=60.0))  # 18 actors take their time to start
