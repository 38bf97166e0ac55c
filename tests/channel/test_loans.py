"""Loans and borrows: written and read in place, given back when the block, or the last view, ends."""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.checks import check_empty, check_full, reap
from support.tracer import in_python
from support.workers import Crew, Interrupt, die, exit_code, fork_off, in_segment, in_threads, may_fork, until

import ringshm
from ringshm.segment.layout import SPACE_HINT

pytestmark = may_fork


class _Json:
    name = "json"

    def encode(self, obj: Any) -> bytes:
        return json.dumps(obj).encode()

    def decode(self, data: memoryview) -> Any:
        return json.loads(bytes(data))


class _Raw:
    """A codec whose result refers to the slot."""

    name = "raw"

    def encode(self, obj: Any) -> Any:
        return obj

    def decode(self, data: memoryview) -> Any:
        return np.frombuffer(data, np.uint8)


def _states(channel: ringshm.Channel) -> list[str]:
    return [slot.state for slot in channel.stats().slots]


def _in_segment(array: np.ndarray[Any, Any], name: str) -> bool:
    return in_segment(array.__array_interface__["data"][0], name)


# --- loans


@pytest.mark.parametrize("codec", ["pickle", "plain", _Json()])
@pytest.mark.parametrize("dtype", ["u1", "f4", ">i8", "M8[s]", "S3", [("a", "i4"), ("b", "f8", (2,))], bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_a_loaned_array_arrives_as_it_was_written(codec: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    with ringshm.Channel(2, 1024, codec=codec) as channel:
        expected = np.empty(shape, dtype)
        expected.view(np.uint8 if shape else dtype)[...] = np.zeros((), dtype) if not shape else 7 % 2
        with channel.loan() as loan:
            array = loan.array(shape, dtype)
            assert array.shape == shape
            assert array.dtype == expected.dtype
            assert array.flags.c_contiguous
            assert array.__array_interface__["data"][0] % 64 == 0
            assert not array.size or _in_segment(array, channel.name)
            array[...] = expected
        received = channel.get()
        assert received.dtype == expected.dtype
        np.testing.assert_array_equal(received, expected)
        assert received.flags.writeable
        assert not received.size or not _in_segment(received, channel.name)


def test_several_loaned_arrays_arrive_as_a_tuple() -> None:
    with ringshm.Channel(2, 1024) as channel:
        for receive in (channel.get, lambda: _borrowed(channel)):
            with channel.loan() as loan:
                arrays = loan.array(3, "u1"), loan.array((2, 2)), loan.array((), "i4")
                for k, array in enumerate(arrays):
                    assert array.__array_interface__["data"][0] % 64 == 0
                    array[...] = k
            received = receive()
            assert isinstance(received, tuple)
            assert [(array.dtype, array.tolist()) for array in received] == [
                (np.uint8, [0, 0, 0]),
                (np.float64, [[1.0, 1.0], [1.0, 1.0]]),
                (np.int32, 2),
            ]


def _borrowed(channel: ringshm.Channel) -> Any:
    with channel.borrow() as message:
        return message.value


def test_arrays_of_a_loan_are_read_only_once_it_is_sent() -> None:
    with ringshm.Channel(2, 1024) as channel:
        with channel.loan() as loan:
            array = loan.array(3)
            array[...] = 1
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2
        with pytest.raises(ValueError, match="loan has ended"):
            loan.array(3)
        with pytest.raises(ValueError, match="begun already"), loan:
            raise AssertionError("the loan began again")
        with pytest.raises(ValueError, match="loan has ended"):
            loan.buffer  # noqa: B018


def test_a_buffer_arrives_as_the_bytes_that_were_asked_for() -> None:
    with ringshm.Channel(2, 16) as channel:
        with channel.loan(nbytes=3) as loan:
            loan.buffer[:5] = b"abcde"
        assert channel.get() == b"abc"
        with channel.loan(nbytes=3) as loan:
            loan.buffer[:5] = b"abcde"
            loan.nbytes = 5
        with channel.borrow() as message:
            assert isinstance(message.value, memoryview)
            assert message.value.readonly
            assert message.value == b"abcde"
        with channel.loan() as loan:
            assert loan.buffer.nbytes == loan.nbytes == 16
            loan.buffer[:] = bytes(range(16))
        assert channel.get() == bytes(range(16))
        with channel.loan(nbytes=0):
            pass
        assert channel.get() == b""


@pytest.mark.parametrize("how", ["raise", "discard"])
def test_a_loan_that_raises_or_discards_sends_nothing(how: str) -> None:
    with ringshm.Channel(1, 64) as channel:
        for _ in range(3):
            try:
                with channel.loan() as loan:
                    loan.array(3)[...] = 1
                    assert _states(channel) == ["writing"]
                    if how == "raise":
                        raise KeyError("as a user would see it")
                    loan.discard()
            except KeyError:
                assert how == "raise"
            stats = channel.stats()
            assert (stats.sent, stats.free, stats.slots) == (0, 1, ())


def test_what_does_not_fit_or_cannot_be_sent_is_refused_at_once() -> None:
    with ringshm.Channel(2, 100, name=None) as channel:
        with pytest.raises(ringshm.PayloadTooLarge, match=r"slot holds 100 bytes, message needs 101"):
            channel.loan(nbytes=101)
        with pytest.raises(ValueError, match="nbytes=-1"):
            channel.loan(nbytes=-1)
        with pytest.raises(TypeError):
            channel.loan(nbytes=1.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="timeout=-1"):
            channel.loan(timeout=-1)
        with channel.loan() as loan:
            with pytest.raises(ringshm.PayloadTooLarge, match=r"slot holds 100 bytes, message needs 104"):
                loan.array(13)
            with pytest.raises(TypeError, match="cannot be loaned"):
                loan.array(1, object)
            with pytest.raises(ValueError, match=r"shape=\(2, -1\)"):
                loan.array((2, -1))
            with pytest.raises(TypeError, match=r"shape=2\.5"):
                loan.array(2.5)  # type: ignore[arg-type]
            loan.array(np.int64(100), "u1")[...] = 5
            with pytest.raises(ringshm.PayloadTooLarge):
                loan.array(1, "u1")
            with pytest.raises(ValueError, match="sent as those"):
                loan.buffer  # noqa: B018
        assert channel.get().tolist() == [5] * 100
        with channel.loan() as loan:
            loan.buffer[:3] = b"abc"
            with pytest.raises(ValueError, match="sent as bytes"):
                loan.array(1)
            with pytest.raises(ringshm.PayloadTooLarge):
                loan.nbytes = 101
            loan.nbytes = "3B"
        assert channel.get() == b"abc"
        with pytest.raises(ValueError, match="nothing was written"), channel.loan():
            pass
        assert channel.stats().free == 2


def test_a_loan_waits_for_a_free_slot_and_times_out() -> None:
    with ringshm.Channel(1, 64) as channel:
        channel.put("first")
        for timeout in (0, 0.05):
            with pytest.raises(queue.Full), channel.loan(timeout=timeout):
                raise AssertionError("there was no slot")
        threading.Timer(0.1, channel.get).start()
        with channel.loan() as loan:
            loan.array(1)[...] = 4
        assert channel.get() == 4


def test_a_loan_that_drops_the_oldest_does_not_wait() -> None:
    with ringshm.Channel(2, 64, when_full="drop_oldest") as channel:
        for k in range(4):
            with channel.loan() as loan:
                loan.array(1, "i8")[...] = k
        assert [channel.get()[0], channel.get()[0]] == [2, 3]
        assert channel.stats().dropped == 2


def test_a_shutdown_within_a_loan_sends_nothing_and_says_so() -> None:
    with ringshm.Channel(2, 64) as channel:
        with pytest.raises(ringshm.ChannelClosed, match="shut down"), channel.loan() as loan:
            loan.array(1)[...] = 1
            channel.shutdown()
        assert (channel.stats().free, channel.stats().sent) == (2, 0)
        with pytest.raises(ringshm.ChannelClosed), channel.loan():
            raise AssertionError("there was a loan")


def test_a_close_within_a_loan_sends_nothing_and_says_so() -> None:
    with ringshm.Channel(2, 64) as channel, channel.sender() as sender:
        with pytest.raises(ringshm.ChannelClosed), sender.loan() as loan:
            loan.array(1)[...] = 1
            sender.close()
        assert (channel.stats().free, channel.stats().sent) == (2, 0)


def test_messages_pass_a_loan_that_is_long_open() -> None:
    with ringshm.Channel(2, 64) as channel:
        with channel.loan() as loan:
            loan.array(1)[...] = 9
            for k in range(5):
                channel.put(k)
                assert channel.get() == k
        assert channel.get() == 9


# --- borrows


def _nested(channel: ringshm.Channel) -> dict[str, Any]:
    return {"a": np.arange(5.0), "b": [np.ones((2, 3), ">i2"), {"c": (np.asfortranarray(np.eye(3)), "text", 1)}]}


def _arrays_of(value: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        return [array for item in value.values() for array in _arrays_of(item)]
    return [array for item in value for array in _arrays_of(item)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("codec", ["pickle", "plain"])
def test_every_array_of_a_borrowed_message_is_a_read_only_view_of_the_slot(codec: str) -> None:
    with ringshm.Channel(2, 4096, codec=codec) as channel:
        sent = _nested(channel)
        for message in (sent, sent["a"], [sent["a"]] * 2, sent["b"][1]["c"][0]):
            channel.put(message)
            with channel.borrow() as borrow:
                arrays = _arrays_of(borrow.value)
                assert arrays
                for array, original in zip(arrays, _arrays_of(message), strict=True):
                    assert array.dtype == original.dtype
                    np.testing.assert_array_equal(array, original)
                    assert _in_segment(array, channel.name)
                    with pytest.raises(ValueError, match="read-only"):
                        array[...] = 0
                del array, arrays


def test_a_codec_of_ones_own_may_refer_to_the_slot() -> None:
    with ringshm.Channel(2, 64, codec=_Raw()) as channel:
        channel.put(b"abc")
        with channel.borrow() as message:
            assert _in_segment(message.value, channel.name)
            assert bytes(message.value) == b"abc"
        assert _states(channel) == []


def test_a_borrow_tells_where_its_message_comes_from() -> None:
    with ringshm.Channel(3, 64) as channel, Crew("fork") as crew:
        channel.put("mine")
        member = crew.start(channel.put, "theirs")
        member.result()
        seen = []
        for _ in range(2):
            with channel.borrow() as message:
                seen.append((message.value, message.sequence, message.sender, message.delivery_count))
        assert seen == [("mine", 0, os.getpid(), 1), ("theirs", 1, member.pid, 1)]
        with pytest.raises(ValueError, match="has ended"):
            message.value  # noqa: B018


def _die_borrowing(channel: ringshm.Channel) -> None:
    with channel.borrow():
        die()


def test_a_message_whose_borrower_died_comes_again_and_counts_its_deliveries() -> None:
    with ringshm.Channel(3, 64) as channel, Crew("fork") as crew:
        channel.put_many(["first", "second"])
        for death in (1, 2):
            crew.start(_die_borrowing, channel).process.join()
            reap(channel, death)
        with channel.borrow() as message:
            assert (message.value, message.sequence, message.delivery_count) == ("first", 0, 3)
        with channel.borrow() as message:
            assert (message.value, message.delivery_count) == ("second", 1)
        assert channel.stats().redelivered == 2


def test_a_requeued_message_goes_back_to_its_old_place() -> None:
    with ringshm.Channel(3, 64) as channel:
        channel.put_many([1, 2])
        with channel.borrow() as message:
            assert message.value == 1
            message.requeue()
        assert channel.stats().received == 0
        assert channel.qsize() == 2
        with channel.borrow() as message:
            assert (message.value, message.delivery_count) == (1, 1)
        assert channel.get() == 2
        assert channel.stats().received == 2


def test_a_requeue_while_views_are_alive_is_refused_aloud() -> None:
    with ringshm.Channel(2, 64) as channel:
        channel.put(np.arange(3))
        with pytest.raises(RuntimeError, match="views are alive"), channel.borrow() as message:
            view = message.value
            message.requeue()
        assert view.tolist() == [0, 1, 2]
        assert channel.qsize() == 0
        assert channel.stats().received == 1


def test_a_message_is_received_also_when_the_block_raises() -> None:
    with ringshm.Channel(1, 64) as channel:
        channel.put("message")
        with pytest.raises(KeyError), channel.borrow():
            assert channel.qsize() == 0
            assert not channel.flush(timeout=0)
            raise KeyError
        assert channel.flush(timeout=0)
        assert (channel.stats().received, channel.stats().free) == (1, 1)


def test_what_cannot_be_decoded_is_received_and_said() -> None:
    with ringshm.Channel(2, 64, codec=_Json()) as channel:
        with ringshm.Channel.attach(channel.name, codec=_RawJson()) as other:
            other.put(b"{no json")
        channel.put("next")
        with pytest.raises(ringshm.UndecodableMessage) as caught, channel.borrow():
            raise AssertionError("there was a message")
        assert isinstance(caught.value.__cause__, json.JSONDecodeError)
        assert channel.stats().free == 1
        with channel.borrow() as message:
            assert message.value == "next"


class _RawJson(_Json):
    def encode(self, obj: Any) -> bytes:
        return bytes(obj)


def test_a_borrow_waits_for_a_message_times_out_and_ends() -> None:
    with ringshm.Channel(1, 64) as channel:
        for timeout in (0, 0.05):
            with pytest.raises(queue.Empty), channel.borrow(timeout=timeout):
                raise AssertionError("there was a message")
        threading.Timer(0.1, channel.put, ["message"]).start()
        with channel.borrow() as message:
            assert message.value == "message"
        channel.shutdown()
        with pytest.raises(ringshm.EndOfChannel), channel.borrow():
            raise AssertionError("there was a message")


# --- views that outlive their block


def _fill(channel: ringshm.Channel, rounds: int = 3) -> None:
    """Use every slot that can be had, again and again."""
    for _ in range(rounds):
        sent = 0
        while channel.has_space():
            channel.put_nowait(np.full(8, 255, np.uint8))
            sent += 1
        for _ in range(sent):
            channel.get_nowait()


DERIVED = {
    "the array": lambda array: array,
    "a slice": lambda array: array[2:4],
    "a reshape": lambda array: array.reshape(2, 4)[1],
    "a scalar view": lambda array: array[3:4].reshape(()),
    "a memoryview": lambda array: memoryview(array)[1:],
    "a cast memoryview": lambda array: memoryview(array).cast("B")[2:],
    "a view of other type": lambda array: array.view(np.uint16).T,
    "an iterator": lambda array: array.flat,
    "a buffer's array": lambda array: np.frombuffer(memoryview(array), np.uint8),
    "a broadcast": lambda array: np.broadcast_to(array, (3, 8)),
}


@pytest.mark.parametrize("derived", DERIVED)
def test_a_slot_is_not_written_again_while_anything_sees_it(derived: str) -> None:
    with ringshm.Channel(3, 64) as channel:
        channel.put(np.arange(8, dtype=np.uint8))
        with channel.borrow() as message:
            view = DERIVED[derived](message.value)
        before = bytes(np.array(view))
        time.sleep(0.02)
        (slot,) = channel.stats().slots
        assert (slot.state, slot.pid) == ("kept", os.getpid())
        assert slot.seconds is not None
        assert 0.02 <= slot.seconds < 60
        assert channel.stats().received == 1
        assert channel.flush(timeout=0)
        _fill(channel)
        assert bytes(np.array(view)) == before
        del view
        assert channel.stats().free == 3


class _Node:
    def __init__(self, view: Any) -> None:
        self.view = view
        self.own = self


def test_views_in_a_cycle_keep_the_slot_until_it_is_collected() -> None:
    with ringshm.Channel(2, 64) as channel:
        gc.disable()
        try:
            channel.put(np.arange(8, dtype=np.uint8))
            with channel.borrow() as message:
                node = _Node(message.value)
            gone = weakref.ref(node)
            del node
            _fill(channel)
            assert _states(channel) == ["kept"]
            gc.collect()
            assert gone() is None
            assert channel.stats().free == 2
        finally:
            gc.enable()


def test_views_in_a_traceback_keep_the_slot() -> None:
    with ringshm.Channel(2, 64) as channel:
        channel.put(np.arange(8, dtype=np.uint8))

        def fail() -> None:
            with channel.borrow() as message:
                view = message.value
                raise KeyError(view.sum())

        try:
            fail()
        except KeyError as error:
            kept = error
        assert _states(channel) == ["kept"]
        _fill(channel)
        assert kept.__traceback__.tb_next.tb_frame.f_locals["view"].tolist() == list(range(8))  # type: ignore[union-attr]
        del kept
        assert channel.stats().free == 2


def test_the_last_view_may_go_in_any_thread() -> None:
    with ringshm.Channel(4, 64) as channel:
        views: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def drop() -> None:
            for views_of_one in iter(views.get, None):
                assert views_of_one.pop().sum() % 8 == 0

        with in_threads(*[drop] * 4):
            for k in range(400):
                channel.put(np.full(8, k % 256, np.uint8))
                with channel.borrow() as message:
                    views.put([message.value])
            for _ in range(4):
                views.put(None)
        gc.collect()
        stats = channel.stats()
        assert (stats.free, stats.received) == (4, 400)


def test_views_outlive_their_channel() -> None:
    channel = ringshm.Channel(2, 64)
    other = ringshm.Channel.attach(channel.name)
    channel.put(np.arange(8, dtype=np.uint8))
    with channel.borrow() as message:
        view = message.value
    channel.close()
    other.close()
    del channel, other, message
    gc.collect()
    assert view.tolist() == list(range(8))
    del view


def test_a_process_that_has_closed_lives_for_others_while_it_has_views() -> None:
    with ringshm.Channel(2, 64, keep_open=True) as channel, Crew("fork") as crew:
        resume = crew.context.Event()
        closed = crew.context.Event()
        channel.put(np.arange(8, dtype=np.uint8))
        member = crew.start(_keep_a_view, channel.receiver(), closed, resume)
        closed.wait()
        until(lambda: not any(person.receivers for person in channel.stats().participants if person.pid == member.pid))
        (slot,) = channel.stats().slots
        assert (slot.state, slot.pid, slot.alive) == ("kept", member.pid, True)
        _fill(channel)
        assert not channel.stats().reaped
        resume.set()
        assert member.result() == list(range(8))
        until(lambda: channel.stats().free == 2)
        assert not channel.stats().reaped


def _keep_a_view(receiver: Any, closed: Any, resume: Any) -> list[int]:
    with receiver.borrow() as message:
        view = message.value
    receiver.close()
    closed.set()
    resume.wait()
    return list(view.tolist())


def test_the_slots_that_a_dead_process_kept_come_back() -> None:
    with ringshm.Channel(2, 64, keep_open=True) as channel, Crew("fork") as crew:
        closed = crew.context.Event()
        channel.put(np.arange(8, dtype=np.uint8))
        member = crew.start(_keep_a_view, channel.receiver(), closed, crew.context.Event())
        closed.wait()
        assert _states(channel) == ["kept"]
        member.kill()
        reap(channel, 1)
        stats = channel.stats()
        assert (stats.free, stats.redelivered, stats.received) == (2, 0, 1)


def test_a_forked_child_does_not_give_its_parents_slots_back() -> None:
    with ringshm.Channel(3, 64) as channel:
        channel.put(np.arange(8, dtype=np.uint8))
        with channel.borrow() as message:
            view = message.value
        channel.put("held")

        def child(keep: bool) -> None:
            nonlocal view, message
            if keep:
                channel.qsize()
            view = message = None
            gc.collect()

        with channel.loan() as loan, channel.borrow():
            loan.array(1)[...] = 1
            for keep in (True, False):
                assert exit_code(fork_off(lambda keep=keep: child(keep))) == 0
            assert sorted(_states(channel)) == ["kept", "reading", "writing"]
        assert channel.get() == 1
        assert view.tolist() == list(range(8))
        view = None
        assert channel.stats().free == 3


def test_a_forked_child_cannot_end_its_parents_blocks() -> None:
    with ringshm.Channel(3, 64) as channel:
        channel.put("message")
        pid = -1
        try:
            with channel.loan() as loan, channel.borrow():
                loan.array(1)[...] = 1
                pid = os.fork()
        except BaseException:
            if pid == 0:
                os._exit(3)
            raise
        if pid == 0:
            os._exit(0)
        assert exit_code(pid) == 3
        assert channel.get() == 1
        assert (channel.stats().sent, channel.stats().received) == (2, 2)


def test_a_forked_child_cannot_give_its_parents_message_back() -> None:
    with ringshm.Channel(2, 64) as channel:
        channel.put(np.arange(8, dtype=np.uint8))
        with channel.borrow() as message:

            def child() -> None:
                message._value = None
                message.requeue()
                message.__exit__(None, None, None)

            assert exit_code(fork_off(child)) == 0
            assert channel.qsize() == 0
            assert _states(channel) == ["reading"]
        assert channel.stats().redelivered == 0


def test_a_borrow_is_good_for_one_block() -> None:
    with ringshm.Channel(2, 64) as channel:
        channel.put_many([1, 2])
        borrow = channel.borrow()
        with borrow:
            borrow.requeue()
            with pytest.raises(ValueError, match="has begun already"), borrow:
                pass
            assert borrow.value == 1
        with pytest.raises(ValueError, match="has begun already"), borrow:
            pass
        assert channel.get_many(2) == [1, 2]


def _leave_a_claim_behind(name: str, left: Any, resume: Any) -> None:
    channel = ringshm.Channel.attach(name)
    channel._start_sending()
    channel._ring.claim([])  # an exception has come before anybody knew of it
    channel.close()
    del channel
    gc.collect()
    left.set()
    resume.wait()


def test_slots_that_a_process_leaves_behind_come_back_though_it_lives() -> None:
    with ringshm.Channel(2, 64, keep_open=True) as channel, Crew("spawn") as crew:
        left, resume = crew.context.Event(), crew.context.Event()
        member = crew.start(_leave_a_claim_behind, channel.name, left, resume)
        left.wait()
        until(lambda: channel.wait_for_peers(senders=9, timeout=0.01) or channel.stats().free == 2)
        assert [person.pid for person in channel.stats().participants] == [os.getpid()]
        resume.set()
        member.result()


# --- waits that could never end


@pytest.mark.parametrize("call", ["get", "put", "loan", "borrow"])
@pytest.mark.parametrize("wait", ["adaptive", "spin"])
def test_a_wait_for_a_slot_that_one_holds_oneself_is_an_error(call: str, wait: str) -> None:
    with ringshm.Channel(2, 64, wait=wait) as channel:
        channel.put_many([np.arange(3), np.arange(3)])
        with channel.borrow() as first:
            kept = first.value
        assert kept.any()
        with (
            channel.borrow(),
            pytest.raises(ringshm.ChannelDeadlock, match=rf"all 2 slots.*process {os.getpid()} kept 1"),
        ):
            if call == "get":
                channel.get()
            elif call == "put":
                channel.put(1)
            elif call == "loan":
                with channel.loan():
                    pass
            else:
                with channel.borrow():
                    pass
        channel.put("goes on")
        assert channel.get() == "goes on"


def _hold_and_wait(channel: ringshm.Channel, barrier: Any) -> str:
    with channel.borrow():
        barrier.wait()
        try:
            channel.get()
        except ringshm.ChannelDeadlock as error:
            return str(error)
    return ""


def test_processes_that_wait_for_each_others_slots_are_told_who_they_are() -> None:
    with ringshm.Channel(2, 64, keep_open=True) as channel, Crew("fork") as crew:
        barrier = crew.context.Barrier(2)
        channel.put_many([1, 2])
        members = [crew.start(_hold_and_wait, channel, barrier) for _ in range(2)]
        until(lambda: channel.stats().received)
        channel.put("for the one that goes on")
        told = [member.result() for member in members]
        assert any(told)
        for text in filter(None, told):
            assert all(f"process {member.pid} reading 1" in text for member in members)


def test_a_flush_for_what_the_same_thread_has_borrowed_is_an_error() -> None:
    with ringshm.Channel(3, 64) as channel:
        channel.put("message")
        with channel.borrow():
            assert not channel.flush(timeout=0.1)
            with pytest.raises(ringshm.ChannelDeadlock, match="this thread itself has borrowed"):
                channel.flush()
        assert channel.flush()


def test_a_batch_that_can_never_be_there_is_an_error() -> None:
    with ringshm.Channel(4, spec={"n": np.int64}) as channel:
        channel.put_batch({"n": np.arange(4)})
        with channel.borrow() as message:
            with pytest.raises(queue.Empty, match="3 of 4 messages came in time"):
                channel.get_batch(4, timeout=0.1)
            with pytest.raises(ringshm.ChannelDeadlock, match=r"4 messages can never be there .* holds 1 of 4 slots"):
                channel.get_batch(4)
            assert message["n"] == 0
        assert channel.get_batch(3)["n"].tolist() == [1, 2, 3]


def _borrow_and_wait(channel: ringshm.Channel) -> None:
    with channel.borrow():
        channel.get()


def test_what_a_dead_waiter_held_counts_no_more() -> None:
    """A borrower that works, beside one that waits, is no standstill, though a third has died while it waited."""
    with ringshm.Channel(2, 64, keep_open=True) as channel, Crew("fork") as crew:
        channel.put(1)
        victim = crew.start(_borrow_and_wait, channel)
        until(lambda: any(person.waiting_for for person in channel.stats().participants))
        victim.kill()
        reap(channel, 1)
        assert channel.stats().redelivered == 1
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        channel.put(2)
        with channel.borrow():  # "works": its thread does not wait

            def wait() -> None:
                try:
                    _borrow_and_wait(channel)
                    told.put("went on")
                except ringshm.ChannelDeadlock as error:
                    told.put(error)

            thread = threading.Thread(target=wait)
            thread.start()
            check_empty(told.get, timeout=0.5)
        channel.put("goes on")
        assert told.get() == "went on"
        thread.join()


def test_views_that_are_garbage_in_cycles_are_collected_by_who_waits() -> None:
    with ringshm.Channel(1, 64) as channel:
        gc.disable()
        try:
            for number in range(3):
                channel.put(np.full(3, number))
                with channel.borrow() as message:
                    cycle: list[Any] = [message.value]
                cycle.append(cycle)
                del cycle, message
            channel.put("goes on")
        finally:
            gc.enable()
        assert channel.get() == "goes on"


# --- interrupted when the message was received


def _interrupted(channel: ringshm.Channel, call: Callable[[], Any]) -> None:
    """Make a call into which a signal handler raises when it has received, and wakes one who waits for space."""

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        if frame.f_code.co_name == "wake_freed":
            raise Interrupt

    channel._open().words[SPACE_HINT] = 1
    with in_python():
        sys.settrace(trace)
        try:
            with pytest.raises(Interrupt):
                call()
        finally:
            sys.settrace(None)


def test_what_an_interrupted_call_received_comes_first_and_to_a_call_of_its_kind() -> None:
    with ringshm.Channel(8, 256) as channel:
        arrays = [np.full(3, number) for number in range(6)]
        channel.put_many(arrays)
        mine, other = np.zeros(3, int), np.zeros(3, int)
        _interrupted(channel, channel.get)
        for call in (lambda: channel.get(out=mine), lambda: channel.borrow().__enter__()):
            with pytest.raises(ringshm.InterruptedCall, match=rf"{channel.name}.*call get\(\)"):
                call()
        assert channel.get()[0] == 0
        _interrupted(channel, lambda: channel.get(out=mine))
        for call in (lambda: channel.get(out=other), channel.get, lambda: channel.get_many(2)):
            with pytest.raises(ringshm.InterruptedCall):
                call()
        assert channel.get(out=mine) is mine
        assert mine[0] == 1
        _interrupted(channel, lambda: channel.get_many(2))
        assert [array[0] for array in channel.get_many(2)] == [2, 3]
        assert [array[0] for array in channel.get_many(9)] == [4, 5]
        assert not other.any()


def test_a_borrow_that_is_interrupted_before_its_block_looks_loses_nothing() -> None:
    with ringshm.Channel(4, 256) as channel:
        channel.put_many(["first", "second"])
        channel.borrow().__enter__()  # and an exception comes before the block
        assert [channel.get(timeout=5), channel.get(timeout=5)] == ["first", "second"]
        channel.put("third")
        assert channel.borrow().__enter__().value == "third"  # seen: so it is received
        with pytest.raises(queue.Empty):
            channel.get(timeout=0.2)
        assert channel.stats().redelivered == 0


def test_a_loan_that_is_interrupted_before_its_block_gives_its_slot_back() -> None:
    with ringshm.Channel(1, 64) as channel:
        channel.loan().__enter__()  # and an exception comes before the block
        channel.put("sent", timeout=5)
        assert channel.get() == "sent"


@pytest.mark.parametrize("on", [False, True])
def test_a_block_ends_as_it_should_whoever_began_it(on: bool) -> None:
    """The compiled path stands aside within each block, or comes back to it."""
    with ringshm.Channel(2, 64) as channel, in_python(not on):
        for number in range(3):
            with channel.loan() as loan, in_python(on):
                loan.array(8, np.uint8)[...] = number
            with in_python(not on), channel.borrow() as message, in_python(on):
                assert message.value.tolist() == [number] * 8
            with channel.loan() as loan, in_python(on):
                loan.discard()
        channel.put("again")
        with channel.borrow() as message, in_python(on):
            message.requeue()
        channel.put(np.arange(8, dtype=np.uint8))
        with channel.borrow() as message, in_python(on):
            assert message.value == "again"
        with channel.borrow() as message, in_python(on):
            kept = message.value
        assert _states(channel) == ["kept"]
        assert kept.tolist() == [*range(8)]
        del kept
        assert (channel.stats().free, channel.stats().received) == (2, 5)


class _Failing(_Json):
    """A codec that fails so many times."""

    error: BaseException = ValueError()
    times = 0

    def decode(self, data: memoryview) -> Any:
        if self.times:
            self.times -= 1
            raise self.error
        return super().decode(data)


@pytest.mark.parametrize("error", [Interrupt(), ValueError("from a signal handler"), MemoryError()])
def test_a_borrow_that_is_interrupted_while_it_decodes_loses_nothing(error: BaseException) -> None:
    codec = _Failing()
    with ringshm.Channel(2, 64, codec=codec) as channel:
        channel.put_many([1, 2])
        codec.error, codec.times = error, 1
        with pytest.raises(type(error)), channel.borrow():
            raise AssertionError("there was a message")
        assert (channel.qsize(), channel.stats().redelivered) == (2, 0)
        with channel.borrow() as message:
            assert message.value == 1
        codec.error, codec.times = ValueError(), 3
        with pytest.raises(ringshm.UndecodableMessage), channel.borrow():
            raise AssertionError("there was a message")
        assert (channel.stats().received, channel.stats().free) == (2, 2)


def test_what_an_interrupted_batch_received_comes_first() -> None:
    with ringshm.Channel(8, spec={"n": np.int64}) as channel:
        channel.put_batch({"n": np.arange(8)})
        out = {"n": np.zeros(2, np.int64)}
        _interrupted(channel, lambda: channel.get_batch(2))
        for call in (channel.get, lambda: channel.get_batch(2, out=out)):
            with pytest.raises(ringshm.InterruptedCall):
                call()
        assert channel.get_batch(3)["n"].tolist() == [0, 1]
        _interrupted(channel, lambda: channel.get_batch(2, out=out))
        assert channel.get_batch(2, out=out)["n"].tolist() == [2, 3]
        assert channel.get()["n"] == 4


# --- waits with an end


def test_a_wait_that_another_thread_could_end_goes_on() -> None:
    with ringshm.Channel(1, 64) as channel:
        channel.put(np.arange(3))
        with channel.borrow() as message:
            kept = [message.value]
        threading.Timer(0.5, kept.clear).start()
        del message
        channel.put("after the view has gone")
        assert channel.get() == "after the view has gone"


def test_a_wait_with_a_time_limit_ends_by_it() -> None:
    with ringshm.Channel(1, 64) as channel:
        channel.put("message")
        with channel.borrow():
            check_full(channel.put, "another", timeout=0.3)
            check_empty(channel.get, timeout=0.3)


def test_a_stopped_borrower_keeps_its_slot() -> None:
    with ringshm.Channel(2, 64, keep_open=True) as channel, Crew("fork") as crew:
        channel.put(np.arange(8, dtype=np.uint8))
        member = crew.start(_stop_in_a_borrow, channel)
        assert member.wait_stopped()
        _fill(channel)
        assert _states(channel) == ["reading"]
        member.send_signal(signal.SIGCONT)
        assert member.result() == list(range(8))


def _stop_in_a_borrow(channel: ringshm.Channel) -> list[int]:
    with channel.borrow() as message:
        os.kill(os.getpid(), signal.SIGSTOP)
        return list(message.value.tolist())


def test_a_message_that_was_to_be_requeued_goes_back_where_the_block_never_ends() -> None:
    with ringshm.Channel(4, 1024) as channel:
        for _ in range(2):  # in the first the role is taken
            channel.put("message")
            borrow = channel.borrow()
            borrow.__enter__()
            assert borrow.value == "message"
            borrow.requeue()
            del borrow
            assert channel.get(timeout=0) == "message"
