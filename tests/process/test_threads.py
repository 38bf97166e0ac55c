"""Threads of one process that use a channel at once: with the GIL they take turns, without it they do not.

The threads share their handles, so that whatever a process keeps for itself is used by several at the same time.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import pytest
from support.workers import script

import ringshm
from ringshm import Channel, Latest, UpTo

SPEC = {"sender": ("i8", ()), "number": ("i8", ()), "obs": ("f4", (16,))}
MESSAGES = 300

#: A message of a sender, with its number; and what it was.
Make = Callable[[int, int], Any]
Read = Callable[[Any], tuple[int, int]]


def _bytes(sender: int, number: int) -> bytes:
    return b"%d %d " % (sender, number) + bytes([number % 251]) * 60


def _of_bytes(message: Any) -> tuple[int, int]:
    sender, number, rest = bytes(message).split(b" ", 2)
    assert rest == bytes([int(number) % 251]) * 60
    return int(sender), int(number)


def _dict(sender: int, number: int) -> dict[str, Any]:
    return {"sender": sender, "number": number, "obs": np.full(3 + number % 5, number), "rest": [number] * 3}


def _of_dict(message: Any) -> tuple[int, int]:
    number = message["number"]
    assert message["obs"].tolist() == [number] * (3 + number % 5) and message["rest"] == [number] * 3
    return message["sender"], number


def _array(sender: int, number: int) -> Any:
    return np.array([sender] + [number] * (8 + number % 9))


def _of_array(message: Any) -> tuple[int, int]:
    assert message[1:].tolist() == [message[1]] * (8 + message[1] % 9)
    return int(message[0]), int(message[1])


def _typed(sender: int, number: int) -> dict[str, Any]:
    return {"sender": sender, "number": number, "obs": np.full(16, number, "f4")}


def _of_typed(message: Any) -> tuple[int, int]:
    number = int(message["number"])
    assert message["obs"].tolist() == [number] * 16
    return int(message["sender"]), number


def _large(sender: int, number: int) -> Any:
    return np.full(40_000, sender << 32 | number)  # 320 KB, copied while other threads run also with the GIL


def _of_large(message: Any) -> tuple[int, int]:
    assert (message == message[0]).all()
    return int(message[0]) >> 32, int(message[0]) & 0xFFFFFFFF


KINDS: dict[str, tuple[Make, Read]] = {
    "bytes": (_bytes, _of_bytes),
    "dict": (_dict, _of_dict),
    "array": (_array, _of_array),
    "typed": (_typed, _of_typed),
    "large": (_large, _of_large),
}


def _put(channel: Any, messages: list[Any]) -> None:
    for message in messages:
        channel.put(message)


def _put_many(channel: Any, messages: list[Any]) -> None:
    for at in range(0, len(messages), 3):
        assert channel.put_many(messages[at : at + 3]) == len(messages[at : at + 3])


def _loan(channel: Any, messages: list[Any]) -> None:
    for message in messages:
        with channel.loan() as loan:
            if channel.spec is not None:
                for name, value in message.items():
                    loan[name] = value
            elif isinstance(message, np.ndarray):
                loan.array(message.shape, message.dtype)[...] = message
            else:
                loan.nbytes = len(message)
                loan.buffer[: len(message)] = message


def _get(channel: Any, read: Read) -> Iterator[tuple[int, int]]:
    while True:
        yield read(channel.get(timeout=1))


def _get_many(channel: Any, read: Read) -> Iterator[tuple[int, int]]:
    while True:
        yield from map(read, channel.get_many(4, timeout=1))


def _borrow(channel: Any, read: Read) -> Iterator[tuple[int, int]]:
    while True:
        with channel.borrow(timeout=1) as message:
            found = read(message.value)
        yield found


@contextmanager
def _together(*calls: Callable[[], object]) -> Iterator[None]:
    """Run each in a thread, while and after the block does what it does; raise what any of them raised."""
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]  # whatever the block has met for that


@pytest.mark.parametrize(("senders", "receivers", "capacity"), [(3, 3, 2), (4, 2, 32)])
@pytest.mark.parametrize(("send", "receive"), [(_put, _get), (_put_many, _get_many), (_loan, _borrow)])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_share_handles_get_each_message_once_and_whole(
    kind: str, send: Any, receive: Any, senders: int, receivers: int, capacity: int
) -> None:
    make, read = KINDS[kind]
    if send is _loan and kind == "dict":
        send = _put  # a loan sends no such object
    received: list[list[tuple[int, int]]] = [[] for _ in range(receivers)]
    messages = MESSAGES // 10 if kind == "large" else MESSAGES

    def receive_all(into: list[tuple[int, int]]) -> None:
        with pytest.raises(queue.Empty):
            into.extend(receive(channel, read))

    options: Any = {"spec": SPEC} if kind == "typed" else {"slot_size": 320_000 if kind == "large" else 1024}
    with Channel(capacity, **options) as channel:
        sending = [
            lambda sender=sender: send(channel, [make(sender, number) for number in range(messages)])
            for sender in range(senders)
        ]
        with _together(*sending, *[lambda into=into: receive_all(into) for into in received]):
            pass
        stats = channel.stats()
        assert (stats.free, stats.recoveries, stats.waiting_senders, stats.waiting_receivers) == (capacity, 0, 0, 0)
    for into in received:
        for sender in range(senders):
            numbers = [number for whose, number in into if whose == sender]
            assert numbers == sorted(numbers)
    assert sorted(chain(*received)) == [(sender, number) for sender in range(senders) for number in range(messages)]


def test_threads_that_read_a_latest_see_versions_whole_and_in_order() -> None:
    last, kept = 400, threading.local()

    def read_all() -> None:
        seen = 0
        while seen < last:
            version, value = latest.read(newer_than=seen)
            assert version > seen and value.tolist() == [version] * 100
            seen = version

    def borrow_all() -> None:
        seen = 0
        while seen < last:
            with latest.borrow(newer_than=seen) as borrow:
                assert borrow.version > seen and borrow.value.tolist() == [borrow.version] * 100
                seen, kept.view = borrow.version, borrow.value[:3]  # a view that lives until the next one
        assert kept.view.tolist() == [last] * 3
        del kept.view

    with Latest(1024, borrows=16) as latest:
        with _together(read_all, read_all, borrow_all, borrow_all, borrow_all):
            for version in range(1, last + 1):
                assert latest.publish(np.full(100, version)) == version
        assert latest.stats().held == ()


def test_handles_come_and_go_while_threads_use_the_channel() -> None:
    """Handles of other threads are made, attached, watched, looked at and closed; so are other channels."""
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            other = Channel.attach(channel.name)
            receiver = other.receiver()
            receiver.fileno()
            assert other.stats().capacity == 8
            receiver.close()
            other.close()
            with Channel(2, 64) as third, third.sender() as sender:
                sender.put(b"")

    def send_all() -> None:
        _put(channel, list(range(MESSAGES)))

    with Channel(8, 64) as channel:
        with pytest.raises(queue.Empty):
            channel.get_nowait()  # takes the role, which the others end to have when they close
        received: list[Any] = []
        with _together(come_and_go, come_and_go, send_all, send_all):
            try:
                received += [channel.get(timeout=60) for _ in range(2 * MESSAGES)]
            finally:
                over.set()
    assert sorted(received) == sorted(2 * list(range(MESSAGES)))


def test_a_handle_that_another_thread_closes_ends_calls_in_an_error_of_ringshm() -> None:
    def use(handle: Any) -> None:
        try:
            while True:
                handle.put(b"x" * 32)
                handle.put({"a": np.zeros(4)})
                assert handle.get(timeout=60) is not None
                assert handle.get(timeout=60) is not None
        except (ringshm.ChannelClosed, ringshm.EndOfChannel, ringshm.BrokenChannel):
            pass

    with Channel(16, 1024, keep_open=True) as channel:
        for _ in range(20):
            handle = Channel.attach(channel.name)
            with _together(lambda handle=handle: use(handle), lambda handle=handle: use(handle)):
                for _ in range(5):
                    channel.put(b"y")
                    channel.get(timeout=60)
                handle.close()
            while not channel.empty():
                channel.get()


def test_a_process_forks_while_its_threads_use_the_channel() -> None:
    program = """
import os, threading, warnings, ringshm
warnings.simplefilter("ignore", DeprecationWarning)  # CPython 3.12 warns of a fork of threads
channel, over = ringshm.Channel(4, 256, keep_open=True), threading.Event()

def use():
    while not over.is_set():
        channel.put([1, 2])
        assert channel.get() == [1, 2]

threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(5):
    pid = os.fork()
    if not pid:
        with ringshm.Channel(2, 64) as own:
            own.put("own")
            assert own.get() == "own"
        channel.put([1, 2])
        os._exit(0 if channel.get() == [1, 2] else 1)
    assert os.waitpid(pid, 0)[1] == 0
over.set()
for thread in threads:
    thread.join()
channel.close()
"""
    process = script(program)
    process.communicate()
    assert process.returncode == 0


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python runs with the GIL")
def test_the_import_leaves_the_gil_off() -> None:
    process = script("import sys, ringshm; sys.exit(sys._is_gil_enabled())")
    process.communicate()
    assert process.returncode == 0


def test_lengths_of_typed_messages_are_each_threads_own() -> None:
    """Messages of UpTo fields differ in form."""
    with Channel(8, spec={"number": ("i8", ()), "rows": ("i8", (UpTo(9),))}) as channel:

        def send(sender: int) -> None:
            for number in range(100):
                channel.put({"number": sender, "rows": np.full(number % 10, sender)})

        with _together(lambda: send(1), lambda: send(2)):
            for _ in range(200):
                message = channel.get(timeout=60)
                assert set(message["rows"].tolist()) <= {int(message["number"])}
