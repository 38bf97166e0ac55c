"""How long is a round trip, and how much of a core does it take: one process sends, another answers with what it got?

By wait strategy and by size; with as many processes as the two that it takes, and with more than there are cores, in
pairs that each have channels of their own. Each trip is timed by itself; the report gives the 50th, 99th and 99.9th
percentile of a run, and the processor time of both ends per trip, which a busy wait spends and a blocking one does not.
"""

from __future__ import annotations

import os
from functools import partial
from time import perf_counter_ns, process_time_ns
from typing import Any

import numpy as np

from .contenders import Contender, Pair
from .measure import Case, Measurement, Metrics, Options, Timing, alternate
from .measure import steps as steps_of
from .workers import CONTEXT, place, run_workers

_METRICS: Metrics = {"p50 us": False, "p99 us": False, "p99.9 us": False, "CPU us": False}
_WARM_UP = 100  # Trips.
_CROWDED_WARM_UP = 20  # Where processes outnumber cores: who polls then waits for its turn on a core in each trip.
_CAPACITY = 4
_NAMES = ["ringshm", "ringshm (block)", "ringshm (spin)", "faster-fifo", "cloudtoid (polling)", "iceoryx2 (bytes)",
          "kickmsg", "pyzmq", "mp.Queue", "mp.Pipe (bytes)", "floor: semaphores"]  # fmt: skip
_SIZES = {"64 B": 64, "10 KB": 10_000, "1 MB": 1_000_000}
GRID = [*np.linspace(0, 99, 100), *np.linspace(99.1, 99.9, 9), 99.99, 100]  # Percentiles kept of each run.
_Trips = tuple[list[int], int]  # Nanoseconds of each, and of processor time for all.


def _ask(there: Pair, back: Pair, nbytes: int, warm_up: int, count: int, barrier: Any, core: int, pin: bool) -> _Trips:
    place(core, pin)
    receiver, sender = back.receiver(), there.sender()
    put, get, times, rest = sender.put, receiver.get, [], bytes(nbytes - 8)
    barrier.wait()
    for number in range(warm_up + count):
        if number == warm_up:
            before = process_time_ns()
        message = number.to_bytes(8, "little") + rest
        start = perf_counter_ns()
        put(message)
        answer = get()
        times.append(perf_counter_ns() - start)
        if answer != message:
            raise ValueError(f"sent {message[:8]!r}..., got {answer[:8]!r}...")
    spent = process_time_ns() - before
    receiver.finish()
    sender.finish()
    return times[warm_up:], spent


def _answer(there: Pair, back: Pair, warm_up: int, count: int, barrier: Any, core: int, pin: bool) -> _Trips:
    place(core, pin)
    receiver, sender = there.receiver(), back.sender()
    put, get = sender.put, receiver.get
    barrier.wait()
    for number in range(warm_up + count):
        if number == warm_up:
            before = process_time_ns()
        put(get())
    spent = process_time_ns() - before
    receiver.finish()
    sender.finish()
    return [], spent


def time(
    nbytes: int, processes: int, options: Options, contender: Contender, count: int, runs: int
) -> list[Timing]:  # fmt: skip
    """Time so many trips of each pair, so many times."""
    return [_time(nbytes, processes, options, contender, count) for _ in range(runs)]


def _time(nbytes: int, processes: int, options: Options, contender: Contender, count: int) -> Timing:
    pairs = [[contender.make(_CAPACITY, nbytes + 64, CONTEXT) for _ in range(2)] for _ in range(processes // 2)]
    crowded = processes > (os.cpu_count() or 1)
    barrier, pin = CONTEXT.Barrier(processes), options.pin and not crowded
    warm_up = _CROWDED_WARM_UP if crowded else _WARM_UP
    workers: list[Any] = []
    for index, (there, back) in enumerate(pairs):
        workers.append(partial(_ask, there, back, nbytes, warm_up, count, barrier, 2 * index, pin))
        workers.append(partial(_answer, there, back, warm_up, count, barrier, 2 * index + 1, pin))
    try:
        results: list[_Trips] = run_workers(workers, options.limit)
    finally:
        for pair in [pair for both in pairs for pair in both]:
            pair.close()
    nanoseconds = np.array([times for times, _ in results if times])
    trips = nanoseconds.size
    p50, p99, p999 = np.percentile(nanoseconds / 1e3, [50, 99, 99.9]).tolist()
    spent = sum(spent for _, spent in results) / 1e3 / trips
    values = {"p50 us": p50, "p99 us": p99, "p99.9 us": p999, "CPU us": spent}
    return Timing(float(nanoseconds.sum(axis=1).max()) / 1e9, values, np.percentile(nanoseconds / 1e3, GRID).tolist())


def _chosen(contenders: list[Contender]) -> list[Contender]:
    return [contender for contender in contenders if contender.name in _NAMES]


def _plan(options: Options) -> list[tuple[Case, int, int]]:
    cores = os.cpu_count() or 1
    cases = [(name, nbytes, 2) for name, nbytes in _SIZES.items()]
    cases += [("64 B", 64, 4 * cores)]
    return [
        (
            Case(
                "round_trip",
                f"{name}, {processes} processes on {cores} cores",
                {"nbytes": nbytes, "processes": processes},
            ),
            nbytes,
            processes,
        )
        for name, nbytes, processes in cases
        if not options.quick or nbytes == 64
    ]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return sum(steps_of(options.chosen(case, _chosen(contenders)), options) for case, _, _ in _plan(options))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Time the round trip over a pair of channels; every answer is compared with what was sent."""
    result: list[Measurement] = []
    for case, nbytes, processes in _plan(options):
        run = partial(time, nbytes, processes, options)
        check = partial(_check, nbytes, processes, options)
        if taking_part := options.chosen(case, _chosen(contenders)):
            result += alternate(case, taking_part, options, check, run, _METRICS)
    return result


def _check(nbytes: int, processes: int, options: Options, contender: Contender) -> None:
    _time(nbytes, processes, options, contender, 20)
