"""What do messages cost that are written and read in place, or typed, or only the newest of which matter?

- a loan and a borrow of 100 MB, the first and the last element touched on both sides, beside one of 1 KB;
- a typed message, an Atari player's, by put and get between two processes, beside the same dict pickled;
- get_batch(32) of those into warm arrays, beside `np.copyto` of the same bytes: field by field out of the slots, as
  another process has left them; and in one piece out of an array that is in this core's cache;
- publish and read of 10 MB, beside the two copies it needs; and a borrow of 100 MB beside one of 1 KB.

All but the second are timed in one process, uncontended: between two, it is a round trip's cost that is added. The
third has a sender in another process, which is done before the clock starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ringshm import Channel, Latest

from . import crowd, throughput
from .contenders import Contender, Pair, Receiver, Sender
from .measure import Case, Measurement, Metrics, Options, Payload, alternate
from .measure import steps as steps_of
from .workers import CONTEXT, Failed, isolated

_STEP = {"obs": (np.uint8, (84, 84, 4)), "action": np.int64, "reward": np.float32, "done": np.bool_}
_BATCH = 32
_METRIC = "us"
_TYPED_METRICS: Metrics = {"messages/s": True}

# --- between two processes


@dataclass(frozen=True)
class _Step(Payload):
    """An Atari player's message."""

    def make(self, number: int) -> Any:
        obs = (np.arange(84 * 84 * 4) + 7 * number).astype(np.uint8).reshape(84, 84, 4)
        return {"obs": obs, "action": number, "reward": np.float32(number), "done": number % 2 == 0}

    def number_of(self, received: Any) -> int:
        return int(received["action"])

    def matches(self, received: Any, number: int) -> bool:
        expected = self.make(number)
        return received["obs"].flags.writeable and all(np.array_equal(received[name], expected[name]) for name in _STEP)


def _make_typed(capacity: int, largest_nbytes: int, context: Any) -> Pair:
    channel = Channel(capacity, spec=_STEP)
    return Pair(lambda: Sender(channel.put), lambda: Receiver(channel.get), channel.close)


def _make_typed_to_check(capacity: int, largest_nbytes: int, context: Any) -> Pair:
    """The same, which also takes the None that ends a receiver: a message without an observation."""
    channel = Channel(capacity, spec=_STEP)
    nothing = {"obs": np.zeros((84, 84, 4), np.uint8), "action": -1, "reward": 0, "done": False}

    def get() -> Any:
        return None if (message := channel.get())["action"] < 0 else message

    return Pair(lambda: Sender(lambda message: channel.put(message or nothing)), lambda: Receiver(get), channel.close)


_PAYLOAD = _Step("obs uint8 (84, 84, 4), action, reward, done", 16)
_TYPED = Contender("ringshm", _make_typed, "ringshm", "ringshm")


def _contenders(contenders: list[Contender]) -> list[Contender]:
    pickled = [
        Contender("ringshm, pickled", other.make, other.distribution, other.module)
        for other in contenders
        if other.name == "ringshm"
    ]
    return [_TYPED, *pickled, *(other for other in contenders if other.name == "py-sharedmemory")]


# --- in one process

_Ways = dict[str, Callable[[], Any]]  # The first is "ringshm"; each moves one message.


@contextmanager
def _loans() -> Iterator[_Ways]:
    def once(channel: Channel, nbytes: int) -> None:
        with channel.loan() as loan:
            written = loan.array(nbytes, np.uint8)
            written[0] = written[-1] = 1
        with channel.borrow() as message:
            read = message.value
            assert read[0] == read[-1] == 1

    with Channel(3, 100_000_000) as large, Channel(3, 1000) as small:
        yield {"ringshm": partial(once, large, 100_000_000), "ringshm, 1 KB": partial(once, small, 1000)}


def _send_batches(channel: Channel, asked: Channel, batch: dict[str, Any]) -> None:
    for _ in asked:
        channel.put_batch(batch)


@contextmanager
def _batches() -> Iterator[_Ways]:
    """Another process fills the ring before the clock starts: its bytes are where a sender leaves them."""
    batch: dict[str, Any] = {
        "obs": np.ones((_BATCH, 84, 84, 4), np.uint8),
        "action": np.ones(_BATCH, np.int64),
        "reward": np.ones(_BATCH, np.float32),
        "done": np.ones(_BATCH, np.bool_),
    }
    out = {name: np.zeros_like(array) for name, array in batch.items()}
    nbytes = sum(array.nbytes for array in batch.values())
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    with Channel(_BATCH, spec=_STEP) as channel, Channel(1, 100) as asked:
        fields = [
            *zip(out.values(), channel._typed("perf").columns, strict=True)
        ]  # each in all slots, which a batch fills
        sender = CONTEXT.Process(target=_send_batches, args=(channel.sender(), asked.receiver(), batch))
        sender.start()

        def await_batch() -> None:
            asked.put(None)
            while channel.has_space():
                pass

        def take() -> float:
            await_batch()
            began = time.perf_counter()
            channel.get_batch(_BATCH, out=out)
            return time.perf_counter() - began

        def copy() -> float:
            await_batch()
            began = time.perf_counter()
            for array, column in fields:
                np.copyto(array, column)
            taken = time.perf_counter() - began
            channel.get_batch(_BATCH, out=out)
            return taken

        def copy_cached() -> float:
            began = time.perf_counter()
            np.copyto(target, source)
            return time.perf_counter() - began

        yield {"ringshm": take, "np.copyto, field by field": copy, "np.copyto within the cache": copy_cached}
        asked.shutdown()
        sender.join()


@contextmanager
def _newest() -> Iterator[_Ways]:
    """The copies go into two slots in turn, as a publisher's must: the newest version is not overwritten."""
    nbytes = 10_000_000
    value, warm = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    slots = [np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)]
    with Latest(nbytes) as latest:

        def publish_and_read() -> None:
            latest.publish(value)
            latest.read()

        def copies(fresh: bool, turns: bool) -> None:
            if turns:
                slots.reverse()
            np.copyto(slots[0], value)
            np.copyto(np.empty(nbytes, np.uint8) if fresh else warm, slots[0])

        yield {
            "ringshm": publish_and_read,
            "two copies": partial(copies, True, True),
            "two copies, out into one array": partial(copies, False, True),
            "two copies, always over the same memory": partial(copies, False, False),
        }


@contextmanager
def _newest_in_place() -> Iterator[_Ways]:
    def borrow(latest: Latest) -> None:
        with latest.borrow() as newest:
            read = newest.value
            assert read[0] == read[-1] == 1

    with Latest(100_000_000) as large, Latest(1000) as small:
        large.publish(np.ones(100_000_000, np.uint8))
        small.publish(np.ones(1000, np.uint8))
        yield {"ringshm": partial(borrow, large), "ringshm, 1 KB": partial(borrow, small)}


_CASES = {
    "loan and borrow of 100 MB": _loans,
    f"get_batch({_BATCH}) of typed messages, 0.9 MB": _batches,
    "Latest, publish and read of 10 MB": _newest,
    "Latest, borrow of 100 MB": _newest_in_place,
}


def _time_ways(case: str, options: Options) -> dict[str, list[float]]:
    """Microseconds of each way, run by run, in turn; where a way gives its own seconds, those count."""
    with _CASES[case]() as ways:
        counts: dict[str, int] = {}
        for name, once in ways.items():
            for _ in range(3):
                once()
            began = time.perf_counter()
            once()
            counts[name] = max(5, int(options.seconds / max(1e-6, time.perf_counter() - began)))
        results: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.runs):
            for name, once in ways.items():
                began, own = time.perf_counter(), []
                for _ in range(counts[name]):
                    own.append(once())
                taken = (time.perf_counter() - began) / counts[name]
                results[name].append(1e6 * (float(np.median(own)) if own[0] is not None else taken))
        return results


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return len(_CASES) + steps_of(_contenders(contenders), options)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Time each case."""
    case = Case("in place", f"{_PAYLOAD.name}, capacity {_PAYLOAD.capacity}, put and get")
    check, run = partial(_check, options), partial(throughput.time, _PAYLOAD, options)
    result = alternate(case, _contenders(contenders), options, check, run, _TYPED_METRICS)
    for name in _CASES:
        options.step(name)
        try:
            runs = isolated(partial(_time_ways, name, options), options.limit * options.runs)
        except Failed as failure:
            result.append(Measurement("in place", name, "ringshm", _METRIC, False, note=f"not timed: {failure}"))
            continue
        result += [Measurement("in place", name, way, _METRIC, False, list(values)) for way, values in runs.items()]
    return result


def _check(options: Options, contender: Contender) -> None:
    checked = replace(_TYPED, make=_make_typed_to_check) if contender is _TYPED else contender
    crowd.check(checked, _PAYLOAD, False, options.limit)
