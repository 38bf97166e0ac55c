"""How many messages per second go from one sender process to one receiver process?

Messages arrive as objects that the receiver owns. The clock runs from when both ends, warmed up, pass a
barrier until the receiver has the last message.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from .contenders import BATCH, Contender, Receiver, Sender
from .measure import ARRAYS, DICT, Measurement, Options, Payload, Timing, alternate
from .measure import check as check_order
from .workers import CONTEXT, place, run_workers

_METRIC = "messages/s"
_Times = tuple[float, float]  # Start and end; the sender's end does not count.
_CASES = [(DICT, False), (DICT, True), *((payload, False) for payload in ARRAYS)]


def _send(sender: Sender, message: Any, warm_up: int, count: int, barrier: Any, pin: bool) -> _Times:
    place(0, pin)
    put = sender.put
    for _ in range(warm_up):
        put(message)
    barrier.wait()
    start = perf_counter()
    for _ in range(count):
        put(message)
    sender.finish()
    return start, 0.0


def _receive(receiver: Receiver, batches: bool, warm_up: int, count: int, barrier: Any, pin: bool) -> _Times:
    place(1, pin)
    get, get_many = receiver.get, receiver.get_many
    for _ in range(warm_up):
        get()
    barrier.wait()
    start = perf_counter()
    if batches and get_many:
        while count > 0:
            count -= len(get_many())
    else:
        for _ in range(count):
            get()
    end = perf_counter()
    receiver.finish()
    return start, end


def _time(payload: Payload, batches: bool, options: Options, contender: Contender, count: int) -> Timing:
    pair, barrier = payload.pair(contender), CONTEXT.Barrier(2)
    warm_up = max(10, min(count // 10, 2 * payload.capacity))
    try:
        send = partial(_send, pair.sender, payload.make(0), warm_up, count, barrier, options.pin)
        receive = partial(_receive, pair.receiver, batches, warm_up, count, barrier, options.pin)
        (sent, _), (received, end) = run_workers([send, receive], options.limit)
    finally:
        pair.close()
    seconds = end - min(sent, received)  # perf_counter is one clock for all processes of a Linux host.
    return Timing(seconds, {_METRIC: count / seconds})


def _takes_part(contender: Contender, batches: bool) -> bool:
    return not contender.variant and (contender.batches or not batches)


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    turns = sum(_takes_part(contender, batches) for _, batches in _CASES for contender in contenders)
    return turns * (1 + options.runs)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Time every payload; the small dict also with `get_many`, for those who have it."""
    result: list[Measurement] = []
    for payload, batches in _CASES:
        taking_part = [contender for contender in contenders if _takes_part(contender, batches)]
        how = f"get_many({BATCH})" if batches else "get"
        case = f"{payload.name}, capacity {payload.capacity}, put and {how}"
        check: Callable[[Contender], None] = partial(_check, payload, batches, options.limit)
        time = partial(_time, payload, batches, options)
        result += alternate("throughput", case, taking_part, options, check, time, {_METRIC: True})
    return result


def _check(payload: Payload, batches: bool, limit: float, contender: Contender) -> None:
    check_order(contender, payload, batches, limit)
