"""How much memory do a sender and a receiver hold while a million small messages pass, and does it grow?

Of both processes together: the resident memory that is their own, and what is shared, after the first ten thousand
messages and after the last; each page that has been touched counts, in each process that has it mapped. A contender
that is too slow for a million within its time is stopped there, and says how many it was.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from .contenders import Contender, Pair
from .measure import DICT, Case, Measurement, Metrics, Options
from .workers import CONTEXT, Failed, isolated, run_workers

_MESSAGES = 1_000_000
_WARM = 10_000
_LOOK = 1000  # Messages between two looks at the clock.
_SECONDS = 6.0
_METRICS: Metrics = {
    "own MiB": None,
    "shared MiB": None,
    "own MiB, growth": None,
    "shared MiB, growth": None,
    "messages": None,
}
_Memory = tuple[int, int]  # KiB, own and shared.


def _memory() -> _Memory:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared = (int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    return own, shared


def _send(pair: Pair, count: int, seconds: float, barrier: Any) -> tuple[_Memory, _Memory, int]:
    sender = pair.sender()
    message, sent = DICT.make(0), 0
    barrier.wait()
    deadline = time.monotonic() + seconds
    while sent < count and (sent <= _WARM or time.monotonic() < deadline):
        for _ in range(_LOOK):
            sender.put(message)
        sent += _LOOK
        if sent == _WARM:
            early = _memory()
    late = _memory()
    sender.put(None)
    sender.finish()
    return early, late, sent


def _receive(pair: Pair, barrier: Any) -> tuple[_Memory, _Memory, int]:
    receiver = pair.receiver()
    received = 0
    barrier.wait()
    while receiver.get() is not None:
        received += 1
        if received == _WARM:
            early = _memory()
    late = _memory()
    receiver.finish()
    return early, late, received


def _measure(contender: Contender, count: int, seconds: float, limit: float) -> dict[str, float]:
    pair, barrier = DICT.pair(contender), CONTEXT.Barrier(2)
    try:
        send, receive = partial(_send, pair, count, seconds, barrier), partial(_receive, pair, barrier)
        (early, late, sent), (early_too, late_too, received) = run_workers([send, receive], limit)
    finally:
        pair.close()
    if sent != received:
        raise Failed(f"{sent} messages sent, {received} received")
    first = [(one + other) / 1024 for one, other in zip(early, early_too, strict=True)]
    last = [(one + other) / 1024 for one, other in zip(late, late_too, strict=True)]
    growth = [after - before for before, after in zip(first, last, strict=True)]
    return dict(zip(_METRICS, [*last, *growth, float(received)], strict=True))


def _chosen(contenders: list[Contender]) -> list[Contender]:
    return [other for other in contenders if other.is_queue and not other.heavy]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return len(_chosen(contenders))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Measure everyone once: what is counted here does not wobble."""
    count, seconds = (_MESSAGES // 10, _SECONDS / 10) if options.quick else (_MESSAGES, _SECONDS)
    limit = options.limit + 4 * seconds
    case = Case("memory", f"{count:,} dicts, capacity {DICT.capacity}, put and get")
    result: list[Measurement] = []
    for contender in _chosen(contenders):
        options.step(f"{case.name}: {contender.name}")
        measurements = case.measurements(contender, _METRICS)
        try:
            values = isolated(partial(_measure, contender, count, seconds, limit), limit)
        except Failed as failure:
            for measurement in measurements:
                measurement.note = f"not measured: {failure}"
        else:
            for measurement in measurements:
                measurement.runs.append(values[measurement.metric])
        result += measurements
    return result
