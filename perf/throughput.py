"""How many messages per second go from one sender process to one receiver process, by their size?

The small dict and 64 bytes, a thousand of which fit, and arrays. By copy, messages arrive as objects that the receiver
owns; beside arrays are the two bare copies that this takes at least, overlapping. Without a copy, sender and receiver
touch the first and the last word of the array where it lies.

Both ends are warm before they pass a barrier. Each reads the clock itself: the time is that from when the first of them
has passed it until the receiver has the last message.

From 100 MB on, the runs of a contender follow one another in one pair of processes: to set these up takes seconds, most
of them for touching memory for the first time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np

from . import crowd
from .contenders import Contender, Pair, iceoryx, ringshm_channel
from .measure import ARRAYS, BYTES, DICT, Case, Measurement, Metrics, Options, Payload, Timing, alternate
from .measure import steps as steps_of
from .workers import CONTEXT, Failed, place, run_workers

_METRICS: Metrics = {"messages/s": True}
_TOGETHER = 100_000_000  # Bytes from which on runs follow one another.
_IN_PLACE_COUNT = 1000  # Messages of a run then, in place, where each takes microseconds.
_HEAVY_NBYTES = {100_000, 10_000_000}  # Sizes for which contenders with a heavy import are timed.
_QUICK = {1000, 1_000_000}


@dataclass(frozen=True)
class _InPlace(Payload):
    """An array of which only the first and the last word are written and read: messages are their numbers."""

    def make(self, number: int) -> Any:
        return number

    def number_of(self, received: Any) -> int:
        return int(received)

    def matches(self, received: Any, number: int) -> bool:
        return bool(received == number)

    def largest(self) -> int:
        return self.nbytes or 0


_IN_PLACE = [
    _InPlace(f"{payload.name} in place", payload.capacity, payload.nbytes)
    for payload in ARRAYS
    if (payload.nbytes or 0) in {1000, 1_000_000, 100_000_000, 1_000_000_000}
]


def _send(pair: Pair, message: Any, warm_up: int, count: int, barrier: Any, pin: bool) -> list[float]:
    place(0, pin)
    sender = pair.sender()
    put = sender.put
    barrier.wait()  # Both ends are open.
    for _ in range(warm_up):
        put(message)
    barrier.wait()
    start = perf_counter()
    for _ in range(count):
        put(message)
    sender.finish()
    return [start]


def _receive(pair: Pair, warm_up: int, count: int, runs: int, barrier: Any, pin: bool) -> list[float]:
    place(1, pin)
    receiver = pair.receiver()
    get = receiver.get
    barrier.wait()
    for _ in range(warm_up):
        message = get()
    barrier.wait()
    times = [perf_counter()]
    for _ in range(runs):
        for _ in range(count):
            message = get()  # Kept until the next one is there, as a program does that works on it.
        times.append(perf_counter())
    del message
    receiver.finish()
    return times


def time(payload: Payload, options: Options, contender: Contender, count: int, runs: int) -> list[Timing]:
    """Time so many messages, so many times over; each run ends with its last message."""
    pair, barrier = payload.pair(contender), CONTEXT.Barrier(2)
    warm_up = max(10, min(count // 10, 2 * payload.capacity))
    if (payload.nbytes or 0) >= _TOGETHER:
        warm_up = 2  # As many buffers as a receiver has in use.
    try:
        send = partial(_send, pair, payload.longest(), warm_up, count * runs, barrier, options.pin)
        receive = partial(_receive, pair, warm_up, count, runs, barrier, options.pin)
        (sent,), times = run_workers([send, receive], _limit(payload, options))
    finally:
        pair.close()
    times[0] = min(sent, times[0])  # perf_counter is one clock for all processes of a Linux host.
    seconds = [end - start for start, end in pairwise(times)]
    return [Timing(taken, {"messages/s": count / taken}) for taken in seconds]


def _check(payload: Payload, limit: float, contender: Contender) -> None:
    if not contender.floor:
        return crowd.check(contender, payload, False, limit)
    pair = payload.pair(contender)
    sender, receiver = pair.sender(), pair.receiver()
    sender.put(payload.make(3))
    if not np.array_equal(receiver.get()[: payload.nbytes], payload.make(3)):
        raise Failed("what was copied out is not what was copied in")


def _takes_part(contender: Contender, payload: Payload) -> bool:
    if contender.floor:  # They copy arrays, and no more.
        return contender.name == "floor: np.copyto" and payload in ARRAYS
    return contender.is_queue and (not contender.heavy or payload.nbytes in _HEAVY_NBYTES)


def _plan(contenders: list[Contender], options: Options) -> list[tuple[Case, Payload, list[Contender]]]:
    names = {contender.name for contender in contenders}
    in_place = [contender for contender in (ringshm_channel.IN_PLACE, iceoryx.IN_PLACE) if contender.name in names]
    plan = []
    for payload in [DICT, BYTES, *ARRAYS, *_IN_PLACE]:
        touched = isinstance(payload, _InPlace)
        name = f"{payload.name}, capacity {payload.capacity}, {'loan and borrow' if touched else 'put and get'}"
        at = {} if payload in (DICT, BYTES) else {"nbytes in place" if touched else "nbytes": payload.nbytes or 0}
        case = Case("throughput", name, at)
        able = in_place if touched else [contender for contender in contenders if _takes_part(contender, payload)]
        taking_part = options.chosen(case, able)
        if taking_part and (not options.quick or payload in (DICT, BYTES) or payload.nbytes in _QUICK):
            plan.append((case, payload, taking_part))
    return plan


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``, at most."""
    plan = _plan(contenders, options)
    return sum(steps_of(taking_part, options, _together(payload)) for _, payload, taking_part in plan)


def _together(payload: Payload) -> bool:
    return (payload.nbytes or 0) >= _TOGETHER


def _limit(payload: Payload, options: Options) -> float:
    """Seconds, of which the largest take more to start."""
    return options.limit + (payload.nbytes or 0) / 5e7


def _no_room(payload: Payload) -> str:
    """Why messages of that size do not fit this machine; empty if they do."""
    nbytes = payload.nbytes or 0
    file_system = os.statvfs("/dev/shm")
    shared, needed = file_system.f_bavail * file_system.f_frsize, (payload.capacity + 1) * nbytes
    if shared < needed:
        return f"/dev/shm has {shared / 1e9:.1f} GB free, this takes {needed / 1e9:.1f} GB"
    free, needed = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), (payload.capacity + 6) * nbytes
    if free < needed:
        return f"{free / 1e9:.1f} GB of memory are free, this takes up to {needed / 1e9:.1f} GB"
    return ""


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Time every size that fits, over everyone who is not too slow for it."""
    result: list[Measurement] = []
    slowness: dict[str, float] = {}  # Seconds per byte, at the last size.
    for case, payload, taking_part in _plan(contenders, options):
        if reason := _no_room(payload):
            result += case.left_out(taking_part, _METRICS, reason)
            continue
        check, nbytes = partial(_check, payload, _limit(payload, options)), payload.nbytes or 0
        quick_enough = []
        for contender in taking_part:
            expected = slowness.get(contender.name, 0.0) * nbytes * (options.runs + payload.capacity + 3)
            if _together(payload) and not isinstance(payload, _InPlace) and expected > options.patience:
                reason = f"its runs would take {expected:.0f} s; --patience is {options.patience:.0f}"
                result += case.left_out([contender], _METRICS, reason)
            else:
                quick_enough.append(contender)
        together = _together(payload)
        count = 0 if not together else _IN_PLACE_COUNT if isinstance(payload, _InPlace) else 1
        run = partial(time, payload, options)
        measured = alternate(case, quick_enough, options, check, run, _METRICS, count, together)
        for measurement in measured:
            if nbytes and (rates := [rate for rate in measurement.runs if rate]):
                slowness[measurement.contender] = 1 / min(rates) / nbytes
        result += measured
    return result
