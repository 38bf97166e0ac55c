"""What every question shares: payloads, options, a measurement, and contenders taking turns."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .contenders import Contender, Pair, Receiver, Sender
from .workers import CONTEXT, Failed, isolated, run_workers

_LARGEST_NUMBER = 2**31 - 1  # Of a message; its pickle is the longest.


@dataclass(frozen=True)
class Options:
    """How long and how often to measure: the seconds that one timing shall take, and the runs."""

    runs: int = 7
    seconds: float = 0.5
    step: Callable[[str], object] = print  # Told what comes next.
    pin: bool = False  # Each end on a core of its own; else wherever the scheduler puts it.

    @property
    def limit(self) -> float:
        """Seconds after which a timing counts as hung."""
        return 10 + 20 * self.seconds


@dataclass
class Measurement:
    """All runs of one metric of one contender; a run that failed is None, so that runs stay paired."""

    question: str
    case: str
    contender: str
    metric: str
    higher_is_better: bool
    runs: list[float | None] = field(default_factory=list)
    note: str = ""
    detail: dict[str, float] = field(default_factory=dict)


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
        array = (np.arange(self.nbytes) + 7 * number).astype(np.uint8)
        array[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        return array

    def matches(self, received: Any, number: int) -> bool:
        """Whether `received` is that message, whole, of its type and, if an array, writable."""
        expected = self.make(number)
        if self.nbytes is None:
            return type(received) is dict and bool(received == expected)
        same = isinstance(received, np.ndarray) and received.dtype == expected.dtype
        return same and received.flags.writeable and np.array_equal(received, expected)

    def pair(self, contender: Contender) -> Pair:
        """Make the contender's channel for these messages, with no room to spare."""
        largest = len(pickle.dumps(self.make(_LARGEST_NUMBER), protocol=5))
        return contender.make(self.capacity, largest, CONTEXT)


DICT = Payload("dict", 1000)
ARRAYS = [Payload(f"{name} array", 4, size) for name, size in
          [("1 KB", 1000), ("10 KB", 10_000), ("100 KB", 100_000), ("1 MB", 1_000_000)]]  # fmt: skip


def _send_numbered(sender: Sender, payload: Payload, count: int) -> None:
    for number in range(count):
        sender.put(payload.make(number))
    sender.finish()


def _receive_numbered(receiver: Receiver, payload: Payload, count: int, batches: bool) -> None:
    received: list[Any] = []
    while len(received) < count:
        if batches and receiver.get_many:
            received.extend(receiver.get_many())
        else:
            received.append(receiver.get())
    receiver.finish()
    # Compared only now: an array that still points into a slot would have been overwritten.
    for number, message in enumerate(received):
        if not payload.matches(message, number):
            raise ValueError(f"message {number} of {count} arrived wrong: {str(message)[:80]}")


def check(contender: Contender, payload: Payload, batches: bool, limit: float) -> None:
    """Send numbered messages, twice as many as fit; raise Failed unless all arrive whole and in order."""
    count = max(20, 2 * payload.capacity + 3)
    pair = payload.pair(contender)
    try:
        send = partial(_send_numbered, pair.sender, payload, count)
        run_workers([send, partial(_receive_numbered, pair.receiver, payload, count, batches)], limit)
    finally:
        pair.close()


@dataclass(frozen=True)
class Timing:
    """One timing: how long it took, in seconds, and what it says, by metric."""

    seconds: float
    values: dict[str, float]


def alternate(
    question: str,
    case: str,
    contenders: list[Contender],
    options: Options,
    check: Callable[[Contender], None],
    time: Callable[[Contender, int], Timing],
    metrics: dict[str, bool],
) -> list[Measurement]:
    """Check and calibrate each contender, then time all of them in turn, run after run.

    Args:
        check: Raises `Failed` where a contender is wrong: it is then reported and not timed.
        time: Times that many messages.
        metrics: The metrics that `time` gives, and whether higher is better.
    """
    table = {
        contender.name: [Measurement(question, case, contender.name, metric, better)
                         for metric, better in metrics.items()]
        for contender in contenders
    }  # fmt: skip
    counts: dict[str, int] = {}
    for contender in contenders:
        options.step(f"{case}: {contender.name}, check")
        try:
            isolated(partial(check, contender), options.limit)
            counts[contender.name] = _calibrate(partial(time, contender), options)
        except Failed as failure:
            _drop(table[contender.name], f"not timed: {failure}")
    for run in range(options.runs):
        turn = run % len(contenders)  # So that nobody always follows the same neighbour.
        for contender in contenders[turn:] + contenders[:turn]:
            options.step(f"{case}: {contender.name}, run {run + 1}")
            values: dict[str, float] = {}
            if contender.name in counts:
                try:
                    timing = isolated(partial(time, contender, counts[contender.name]), options.limit)
                    values = timing.values
                except Failed as failure:
                    del counts[contender.name]
                    _drop(table[contender.name], f"run {run + 1}: {failure}")
            for measurement in table[contender.name]:
                measurement.runs.append(values.get(measurement.metric))
    return [measurement for row in table.values() for measurement in row]


def _drop(measurements: list[Measurement], reason: str) -> None:
    for measurement in measurements:
        measurement.note = reason


def _calibrate(time: Callable[[int], Timing], options: Options) -> int:
    """How many messages take about as long as a timing shall."""
    count = 50
    while True:
        taken = isolated(partial(time, count), options.limit).seconds
        if taken > options.seconds / 4:
            return max(1, round(count * options.seconds / taken))
        count = round(count * min(20.0, max(2.0, 0.5 * options.seconds / max(taken, 1e-6))))
