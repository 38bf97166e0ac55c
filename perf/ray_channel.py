"""How many messages per second cross the nodes of a Ray cluster, beside Ray's own queue; and what `ringshm.ray` costs
on one node, beside a plain channel.

Two nodes on this machine, the second with a /dev/shm of its own (`tests/support/ray_nodes.py`; needs root). An actor
sends, this process receives: observations of (84, 84, 4) bytes, and arrays of 1 MB. "Ray's queue" is `ray.util.queue`
with 32 messages in each call at both ends. Receivers look at each message's number.
"""

from __future__ import annotations

import time as clock
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from .contenders import Contender, Entrant
from .measure import Case, Measurement, Metrics, Options
from .workers import Failed, isolated

_METRICS: Metrics = {"messages/s": True}
_ACROSS, _QUEUE, _HERE, _PLAIN = "ringshm.ray", "Ray's queue", "ringshm.ray, one node", "plain channel"
_CASES = {"observations": ((84, 84, 4), 64, 4000), "1 MB arrays": ((1_000_000,), 16, 250)}
_BATCH = 32
_QUICK_SHARE = 10
_LIMIT_A_RUN = 60.0  # Seconds, the start of two nodes among them.


def _cases() -> list[tuple[Case, tuple[int, ...], int, int]]:
    return [(Case("ray_channel", name), shape, capacity, count) for name, (shape, capacity, count) in _CASES.items()]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return len(_cases()) if find_spec("ray") is not None else 0


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """All ways of all cases, in turn."""
    names = [Entrant(name, "ray", "ray") for name in (_ACROSS, _QUEUE, _HERE, _PLAIN)]
    if find_spec("ray") is None:
        return [one for case, *_ in _cases() for one in case.left_out(names, _METRICS, "Ray is not installed")]
    from tests.support.ray_nodes import may_mount

    if not may_mount():
        return [one for case, *_ in _cases() for one in case.left_out(names, _METRICS, "needs root for a second node")]
    rows: list[Measurement] = []
    for case, shape, capacity, count in _cases():
        options.step(case.name)
        found = {one.name: case.measurements(one, _METRICS)[0] for one in names}
        count = max(4 * _BATCH, count // _QUICK_SHARE) if options.quick else count
        try:  # in a process of its own: a process that has used Ray must not fork, as other questions do
            limit = _LIMIT_A_RUN * options.runs
            for name, runs in isolated(partial(_runs, shape, capacity, count, options.runs), limit).items():
                found[name].runs += runs
        except Failed as failure:
            for one in found.values():
                one.note = f"not timed: {failure}"
        rows += found.values()
    return rows


def _runs(shape: tuple[int, ...], capacity: int, count: int, runs: int) -> dict[str, list[float]]:
    from tests.support.ray_nodes import nodes

    with nodes(2):
        ways = _ways(shape, capacity)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, way in ways.items():
                rates[name].append(way(count))
        return rates


def _ways(shape: tuple[int, ...], capacity: int) -> dict[str, Any]:
    """Each times so many messages, and says how many passed in a second."""
    import ray
    from ray.util.queue import Empty, Full, Queue

    import ringshm.ray
    from tests.support.ray_nodes import on

    spec = {"obs": ("u1", shape), "number": "i8"}

    @ray.remote(num_cpus=0)
    class Sends:
        def ring(self, out: Any, count: int) -> None:
            message = {"obs": np.zeros(shape, np.uint8), "number": 0}
            for number in range(-1, count):
                message["number"] = number
                out.put(message)

        def queue(self, out: Any, count: int) -> None:
            for first in range(-1, count, _BATCH):
                numbers = range(first, min(count, first + _BATCH))
                messages = [{"obs": np.zeros(shape, np.uint8), "number": number} for number in numbers]
                while True:
                    try:
                        out.put_nowait_batch(messages)
                        break
                    except Full:
                        clock.sleep(0.001)

    actors = {node: Sends.options(**on(node)).remote() for node in (0, 1)}  # type: ignore[attr-defined]

    def receive(source: Any, count: int) -> float:
        """From the first message on, which the sender's start delays."""
        assert source.get()["number"] == -1
        began, expected = clock.perf_counter(), 0
        while expected < count:
            for message in source.get_many(_BATCH):
                assert message["number"] == expected
                expected += 1
        return count / (clock.perf_counter() - began)

    def ring(node: int, count: int) -> float:
        with ringshm.ray.Channel(capacity, spec=spec) as channel, channel.receiver() as source:
            sent = actors[node].ring.remote(channel.sender(), count)
            rate = receive(source, count)
            ray.get(sent)
            return rate

    def plain(count: int) -> float:
        with ringshm.Channel(capacity, spec=spec, keep_open=True) as channel, channel.receiver() as source:
            sent = actors[0].ring.remote(channel.sender(), count)
            rate = receive(source, count)
            ray.get(sent)
            return rate

    def queue(count: int) -> float:
        source = Queue(maxsize=max(capacity, 2 * _BATCH), actor_options=on(0))
        sent = actors[1].queue.remote(source, count)
        expected, began = -1, 0.0
        while expected < count:
            try:
                messages = source.get_nowait_batch(min(_BATCH, count - expected))
            except Empty:
                clock.sleep(0.0005)
                continue
            for message in messages:
                assert message["number"] == expected
                expected += 1
            began = began or clock.perf_counter()
        rate = (count - _BATCH) / (clock.perf_counter() - began)
        ray.get(sent)
        source.shutdown()
        return float(rate)

    return {_ACROSS: lambda n: ring(1, n), _QUEUE: queue, _HERE: lambda n: ring(0, n), _PLAIN: plain}
