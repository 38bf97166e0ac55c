"""What do messages cost that are written and read in place, or typed, or only the newest of which matter?

- a loan and a borrow, the first and the last element touched on both sides: of 1 KB and 1 MB, as bare memory and as a
  typed message, beside others that move messages without a copy; and of 100 MB, beside one of 1 KB;
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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ringshm import Channel, Latest

from . import crowd, throughput
from .contenders import Contender, Pair, Receiver, Sender, iceoryx, kickmsg, ringshm_channel
from .measure import (
    Case,
    Measurement,
    Metrics,
    Options,
    Payload,
    Ways,
    alternate,
    repeated,
    timed_by_itself,
    ways_in_turn,
)
from .measure import steps as steps_of
from .workers import CONTEXT

_STEP = {"obs": (np.uint8, (84, 84, 4)), "action": np.int64, "reward": np.float32, "done": np.bool_}
_BATCH = 32
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
_TYPED = Contender("ringshm", "ringshm", "ringshm", make=_make_typed)
_TYPED_CASE = Case("in_place", f"{_PAYLOAD.name}, capacity {_PAYLOAD.capacity}, put and get")


def _contenders(contenders: list[Contender]) -> list[Contender]:
    pickled = [
        Contender("ringshm, pickled", other.distribution, other.module, make=other.make)
        for other in contenders
        if other.name == "ringshm"
    ]
    return [_TYPED, *pickled, *(other for other in contenders if other.name == "py-sharedmemory")]


# --- in one process


@contextmanager
def _side_by_side(nbytes: int, typed: bool, present: set[str]) -> Iterator[Ways]:
    """Everyone who moves messages without a copy."""
    adapters = {"ringshm": ringshm_channel.in_place, "iceoryx2": iceoryx.in_place, "kickmsg": kickmsg.in_place}
    with ExitStack() as stack:
        yield {
            name: repeated(stack.enter_context(adapter(nbytes, typed)))
            for name, adapter in adapters.items()
            if name in present
        }


@contextmanager
def _loans() -> Iterator[Ways]:
    def once(channel: Channel, nbytes: int) -> None:
        with channel.loan() as loan:
            written = loan.array(nbytes, np.uint8)
            written[0] = written[-1] = 1
        with channel.borrow() as message:
            read = message.value
            assert read[0] == read[-1] == 1

    with Channel(3, 100_000_000) as large, Channel(3, 1000) as small:
        yield {
            "ringshm": repeated(partial(once, large, 100_000_000)),
            "ringshm, 1 KB": repeated(partial(once, small, 1000)),
        }


def _send_batches(channel: Channel, asked: Channel, batch: dict[str, Any]) -> None:
    for _ in asked:
        channel.put_batch(batch)


@contextmanager
def _batches() -> Iterator[Ways]:
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

        yield {
            "ringshm": timed_by_itself(take),
            "np.copyto, field by field": timed_by_itself(copy),
            "np.copyto within the cache": timed_by_itself(copy_cached),
        }
        asked.shutdown()
        sender.join()


@contextmanager
def _newest() -> Iterator[Ways]:
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
            "ringshm": repeated(publish_and_read),
            "two copies": repeated(partial(copies, True, True)),
            "two copies, out into one array": repeated(partial(copies, False, True)),
            "two copies, always over the same memory": repeated(partial(copies, False, False)),
        }


@contextmanager
def _newest_in_place() -> Iterator[Ways]:
    def borrow(latest: Latest) -> None:
        with latest.borrow() as newest:
            read = newest.value
            assert read[0] == read[-1] == 1

    with Latest(100_000_000) as large, Latest(1000) as small:
        large.publish(np.ones(100_000_000, np.uint8))
        small.publish(np.ones(1000, np.uint8))
        yield {"ringshm": repeated(partial(borrow, large)), "ringshm, 1 KB": repeated(partial(borrow, small))}


def _cases(
    contenders: list[Contender], options: Options
) -> list[tuple[Case, Callable[[], AbstractContextManager[Ways]]]]:
    present = {contender.name for contender in contenders}
    plan: list[tuple[str, Callable[[], AbstractContextManager[Ways]]]] = [
        (f"loan and borrow of {name}, {how}", partial(_side_by_side, nbytes, how == "typed", present))
        for name, nbytes in (("1 KB", 1000), ("1 MB", 1_000_000))
        for how in ("untyped", "typed")
    ]
    plan += [
        ("loan and borrow of 100 MB", _loans),
        (f"get_batch({_BATCH}) of typed messages, 0.9 MB", _batches),
        ("Latest, publish and read of 10 MB", _newest),
        ("Latest, borrow of 100 MB", _newest_in_place),
    ]
    cases = [(Case("in_place", name), make) for name, make in plan]
    return [(case, make) for case, make in cases if options.wanted(case, "ringshm")]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    between = steps_of(options.chosen(_TYPED_CASE, _contenders(contenders)), options)
    return between + len(_cases(contenders, options))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Time each case."""
    result: list[Measurement] = []
    if taking_part := options.chosen(_TYPED_CASE, _contenders(contenders)):
        check, run = partial(_check, options), partial(throughput.time, _PAYLOAD, options)
        result += alternate(_TYPED_CASE, taking_part, options, check, run, _TYPED_METRICS)
    for case, make in _cases(contenders, options):
        result += ways_in_turn(case, make, options)
    return result


def _check(options: Options, contender: Contender) -> None:
    checked = replace(_TYPED, make=_make_typed_to_check) if contender is _TYPED else contender
    crowd.check(checked, _PAYLOAD, False, options.limit)
