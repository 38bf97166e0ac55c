"""What do a put and a get cost in one process, where nobody waits and nobody else runs?

Bytes as they are, the small dict, and bytes in batches. Beside a queue of bytes in Rust, whose users pickle a dict
themselves, and beside pickling alone. The time is the processor's for one message, or one batch, put and got.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from time import process_time
from typing import Any

from ringshm import Channel

from .contenders import BATCH, Contender, cloudtoid
from .measure import BYTES, DICT, Case, Measurement, Options, Payload, Way, Ways, repeated, ways_in_turn

_RINGSHM, _CLOUDTOID = "ringshm", "cloudtoid"


def _passing(put: Callable[[Any], object], get: Callable[[], Any], message: Any) -> Way:
    """One message after another, in a loop that adds as little as may be."""

    def way(count: int) -> float:
        began = process_time()
        for _ in repeat(None, count):
            put(message)
            get()
        return (process_time() - began) / count

    return way


def _passing_pickled(put: Callable[[bytes], object], get: Callable[[], Any], message: Any) -> Way:
    dumps, loads = pickle.dumps, pickle.loads

    def way(count: int) -> float:
        began = process_time()
        for _ in repeat(None, count):
            put(dumps(message, 5))
            loads(get())
        return (process_time() - began) / count

    return way


@contextmanager
def _one(payload: Payload, passing: Callable[..., Way], present: set[str]) -> Iterator[Ways]:
    """`passing` is how a queue of bytes passes that payload."""
    message, room = payload.longest(), (payload.capacity, payload.largest())
    with ExitStack() as stack:
        ways = {}
        if _RINGSHM in present:
            channel = stack.enter_context(Channel(*room))
            ways[_RINGSHM] = _passing(channel.put, channel.get, message)
        if _CLOUDTOID in present:
            publisher, subscriber = stack.enter_context(cloudtoid.both_ends(*room))
            ways[_CLOUDTOID] = passing(publisher.try_send, subscriber.try_receive, message)
        if passing is _passing_pickled:
            nothing: list[Any] = []
            ways["floor: pickle"] = _passing_pickled(nothing.append, nothing.pop, message)
        yield ways


@contextmanager
def _batch(present: set[str]) -> Iterator[Ways]:
    """Cloudtoid receives one by one: it has no call that takes several."""
    messages, room = [BYTES.make(number) for number in range(BATCH)], (BYTES.capacity, BYTES.largest())
    with ExitStack() as stack:
        ways = {}
        if _RINGSHM in present:
            channel = stack.enter_context(Channel(*room))

            def pass_batch() -> None:
                channel.put_many(messages)
                assert len(channel.get_many(BATCH)) == BATCH

            ways[_RINGSHM] = repeated(pass_batch)
        if _CLOUDTOID in present:
            publisher, subscriber = stack.enter_context(cloudtoid.both_ends(*room))

            def pass_each() -> None:
                publisher.try_send_batch(messages)
                receive = subscriber.try_receive
                assert len([receive() for _ in repeat(None, BATCH)]) == BATCH

            ways[_CLOUDTOID] = repeated(pass_each)
        yield ways


def _plan(contenders: list[Contender], options: Options) -> list[tuple[Case, Callable[[], Any]]]:
    present = {contender.name for contender in contenders}
    plan: dict[str, Callable[[], Any]] = {
        "64 bytes, put and get": partial(_one, BYTES, _passing, present),
        "dict, put and get": partial(_one, DICT, _passing_pickled, present),
        f"{BATCH} messages of 64 bytes, put_many and get_many": partial(_batch, present),
    }
    cases = [(Case("one_process", name), make) for name, make in plan.items()]
    return [(case, make) for case, make in cases if options.wanted(case, _RINGSHM)]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return len(_plan(contenders, options))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Time each case."""
    return [row for case, make in _plan(contenders, options) for row in ways_in_turn(case, make, options)]
