"""Threads of one process that use a channel at once: with the GIL they take turns, without it they do not.

The threads share their handles, so that whatever a process keeps for itself is used by several at the same time.
"""

from __future__ import annotations

import mmap
import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import numpy as np
import pytest
from support.checks import check_whole, reap
from support.workers import Crew, Member, may_fork, script, until

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


# --- a process is killed while several of its threads send and receive


class Log:
    """What one thread sends, or receives, in memory that outlives its process.

    Its numbers come in the order in which they are noted: a sender's before it puts them, a receiver's when it has
    decoded them. `settled` says how many of them are of calls that have returned.
    """

    LENGTH = 1 << 18

    def __init__(self) -> None:
        self._words = np.frombuffer(mmap.mmap(-1, 8 * (2 + self.LENGTH)), np.int64)

    def note(self, *numbers: int) -> None:
        for number in numbers:
            self._words[2 + self._words[0]] = number
            self._words[0] += 1

    def settle(self, numbers: Sequence[int] | None = None) -> None:
        """The call has returned; if it received, those. What else it had decoded it has not: of a message larger than a
        slot, whose sender dies meanwhile.
        """
        if numbers is not None:
            decoded = self.in_doubt
            more = len(decoded) - len(numbers)
            assert decoded[more:] == numbers, f"decoded {decoded}, of which {numbers} were returned"
            self._words[2 + self._words[1] : 2 + self._words[1] + more] |= _DROPPED
        self._words[1] = self._words[0]

    @property
    def settled(self) -> list[int]:
        return self._words[2 : 2 + self._words[1]].tolist()

    @property
    def in_doubt(self) -> list[int]:
        """Those of the call that a death ended."""
        return self._words[2 + self._words[1] : 2 + self._words[0]].tolist()


#: Of a receiver: the `log` of what it decodes.
_here = threading.local()
#: In a number: a receiver that died had it before; it was decoded and not received.
_AGAIN, _DROPPED = 1 << 62, 1 << 61


def _decoded(number: int) -> int:
    if log := getattr(_here, "log", None):
        log.note(number)
    return number


class _Mark:
    """What comes last in a message: a thread has decoded the whole message when it notes that."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _decoded, (self.number,)


def _marked(number: int) -> Any:
    return number, bytes([number % 251]) * (3000 if number % 5 == 0 else 100), _Mark(number)  # some take several slots


def _number_of(message: Any) -> int:
    if isinstance(message, np.ndarray):
        assert (message == message[0]).all() and len(message) == 20
        return int(message[0])
    number, body, mark = message
    assert number == mark and body == bytes([number % 251]) * (3000 if number % 5 == 0 else 100)
    return int(number)


def _log_put(channel: Any, log: Log, numbers: Sequence[int]) -> None:
    for number in numbers:
        log.note(number)
        channel.put(_marked(number), timeout=60)
        log.settle()


def _log_put_many(channel: Any, log: Log, numbers: Sequence[int]) -> None:
    log.note(*numbers)
    assert channel.put_many([*map(_marked, numbers)], timeout=60) == len(numbers)
    log.settle()


def _log_loan(channel: Any, log: Log, numbers: Sequence[int]) -> None:
    for number in numbers:
        with channel.loan(timeout=60) as loan:
            loan.array((20,), np.int64)[...] = number
            log.note(number)
        log.settle()


def _log_get(channel: Any, log: Log) -> None:
    _here.log = log
    log.settle([_number_of(channel.get(timeout=0.5))])


def _log_get_many(channel: Any, log: Log) -> None:
    _here.log = log
    log.settle([*map(_number_of, channel.get_many(3, timeout=0.5))])


def _log_borrow(channel: Any, log: Log) -> None:
    with channel.borrow(timeout=0.5) as borrow:
        log.note(_number_of(borrow.value) | (_AGAIN if borrow.delivery_count > 1 else 0))
    log.settle()


class Threads:
    """Threads of one process that send and receive at once, and their logs.

    Args:
        who: begins the numbers of what they send.
        send, receive: what their calls are: of a sender, of each receiver.
    """

    def __init__(self, who: int, send: Any, receive: Sequence[Any]) -> None:
        self.who, self.send, self.receive = who, send, receive
        self.sent = [Log() for _ in range(3)]
        self.received = [Log() for _ in receive]
        # whether senders, and receivers, shall end; which senders have
        self.words = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)

    def _send_all(self, channel: Any, sender: int, pause: float) -> None:
        first = (self.who * len(self.sent) + sender) << 32
        for number in range(first, first + Log.LENGTH - 3, 3):
            if self.words[0]:
                break
            self.send(channel, self.sent[sender], range(number, number + 3))
            time.sleep(pause)
        self.words[2 + sender] = True

    def _receive_all(self, channel: Any, receiver: int) -> None:
        while not self.words[1]:
            with suppress(queue.Empty):
                self.receive[receiver](channel, self.received[receiver])

    def run(self, channel: Any, pause: float = 0.0) -> None:
        """Until they are told to end. If a thread fails, the process does."""

        def attempt(call: Any, *args: Any) -> None:
            try:
                call(channel, *args)
            except BaseException:
                traceback.print_exc()
                os._exit(1)

        senders = [threading.Thread(target=attempt, args=(self._send_all, k, pause)) for k in range(len(self.sent))]
        receivers = [threading.Thread(target=attempt, args=(self._receive_all, k)) for k in range(len(self.received))]
        for thread in (*senders, *receivers):
            thread.start()
        for thread in (*senders, *receivers):
            thread.join()

    @property
    def have_sent(self) -> bool:
        return bool(self.words[2 : 2 + len(self.sent)].all())

    @property
    def calls(self) -> int:
        return sum(len(log.settled) for log in (*self.sent, *self.received))


@may_fork
@pytest.mark.parametrize(
    ("send", "receive"), [(_log_put, _log_get), (_log_put_many, _log_get_many), (_log_loan, _log_borrow)]
)
def test_a_process_is_killed_while_its_threads_send_and_receive_and_others_go_on(send: Any, receive: Any) -> None:
    """Each message comes once and whole, but for what a killed thread had decoded or was sending, and nobody hangs."""
    seed = random.randrange(1 << 32)
    print(f"{seed=}")
    chance = random.Random(seed)
    victims: list[Threads] = []
    with Channel(8, 1024, keep_open=True, max_deliveries=99) as channel, Crew("fork") as crew:
        others = Threads(0, send, [receive, _log_borrow])
        surviving = crew.start(others.run, channel, 0.001)

        def hits() -> int:
            """What deaths have left to others: a message that comes again, a mutex."""
            stats = channel.stats()
            return stats.redelivered + stats.recoveries

        def await_while_alive(member: Member, condition: Callable[[], bool]) -> None:
            until(lambda: condition() or member.process.exitcode is not None)

        while len(victims) < 10 or hits() < 5:
            victim, calls = Threads(len(victims) + 1, send, [receive] * 3), chance.randrange(1, 100)
            victims.append(victim)
            killed = crew.start(victim.run, channel)
            await_while_alive(killed, lambda victim=victim, calls=calls: victim.calls >= calls)
            killed.kill()
            assert killed.process.exitcode == -signal.SIGKILL
        others.words[0] = True
        await_while_alive(surviving, lambda: others.have_sent and channel.stats().free == channel.capacity)
        others.words[1] = True
        surviving.result()
        reap(channel, len(victims))
        print(f"{len(victims)} killed, {hits()} hits")
        assert channel.stats().dropped == 0
        check_whole(channel)
    every = [others, *victims]
    sent, may_be = Counter[int](), Counter[int]()
    for log in chain(*(threads.sent for threads in every)):
        sent.update(log.settled)
        may_be.update(log.in_doubt)
    received, in_hand = Counter[int](), Counter[int]()
    for log in chain(*(threads.received for threads in every)):
        received.update(number & ~_AGAIN for number in log.settled if not number & _DROPPED)
        assert {number & ~_DROPPED for number in log.settled if number & _DROPPED} <= may_be.keys()
        in_hand.update(number & ~_AGAIN for number in log.in_doubt)
    assert max(received.values()) == 1, "doubled"
    assert received.keys() <= sent.keys() | may_be.keys()
    missing = sent.keys() - received.keys()
    assert missing <= in_hand.keys(), f"{len(missing - in_hand.keys())} lost of {len(sent)}"
    print(f"{len(received)} received, {len(missing)} went with their receivers")
    borrowed = [number for number in others.received[1].settled if not number & _AGAIN]
    for sender in {number >> 32 for number in borrowed}:
        numbers = [number for number in borrowed if number >> 32 == sender]
        assert numbers == sorted(numbers)
