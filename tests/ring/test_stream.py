"""Messages larger than a slot: whole, once, in order, at any capacity; and whoever dies, stops or gives up amid one."""

from __future__ import annotations

import asyncio
import os
import queue
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from support.checks import check_empty, check_full, check_whole, reap
from support.payloads import read_only
from support.tracer import Tracer
from support.workers import (
    Crew,
    check_delivery,
    die,
    get_all,
    get_all_by_many,
    interrupt,
    may_fork,
    shm_files,
    stop,
    until,
)

from ringshm import BrokenChannel, Channel, ChannelClosed, EndOfChannel, PayloadTooLarge, Receiver, Sender
from ringshm.channel import steps
from ringshm.segment.files import path_of
from ringshm.segment.layout import R_PIECE, R_READ, R_WRITTEN, READING

pytestmark = may_fork


def numbers(nbytes: int, seed: int = 0) -> Any:
    """Bytes of which no two pieces are alike."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def put_all(channel: Channel | Sender, *messages: Any) -> None:
    for message in messages:
        channel.put(message)
    channel.close()


def same(received: Any, sent: Any) -> bool:
    if isinstance(sent, np.ndarray):
        return (
            isinstance(received, np.ndarray)
            and received.flags.writeable == sent.flags.writeable
            and (received.dtype, received.shape) == (sent.dtype, sent.shape)
            and received.tobytes() == sent.tobytes()
        )
    if isinstance(sent, dict):
        return received.keys() == sent.keys() and all(same(received[key], sent[key]) for key in sent)
    return type(received) is type(sent) and bool(received == sent)


STRUCTURED = np.dtype([("a", "<i4"), ("b", "<f8", (3,))])
MESSAGES: dict[str, Callable[[], Any]] = {
    "bytes": lambda: numbers(5000).tobytes(),
    "bytearray": lambda: bytearray(numbers(5000).tobytes()),
    "str": lambda: "é" * 3000,
    "large int": lambda: 3**20000,
    "array": lambda: numbers(5000),
    "read-only": lambda: read_only(numbers(5000)),
    "float64": lambda: numbers(8000).view(np.float64).reshape(10, 100),
    "Fortran": lambda: np.asfortranarray(numbers(6000).reshape(60, 100)),
    "every third, backwards": lambda: numbers(24000).view(np.int64)[::-3],
    "transposed slice": lambda: numbers(48000).view(np.int32).reshape(10, 30, 40)[1:9, ::2, 5:].transpose(2, 0, 1),
    "structured, strided": lambda: numbers(28 * 500).view(STRUCTURED)[::2],
    "datetime64": lambda: np.arange(1000).astype("M8[s]"),
    "datetime64, strided": lambda: np.arange(2000).astype("M8[s]")[::2],
    "dict": lambda: {"a": numbers(3000), "b": numbers(8000).view(np.float32)[::2], "c": b"x" * 2000, "d": "y" * 500},
    "dict without arrays": lambda: {k: str(k) for k in range(1000)},
}


@pytest.mark.parametrize("slot_size", [50, 64, 1000, 4000])
@pytest.mark.parametrize("what", MESSAGES)
def test_every_kind_of_message_arrives_as_it_was_sent(what: str, slot_size: int) -> None:
    message = MESSAGES[what]()
    for capacity, codec in [(1, "pickle"), (3, "plain"), (10_000, "pickle")]:
        with Channel(capacity, slot_size, codec=codec) as channel, Crew("thread") as crew:
            crew.start(channel.sender().put, message)
            received = channel.get()
            crew.results()
            assert same(received, message)
            assert channel.stats().free == capacity


class Reversed:
    """A codec of the user's."""

    name = "reversed"

    def encode(self, obj: Any) -> bytes:
        return bytes(reversed(obj))

    def decode(self, data: memoryview) -> Any:
        return bytes(reversed(data))


def test_a_codec_of_ones_own() -> None:
    with Channel(2, 100, codec=Reversed()) as channel, Crew("thread") as crew:
        crew.start(channel.sender().put, numbers(5000).tobytes())
        assert channel.get() == numbers(5000).tobytes()
        crew.results()


def test_sizes_around_the_edges_of_slots() -> None:
    for slot_size in (1, 63, 64, 65, 128, 200):
        sizes = {times * slot_size + by for times in (1, 2, 3, 4, 7) for by in (-1, 0, 1)} - {0}
        with Channel(3, slot_size) as channel, Crew("thread") as crew:
            crew.start(put_all, channel.sender(), *(numbers(size, size) for size in sorted(sizes)))
            for size in sorted(sizes):
                assert same(channel.get(), numbers(size, size))
            crew.results()
            assert channel.stats().free == 3


# --- what fits into the free slots


def test_one_that_fits_needs_no_receiver() -> None:
    message = numbers(900)
    with Channel(12, 100) as channel:
        channel.put("before")
        channel.put(message)
        stats = channel.stats()
        assert (stats.ready, stats.pieces, stats.free, stats.slots, channel.qsize()) == (2, 8, 2, (), 2)
        assert stats.sent_nbytes - 900 == len("before")
        assert channel.get() == "before"
        assert same(channel.get(), message)
        check_whole(channel)


def _put_and_die(channel: Channel, message: Any) -> None:
    channel.put(message)
    die()


def test_one_that_fits_outlives_its_sender_and_its_receivers() -> None:
    message = numbers(700)
    with Channel(20, 64, keep_open=True, max_deliveries=5) as channel, Crew() as crew:
        crew.start(_put_and_die, channel, message).process.join()
        reap(channel, 1)
        for deaths in range(3):
            crew.start(_die_amid_get, channel, 1 + 5 * deaths).process.join()
            reap(channel, 2 + deaths)
        with channel.borrow() as borrowed:
            assert (borrowed.value == message).all() and not borrowed.value.flags.writeable
            assert borrowed.delivery_count == 4
        check_whole(channel)


def test_shared_memory_neither_grows_nor_shrinks() -> None:
    with Channel(4, 4096) as channel, Crew() as crew:
        size = os.stat(path_of(channel.name)).st_size
        files = shm_files()
        crew.start(put_all, channel.sender(), numbers(2_000_000))
        assert same(channel.get(), numbers(2_000_000))
        assert os.stat(path_of(channel.name)).st_size == size
        assert shm_files() == files


# --- order, and company


def _put_mixed(channel: Channel, sender: int, count: int, seed: int) -> int:
    rng = random.Random(seed)
    for k in range(count):
        channel.put((sender, k, bytes([k % 256]) * rng.choice([0, 10, 100, 1000, 5000])))
    channel.close()
    return count


@pytest.mark.parametrize("wait", ["adaptive", "block", "spin"])
@pytest.mark.parametrize("capacity", [1, 2, 3, 16])
def test_many_senders_and_receivers_at_any_capacity(capacity: int, wait: str) -> None:
    with Channel(capacity, 200, wait=wait) as channel, Crew() as crew:
        senders = [crew.start(_put_mixed, channel, number, 40, number) for number in range(3)]
        receivers = [crew.start(get_all, channel.receiver()), crew.start(get_all_by_many, channel.receiver(), 5)]
        counts = [sender.result() for sender in senders]
        channel.close()
        views = [receiver.result() for receiver in receivers]
    assert all(set(content) <= {k % 256} for view in views for _, k, content in view)
    check_delivery(counts, [[(sender, k) for sender, k, _ in view] for view in views])


def test_what_others_send_meanwhile_comes_behind_it() -> None:
    message = numbers(100_000)
    with Channel(8, 1000) as channel, Crew("thread") as crew:
        crew.start(channel.sender().put, message)
        until(lambda: channel.qsize() == 1)
        channel.put("second")
        crew.start(channel.sender().put, numbers(50_000))
        until(lambda: channel.qsize() == 3)
        channel.put("fourth")
        assert same(channel.get(), message)
        assert channel.get() == "second"
        assert same(channel.get(), numbers(50_000))
        assert channel.get() == "fourth"
        crew.results()
        check_whole(channel)


def test_many_streams_at_once_share_a_full_ring() -> None:
    messages = [numbers(3000 + size, size) for size in range(12)]
    with Channel(3, 100) as channel, Crew("thread") as crew:
        senders = [channel.sender() for _ in messages]  # that are open: the last may begin when all others have ended
        for sender, message in zip(senders, messages, strict=True):
            crew.start(sender.put, message)
        until(channel.full)
        received = [channel.get() for _ in messages]
        crew.results()
        assert Counter(array.tobytes() for array in received) == Counter(array.tobytes() for array in messages)
        check_whole(channel)


def test_batches_stop_before_it_and_begin_with_it() -> None:
    with Channel(30, 100) as channel:
        assert channel.put_many([1, 2, b"x" * 500, 3, 4]) == 5
        assert channel.get_many(9) == [1, 2]
        assert channel.get_many(9) == [b"x" * 500]
        assert channel.get_many(9) == [3, 4]
        assert channel.put_many(k for k in (b"a" * 200, *range(8))) == 9
        assert channel.get() == b"a" * 200
        assert channel.get_many(20) == [*range(8)]
        check_whole(channel)


def test_get_into_memory_of_ones_own() -> None:
    array, out = numbers(5000), np.empty(5000, np.uint8)
    with Channel(200, 64) as channel:
        channel.put(array)
        assert channel.get(out=out) is out and (out == array).all()
        channel.put({"a": array, "b": "x" * 300, "c": array[::2]})
        memory: dict[str, Any] = {"a": np.zeros(5000, np.uint8)}
        assert channel.get(out=memory) is memory
        assert (memory["a"] == array).all() and memory["b"] == "x" * 300 and same(memory["c"], array[::2])
        channel.put(array)
        with pytest.raises(ValueError, match="back in its place"):
            channel.get(out=np.empty(3, np.uint8))
        assert same(channel.get(), array)
        check_whole(channel)


def test_borrow() -> None:
    message = {"a": numbers(5000), "n": 3}
    with Channel(100, 64) as channel:
        channel.put(message)
        with channel.borrow() as borrowed:
            borrowed.requeue()
        with channel.borrow() as borrowed:
            assert borrowed.sender == os.getpid() and (borrowed.sequence, borrowed.delivery_count) == (0, 1)
            kept = borrowed.value["a"]
            assert not kept.flags.writeable
        assert (kept == message["a"]).all()
        check_whole(channel)  # a view keeps no slot
    assert (kept == message["a"]).all()


def test_borrow_of_one_that_does_not_fit() -> None:
    message = numbers(50_000)
    with Channel(2, 1000) as channel, Crew("thread") as crew:
        sending = crew.start(channel.sender().put, message)
        with channel.borrow() as borrowed:
            borrowed.requeue()
        assert sending.process.is_alive()  # it has not been received
        with channel.borrow() as borrowed:
            assert (borrowed.value == message).all() and sending.process.is_alive()
        sending.result()
        check_whole(channel)


def _put_ended(sending: Any) -> None:
    """Wait until a `put` has returned, or raised; the block that waits holds its message."""
    until(lambda: not sending.process.is_alive())


@pytest.mark.parametrize("capacity", [1, 3])
def test_one_that_a_block_holds_whole_is_sent_though_time_is_up(capacity: int) -> None:
    message = numbers(50_000)
    with Channel(capacity, 1000, keep_open=True) as channel, Crew("thread") as crew:
        sending = crew.start(partial(channel.sender().put, timeout=2.0), message)
        with channel.borrow() as borrowed:
            _put_ended(sending)
            assert sending.result() is None and (borrowed.value == message).all()
            with pytest.raises(RuntimeError, match="its sender's time is up: it cannot go back"):
                borrowed.requeue()
        assert channel.stats().dropped == 0
        check_whole(channel)


def test_one_that_a_block_gives_back_is_not_sent_when_time_is_up() -> None:
    with Channel(3, 1000, keep_open=True) as channel, Crew("thread") as crew:
        sending = crew.start(_caught, partial(channel.sender().put, timeout=2.0), numbers(50_000))
        with channel.borrow() as borrowed:
            borrowed.requeue()
            _put_ended(sending)
            assert sending.result() is queue.Full
        with pytest.raises(queue.Empty):
            channel.get(timeout=0)
        check_whole(channel)


def _borrow_and_die(channel: Channel | Receiver, there: Any, go: Any) -> None:
    with channel.borrow():
        there.set()
        go.wait()
        die()


def test_one_that_is_left_to_a_block_is_lost_with_its_process_and_told() -> None:
    with Channel(3, 1000, keep_open=True) as channel, Crew() as crew:
        there, go = crew.context.Event(), crew.context.Event()
        receiving = crew.start(_borrow_and_die, channel.receiver(), there, go)
        while _caught(partial(channel.put, timeout=0.3), numbers(50_000)):  # until the block holds it for longer
            pass
        assert there.wait(0)
        with pytest.warns(RuntimeWarning, match="dropped a message that did not fit into the ring: the receiver"):
            go.set()
            receiving.process.join()
            reap(channel, 1)
        assert (channel.stats().dropped, channel.stats().redelivered) == (1, 0)
        check_whole(channel)


def test_one_whose_sender_dies_while_a_block_holds_it_is_received() -> None:
    with Channel(3, 1000, keep_open=True) as channel, Crew() as crew:
        sending = crew.start(channel.sender().put, numbers(50_000))
        with channel.borrow() as borrowed:
            sending.kill()
            reap(channel, 1)
            assert same(borrowed.value, read_only(numbers(50_000)))
        assert channel.stats().withdrawn == 0
        check_whole(channel)


def test_a_cancelled_aput_of_one_that_a_block_holds_is_sent() -> None:
    async def send(channel: Sender, there: threading.Event) -> str:
        task = asyncio.create_task(channel.aput(numbers(50_000)))
        while not there.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await task  # the cancellation is put off, and has nothing to cancel any more
        return "sent"

    with Channel(3, 1000, keep_open=True) as channel, Crew("thread") as crew:
        there = threading.Event()
        sending = crew.start(asyncio.run, send(channel.sender(), there))
        with channel.borrow():
            there.set()
            _put_ended(sending)
            assert sending.result() == "sent"
        check_whole(channel)


def _put_until_sent(channel: Channel | Sender, count: int, seed: int) -> list[tuple[int, int]]:
    """Put messages with too little time, again and again; which attempt of each was sent."""
    rng, sent = random.Random(seed), []
    for number in range(count):
        for attempt in range(1 << 30):
            try:
                channel.put((number, attempt, bytes(5000)), timeout=rng.choice([0.0005, 0.002, 0.005]))
            except queue.Full:
                continue
            sent.append((number, attempt))
            break
    channel.close()
    return sent


def _borrow_all(channel: Channel | Receiver, seed: int) -> list[tuple[int, int]]:
    rng, received = random.Random(seed), []
    with suppress(EndOfChannel):
        while True:
            with channel.borrow() as borrowed:
                time.sleep(rng.choice([0, 0.001, 0.004]))  # work
                received.append(borrowed.value[:2])
    return received


@pytest.mark.parametrize("capacity", [1, 4])
def test_never_both_full_and_received(capacity: int) -> None:
    with Channel(capacity, 512) as channel, Crew() as crew:
        receiving = crew.start(_borrow_all, channel.receiver(), 1)
        sending = crew.start(_put_until_sent, channel.sender(), 150, 2)
        channel.close()
        assert receiving.result() == sending.result()


def test_drop_oldest_makes_room_for_all_of_it() -> None:
    with Channel(8, 100, when_full="drop_oldest") as channel:
        for k in range(20):
            channel.put(k)
        channel.put(numbers(500))
        stats = channel.stats()
        assert (stats.dropped, stats.ready, stats.pieces) == (17, 4, 4)
        assert channel.get_many(9) == [17, 18, 19]
        assert same(channel.get(), numbers(500))
        channel.put(numbers(300))
        for k in range(7):
            channel.put(k)  # the fourth drops the array, with all its slots
        assert channel.get_many(9) == [*range(7)]
        assert (channel.stats().free, channel.stats().dropped) == (8, 18)


def test_an_unfinished_message_is_not_dropped_for_newer_ones() -> None:
    with Channel(8, 64, when_full="drop_oldest") as channel, Crew("thread") as crew:
        crew.start(channel.sender().put, numbers(5000))
        until(lambda: channel.qsize() == 1)
        for k in range(30):
            channel.put(k)
        assert same(channel.get(), numbers(5000))
        crew.results()
        assert channel.get() == 30 - channel.qsize() - 1
        assert channel.stats().dropped == 30 - channel.qsize() - 1


@pytest.mark.parametrize("wait", ["adaptive", "block"])
@pytest.mark.parametrize("streams", [1, 3])
def test_no_wake_up_is_lost(wait: str, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With slices of ten minutes, one that is lost would set off the watchdog."""
    monkeypatch.setattr(steps, "SLICE", 600.0)
    messages = [numbers(64 * 300, seed) for seed in range(streams)]
    with Channel(streams, 64, wait=wait) as channel, Crew() as crew:
        for message in messages:
            crew.start(channel.sender().put, message)
        receivers = [crew.start(channel.receiver().get) for _ in messages]
        received = [receiver.result() for receiver in receivers]
        assert Counter(array.tobytes() for array in received) == Counter(array.tobytes() for array in messages)
        channel.close()


# --- refused


def test_where_it_cannot_wait_it_is_refused() -> None:
    with Channel(4, 100) as channel:
        for put in (channel.put_nowait, lambda obj: channel.put(obj, False), lambda obj: channel.put(obj, timeout=0)):
            with pytest.raises(PayloadTooLarge, match=r"slot holds 100 bytes, message needs 101.*send it with put\(\)"):
                put(bytes(101))
        with pytest.raises(PayloadTooLarge):
            channel.put_many([1, bytes(101)], timeout=0)
        with pytest.raises(PayloadTooLarge):
            channel.loan(nbytes=101)
        check_whole(channel)
    with Channel(4, 100, oversize="error") as channel:
        for send in (channel.put, channel.put_nowait, lambda obj: channel.put_many([1, obj])):
            with pytest.raises(PayloadTooLarge, match=r"100 bytes, message needs 101.*oversize='stream'"):
                send(bytes(101))
        check_whole(channel)


# --- time


def test_time_is_up_without_a_receiver() -> None:
    with Channel(4, 100) as channel:
        channel.put("before")
        with pytest.raises(queue.Full, match="5000 bytes, larger than a slot, was not received in time"):
            channel.put(bytes(5000), timeout=0.1)
        stats = channel.stats()
        assert (stats.sent, stats.withdrawn, stats.dropped) == (1, 1, 0)
        check_whole(channel, "before")


def test_put_many_returns_how_many_were_sent_when_time_is_up() -> None:
    with Channel(8, 100) as channel:
        assert channel.put_many([1, 2, bytes(5000), 3], timeout=0.1) == 2
        check_whole(channel, 1, 2)


def _get_stopped(channel: Channel, at: int) -> list[Any]:
    with Tracer(stop, at, functions=["advance"], lines=True):
        first = channel.get()
    return [first, channel.get()]


def test_time_is_up_with_a_stopped_receiver() -> None:
    """The receiver drops what it had, and goes on with the next."""
    with Channel(4, 1000, keep_open=True) as channel, Crew() as crew:
        stopped = crew.start(_get_stopped, channel, 12)
        until(lambda: channel.stats().waiting_receivers)
        check_full(channel.put, bytes(50_000), timeout=1.0)
        channel.put_nowait("next")
        stopped.send_signal(signal.SIGCONT)
        until(lambda: channel.qsize() == 0)
        channel.put("last")
        assert stopped.result() == ["next", "last"]
        check_whole(channel)


def _put_stopped(channel: Channel, message: Any) -> None:
    with Tracer(stop, 40, functions=["advance"], lines=True):
        channel.put(message)


def test_time_is_up_with_a_stopped_sender_and_the_next_call_goes_on() -> None:
    message = numbers(50_000)
    with Channel(2, 1000) as channel, Crew() as crew:
        stopped = crew.start(_put_stopped, channel, message)
        assert stopped.wait_stopped()
        with pytest.raises(queue.Empty, match="not all of a message of 50000 bytes"):
            channel.get(timeout=0.3)
        assert (channel.qsize(), channel.stats().slots) == (1, ())
        check_empty(channel.get_nowait)
        assert channel._open().ring.partial is not None
        stopped.send_signal(signal.SIGCONT)
        assert same(channel.get(), message)
        stopped.result()
        assert channel._open().ring.partial is None
        check_whole(channel)


def test_who_has_given_up_amid_one_can_close() -> None:
    """What it keeps for its next call does not keep it."""
    with Channel(2, 1000) as channel, Crew() as crew:
        sender = crew.start(_put_stopped, channel, numbers(50_000))
        assert sender.wait_stopped()
        crew.start(lambda: (check_empty(channel.get, timeout=0.1), channel.close())).result()
        until(lambda: len(channel.stats().participants) == 2)
        assert channel.stats().reaped == 0
        sender.send_signal(signal.SIGCONT)
        assert same(channel.get(), numbers(50_000))


def test_who_only_polls_gets_it_too() -> None:
    message, polls = numbers(200_000), 0
    with Channel(4, 1000) as channel, Crew() as crew:
        crew.start(channel.sender().put, message)
        while True:
            try:
                received = channel.get_nowait()
                break
            except queue.Empty:
                polls += 1
        assert same(received, message)
        crew.results()
        assert polls > 10 and channel.stats().redelivered == 0
        check_whole(channel)


def _poll(channel: Receiver, seconds: float) -> Any:
    while True:
        try:
            return channel.get(timeout=seconds)
        except queue.Empty:
            continue
        except EndOfChannel:
            return None


def test_receivers_with_little_time_do_not_take_it_from_each_other_for_ever() -> None:
    message = numbers(3_000_000)
    with Channel(4, 1000) as channel, Crew() as crew:
        pollers = [crew.start(_poll, channel.receiver(), 0.001) for _ in range(3)]
        channel.put(message)
        channel.close()
        (received,) = (result for poller in pollers if (result := poller.result()) is not None)
        assert same(received, message)


# --- ends


def test_shutdown_takes_back_what_nobody_receives() -> None:
    with Channel(2, 100) as channel, Crew("thread") as crew:
        waiting = crew.start(_caught, channel.sender().put, bytes(5000))
        until(lambda: channel.qsize() == 1)
        channel.shutdown()
        assert waiting.result() is ChannelClosed
        with pytest.raises(EndOfChannel):
            channel.get()
        with pytest.raises(ChannelClosed):
            channel.put(bytes(5000))
        assert channel.stats().free == 2


def _caught(function: Callable[..., Any], *args: Any) -> type[BaseException] | None:
    try:
        function(*args)
    except Exception as error:
        return type(error)
    return None


def test_a_shutdown_amid_one_lets_it_end() -> None:
    message = numbers(100_000)
    with Channel(2, 100) as channel, Crew("thread") as crew:
        sending = crew.start(_caught, channel.sender().put, message)
        channel._open().ring.partial = None
        with channel.borrow() as borrowed:
            channel.shutdown()
            assert (borrowed.value == message).all()
        assert sending.result() is None


def test_the_last_receiver_goes() -> None:
    with Channel(2, 100) as channel, Crew() as crew:
        sender = channel.sender()
        crew.start(_die_amid_get, channel.receiver(), 9)
        with pytest.raises(BrokenChannel, match="died"):
            sender.put(bytes(50_000))
        assert channel.stats().free == 2


def test_closing_the_handle_ends_the_call_and_takes_it_back() -> None:
    with Channel(2, 100) as channel, Crew("thread") as crew:
        sender = channel.sender()
        sending = crew.start(_caught, sender.put, bytes(50_000))
        until(lambda: channel.qsize() == 1)
        sender.close()
        assert sending.result() is ChannelClosed
        check_whole(channel)


# --- deaths


def _amid(channel: Channel | Receiver) -> Callable[[], bool]:
    """A condition for a Tracer: this process has claimed or taken its first slot."""
    begun: list[bool] = []

    def amid() -> bool:
        if not begun and any(slot.pid == os.getpid() for slot in channel.stats().slots):
            begun.append(True)
        return bool(begun)

    return amid


def _die_amid_get(channel: Channel | Receiver, at: int) -> None:
    with Tracer(die, at, folders=["ring"], when=_amid(channel), lines=True):
        channel.get()


def _die_amid_put(channel: Channel, at: int, message: Any) -> None:
    with Tracer(die, at, folders=["ring"], when=_amid(channel), lines=True):
        channel.put(message)


@pytest.mark.parametrize("at", [1, 20, 60, 100, 150, 200, 260, 400])
def test_a_sender_that_dies_amid_it(at: int) -> None:
    """The receiver drops what it had, and goes on with the next message."""
    with Channel(3, 1000, keep_open=True) as channel, Crew() as crew:
        receiving = crew.start(channel.receiver().get)
        crew.start(_die_amid_put, channel, at, bytes(50_000)).process.join()
        reap(channel, 1)
        channel.put("next")
        assert receiving.result() == "next"
        check_whole(channel)


@pytest.mark.parametrize("at", [1, 20, 60, 100, 150, 200, 260, 400])
def test_a_receiver_that_dies_amid_it(at: int) -> None:
    """Another gets it from the start."""
    message = numbers(50_000)
    with Channel(3, 1000, keep_open=True) as channel, Crew() as crew:
        sending = crew.start(channel.sender().put, message)
        crew.start(_die_amid_get, channel, at).process.join()
        with channel.borrow() as borrowed:
            assert (borrowed.value == message).all() and borrowed.delivery_count == 2
        sending.result()
        check_whole(channel)


def test_both_die_amid_it() -> None:
    with Channel(3, 1000, keep_open=True) as channel, Crew() as crew:
        receiving = crew.start(_die_amid_get, channel, 200)
        until(lambda: channel.stats().waiting_receivers)  # the sender would not live to see one that comes late
        for member in (crew.start(_die_amid_put, channel, 300, bytes(50_000)), receiving):
            member.process.join()
        reap(channel, 2)
        check_whole(channel)


def test_one_that_its_receivers_die_of_is_dropped_and_its_put_returns() -> None:
    with Channel(3, 1000, keep_open=True, max_deliveries=2) as channel, Crew() as crew:
        sending = crew.start(_caught, channel.sender().put, bytes(50_000), method="thread")
        with pytest.warns(RuntimeWarning, match="dropped 1 message"):
            for deaths in range(2):
                crew.start(_die_amid_get, channel, 150).process.join()
                reap(channel, 1 + deaths)
            assert sending.result() is None
        assert channel.stats().dropped == 1
        check_whole(channel)


def _put_for_ever(channel: Channel, number: int) -> None:
    for k in range(1 << 30):
        channel.put(np.full(20_000, number << 16 | k & 0xFFFF, np.int64))


@pytest.mark.slow(seconds=120)
def test_senders_and_receivers_are_killed_at_any_moment() -> None:
    """No array that arrives is torn, and afterwards all is whole."""
    rng = random.Random(7)
    with Channel(4, 10_000, keep_open=True, max_deliveries=200) as channel, Crew() as crew:
        killed, received, deadline = 0, 0, time.monotonic() + 20
        workers = [crew.start(_put_for_ever, channel, number) for number in range(2)]
        workers.append(crew.start(get_for_ever, channel))
        while time.monotonic() < deadline:
            try:
                array = channel.get(timeout=rng.choice([0.001, 0.1, 1.0]))
                assert array.shape == (20_000,) and (array == array[0]).all()
                received += 1
            except queue.Empty:
                pass
            if rng.random() < 0.2:
                victim = rng.randrange(3)
                workers[victim].kill()
                killed += 1
                again = (get_for_ever, channel) if victim == 2 else (_put_for_ever, channel, victim)
                workers[victim] = crew.start(*again)
        for worker in workers:
            worker.kill()
        until(lambda: channel.wait_for_peers(senders=99, timeout=0.01) or len(channel.stats().participants) == 1)
        with pytest.raises(queue.Empty):
            while True:
                channel.get_nowait()
        assert received > 20 and killed > 20
        check_whole(channel)


def get_for_ever(channel: Channel) -> None:
    while True:
        array = channel.get()
        assert array.shape == (20_000,) and (array == array[0]).all()


FILES = ["large.py", "sending.py", "receiving.py", "slots.py"]


@pytest.mark.slow(seconds=60)
def test_an_interrupt_at_each_line_of_put_takes_it_back() -> None:
    message = numbers(30_000)
    with Channel(3, 1000, keep_open=True) as channel, Crew("thread") as crew:
        for at in (*range(1, 60), *range(60, 1500, 13)):
            receiving = crew.start(_get_patiently, channel.receiver())
            sent = False
            try:
                with Tracer(interrupt, at, folders=["ring", "channel"], lines=True) as steps:
                    channel.put(message)
                sent = True
            except KeyboardInterrupt:
                pass
            if steps.count < at:
                break
            channel.put("next")
            first = receiving.result()
            if not isinstance(first, str):
                assert same(first, message)
                assert channel.get() == "next"
            assert isinstance(first, str) is not sent or not sent
            check_whole(channel)
        assert at > 60


def _get_patiently(receiver: Receiver) -> Any:
    value = receiver.get()
    receiver.close()
    return value


@pytest.mark.slow(seconds=60)
def test_an_interrupt_at_each_line_of_get_leaves_it_in_its_place() -> None:
    message = numbers(30_000)
    with Channel(3, 1000, keep_open=True) as channel, Crew("thread") as crew:
        for at in (*range(1, 60), *range(60, 1500, 13)):
            crew.start(channel.sender().put, message)
            until(lambda: channel.qsize() == 1)
            try:
                with Tracer(interrupt, at, folders=["ring", "channel"], lines=True) as steps:
                    received = channel.get()
            except KeyboardInterrupt:
                received = channel.get()
            assert same(received, message)
            if steps.count < at:
                break
        crew.results()
        check_whole(channel)


def _fork_amid(channel: Channel, message: Any, forked: Any) -> int:
    thread = threading.Thread(target=channel.put, args=(message,))
    thread.start()
    until(lambda: channel.qsize() == 1)
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    forked.set()
    thread.join()
    return 1


def test_a_fork_amid_it_is_the_parents() -> None:
    message = numbers(50_000)
    with Channel(3, 1000) as channel, Crew() as crew:
        forked = crew.context.Event()
        crew.start(_fork_amid, channel, message, forked)
        forked.wait()
        assert same(channel.get(), message)
        crew.results()


# --- damage


@pytest.mark.parametrize("word", [R_PIECE, R_WRITTEN, R_READ])
@pytest.mark.parametrize("value", [0, 1, 10**6, 1 << 40, (1 << 64) - 1])
def test_damage_to_a_stream_ends_it_with_an_error(word: int, value: int) -> None:
    message = numbers(20_000)
    with Channel(40, 1000) as channel:
        channel.put(message)
        segment = channel._open().segment
        before = segment.words[segment.layout.record(0) + word]
        segment.words[segment.layout.record(0) + word] = value
        try:
            assert same(channel.get(timeout=0.2), message)
            assert word == R_READ or value == before
        except (OSError, queue.Empty):
            segment.words[segment.layout.record(0) + word] = before
            assert not any(word & 7 == READING for word in channel._open().ring.slot_words()[::8])
            assert same(channel.get(), message)
        check_whole(channel)
