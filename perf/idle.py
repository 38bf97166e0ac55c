"""What does a process take that waits for a message that does not come, and how soon does it wake when one comes?

A receiver waits a while, then a message is put. The processor time that it spent, as a share of a core, and the time
from before the `put` to after the `get`, by wait strategy.
"""

from __future__ import annotations

import time as clock
from functools import partial
from typing import Any

from .contenders import Contender, Pair
from .measure import Case, Measurement, Metrics, Options, Timing, alternate
from .measure import steps as steps_of
from .workers import CONTEXT, place, run_workers

_METRICS: Metrics = {"% of a core": False, "wake-up us": False}
_NAMES = ["ringshm", "ringshm (block)", "ringshm (spin)", "faster-fifo", "iceoryx2", "pyzmq", "mp.Queue", "mp.Pipe"]


def _wait(pair: Pair, barrier: Any, pin: bool) -> tuple[float, float]:
    place(0, pin)
    receiver = pair.receiver()
    barrier.wait()
    receiver.get()  # The first one attaches.
    began, before = clock.perf_counter(), clock.process_time()
    receiver.get()
    ended = clock.perf_counter()
    share = (clock.process_time() - before) / (ended - began)
    receiver.finish()
    return share, ended


def _wake(pair: Pair, barrier: Any, seconds: float, pin: bool) -> tuple[float, float]:
    place(1, pin)
    sender = pair.sender()
    barrier.wait()
    sender.put(b"attach")
    clock.sleep(seconds)
    began = clock.perf_counter()
    sender.put(b"wake up")
    sender.finish()
    return 0.0, began


def time(options: Options, contender: Contender, _count: int, runs: int) -> list[Timing]:
    """Let a receiver wait, so many times, and long enough for it to be idle."""
    return [_time(options, 30 * options.seconds, contender) for _ in range(runs)]


def _time(options: Options, seconds: float, contender: Contender) -> Timing:
    pair, barrier = contender.make(4, 100, CONTEXT), CONTEXT.Barrier(2)
    try:
        wait, wake = partial(_wait, pair, barrier, options.pin), partial(_wake, pair, barrier, seconds, options.pin)
        (share, ended), (_, began) = run_workers([wait, wake], options.limit)
    finally:
        pair.close()
    return Timing(seconds, {"% of a core": 100 * share, "wake-up us": 1e6 * (ended - began)})


def _chosen(contenders: list[Contender]) -> list[Contender]:
    return [contender for contender in contenders if contender.name in _NAMES]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return steps_of(_chosen(contenders), options)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Let everyone wait."""
    check, run = partial(_check, options), partial(time, options)
    case = Case("idle", "a receiver that waits")
    return alternate(case, _chosen(contenders), options, check, run, _METRICS, count=1)


def _check(options: Options, contender: Contender) -> None:
    _time(options, 0.0, contender)
