"""A real channel against `collections.deque`: whatever calls one process makes, in whatever order."""

from __future__ import annotations

import collections
import queue
from typing import Any

import numpy as np
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st
from support.checks import check_empty, check_full
from support.payloads import Unpickles

import ringshm
from ringshm.segment.layout import SMALL_NBYTES

SLOT_SIZE = 3 * SMALL_NBYTES


class NotDecodable(Exception):
    """What unpickling a bad message raises."""


def fail(number: int) -> Any:
    raise NotDecodable(number)


SIZES = [0, 1, 100, SMALL_NBYTES - 1, SMALL_NBYTES, SMALL_NBYTES + 1, SLOT_SIZE]
KINDS = ["bytes", "array", "strided", "dict", "number", "bad"]


def make(number: int, kind: str, size: int) -> Any:
    """A message that is told from all others by its number."""
    raw = (number.to_bytes(4, "little") * (size // 4 + 1))[:size]
    if kind == "bytes":
        return raw
    if kind == "array":
        return np.frombuffer(bytearray(raw), np.uint8)
    if kind == "strided":
        return np.frombuffer(bytearray(2 * size), np.uint8)[::2] + np.uint8(number % 256)
    if kind == "dict":
        array = np.frombuffer(bytearray(raw[: size // 3]), np.uint8)
        return {"number": number, "raw": raw[: size // 2], "array": array}
    return Unpickles(fail, number) if kind == "bad" else number


def assert_equal(message: Any, expected: Any) -> None:
    assert type(message) is type(expected)
    if isinstance(expected, np.ndarray):
        assert message.dtype == expected.dtype
        assert np.array_equal(message, expected)
    elif isinstance(expected, dict):
        assert message.keys() == expected.keys()
        for key in expected:
            assert_equal(message[key], expected[key])
    else:
        assert message == expected


class ChannelModel(stateful.RuleBasedStateMachine):
    """One process that both puts and gets."""

    messages: stateful.Bundle[Any] = stateful.Bundle("messages")

    def __init__(self) -> None:
        super().__init__()
        self.channel: ringshm.Channel | None = None
        self.model: collections.deque[Any] = collections.deque()
        self.number = self.sent = self.received = self.dropped = 0

    @stateful.initialize(capacity=st.integers(1, 4), when_full=st.sampled_from(["wait", "drop_oldest"]))
    def create(self, capacity: int, when_full: str) -> None:
        self.channel = ringshm.Channel(capacity, SLOT_SIZE, oversize="error", when_full=when_full, prefault=False)
        self.capacity = capacity
        self.drops = when_full == "drop_oldest"

    def teardown(self) -> None:
        if self.channel is not None:
            self.channel.close()

    @property
    def open(self) -> ringshm.Channel:
        assert self.channel is not None
        return self.channel

    def published(self, message: Any) -> None:
        if len(self.model) == self.capacity:
            self.model.popleft()
            self.dropped += 1
        self.model.append(message)
        self.sent += 1

    @stateful.rule(target=messages, kind=st.sampled_from(KINDS), size=st.sampled_from(SIZES))
    def make_message(self, kind: str, size: int) -> Any:
        self.number += 1
        return make(self.number, kind, size)

    @stateful.rule(message=messages, timeout=st.sampled_from([0, 0.001, None]))
    def put(self, message: Any, timeout: float | None) -> None:
        if self.drops or len(self.model) < self.capacity:
            self.open.put(message, timeout=timeout)
            self.published(message)
        else:
            with pytest.raises(queue.Full, match=self.open.name):
                self.open.put(message, timeout=timeout or 0)

    @stateful.rule(message=messages)
    def put_nowait(self, message: Any) -> None:
        if self.drops or len(self.model) < self.capacity:
            self.open.put_nowait(message)
            self.published(message)
        else:
            check_full(self.open.put_nowait, message)

    @stateful.rule(batch=st.lists(messages, max_size=6))
    def put_many(self, batch: list[Any]) -> None:
        room = len(batch) if self.drops else self.capacity - len(self.model)
        assert self.open.put_many(iter(batch), timeout=0) == min(len(batch), room)
        for message in batch[:room]:
            self.published(message)

    @stateful.rule(excess=st.integers(1, 10_000))
    def put_what_is_too_large(self, excess: int) -> None:
        with pytest.raises(ringshm.PayloadTooLarge):
            self.open.put(bytes(SLOT_SIZE + excess))
        with pytest.raises(ringshm.PayloadTooLarge):
            self.open.put_many([1, bytes(SLOT_SIZE + excess)])

    @stateful.rule(nowait=st.booleans())
    def get(self, nowait: bool) -> None:
        call = self.open.get_nowait if nowait else lambda: self.open.get(timeout=0.001)
        if not self.model:
            check_empty(call)
            return
        expected = self.model.popleft()
        self.received += 1
        if isinstance(expected, Unpickles):
            with pytest.raises(ringshm.UndecodableMessage) as caught:
                call()
            assert isinstance(caught.value.__cause__, NotDecodable)
            assert caught.value.__cause__.args == expected.args
        else:
            assert_equal(call(), expected)

    @stateful.rule(limit=st.integers(1, 6))
    def get_many(self, limit: int) -> None:
        if not self.model:
            check_empty(self.open.get_many, limit, timeout=0)
            return
        if isinstance(self.model[0], Unpickles):
            self.model.popleft()
            self.received += 1
            with pytest.raises(ringshm.UndecodableMessage):
                self.open.get_many(limit, timeout=0)
            return
        batch = self.open.get_many(limit, timeout=0)
        expected = []
        while self.model and len(expected) < limit and not isinstance(self.model[0], Unpickles):
            expected.append(self.model.popleft())
        assert len(batch) == len(expected)
        for message, wanted in zip(batch, expected, strict=True):
            assert_equal(message, wanted)
        self.received += len(batch)

    @stateful.rule()
    def flush(self) -> None:
        assert self.open.flush(timeout=0) is not bool(self.model)

    @stateful.rule()
    def attach_again(self) -> None:
        with ringshm.Channel.attach(self.open.name) as other:
            assert other.qsize() == len(self.model)
            assert (other.capacity, other.slot_size) == (self.capacity, SLOT_SIZE)

    @stateful.precondition(lambda self: self.channel is not None and len(self.model) > 0)
    @stateful.rule()
    def shut_down_and_start_anew(self) -> None:
        """What is there is still received; then the stream ends, for good."""
        self.open.shutdown()
        with pytest.raises(ringshm.ChannelClosed):
            self.open.put(1)
        while self.model:
            self.get(nowait=True)
        with pytest.raises(ringshm.EndOfChannel):
            self.open.get(timeout=1)
        self.check()
        self.open.close()
        self.sent = self.received = self.dropped = 0
        self.create(self.capacity, "drop_oldest" if self.drops else "wait")

    @stateful.invariant()
    def check(self) -> None:
        if self.channel is None:
            return
        channel, waiting = self.open, len(self.model)
        assert channel.qsize() == waiting
        assert channel.empty() == (not waiting)
        assert channel.full() == (waiting == self.capacity)
        assert channel.has_space() == (waiting < self.capacity)
        stats = channel.stats()
        assert (stats.sent, stats.received, stats.dropped) == (self.sent, self.received, self.dropped)
        assert (stats.ready, stats.free, stats.capacity) == (waiting, self.capacity - waiting, self.capacity)
        assert stats.fill == pytest.approx(waiting / self.capacity)
        assert stats.slots == ()
        assert stats.redelivered == stats.recoveries == stats.reaped == 0
        assert stats.received_nbytes <= stats.sent_nbytes
        if not waiting:
            assert stats.received_nbytes == stats.sent_nbytes


def test_a_channel_behaves_like_a_bounded_deque() -> None:
    stateful.run_state_machine_as_test(
        ChannelModel,  # type: ignore[no-untyped-call]
        settings=settings(max_examples=100, stateful_step_count=40, print_blob=True),
    )
