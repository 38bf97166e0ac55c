"""Messages with arrays in them, by the compiled path and by the Python code: the same bytes, the same objects."""

from __future__ import annotations

import pickle
import random
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checks import check_whole
from support.seams import Slot
from support.workers import in_threads, until

import ringshm
from ringshm import Channel, Latest, UndecodableMessage
from ringshm.dropin.handle import QueueChannel
from ringshm.messages.codecs import CONTAINER_OOB
from ringshm.messages.pool import LEAST_NBYTES
from ringshm.ring.acceleration import compiled

pytestmark = pytest.mark.skipif(ringshm.accelerated != "", reason=ringshm.accelerated)


@contextmanager
def paused(on: bool = True) -> Iterator[None]:
    """Calls are Python's."""
    before = compiled.pause(on)
    try:
        yield
    finally:
        compiled.pause(before)


class Reduced:
    """Pickled and unpickled by code."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return Reduced, self.parts


def _readonly(array: Any) -> Any:
    array.flags.writeable = False
    return array


_SAME = np.arange(5)
MESSAGES: dict[str, Any] = {
    "an observation": {"obs": np.arange(12, dtype=np.uint8).reshape(3, 4), "reward": 1.0, "action": 3},
    "arrays of one form": [np.full(3, k, np.float32) for k in range(5)],
    "one array twice": [_SAME, _SAME],
    "read-only": {"weights": _readonly(np.ones((2, 3)))},
    "Fortran's order": (np.asfortranarray(np.arange(6).reshape(2, 3)), 1),
    "strided": (np.arange(20)[::3], np.arange(4)),
    "no dimension, no items": [np.array(2.5), np.zeros((0, 4), np.int16), np.array(b"")],
    "odd dtypes": [
        np.arange(3, dtype=">i4"),
        np.array(["2026-11-27"], "M8[D]"),
        np.zeros(2, "f4, i8"),
    ],
    "text and objects": [np.array(["one", "three"]), np.array([{"an": "object"}], object)],
    "a subclass": [np.arange(4).view(np.recarray), np.arange(3)],
    "large bytes": {"raw": bytes(70_000), "array": np.arange(7)},
    "large bytes alone": [bytes(70_000), bytearray(80_000)],
    "a user's buffers": [pickle.PickleBuffer(bytearray(b"own")), np.arange(3), pickle.PickleBuffer(b"read-only")],
    "by code": Reduced(np.arange(3), {"deep": [Reduced(np.ones(2))]}),
    "many arrays": [np.full(k, k) for k in range(70)],
    "larger than what is copied under the mutex": {"obs": np.arange(200_000, dtype=np.uint8)},
    "larger than a mebibyte": {"obs": np.arange(1_200_000, dtype=np.uint8), "next": np.arange(3)},
}


def equal(one: Any, other: Any) -> bool:
    """Whether they are alike, to the dtypes, orders and flags of arrays."""
    if isinstance(one, pickle.PickleBuffer):
        return bytes(one) == bytes(other)
    if isinstance(one, np.ndarray):
        return (
            type(one) is type(other)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.flags.writeable == other.flags.writeable
            and one.tolist() == other.tolist()
        )
    if isinstance(one, Reduced):
        return type(other) is Reduced and equal(one.parts, other.parts)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other)


def _put_many(channel: Any, message: Any) -> None:
    channel.put_many([message])


#: Calls that send a message, and that receive it.
SENDING: dict[str, Callable[[Any, Any], object]] = {
    "put": lambda channel, message: channel.put(message),
    "put_many": _put_many,
}
RECEIVING: dict[str, Callable[[Any], Any]] = {
    "get": lambda channel: channel.get(timeout=0),
    "get_many": lambda channel: channel.get_many(1, timeout=0)[0],
}


@pytest.mark.parametrize("made", [Channel, QueueChannel])
@pytest.mark.parametrize("what", MESSAGES)
def test_a_message_has_the_same_bytes_from_either_side_and_is_the_same_to_both(what: str, made: Any) -> None:
    message = MESSAGES[what]
    with made(1, 1_300_000) as channel:
        slot = Slot(channel)
        for _ in range(2):  # at first forms of arrays are not known
            wires = []
            for pure in (True, False):
                for send in SENDING.values():
                    for receive in RECEIVING.values():
                        slot.clear()
                        with paused(pure):
                            send(channel, message)
                        wires.append(slot.message())
                        with paused(not pure):
                            across = receive(channel)
                        with paused(pure):
                            send(channel, message)
                            assert equal(across, receive(channel))
                        if made is Channel:
                            assert equal(message, across) or what == "a user's buffers"
            assert all(wire == wires[0] for wire in wires)
        check_whole(channel)


numbers = st.sampled_from([np.uint8, np.float32, np.int64, np.bool_, np.complex64])
arrays = st.builds(
    lambda dtype, shape, fortran, flag: (_readonly if flag else np.asarray)(
        np.ones(shape, dtype, order="F" if fortran else "C")
    ),
    numbers, st.lists(st.integers(0, 4), max_size=3).map(tuple), st.booleans(), st.booleans(),
)  # fmt: skip
messages = st.recursive(
    arrays | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5) | st.none(),
    lambda part: (
        st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=3), part, max_size=4) | st.tuples(part, part)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("made", [Channel, QueueChannel])
def test_any_message_has_the_same_bytes_from_either_side(made: Any) -> None:
    with made(1, 65536) as channel:
        slot = Slot(channel)

        @given(messages)
        def check(message: Any) -> None:
            wires = []
            for pure in (True, False, False):
                slot.clear()
                with paused(pure):
                    channel.put(message)
                wires.append(slot.message())
                with paused(not pure):
                    assert equal(message, channel.get()) or made is QueueChannel
            assert wires[0] == wires[1] == wires[2]

        check()


@pytest.mark.parametrize("nbytes", [1000, 300_000, LEAST_NBYTES + 1])
def test_what_is_received_is_the_receivers_and_what_is_borrowed_is_the_slots(nbytes: int) -> None:
    sent = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    with Channel(2, nbytes + 4096) as channel:
        for _ in range(3):
            channel.put({"obs": sent})
            got = channel.get()["obs"]
            channel.put({"obs": np.zeros(nbytes, np.uint8)})
            with channel.borrow() as borrow:
                assert not np.shares_memory(got, borrow.value["obs"])
                assert not borrow.value["obs"].flags.writeable
            assert np.array_equal(got, sent)
            got[:] = 3  # it is writable, and nobody else's
        channel.put({"obs": sent})
        with channel.borrow() as borrow:
            kept = borrow.value["obs"]
        for k in range(3):
            channel.put({"obs": np.full(nbytes, k, np.uint8)})
            assert channel.get()["obs"][-1] == k
        assert np.array_equal(kept, sent)
        del kept
        check_whole(channel)


def test_a_queues_arrays_arrive_writable_in_containers_and_bare() -> None:
    """A handle remembers one form for both."""
    array = _readonly(np.ones(3))
    with QueueChannel(1, 4096) as channel:
        channel.put("the first call takes the role")
        channel.get()
        for _ in range(2):
            for message in ([array], array):
                channel.put(message)
                assert np.asarray(channel.get()).flags.writeable


@pytest.mark.parametrize("message", [lambda array: array, lambda array: [array]], ids=["bare", "in a container"])
def test_an_array_that_gets_another_dtype_while_it_is_described_does_not_describe_others(
    message: Callable[[Any], Any],
) -> None:
    array = np.ones(5)

    def change(frame: FrameType, event: str, _: object) -> None:
        """Another thread may run between any two bytecodes."""
        if event == "return" and frame.f_code.co_name == "_encode_array":
            array.dtype = np.dtype(np.int64)

    with Channel(2, 4096) as channel:
        channel.put("the first call takes the role")
        channel.get()
        sys.setprofile(change)
        try:
            channel.put(message(array))
        finally:
            sys.setprofile(None)
        assert array.dtype == np.int64
        channel.get()
        channel.put(np.arange(5))
        assert equal(channel.get(), np.arange(5))


class Changes:
    """What is pickled behind an array, and changes it."""

    def __init__(self, change: Callable[[], object]) -> None:
        self._change = change

    def __reduce__(self) -> Any:
        self._change()
        return int, (7,)


def _resize(array: Any, length: int) -> None:
    array.resize(length, refcheck=False)


@pytest.mark.parametrize("pure", [True, False])
def test_an_array_that_pickling_changes_is_sent_as_it_was_described_or_not_at_all(pure: bool) -> None:
    with Channel(2, 1 << 20) as channel:
        channel.put({"array": np.ones(1000)})
        channel.get()
        with paused(pure):
            array = np.ones(1000)
            channel.put([array, Changes(lambda: array.fill(2))])
            assert equal(channel.get(), [np.full(1000, 2.0), 7])
            channel.put([array, Changes(lambda: _resize(array, 5))])
            with pytest.raises(UndecodableMessage):
                channel.get()
            with pytest.raises(ZeroDivisionError):
                channel.put([np.ones(1000), Changes(lambda: 1 // 0)])
            channel.put([np.zeros(1000), 7])
            assert equal(channel.get(), [np.zeros(1000), 7])
        check_whole(channel)


def test_an_array_is_copied_when_there_is_space() -> None:
    """A `put` that waits sends what is in the array when it need not wait any more, as the Python code does."""
    array = np.zeros(1000)
    with Channel(1, 1 << 16) as channel:
        channel.put({"array": array})
        channel.get()
        channel.put("in the way")

        with in_threads(lambda: channel.put({"array": array})):
            until(lambda: channel.stats().waiting_senders)
            array.fill(3)
            assert channel.get() == "in the way"
        assert equal(channel.get(), {"array": np.full(1000, 3.0)})


def test_arrays_that_several_threads_pickle_keep_apart() -> None:
    def send(number: int) -> None:
        for _ in range(50):
            channel.put([np.full(100, number), Changes(lambda: channel.qsize()), np.full(50, number)])

    with Channel(300, 4096) as channel:
        with in_threads(*[partial(send, number) for number in range(4)]):
            pass
        for first, _, second in channel.get_many(200):
            assert set(first.tolist()) == set(second.tolist()) and len(first) == 100 and len(second) == 50


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UndecodableMessage as error:
        return type(error.__cause__)


def _borrow(channel: Any) -> Any:
    with channel.borrow() as borrow:
        return _copied(borrow.value)


def _copied(message: Any) -> Any:
    """With writable arrays."""
    return pickle.loads(pickle.dumps(message, 4))


@pytest.mark.parametrize("seed", range(4))
def test_damage_to_a_table_has_the_same_outcome_on_either_side(seed: int) -> None:
    """Lengths and offsets that are not to be: never is anything read beyond the message."""
    chance = random.Random(seed)
    message = {"a": np.arange(40, dtype=np.uint8), "b": _readonly(np.arange(3.0)), "c": np.zeros(0)}
    values = [
        0,
        1,
        2,
        63,
        64,
        65,
        1 << 16,
        (1 << 32) - 1,
        1 << 32,
        1 << 61,
        (1 << 63) + 80,
        (1 << 64) - 2,
        (1 << 64) - 1,
    ]
    calls: list[Callable[[Any], Any]] = [RECEIVING["get"], RECEIVING["get_many"], _borrow]
    outcomes = set()
    with Channel(1, 1024) as channel:
        slot = Slot(channel)
        for _ in range(2):
            channel.put(message)
            channel.get()
        for _ in range(400):
            at, call = chance.choice([0, 4, 12, 20, 28]), chance.choice(calls)
            value = chance.choice([*values, chance.getrandbits(64), chance.randrange(200)])
            nbytes = chance.choice([None, None, None, *range(80)])
            results = []
            for pure in (True, False):
                with paused(pure):
                    channel.put(message)
                    slot.write(at, struct.pack("<Q", value) if at else struct.pack("<I", value & 0xFFFFFFFF))
                    if nbytes is not None:
                        slot.set_meta(nbytes << 16 | CONTAINER_OOB)
                    results.append(_outcome(partial(call, channel)))
            assert equal(*results) or results[0] is results[1], (at, hex(value), nbytes, results)
            outcomes.add(results[0] if isinstance(results[0], type) else dict)
            assert channel.empty()  # it counts as received
        assert len(outcomes) > 1
        check_whole(channel)


def test_a_latest_has_the_same_bytes_from_either_side() -> None:
    with Latest(1 << 16) as latest:
        for what in ("an observation", "strided", "by code", "read-only"):
            for _ in range(2):
                for pure in (True, False):
                    with paused(pure):
                        latest.publish(MESSAGES[what])
                    for other in (True, False):
                        with paused(other):
                            assert equal(latest.read()[1], MESSAGES[what])
                            with latest.borrow() as borrow:
                                assert equal(_copied(borrow.value), _copied(MESSAGES[what]))
