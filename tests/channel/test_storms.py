"""A storm of signals whose handler raises, upon each call that may block, in processes with and without compiled code.

The handler's exception always arrives, and no message is lost; none is doubled, but what a sender sends once more since
it was interrupted. How soon a handler runs while a call waits is asked at the end.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from support.workers import Crew, Interrupt, Interrupts, may_fork, until

from ringshm import Channel, EndOfChannel, Latest
from ringshm.ring.acceleration import compiled
from ringshm.ring.mutex import SLICE

pytestmark = [
    may_fork,
    pytest.mark.skipif(
        sys.version_info < (3, 11),
        reason="CPython 3.10 runs signal handlers also between the return of a call and the store of its result: what "
        "`get` has returned then is lost to the caller",
    ),
]

MESSAGES = 300
SPEC = {"number": np.int64}
PURE = [False] if compiled is None else [False, True]

# Each makes one call, and disarms the storm right after it: no handler runs in between.


def _get(channel: Any, storm: Interrupts) -> list[int]:
    number = channel.get()
    storm.armed = False
    return [number]


def _get_with_timeout(channel: Any, storm: Interrupts) -> list[int]:
    number = channel.get(timeout=60)
    storm.armed = False
    return [number]


def _get_many(channel: Any, storm: Interrupts) -> list[int]:
    numbers = channel.get_many(3)
    storm.armed = False
    return list(numbers)


def _get_typed(channel: Any, storm: Interrupts) -> list[int]:
    message = channel.get()
    storm.armed = False
    return [int(message["number"])]


def _get_batch(channel: Any, storm: Interrupts) -> list[int]:
    batch = channel.get_batch(3, min=1)
    storm.armed = False
    return [int(number) for number in batch["number"]]


def _borrow(channel: Any, storm: Interrupts) -> list[int]:
    with channel.borrow() as borrow:
        storm.armed = False
        return [borrow.value]


#: By name: whether the messages are typed, and the call.
RECEIVING: dict[str, tuple[bool, Callable[[Any, Interrupts], list[int]]]] = {
    "get": (False, _get),
    "get with a time-out": (False, _get_with_timeout),
    "get many": (False, _get_many),
    "get typed": (True, _get_typed),
    "get batch": (True, _get_batch),
    "borrow": (False, _borrow),
}


def _put(channel: Any, number: int) -> int:
    channel.put(number)
    return 1


def _put_many(channel: Any, number: int) -> int:
    channel.put_many(range(number, number + 3))
    return 3


def _put_typed(channel: Any, number: int) -> int:
    channel.put({"number": number})
    return 1


def _put_batch(channel: Any, number: int) -> int:
    channel.put_batch({"number": np.arange(number, number + 3)})
    return 3


def _loan(channel: Any, number: int) -> int:
    with channel.loan() as loan:
        loan["number"] = number
    return 1


SENDING: dict[str, tuple[bool, Callable[[Any, int], int]]] = {
    "put": (False, _put),
    "put many": (False, _put_many),
    "put typed": (True, _put_typed),
    "put batch": (True, _put_batch),
    "loan": (True, _loan),
}


def _pause(pure: bool) -> None:
    if compiled is not None:
        compiled.pause(pure)


def _receive_in_a_storm(channel: Any, how: str, pure: bool, seed: int) -> list[int]:
    _pause(pure)
    call = RECEIVING[how][1]
    got: list[int] = []
    caught = 0
    with Interrupts(seed, longest=3e-4) as storm, suppress(EndOfChannel):
        while True:
            try:
                storm.armed = True
                got += call(channel, storm)
            except Interrupt:
                caught += 1
                got += call(channel, storm)  # in peace: a mutex is recovered in some slices
    assert caught == storm.count > 0, f"{storm.count} exceptions were raised, and {caught} arrived"
    channel.close()
    return got


def _receive_in_peace(channel: Any, typed: bool) -> list[int]:
    numbers = [int(message["number"]) if typed else message for message in channel]
    channel.close()
    return numbers


def _send(channel: Any, how: str, pure: bool, first: int) -> None:
    _pause(pure)
    number = first
    while number < first + MESSAGES:
        number += SENDING[how][1](channel, number)
    channel.close()


def _send_in_a_storm(channel: Any, how: str, pure: bool, first: int) -> int:
    """Send each number, once more where that was interrupted; how often it was."""
    _pause(pure)
    call = SENDING[how][1]
    number, caught = first, 0
    with Interrupts(first, longest=3e-4) as storm:
        while number < first + MESSAGES:
            try:
                storm.armed = True
                count = call(channel, number)
                storm.armed = False
                number += count
            except Interrupt:
                caught += 1
                number += call(channel, number)
        assert caught == storm.count > 0, f"{storm.count} exceptions were raised, and {caught} arrived"
    channel.close()
    return caught


def _channel(typed: bool) -> Channel:
    return Channel(3, spec=SPEC) if typed else Channel(3, 64)


def _whole(channel: Channel) -> bool:
    stats = channel.stats()
    return (stats.free, stats.slots, stats.ready) == (channel.capacity, (), 0)


@pytest.mark.parametrize("how", RECEIVING)
def test_each_message_is_received_once_in_a_storm(how: str) -> None:
    typed = RECEIVING[how][0]
    with _channel(typed) as channel, Crew("fork") as crew:
        receivers = [crew.start(_receive_in_a_storm, channel, how, pure, seed) for seed, pure in enumerate(PURE)]
        senders = range(0, MESSAGES * len(PURE), MESSAGES)
        sending = [
            crew.start(_send, channel, "put typed" if typed else "put", pure, first)
            for pure, first in zip(PURE, senders, strict=True)
        ]
        for member in sending:
            member.result()
        channel.shutdown()
        received = [member.result() for member in receivers]
        assert Counter(itertools.chain.from_iterable(received)) == Counter(range(MESSAGES * len(PURE)))
        assert _whole(channel)


@pytest.mark.parametrize("how", SENDING)
def test_each_message_is_sent_in_a_storm(how: str) -> None:
    typed = SENDING[how][0]
    with _channel(typed) as channel, Crew("fork") as crew:
        receiver = crew.start(_receive_in_peace, channel, typed)
        senders = [
            crew.start(_send_in_a_storm, channel, how, pure, number * MESSAGES) for number, pure in enumerate(PURE)
        ]
        interrupts = sum(member.result() for member in senders)
        channel.shutdown()
        received = Counter(receiver.result())
        assert set(received) == set(range(MESSAGES * len(PURE)))
        assert received.total() <= len(received) + 3 * interrupts
        assert _whole(channel)


# --- how soon


#: What blocks for ever on an empty channel, on a full one, or on a Latest of one version.
BLOCKING: dict[str, Callable[[Any], Any]] = {
    "get": lambda empty: empty.get(),
    "get many": lambda empty: empty.get_many(2),
    "get with a time-out": lambda empty: empty.get(timeout=600),
    "borrow": lambda empty: empty.borrow().__enter__(),
    "put": lambda full: full.put(1),
    "put many": lambda full: full.put_many([1, 2]),
    "loan": lambda full: full.loan().__enter__(),
    "flush": lambda full: full.flush(),
    "read": lambda latest: latest.read(newer_than=1),
}
FULL = ("put", "put many", "loan", "flush")


def _wait(handle: Any, what: str, began: Any, ran_at: Any) -> None:
    """Block in the call again and again, until its handler has interrupted it eight times."""

    def note(*_: object) -> None:
        ran_at.put(time.monotonic())
        raise Interrupt

    signal.signal(signal.SIGUSR1, note)
    if what in FULL:
        handle.put(0)
    for _ in range(8):
        try:
            began.release()
            BLOCKING[what](handle)
        except Interrupt:
            continue
        raise AssertionError("the call ended")


@pytest.mark.parametrize("what", BLOCKING)
def test_a_handler_runs_within_a_slice(what: str) -> None:
    """The soonest of several tries counts, since the machine may be busy."""
    with Latest(64) if what == "read" else Channel(1, 64, keep_open=True) as channel, Crew("fork") as crew:
        if isinstance(channel, Latest):
            channel.publish(1)
        began, ran_at = crew.context.Semaphore(0), crew.context.SimpleQueue()
        member = crew.start(_wait, channel, what, began, ran_at)
        delays = []
        for _ in range(8):
            began.acquire()
            if not isinstance(channel, Latest):
                until(lambda: any(one.pid == member.pid and one.waiting_for for one in channel.stats().participants))
            time.sleep(0.02)
            sent = time.monotonic()
            os.kill(member.pid, signal.SIGUSR1)
            delays.append(ran_at.get() - sent)
        member.result()
        assert min(delays) <= SLICE, delays
