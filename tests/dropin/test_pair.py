"""The pair of the system that ringshm replaces: its programs run unchanged, and every type it sent arrives the same."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.checks import check_empty, check_full
from support.workers import Crew, in_threads, may_fork, until

import ringshm

methods = pytest.mark.parametrize("method", ["fork", "spawn"])
pytestmark = may_fork


class Step(NamedTuple):
    """What an actor sends: one step of many environments."""

    observation: Any
    reward: Any
    extra: Any = None


class Nest(NamedTuple):
    """Something to nest in itself."""

    inner: Any


def observations(value: int = 1) -> np.ndarray:
    """float32 of shape (64, 80, 4, 84, 84, 3), scaled down in every dimension but the number of them."""
    shape = (2, 5, 4, 21, 21, 3)
    return np.arange(value, value + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def everything() -> dict[str, Any]:
    """One message that holds every type, nested five deep."""
    leaves = (
        b"bytes", 7, -(1 << 80), 2.5, True, None, "str", np.arange(6).reshape(2, 3), np.dtype(">f4"), np.float32(3),
    )  # fmt: skip
    five_deep = Nest([{"set": {1, "two", (3, b"four")}, "tuple": (Nest(leaves), [])}])
    return {
        "leaves": leaves,
        "five deep": five_deep,
        "list": [[[[[1, (2,)]]]]],
        "dict": {"a": {"b": {"c": {"d": {"e": np.zeros((0, 2), np.uint8)}}}}},
        "tuple": (((((b"x" * 70_000,),),),),),
        "set": {1, 2.5, "x", b"y", (1, (2, (3, (4,))))},
        "step": Step(observations(), np.full(5, 0.5), {"done": np.array([True, False]), "info": [Step(1, 2)]}),
        "dtypes": [np.dtype("f4"), np.dtype("M8[ns]"), np.dtype([("a", "i4"), ("b", "S3", (2,))])],
        "structured": np.array([(1, b"abc"), (2, b"x")], [("a", "i4"), ("b", "S3")]),
        "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
    }


def difference(a: Any, b: Any, path: str = "message") -> str:
    """Where two messages differ in type, value, dtype, shape or order; "" if nowhere."""
    if type(a) is not type(b):
        return f"{path}: {type(a)} is not {type(b)}"
    if isinstance(a, np.ndarray):
        same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes("A") == b.tobytes("A")
        return "" if same and a.flags.f_contiguous == b.flags.f_contiguous else f"{path}: {a!r} is not {b!r}"
    if isinstance(a, (tuple, list)):
        if len(a) != len(b):
            return f"{path}: {len(a)} items are not {len(b)}"
        return next(
            filter(None, (difference(x, y, f"{path}[{n}]") for n, (x, y) in enumerate(zip(a, b, strict=True)))), ""
        )
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{path}: keys {list(a)} are not {list(b)}"
        return next(filter(None, (difference(a[key], b[key], f"{path}[{key!r}]") for key in a)), "")
    if isinstance(a, set):
        return "" if {(type(x), x) for x in a} == {(type(x), x) for x in b} else f"{path}: {a} is not {b}"
    return "" if a == b else f"{path}: {a!r} is not {b!r}"


@contextmanager
def pair(*arguments: Any) -> Iterator[tuple[ringshm.SharedMemorySender, ringshm.SharedMemoryReceiver]]:
    """A pair that is closed in the end."""
    sender, receiver = ringshm.create_shared_memory_pair(*arguments)
    with sender, receiver:
        yield sender, receiver


# --- what runs in other processes


def send_everything(sender: ringshm.Sender, times: int) -> None:
    for _ in range(times):
        sender.put(everything())
    sender.close()


def echo(receiver: ringshm.Receiver, sender: ringshm.Sender) -> int:
    """Send back what comes, until it ends, with what was wrong with it; how many came."""
    count = 0
    for message in receiver:
        sender.put((difference(everything(), message), message))
        count += 1
    receiver.close()
    sender.close()
    return count


def put_range(sender: ringshm.SharedMemorySender, count: int) -> bool:
    """Wait for space by hand, as the old programs did."""
    for number in range(count):
        while not sender.has_space():
            pass
        sender.put((number, np.full(100, number)))
    return sender.wait_for_all_ack()


def get_range(receiver: ringshm.SharedMemoryReceiver, count: int) -> list[int]:
    numbers = []
    while len(numbers) < count:
        message = receiver.get_nowait()
        if message is None:
            message = receiver.get(timeout=30)
        number, array = message
        assert (array == number).all()
        numbers.append(number)
    return numbers


# --- types


@methods
def test_a_message_of_every_type_crosses_to_another_process_and_back_the_same(method: str) -> None:
    there_sender, there_receiver = ringshm.create_shared_memory_pair(3, "8MiB")
    back_sender, back_receiver = ringshm.create_shared_memory_pair(3, "8MiB")
    with Crew(method) as crew:
        child = crew.start(echo, there_receiver, back_sender)
        there_receiver.close()
        back_sender.close()
        for _ in range(3):
            there_sender.put(everything())
            wrong, message = back_receiver.get(timeout=30)
            assert wrong == ""
            assert difference(everything(), message) == ""
            assert type(message["step"]) is Step
            assert type(message["step"].extra["info"][0]) is Step
            assert type(message["five deep"]) is Nest
            assert message["step"].observation.flags.writeable
        there_sender.close()
        assert child.result() == 3
        with pytest.raises(ringshm.EndOfChannel):
            back_receiver.get(timeout=30)
    back_receiver.close()


@methods
@pytest.mark.parametrize("codec", ["pickle", "plain"])
def test_every_type_crosses_under_both_codecs(method: str, codec: str) -> None:
    with ringshm.Channel(2, "8MiB", codec=codec) as channel, Crew(method) as crew:
        crew.start(send_everything, channel.sender(), 4)
        with channel.receiver() as receiver:
            messages = [receiver.get(timeout=30) for _ in range(4)]
        assert [difference(everything(), message) for message in messages] == [""] * 4
        crew.results()


def test_observations_of_a_learner_arrive_bit_by_bit() -> None:
    with pair(2, observations().nbytes) as (sender, receiver):
        for value in range(5):
            sender.put(observations(value))  # a bare array of exactly a slot
            arrived = receiver.get(timeout=30)
            assert arrived.dtype == np.float32
            assert np.array_equal(arrived, observations(value))


# --- calls


def test_the_two_ends_are_a_sender_and_a_receiver_and_nothing_else() -> None:
    with pair(3, 1024) as (sender, receiver):
        assert isinstance(sender, ringshm.SharedMemorySender) and isinstance(sender, ringshm.Sender)
        assert isinstance(receiver, ringshm.SharedMemoryReceiver) and isinstance(receiver, ringshm.Receiver)
        assert sender.name == receiver.name
        assert (sender.capacity, sender.slot_size) == (3, 1024)
        with pytest.raises(AttributeError, match=r"that is for a handle of the other role"):
            sender.get()  # type: ignore[attr-defined]
        with pytest.raises(AttributeError, match=r"that is for a handle of the other role"):
            receiver.put(1)  # type: ignore[attr-defined]


def test_put_waits_while_the_pair_is_full() -> None:
    with pair(2, 64) as (sender, receiver):
        sender.put(0)
        sender.put(1)
        assert not sender.has_space()
        check_full(sender.put, "too many", timeout=0.01)
        with in_threads(partial(sender.put, 2)) as (thread,):
            until(lambda: receiver.stats().waiting_senders == 1)
            assert thread.is_alive()
            assert receiver.get() == 0
        assert [receiver.get_nowait() for _ in range(3)] == [1, 2, None]
        assert sender.has_space()


def test_get_with_a_timeout_raises_empty_and_get_nowait_gives_none() -> None:
    with pair(2, 64) as (sender, receiver):
        check_empty(receiver.get, timeout=0.01)
        check_empty(receiver.get, block=False)
        assert receiver.get_nowait() is None
        sender.put(None)
        assert receiver.qsize() == 1
        assert receiver.get(timeout=3) is None
        assert receiver.get_nowait() is None


def test_wait_for_all_ack_returns_when_everything_was_received() -> None:
    with pair(4, 64) as (sender, receiver):
        assert sender.wait_for_all_ack()
        for number in range(3):
            sender.put(number)
        assert sender.wait_for_all_ack(timeout=0.01) is False
        done = threading.Event()

        def acknowledge() -> None:
            assert sender.wait_for_all_ack()
            done.set()

        with in_threads(acknowledge):
            for number in range(3):
                assert not done.is_set()
                assert receiver.get() == number
        assert done.is_set()


@methods
@pytest.mark.parametrize("capacity", [1, 3])
def test_the_old_programs_run_between_processes(method: str, capacity: int) -> None:
    with pair(capacity, 2048) as (sender, receiver), Crew(method) as crew:
        crew.start(put_range, sender, 200)
        crew.start(get_range, receiver, 200)
        acknowledged, numbers = crew.results()
        assert acknowledged is True
        assert numbers == list(range(200))


@methods
def test_the_stream_ends_when_the_sending_process_has_gone(method: str) -> None:
    sender, receiver = ringshm.create_shared_memory_pair(3, "8MiB")
    with Crew(method) as crew:
        crew.start(send_everything, sender, 2)
        sender.close()
        assert len(list(receiver)) == 2
        crew.results()
    with pytest.raises(ringshm.EndOfChannel):
        receiver.get_nowait()
    receiver.close()


# --- making one


def test_the_default_size_leaves_room_in_shared_memory() -> None:
    with pair(4) as (sender, receiver):
        assert 256 << 10 <= sender.slot_size <= 64 << 20
        sender.put(np.zeros(sender.slot_size, np.uint8))
        assert receiver.get().nbytes == sender.slot_size


@pytest.mark.parametrize("capacity", [(), (0,), (None,)])
@pytest.mark.parametrize("ctx", [None, "fork", "spawn"])
def test_a_pair_needs_no_capacity_and_takes_a_context(capacity: tuple[Any, ...], ctx: str | None) -> None:
    context = None if ctx is None else multiprocessing.get_context(ctx)
    sender, receiver = ringshm.create_shared_memory_pair(*capacity, ctx=context)
    with sender, receiver:
        assert sender.capacity == 64
        assert 256 << 10 <= sender.slot_size <= 4 << 20
        for number in range(sender.capacity):
            sender.put(number, block=False)
        check_full(sender.put, 64, timeout=0.01)
        assert [receiver.get() for _ in range(sender.capacity)] == list(range(64))


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ringshm.create_shared_memory_pair(False), TypeError, "capacity=False"),
    (lambda: ringshm.create_shared_memory_pair(4, 64, None), TypeError, "positional"),  # type: ignore[misc, call-overload]
    (lambda: ringshm.create_shared_memory_pair(-1, 64), ValueError, "capacity=-1"),
    (lambda: ringshm.create_shared_memory_pair("4"), TypeError, "capacity='4'"),  # type: ignore[arg-type]
    (lambda: ringshm.create_shared_memory_pair(4, 0), ValueError, "slot_size=0"),
    (lambda: ringshm.create_shared_memory_pair(4, "8 bits"), ValueError, "unknown unit"),
    (lambda: ringshm.create_shared_memory_pair(4, "8EiB"), ValueError, "unknown unit"),
    (lambda: ringshm.create_shared_memory_pair(1 << 20, "1TiB"), ringshm.InsufficientSharedMemory, "--shm-size"),
]


@pytest.mark.parametrize(("make", "error", "says"), BAD, ids=[says for _, _, says in BAD])
def test_a_pair_that_cannot_be_is_refused(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_dropping_both_ends_removes_the_names() -> None:
    sender, receiver = ringshm.create_shared_memory_pair(2, 64)
    name = sender.name
    del sender
    attached = ringshm.Channel.attach(name)  # one end is still there
    attached.close()
    del receiver
    with pytest.raises(ringshm.ChannelNotFound, match=name):
        ringshm.Channel.attach(name)
