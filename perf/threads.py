"""How many small messages pass between the threads of one process, from 1 thread at each end to 4, by `put` and `get`?

A `Channel` beside `queue.Queue`, of equal capacity. With the GIL one thread runs at a time; without it (a free-threaded
Python) those of both ends run at once. A queue passes references to objects, and copies nothing; a channel copies.
"""

from __future__ import annotations

import queue
import threading
import time as clock
from dataclasses import replace
from typing import Any

from ringshm import Channel

from .contenders import Contender, Entrant
from .measure import BYTES, DICT, Case, Measurement, Metrics, Options, Payload, Timing, alternate
from .measure import steps as steps_of
from .workers import Failed

_CAPACITY = 1000
_METRICS: Metrics = {"messages/s": True}
_LEAST_SECONDS = 0.2  # Of a timing: threads take a moment to start.


_ENTRANTS = [Entrant("ringshm", "ringshm", "ringshm"), Entrant("queue.Queue")]


def _make(entrant: Entrant, payload: Payload) -> Any:
    return queue.Queue(_CAPACITY) if entrant.name == "queue.Queue" else Channel(_CAPACITY, payload.largest())


def _pass(entrant: Entrant, payload: Payload, threads: int, count: int) -> tuple[float, list[Any]]:
    """Send so many messages from each thread; the seconds, and what each other thread got."""
    channel = _make(entrant, payload)
    message = payload.longest()
    start = threading.Barrier(2 * threads + 1)
    got: list[list[Any]] = [[] for _ in range(threads)]

    def put() -> None:
        start.wait()
        for _ in range(count):
            channel.put(message)

    def get(mine: list[Any]) -> None:
        start.wait()
        for _ in range(count):
            mine.append(channel.get())

    workers = [threading.Thread(target=put) for _ in range(threads)]
    workers += [threading.Thread(target=get, args=(mine,)) for mine in got]
    for worker in workers:
        worker.start()
    start.wait()
    began = clock.perf_counter()
    for worker in workers:
        worker.join()
    taken = clock.perf_counter() - began
    if isinstance(channel, Channel):
        channel.close()
    return taken, got


def _plan() -> list[tuple[Case, Payload, int]]:
    return [
        (Case("threads", f"{payload.name}, {count} and {count} threads", {"threads": count}), payload, count)
        for payload in (BYTES, DICT)
        for count in (1, 2, 3, 4)
    ]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return steps_of(_ENTRANTS, options) * len(_plan())


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Pass messages between threads, through both."""
    result: list[Measurement] = []
    for case, payload, threads in _plan():

        def check(entrant: Entrant, payload: Payload = payload, threads: int = threads) -> None:
            _, got = _pass(entrant, payload, threads, 100)
            if not all(len(mine) == 100 and all(one == payload.longest() for one in mine) for mine in got):
                raise Failed("messages are lost, or not what was sent")

        def time(
            entrant: Entrant, count: int, runs: int, payload: Payload = payload, threads: int = threads
        ) -> list[Timing]:
            taken = [_pass(entrant, payload, threads, max(1, count // threads))[0] for _ in range(runs)]
            return [Timing(one, {"messages/s": threads * max(1, count // threads) / one}) for one in taken]

        longer = max(_LEAST_SECONDS, options.seconds)
        result += alternate(case, _ENTRANTS, replace(options, seconds=longer), check, time, _METRICS)
    return result
