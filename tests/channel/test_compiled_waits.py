"""How calls wait in the compiled path: as the reference does, beside its waiters, and with hardly any Python run."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.checks import check_whole
from support.workers import Crew, Interrupt, Interrupts, in_threads, may_fork, until

import ringshm
from ringshm import Channel, ChannelClosed, EndOfChannel, Receiver, Sender
from ringshm.ring.acceleration import compiled

pytestmark = [may_fork, pytest.mark.skipif(compiled is None, reason=ringshm.accelerated)]

#: Calls that wait, of a handle that sends or receives, without a time limit or with one that is not reached.
RECEIVING: dict[str, Callable[[Any], list[Any]]] = {
    "get": lambda channel: [channel.get()],
    "get, with a time limit": lambda channel: [channel.get(timeout=60)],
    "get_many": lambda channel: channel.get_many(1),
    "borrow": lambda channel: _borrowed(channel),
}
SENDING: dict[str, Callable[[Any, Any], Any]] = {
    "put": lambda channel, message: channel.put(message),
    "put, with a time limit": lambda channel, message: channel.put(message, timeout=60),
    "put_many": lambda channel, message: channel.put_many([message]),
    "loan": lambda channel, message: _lend(channel, message),
}


def _borrowed(channel: Any) -> list[Any]:
    with channel.borrow() as message:
        return [message.value]


def _lend(channel: Any, message: int) -> None:
    with channel.loan() as loan:
        loan.buffer[:8] = message.to_bytes(8, "little")
        loan.nbytes = 8


@contextmanager
def paused() -> Iterator[None]:
    """Calls are Python's in this process."""
    before = compiled.pause(True)
    try:
        yield
    finally:
        compiled.pause(before)


# --- interruptions


def _get_under_interrupts(channel: Receiver[Any], call: str, seed: int) -> tuple[list[Any], int]:
    """Receive all, interrupted in every second call at most: the other recovers a mutex that was left."""
    received: list[Any] = []
    receive, arm = RECEIVING[call], True
    with Interrupts(seed, 0.002) as interrupts:
        while True:
            try:
                interrupts.armed = arm
                messages = receive(channel)
                interrupts.armed = False
            except Interrupt:
                arm = False
                continue
            except EndOfChannel:
                interrupts.armed = False
                return received, interrupts.count
            received += messages
            arm = True


@pytest.mark.parametrize("call", ["get", "get, with a time limit", "get_many"])
def test_a_storm_of_interrupts_loses_no_message_of_a_receiver_that_waits(call: str) -> None:
    with Channel(2, 64, wait="block") as channel, Crew() as crew:
        receiving = crew.start(_get_under_interrupts, channel.receiver(), call, 1)
        with channel.sender() as sender:
            for k in range(300):
                sender.put(k)
                if k % 3 == 0:
                    time.sleep(0.002)  # so that it waits again
        channel.close()
        received, interrupts = receiving.result()
    assert received == list(range(300))
    assert interrupts > 20


def _put_under_interrupts(channel: Sender[Any], count: int, seed: int) -> tuple[list[int], int]:
    """Put numbers; those of which it is unknown whether they were sent."""
    unknown = []
    with Interrupts(seed, 0.002) as interrupts:
        for k in range(count):
            try:
                interrupts.armed = k % 2 == 0
                channel.put(k)
                interrupts.armed = False
            except Interrupt:
                unknown.append(k)
        total = interrupts.count
    channel.close()
    return unknown, total


def test_a_storm_of_interrupts_sends_no_message_of_a_sender_that_waits_in_part_or_twice() -> None:
    with Channel(2, 64, wait="block") as channel, Crew() as crew:
        sending = crew.start(_put_under_interrupts, channel.sender(), 300, 2)
        received = []
        for message in channel.receiver():
            received.append(message)
            if len(received) % 3 == 0:
                time.sleep(0.002)
        unknown, interrupts = sending.result()
    assert received == sorted(set(received))
    assert set(range(300)) - set(received) <= set(unknown)
    assert interrupts > 20


def _interrupted(handle: Any, call: str) -> None:
    """Wait until a handler raises, each time from another place of the wait."""

    def handle_signal(*_: object) -> None:
        raise Interrupt

    signal.signal(signal.SIGTERM, handle_signal)
    with pytest.raises(Interrupt):
        RECEIVING[call](handle) if call in RECEIVING else SENDING[call](handle, 1)


@pytest.mark.parametrize("call", [*RECEIVING, *SENDING])
def test_after_a_handlers_exception_nobody_seems_to_wait(call: str) -> None:
    with Channel(1, 64, wait="block", keep_open=True) as channel, Crew() as crew:
        if call in SENDING:
            channel.put(0)
        for seconds in (0, 0.07):  # in the first slice, and later, when the reference has called the compiled path
            member = crew.start(_interrupted, channel, call)
            until(lambda: any(person.waiting_for for person in channel.stats().participants))
            time.sleep(seconds)
            member.send_signal(signal.SIGTERM)
            member.result()
        check_whole(channel, *([0] if call in SENDING else []))


# --- threads of one process


@pytest.mark.parametrize("sends", [False, True], ids=["receivers", "senders"])
def test_threads_of_one_process_wait_at_once_some_in_the_compiled_path_and_some_in_python(sends: bool) -> None:
    """Each is counted, each is woken, whoever comes and goes first."""

    def waiting() -> int:
        stats = channel.stats()
        return stats.waiting_senders if sends else stats.waiting_receivers

    def wait() -> None:
        if sends:
            handle.put(1)
        else:
            received.append(handle.get())

    received: list[int] = []
    with Channel(6, 64, wait="block", keep_open=True) as channel, Crew() as crew:
        other: Any = channel.receiver() if sends else channel.sender()
        handle: Any = channel.sender() if sends else channel.receiver()
        if sends:
            for k in range(6):
                channel.put(k)
        for in_python in (False, True):
            go = crew.context.Semaphore(0)
            helping = crew.start(
                _help, other, sends, 6, go
            )  # the other process, by which the threads may wait compiled
            before = compiled.pause(in_python)
            try:
                with in_threads(wait, wait, wait):
                    until(lambda: waiting() == 3)
                    compiled.pause(not in_python)
                    with in_threads(wait, wait, wait):
                        until(lambda: waiting() == 6)
                        go.release()
            finally:
                compiled.pause(before)
            helping.result()
            assert waiting() == 0
            if sends:
                assert [channel.get() for _ in range(6)] == [1] * 6
                channel.put_many(range(6))
        assert received == [] if sends else sorted(received) == sorted([*range(6), *range(6)])


def _help(handle: Any, sends: bool, count: int, go: Any) -> None:
    """When told to, end so many waits."""
    go.acquire()
    for k in range(count):
        handle.get() if sends else handle.put(k)


def test_a_thread_closes_the_handle_that_another_waits_on() -> None:
    with Channel(2, 64, wait="block", keep_open=True) as channel:
        receiver = channel.receiver()
        with Crew() as crew, pytest.raises(ChannelClosed):
            crew.start(time.sleep, 60)  # so that a sender may come
            with in_threads(lambda: (until(lambda: channel.stats().waiting_receivers), receiver.close())):
                receiver.get()
        check_whole(channel)


# --- how little is run


def _python_calls(channel: Receiver[Any], receive: Callable[[Any], Any], started: Any) -> tuple[int, float]:
    """How many Python functions are called in a call that waits, and for how long it did."""
    receive(channel)
    calls = 0

    def count(_: Any, event: str, __: Any) -> None:
        nonlocal calls
        calls += event == "call"

    began = time.monotonic()
    started.release()
    sys.setprofile(count)
    receive(channel)
    sys.setprofile(None)
    return calls, time.monotonic() - began


@pytest.mark.parametrize(
    ("receive", "need"),
    [
        (lambda channel: channel.get(), 1),
        (lambda channel: channel.get_many(2), 1),
        (lambda channel: channel.get_batch(3), 3),
        (lambda channel: channel.get_batch(3, timeout=60), 3),
    ],
    ids=["get", "get_many", "get_batch", "get_batch, with a time limit"],
)
def test_a_process_that_merely_waits_runs_hardly_any_python(receive: Callable[[Any], Any], need: int) -> None:
    """Less than twelve calls of functions a slice, as long as it waits; the reference calls some sixty."""
    with Channel(4, spec={"x": "i8"}, wait="block") as channel, Crew() as crew:
        started = crew.context.Semaphore(0)
        member = crew.start(_python_calls, channel.receiver(), receive, started)
        with channel.sender() as sender:
            for k in range(need):
                sender.put({"x": k})
            started.acquire()
            for k in range(need):  # those before the last wake it in vain
                time.sleep(2 / need)
                sender.put({"x": k})
            calls, seconds = member.result()
    assert calls < 12 * seconds / 0.05


@pytest.mark.parametrize("receive", [lambda channel: channel.get(), _borrowed], ids=["get", "borrow"])
def test_a_message_that_comes_after_a_slice_or_two_is_received_with_hardly_any_python(
    receive: Callable[[Any], Any],
) -> None:
    """As where other work wants the cores. One look in four is Python's, and so are those of a later part of a wait."""
    fewest = 1000
    with Channel(4, 64, wait="block") as channel, Crew() as crew, channel.sender() as sender:
        for _ in range(10):
            started = crew.context.Semaphore(0)
            member = crew.start(_python_calls, channel.receiver(), receive, started)
            sender.put(0)
            started.acquire()
            time.sleep(0.08)
            sender.put(1)
            fewest = min(fewest, member.result()[0])
    assert fewest < 10  # the reference calls some 150


@pytest.mark.parametrize("wait", ["block", "adaptive", "spin"])
def test_processes_with_and_without_the_compiled_path_wait_for_each_other(wait: str) -> None:
    def echo(in_python: bool, here: Receiver[int], there: Sender[int]) -> int:
        compiled.pause(in_python)
        count = 0
        for number in here:
            there.put(number + 1)
            count += 1
        return count

    with Channel(1, 64, wait=wait) as there, Channel(1, 64, wait=wait) as back, Crew() as crew:
        members = [crew.start(echo, in_python, there.receiver(), back.sender()) for in_python in (False, True)]
        with there.sender() as sender, back.receiver() as receiver:
            for k in range(400):
                with paused() if k % 2 else Crew():
                    sender.put(k)
                    assert receiver.get() == k + 1
        there.close()
        assert sum(member.result() for member in members) == 400
