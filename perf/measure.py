"""What every question shares: payloads, options, a measurement, and contenders taking turns."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from multiprocessing.reduction import ForkingPickler
from statistics import median
from time import process_time
from typing import Any

import numpy as np

from .contenders import Contender, E, Entrant, Pair
from .workers import CONTEXT, Failed, isolated

_LARGEST_NUMBER = 2**31 - 1  # Of a message; its pickle is the longest.
_SAMPLE_NBYTES = 100_000  # From there on, the pickle of an array grows with the array alone.
_FIRST_COUNT = 50  # Messages of the first timing, from which the count is found.
WAY_METRIC = "us"
Metrics = dict[str, bool | None]  # Whether higher is better; None: neither is, it is not compared.


@dataclass(frozen=True)
class Options:
    """How long and how often to measure: the seconds that one timing shall take, and the runs."""

    runs: int = 7
    seconds: float = 0.08
    step: Callable[[str], object] = print  # Told what comes next.
    pin: bool = False  # Each end on a core of its own; else wherever the scheduler puts it.
    quick: bool = False  # Fewer cases.
    patience: float = 20.0  # Seconds that all runs of a contender in one case may take; else it is not timed there.
    margin: float = 10.0  # Seconds that a timing may take for its processes to start and end.
    wanted: Callable[[Case, str], bool] = lambda case, name: True  # Whether that contender is timed in that case.

    @property
    def limit(self) -> float:
        """Seconds after which a timing counts as hung."""
        return self.margin + 20 * self.seconds

    def chosen(self, case: Case, contenders: Iterable[Contender]) -> list[Contender]:
        """Those of them that are wanted in that case."""
        return [contender for contender in contenders if self.wanted(case, contender.name)]


@dataclass
class Measurement:
    """All runs of one metric of one contender; a run that failed is None, so that runs stay paired."""

    question: str
    case: str
    contender: str
    metric: str
    higher_is_better: bool | None
    runs: list[float | None] = field(default_factory=list)
    note: str = ""
    left_out: bool = False  # On purpose, as the note says: no failure.
    detail: dict[str, float] = field(default_factory=dict)
    quantiles: list[list[float]] = field(default_factory=list)  # Of each run, the distribution behind its percentiles.
    at: dict[str, int] = field(default_factory=dict)  # Where the case lies on the axes of a plot.


def advantages(ours: Measurement, theirs: Measurement) -> list[float]:
    """How many times better `ours` was, run by run."""
    if ours.higher_is_better is None or not (ours.runs and theirs.runs):
        return []
    both = [(mine, other) for mine, other in zip(ours.runs, theirs.runs, strict=True) if mine and other]
    return [mine / other if ours.higher_is_better else other / mine for mine, other in both]


@dataclass(frozen=True)
class Case:
    """One table of a question."""

    question: str
    name: str
    at: dict[str, int] = field(default_factory=dict)

    def measurements(self, contender: Entrant, metrics: Metrics) -> list[Measurement]:
        """Those of one contender, still without runs."""
        return [
            Measurement(self.question, self.name, contender.name, metric, better, at=self.at)
            for metric, better in metrics.items()
        ]

    def left_out(self, contenders: Iterable[Entrant], metrics: Metrics, why: str) -> list[Measurement]:
        """What is reported of contenders that are not timed, though nothing is wrong with them."""
        return [
            replace(measurement, note=f"left out: {why}", left_out=True)
            for contender in contenders
            for measurement in self.measurements(contender, metrics)
        ]


def _pickle_nbytes(message: Any) -> int:
    return max(len(pickle.dumps(message, 5)), len(ForkingPickler.dumps(message)))


@dataclass(frozen=True)
class Payload:
    """What is sent: faster-fifo's small dict, or an array of `nbytes` bytes."""

    name: str
    capacity: int
    nbytes: int | None = None

    def make(self, number: int) -> Any:
        """The message of that sequence number, unlike its neighbours."""
        if self.nbytes is None:
            return {"a": number, "b": 33, "c": (1, 2, 3), "d": [1, 2, 3], "e": "123", "f": b"kkk"}
        array = np.resize((np.arange(256) + 7 * number).astype(np.uint8), self.nbytes)
        array[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        return array

    def number_of(self, received: Any) -> int:
        """The sequence number that a message claims to have."""
        return int(received["a"]) if self.nbytes is None else int.from_bytes(received[:8].tobytes(), "little")

    def matches(self, received: Any, number: int) -> bool:
        """Whether `received` is that message, whole, of its type and, if an array, writable."""
        expected = self.make(number)
        if self.nbytes is None:
            return type(received) is dict and bool(received == expected)
        same = isinstance(received, np.ndarray) and received.dtype == expected.dtype
        return same and received.flags.writeable and np.array_equal(received, expected)

    def longest(self) -> Any:
        """The message with the longest pickle: it takes the room that every contender has for each."""
        return self.make(_LARGEST_NUMBER)

    def largest(self) -> int:
        """Bytes of its longest pickle, by the protocol that takes more: contenders choose between two."""
        if self.nbytes is None:
            return _pickle_nbytes(self.longest())
        sample = np.zeros(
            min(self.nbytes, _SAMPLE_NBYTES), np.uint8
        )  # Beyond that a pickle grows with its array alone.
        return self.nbytes - len(sample) + _pickle_nbytes(sample)

    def pair(self, contender: Contender) -> Pair:
        """Make the contender's channel for these messages, with no room to spare."""
        return contender.make(self.capacity, self.largest(), CONTEXT)


@dataclass(frozen=True)
class _Bytes(Payload):
    """Bytes that begin with their number."""

    def make(self, number: int) -> bytes:
        return number.to_bytes(8, "little") + bytes((self.nbytes or 0) - 8)

    def number_of(self, received: Any) -> int:
        return int.from_bytes(received[:8], "little")

    def matches(self, received: Any, number: int) -> bool:
        return type(received) is bytes and received == self.make(number)

    def largest(self) -> int:
        return _pickle_nbytes(self.longest())


DICT = Payload("dict", 1000)
BYTES = _Bytes("64 B bytes", 1000, 64)


def array(name: str, nbytes: int) -> Payload:
    """An array, four of which fit; two where four would be a good part of this machine's memory, one of the largest."""
    return Payload(f"{name} array", 4 if nbytes < 100_000_000 else 2 if nbytes < 1_000_000_000 else 1, nbytes)


ARRAYS = [
    array(name, size)
    for name, size in [
        *(("10 B", 10), ("1 KB", 1000), ("10 KB", 10_000), ("100 KB", 100_000), ("1 MB", 1_000_000)),
        *(("10 MB", 10_000_000), ("100 MB", 100_000_000), ("1 GB", 1_000_000_000)),
    ]
]


@dataclass(frozen=True)
class Timing:
    """One timing: how long it took, in seconds, and what it says, by metric; and the distribution behind that."""

    seconds: float
    values: dict[str, float]
    quantiles: list[float] = field(default_factory=list)


#: Times so many messages so many times over, in one set of processes.
Time = Callable[[E, int, int], list[Timing]]


def alternate(
    case: Case,
    contenders: list[E],
    options: Options,
    check: Callable[[E], None],
    time: Time[E],
    metrics: Metrics,
    count: int = 0,
    together: bool = False,
) -> list[Measurement]:
    """Check each contender and find its count, then time all of them in turn, run after run.

    Args:
        check: Raises `Failed` where a contender is wrong: it is then reported and not timed.
        time: Times that many messages.
        metrics: The metrics that `time` gives.
        count: How many messages a timing is given; 0: as many as take as long as it shall.
        together: The runs of one contender follow one another in the same processes, where these take so long to start
            that turns could not be paid for. Those of a `heavy` one always do.
    """
    table = {contender.name: case.measurements(contender, metrics) for contender in contenders}
    counts: dict[str, int] = {}
    limit = options.limit + (options.patience if together else 0)

    def timed(contender: E, runs: int, note: str) -> None:
        timings: list[Timing] = []
        if contender.name in counts:
            try:
                timings = isolated(partial(time, contender, counts[contender.name], runs), limit)
            except Failed as failure:
                del counts[contender.name]
                _drop(table[contender.name], f"{note}{failure}")
        for measurement in table[contender.name]:
            values = [timing.values.get(measurement.metric) for timing in timings] or [None] * runs
            measurement.runs += values
            if measurement is table[contender.name][0]:
                measurement.quantiles += [timing.quantiles for timing in timings if timing.quantiles]

    apart = [contender for contender in contenders if together or contender.heavy]
    for contender in contenders:
        options.step(f"{case.name}: {contender.name}, check")
        try:
            isolated(partial(check, contender), limit)
            counts[contender.name] = count or _calibrate(partial(time, contender), options)
        except Failed as failure:
            _drop(table[contender.name], f"not timed: {failure}")
    for contender in apart:
        options.step(f"{case.name}: {contender.name}, all runs")
        timed(contender, options.runs, "")
    in_turn = [contender for contender in contenders if contender not in apart]
    for run in range(options.runs if in_turn else 0):
        turn = run % len(in_turn)  # So that nobody always follows the same neighbour.
        for contender in in_turn[turn:] + in_turn[:turn]:
            options.step(f"{case.name}: {contender.name}, run {run + 1}")
            timed(contender, 1, f"run {run + 1}: ")
    return [measurement for row in table.values() for measurement in row]


def steps(contenders: Iterable[Entrant], options: Options, together: bool = False) -> int:
    """How many times `alternate` will call ``options.step``."""
    return sum(2 if together or contender.heavy else 1 + options.runs for contender in contenders)


#: Does one thing in one process so many times; the seconds that once took. Where nobody waits, those are of processor
#: time: what else runs on the machine does not count.
Way = Callable[[int], float]
Ways = dict[str, Way]  # By contender.


def repeated(once: Callable[[], object]) -> Way:
    """Call it so many times; all of it counts."""

    def way(count: int) -> float:
        began = process_time()
        for _ in repeat(None, count):
            once()
        return (process_time() - began) / count

    return way


def timed_by_itself(once: Callable[[], float]) -> Way:
    """Call it so many times; of each call only the seconds count that it returns."""
    return lambda count: median(once() for _ in range(count))


def ways_in_turn(case: Case, make: Callable[[], AbstractContextManager[Ways]], options: Options) -> list[Measurement]:
    """Time the ways that are wanted, in turn, run after run, in one process of their own."""
    options.step(f"{case.name}: {case.question}")
    try:
        runs = isolated(partial(_time_ways, case, make, options), options.limit * options.runs)
    except Failed as failure:
        return [Measurement(case.question, case.name, "ringshm", WAY_METRIC, False, note=f"not timed: {failure}")]
    return [Measurement(case.question, case.name, way, WAY_METRIC, False, list(values)) for way, values in runs.items()]


def _time_ways(
    case: Case, make: Callable[[], AbstractContextManager[Ways]], options: Options
) -> dict[str, list[float]]:
    with make() as ways:
        chosen = {name: way for name, way in ways.items() if options.wanted(case, name)}
        counts: dict[str, int] = {}
        for name, way in chosen.items():
            way(3)
            counts[name] = max(5, int(options.seconds / max(1e-7, way(5))))
        results: dict[str, list[float]] = {name: [] for name in chosen}
        for run in range(options.runs):
            names = list(chosen)
            for name in names[run % len(names) :] + names[: run % len(names)]:
                results[name].append(1e6 * chosen[name](counts[name]))
        return results


def counted(
    question: str, case: str, who: str, metric: str, limit: float, count: Callable[[], dict[str, float]]
) -> Measurement:
    """The sum of what `count` counts, run once on its own; or the reason why there is none."""
    measurement = Measurement(question, case, who, metric, higher_is_better=None)
    try:
        measurement.detail = isolated(count, limit)
        measurement.runs.append(float(sum(measurement.detail.values())))
    except Failed as failure:
        measurement.note = str(failure)
        measurement.runs.append(None)
    return measurement


def _drop(measurements: list[Measurement], reason: str) -> None:
    for measurement in measurements:
        measurement.note = reason


def _calibrate(time: Callable[[int, int], list[Timing]], options: Options) -> int:
    """How many messages take about as long as a timing shall."""
    count = _FIRST_COUNT
    while True:
        taken = isolated(partial(time, count, 1), options.limit)[0].seconds
        if taken > options.seconds / 4:
            return max(1, round(count * options.seconds / taken))
        count = round(count * min(20.0, max(2.0, 0.5 * options.seconds / max(taken, 1e-6))))
