"""How long is the round trip of 64 bytes: one process sends, another answers with what it got?

Each trip is timed by itself; the report gives the 50th, 99th and 99.9th percentile of a run.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np

from .contenders import Contender, Receiver, Sender
from .measure import Measurement, Options, Timing, alternate
from .workers import CONTEXT, Failed, place, run_workers

_METRICS = {"p50 us": False, "p99 us": False, "p99.9 us": False}
_WARM_UP = 200
_NAMES = ["ringshm", "ringshm (block)", "ringshm (spin)", "mp.Pipe", "mp.Queue", "faster-fifo"]


def _message(number: int) -> bytes:
    return number.to_bytes(8, "little") * 8


def _ask(there: Sender, back: Receiver, count: int, barrier: Any, pin: bool) -> list[int]:
    place(0, pin)
    put, get, times = there.put, back.get, []
    barrier.wait()
    for number in range(_WARM_UP + count):
        message = _message(number)
        start = perf_counter_ns()
        put(message)
        answer = get()
        times.append(perf_counter_ns() - start)
        if answer != message:
            raise ValueError(f"sent {message!r}, got {answer!r}")
    there.finish()
    return times[_WARM_UP:]


def _answer(there: Receiver, back: Sender, count: int, barrier: Any, pin: bool) -> list[int]:
    place(1, pin)
    put, get = back.put, there.get
    barrier.wait()
    for _ in range(_WARM_UP + count):
        put(get())
    back.finish()
    return []


def _time(options: Options, contender: Contender, count: int) -> Timing:
    there, back = contender.make(4, 100, CONTEXT), contender.make(4, 100, CONTEXT)
    barrier = CONTEXT.Barrier(2)
    try:
        ask = partial(_ask, there.sender, back.receiver, count, barrier, options.pin)
        answer = partial(_answer, there.receiver, back.sender, count, barrier, options.pin)
        nanoseconds, _ = run_workers([ask, answer], options.limit)
    finally:
        there.close()
        back.close()
    percentiles = np.percentile(np.array(nanoseconds) / 1e3, [50, 99, 99.9]).tolist()
    return Timing(sum(nanoseconds) / 1e9, dict(zip(_METRICS, percentiles, strict=True)))


def _chosen(contenders: list[Contender]) -> list[Contender]:
    return [contender for contender in contenders if contender.name in _NAMES]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return len(_chosen(contenders)) * (1 + options.runs)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Time the round trip over a pair of channels; every answer is compared with what was sent."""

    def check(contender: Contender) -> None:
        if not _time(options, contender, 100).seconds > 0:
            raise Failed("the clock stood still")

    time = partial(_time, options)
    case = "64 bytes, capacity 4"
    return alternate("round_trip", case, _chosen(contenders), options, check, time, _METRICS)
