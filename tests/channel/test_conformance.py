"""One suite over start methods, roles and capacities; `queue.Queue` is the model of a single call."""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import random
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Full
from typing import Any

import pytest
from support import workers
from support.checks import check_empty, check_full
from support.tracer import Tracer

from ringshm import (
    BrokenChannel,
    Channel,
    ChannelClosed,
    ChannelNotFound,
    EndOfChannel,
    JoinableQueue,
    Latest,
    PayloadTooLarge,
    Queue,
    Receiver,
    Sender,
    SimpleQueue,
)

pytestmark = workers.may_fork

TOPOLOGIES = {"spsc": (1, 1), "mpsc": (3, 1), "spmc": (1, 3), "mpmc": (3, 3)}


# --- many to many


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("capacity", [1, 2, 3])
@pytest.mark.parametrize("method", ["thread", "fork"])
def test_each_message_goes_to_one_receiver_in_order_of_its_sender(method: str, capacity: int, topology: str) -> None:
    senders, receivers = TOPOLOGIES[topology]
    counts = [200] * senders
    with Channel(capacity, 64) as channel, workers.Crew(method) as crew:
        getting = [crew.start(workers.get_all, channel.receiver()) for _ in range(receivers)]
        begun = [_begun(channel.sender()) for _ in counts]  # all of them before one of them may have ended
        putting = [crew.start(workers.put_numbered, begun.pop(0), s, n) for s, n in enumerate(counts)]
        channel.close()
        assert [member.result() for member in putting] == counts
        workers.check_delivery(counts, [member.result() for member in getting])


def _begun(sender: Sender[Any]) -> Sender[Any]:
    """A handle that has begun to send: in a receiver's own process others do not keep the stream open."""
    sender.put_many([])
    return sender


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_that_import_everything_anew_do_the_same(method: str, capacity: int) -> None:
    counts = [200, 150]
    with Channel(capacity, 64) as channel, workers.Crew(method) as crew:
        getting = [crew.start(workers.get_all, channel), crew.start(workers.get_all_by_many, channel, 2)]
        putting = [crew.start(workers.put_numbered, channel, s, count) for s, count in enumerate(counts)]
        channel.close()
        assert [member.result() for member in putting] == counts
        workers.check_delivery(counts, [member.result() for member in getting])


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_processes_of_every_kind_share_a_channel(capacity: int) -> None:
    counts = [60, 70, 80, 90]
    with Channel(capacity, 64, keep_open=True) as channel, workers.Crew() as crew:
        putting = [
            crew.start(workers.put_numbered, channel.sender(), 0, counts[0], method="thread"),
            crew.start(workers.put_numbered, channel.sender(), 1, counts[1], method="fork"),
            crew.start(workers.put_numbered, channel.sender(), 2, counts[2], method="spawn"),
        ]
        getting = [crew.start(workers.get_all, channel.receiver(), method=kind) for kind in ("thread", "fork", "spawn")]
        by_name = (
            "import sys, ringshm\n"
            "from support import workers\n"
            "channel = ringshm.Channel.attach(sys.argv[1])\n"
            "if sys.argv[2] == 'put':\n"
            "    workers.put_numbered(channel, 3, int(sys.argv[3]))\n"
            "else:\n"
            "    print(workers.get_all(channel))\n"
        )
        sender = workers.script(by_name, channel.name, "put", str(counts[3]))
        receiver = workers.script(by_name, channel.name, "get")
        channel.wait_for_peers(receivers=3)
        workers.finish(sender)
        for member in putting:
            member.result()
        channel.shutdown()
        views = [member.result() for member in getting]
        workers.check_delivery(counts, [*views, eval(workers.finish(receiver))])


def _put_by_turns(channel: Channel, mine: Any, others: Any, numbers: range) -> None:
    for number in numbers:
        mine.acquire()
        channel.put(number)
        others.release()


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_messages_come_in_the_order_in_which_puts_completed(capacity: int) -> None:
    with Channel(capacity, 64) as channel, workers.Crew("fork") as crew:
        turns = [crew.context.Semaphore(1), crew.context.Semaphore(0), crew.context.Semaphore(0)]
        for s in range(3):
            crew.start(_put_by_turns, channel, turns[s], turns[(s + 1) % 3], range(s, 300, 3))
        assert [channel.get() for _ in range(300)] == list(range(300))


@pytest.mark.parametrize("threads", [8])
def test_threads_share_one_handle(threads: int) -> None:
    counts = [100] * threads
    views: list[list[Any]] = [[] for _ in range(threads)]

    def put(s: int) -> None:
        for k in range(counts[s]):
            channel.put((s, k))

    def get(r: int) -> None:
        with suppress(EndOfChannel):
            while True:
                views[r].append(channel.get())

    with Channel(3, 64) as channel, workers.in_threads(*(partial(get, r) for r in range(threads))):
        with workers.in_threads(*(partial(put, s) for s in range(threads))):
            pass
        channel.shutdown()
    workers.check_delivery(counts, views)


def test_shared_memory_is_taken_once() -> None:
    before = workers.ringshm_files()
    with Channel(3, 100_000) as channel:
        made = workers.ringshm_files() - before
        assert len(made) == 10
        with workers.Crew("fork") as crew:
            receiver = crew.start(workers.get_all, channel.receiver())
            with channel.sender() as sender, Channel.attach(channel.name) as other:
                for message in [None, b"x" * 100_000, {"a": [1] * 1000}, *range(100)]:
                    sender.put(message)
                    assert workers.ringshm_files() - before == made
                other.close()
            channel.close()
            assert len(receiver.result()) == 103
    assert workers.ringshm_files() == before


# --- single calls, as queue.Queue has them

STATES = {"empty": 0, "with one": 1, "full": 2}
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("put", ("m",), {"timeout": 0}), ("put", ("m",), {"timeout": 0.01}), ("put", ("m", True, 0.01), {}),
    ("put", ("m", False), {}), ("put", ("m",), {"block": False, "timeout": -1}), ("put", ("m",), {"timeout": -1}),
    ("put", ("m",), {"timeout": "1"}), ("put_nowait", ("m",), {}), ("get", (), {"timeout": 0}),
    ("get", (), {"timeout": 0.01}), ("get", (True, 0.01), {}), ("get", (False,), {}),
    ("get", (), {"block": False, "timeout": -1}), ("get", (), {"timeout": -1}), ("get", (), {"timeout": "1"}),
    ("get_nowait", (), {}), ("qsize", (), {}), ("empty", (), {}), ("full", (), {}),
]  # fmt: skip


def _outcome(channel: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return getattr(channel, method)(*args, **kwargs)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("method", "args", "kwargs"), CALLS, ids=lambda value: str(value))
def test_calls_answer_as_those_of_queue_do(
    method: str, args: tuple[Any, ...], kwargs: dict[str, Any], state: str
) -> None:
    model: queue.Queue[Any] = queue.Queue(2)
    with Channel(2, 64) as channel:
        for peer in (model, channel):
            for number in range(STATES[state]):
                peer.put(number)
        assert _outcome(channel, method, args, kwargs) == _outcome(model, method, args, kwargs)
        assert channel.qsize() == model.qsize()


@pytest.mark.parametrize("method", ["put", "get", "flush", "wait_for_peers", "put_many", "get_many"])
@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan])
def test_a_timeout_that_makes_no_sense_is_refused(method: str, timeout: float) -> None:
    arguments = {"put": ("m",), "put_many": (["m"],), "get_many": (1,)}.get(method, ())
    with Channel(1, 64) as channel, pytest.raises(ValueError, match="timeout"):
        getattr(channel, method)(*arguments, timeout=timeout)


@pytest.mark.parametrize("capacity", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_calls_leaves_what_a_deque_would_hold(seed: int, capacity: int) -> None:
    choose = random.Random(seed)
    model: deque[int] = deque()
    numbers = itertools.count()

    def put_many() -> None:
        offered = [next(numbers) for _ in range(choose.randrange(4))]
        sent = channel.put_many(offered, timeout=0)
        assert sent == min(len(offered), capacity - len(model))
        model.extend(offered[:sent])

    def get_many() -> None:
        limit = choose.randrange(1, 4)
        if model:
            assert channel.get_many(limit, timeout=0) == [model.popleft() for _ in range(min(limit, len(model)))]
        else:
            check_empty(channel.get_many, limit, timeout=0)

    def put() -> None:
        number = next(numbers)
        if len(model) < capacity:
            channel.put(number)
            model.append(number)
        else:
            check_full(channel.put_nowait, number)

    def get() -> None:
        if model:
            assert channel.get() == model.popleft()
        else:
            check_empty(channel.get_nowait)

    with Channel(capacity, 64) as channel:
        for _ in range(300):
            choose.choice([put, get, put_many, get_many])()
            assert channel.qsize() == len(model)
            assert channel.empty() == (not model)
            assert channel.full() == (len(model) == capacity)
            assert channel.has_space() == (len(model) < capacity)
            stats = channel.stats()
            assert (stats.ready, stats.free) == (len(model), capacity - len(model))
            assert stats.sent - stats.received == len(model)


def test_numbers_that_are_put_together_arrive_as_they_were_whichever_way_they_are_encoded() -> None:
    """The compiled path encodes small ones itself, and none for a queue of tasks, whose codec counts them."""
    numbers = [2**70, 1, -(2**100), 2.5, True, -3]
    with Channel(8, 128) as channel:
        assert channel.put_many(numbers) == len(numbers)
        assert channel.get_many(8) == numbers
    tasks = JoinableQueue[Any](8)
    tasks.put_many(numbers)
    assert tasks.get_many() == numbers
    tasks.close()


def test_put_many_sends_nothing_if_one_cannot_be_sent() -> None:
    with Channel(3, 64, oversize="error") as channel:
        with pytest.raises(PayloadTooLarge, match=r"64.*200"):
            channel.put_many([1, 2, bytes(200)])
        with pytest.raises(Exception, match="pickle"):
            channel.put_many([1, threading.Lock()])
        assert channel.empty()
        assert channel.put_many([]) == 0


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_get_many_wants_a_positive_number(limit: Any) -> None:
    with Channel(1, 64) as channel, pytest.raises((ValueError, TypeError), match="max_messages"):
        channel.get_many(limit)


def test_put_waits_while_full() -> None:
    with Channel(1, 64) as channel, workers.Crew("fork") as crew:
        channel.put("first")
        putting = crew.start(channel.put, "second")
        workers.until(lambda: channel.stats().waiting_senders)
        assert channel.get() == "first"
        putting.result()
        assert channel.get() == "second"


def test_get_waits_while_empty() -> None:
    with Channel(1, 64) as channel, workers.Crew("fork") as crew:
        getting = crew.start(channel.get)
        workers.until(lambda: channel.stats().waiting_receivers)
        channel.put("message")
        assert getting.result() == "message"


def test_put_many_waits_for_space_and_counts_what_fitted() -> None:
    with Channel(2, 64) as channel, workers.Crew("fork") as crew:
        assert channel.put_many(range(5), timeout=0.05) == 2
        putting = crew.start(channel.put_many, [2, 3, 4])
        assert [channel.get() for _ in range(5)] == [0, 1, 2, 3, 4]
        assert putting.result() == 3


def _first_bytes(channel: Channel | Receiver, count: int) -> list[int]:
    return [channel.get()[0] for _ in range(count)]


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize("size", [8, 40_000, 200_000])  # small; within one slot; larger than a slot
def test_put_many_raises_what_ends_it_and_says_how_many_were_sent(size: int, timeout: float | None) -> None:
    messages = [bytes([n]) * size for n in range(9)]
    with Channel(2, 100_000) as channel, workers.Crew("fork") as crew:
        receiving = crew.start(_first_bytes, channel.receiver(), 3)
        with pytest.raises(BrokenChannel) as broken:
            channel.put_many(messages, timeout=timeout)
        received = receiving.result() + _first_bytes(channel, channel.qsize())
        assert received == list(range(broken.value.sent))


def test_put_many_says_of_bad_objects_that_none_was_sent() -> None:
    with Channel(2, 64, oversize="error") as channel:
        with pytest.raises(PayloadTooLarge) as large:
            channel.put_many([1, bytes(100)])
        with pytest.raises(Full) as full:  # not its own: the time is not up
            channel.put_many(channel.put_nowait(n) for n in range(3))  # type: ignore[func-returns-value]
        assert (large.value.sent, full.value.sent) == (0, 0)  # type: ignore[attr-defined]
        assert channel.qsize() == 2


@pytest.mark.parametrize("size", [8, 40_000, 200_000])
def test_put_many_that_is_interrupted_at_any_line_says_how_many_were_sent(size: int) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    messages = [bytes([n]) * size for n in range(4)]
    with Channel(12, 100_000) as channel:
        for at in range(1, 2000, {8: 1, 40_000: 3, 200_000: 7}[size]):
            sent = 0
            with Tracer(interrupt, at, folders=["ring", "channel"], lines=True) as steps:
                try:
                    assert channel.put_many(messages) == 4
                    sent = 4
                except KeyboardInterrupt as error:
                    sent = getattr(error, "sent", 0)
            channel.put(b"end")  # who enters the mutex next also reveals what an interrupted one has sent
            assert [channel.get() for _ in range(channel.qsize())] == [*messages[:sent], b"end"], at
            if steps.count < at:
                break
    assert 30 < at < 1999


def test_flush_waits_until_what_this_process_put_was_received() -> None:
    with Channel(2, 64) as channel, workers.Crew("fork") as crew:
        assert channel.flush()
        channel.put("mine")
        crew.start(channel.put, "another's").result()
        assert not channel.flush(timeout=0)
        assert not channel.wait_for_all_ack(timeout=0.05)
        assert crew.start(channel.get).result() == "mine"
        assert channel.flush(timeout=0)
        assert channel.qsize() == 1


def _stay(channel: Any, method: str, arguments: tuple[Any, ...], leave: Any) -> None:
    getattr(channel, method)(*arguments)
    leave.wait()


def test_wait_for_peers_counts_other_processes_by_role() -> None:
    with Channel(4, 64) as channel, workers.Crew("fork") as crew:
        assert channel.wait_for_peers()
        channel.put("by itself")
        assert not channel.wait_for_peers(senders=1, timeout=0)
        leave = crew.context.Event()
        crew.start(_stay, channel, "get", (), leave)
        assert channel.wait_for_peers(receivers=1)
        assert not channel.wait_for_peers(senders=1, receivers=1, timeout=0.05)
        crew.start(_stay, channel, "put", ("message",), leave)
        assert channel.wait_for_peers(senders=1, receivers=1)
        workers.until(lambda: channel.qsize() == 1)  # the role is taken before the message is sent
        leave.set()
        crew.results()
        workers.until(lambda: not channel.wait_for_peers(senders=1, timeout=0))


def test_stats_tell_who_takes_part_and_what_went_through() -> None:
    with Channel(3, 64) as channel, workers.Crew("fork") as crew:
        leave = crew.context.Event()
        sender = crew.start(_stay, channel, "put_many", ([b"12345"] * 3,), leave)
        channel.wait_for_peers(senders=1)
        workers.until(channel.full)
        assert channel.get() == b"12345"
        stats = channel.stats()
        assert (stats.sent, stats.received, stats.dropped, stats.redelivered) == (3, 1, 0, 0)
        assert (stats.sent_nbytes, stats.received_nbytes) == (15, 5)
        assert (stats.capacity, stats.ready, stats.free, stats.slots, stats.dead) == (3, 2, 1, (), ())
        assert stats.fill == pytest.approx(2 / 3)
        roles = {person.pid: (person.senders, person.receivers, person.undecided) for person in stats.participants}
        assert roles[sender.pid] == (1, 0, 0)
        assert len(roles) == 2
        leave.set()
        sender.result()


@pytest.mark.parametrize("strategy", ["adaptive", "block", "spin"])
def test_every_wait_strategy_delivers(strategy: str) -> None:
    with Channel(2, 64, wait=strategy) as there, Channel(2, 64, wait=strategy) as back, workers.Crew("fork") as crew:
        crew.start(lambda source, sink: [sink.put(k) for k in source], there.receiver(), back.sender())
        with there.sender() as sender:
            there.close()
            for k in range(50):
                sender.put(k)
                assert back.get() == k
        check_empty(Channel(1, 64, wait=strategy).get, timeout=0.05)


# --- drop_oldest


def test_in_receives_nothing() -> None:
    with Channel(3, 64) as channel, channel.sender() as sender, channel.receiver() as receiver:
        channel.put_many([1, 2])
        for handle in (channel, receiver):
            with pytest.raises(TypeError, match=rf"{channel.name}.*`in` would receive all messages"):
                print(2 in handle)
        for other in (sender, Queue(1), JoinableQueue(1), SimpleQueue(), Latest(64)):
            with pytest.raises(TypeError):
                print(2 in other)  # type: ignore[operator]
            other.close()
        assert channel.qsize() == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_drop_oldest_waits_while_all_slots_are_being_read(asynchronous: bool) -> None:
    with Channel(2, 64, when_full="drop_oldest") as channel, workers.Crew("thread") as crew:

        def put(message: int, timeout: float | None) -> None:
            if asynchronous:
                asyncio.run(channel.aput(message, timeout=timeout))
            else:
                channel.put(message, timeout=timeout)

        channel.put_many([1, 2])
        with channel.borrow() as first:
            with channel.borrow() as second:
                check_full(channel.put_nowait, 3)
                with pytest.raises(Full, match="all slots are being read or written, none could be dropped in time"):
                    put(3, 0.05)
                putting = crew.start(put, 3, 20.0)
                workers.until(_waits(channel, "put"))
            putting.result()  # that block has given its slot back
            assert (first.value, second.sequence) == (1, 1)
            with channel.borrow() as third:
                putting = crew.start(put, 4, None)
                workers.until(_waits(channel, "put"))
                third.requeue()  # there is no free slot then, but one to drop
            putting.result()
        assert channel.get() == 4
        assert channel.stats().dropped == 1


def test_drop_oldest_never_waits_and_counts_what_goes() -> None:
    with Channel(3, 64, when_full="drop_oldest") as channel:
        for k in range(10):
            channel.put(k)
        channel.put_nowait(10)
        assert channel.put_many([11, 12]) == 2
        assert channel.stats().dropped == 10
        assert [channel.get() for _ in range(3)] == [10, 11, 12]
        stats = channel.stats()
        assert (stats.sent, stats.received, stats.dropped) == (13, 3, 10)
        assert channel.flush(timeout=0)


def test_drop_oldest_loses_nothing_that_it_does_not_count() -> None:
    with Channel(2, 64, when_full="drop_oldest") as channel, workers.Crew("fork") as crew:
        getting = crew.start(workers.get_all, channel.receiver())
        channel.wait_for_peers(receivers=1)
        for k in range(2000):
            channel.put(k)
        channel.shutdown()
        received = getting.result()
        assert received == sorted(set(received))
        assert received[-1] == 1999
        assert len(received) + channel.stats().dropped == 2000


# --- handles


def test_a_sender_has_no_receivers_methods_and_vice_versa() -> None:
    with Channel(1, 64) as channel, channel.sender() as sender, channel.receiver() as receiver:
        sender.put("message")
        assert receiver.get() == "message"
        assert not hasattr(sender, "get")
        assert not hasattr(receiver, "put")
        with pytest.raises(AttributeError, match=r"receiver\(\)"):
            sender.get()
        with pytest.raises(AttributeError, match=r"sender\(\)"):
            receiver.put("message")


def test_a_handle_knows_its_channel() -> None:
    with Channel(3, "1KiB") as channel, channel.receiver() as receiver:
        assert (receiver.name, receiver.capacity, receiver.slot_size) == (channel.name, 3, 1024)
        assert not receiver.closed
        receiver.close()
        receiver.close()
        assert receiver.closed
        assert channel.name in repr(receiver)
        assert "closed" in repr(receiver)


def test_attach_finds_a_channel_that_appears_later() -> None:
    with Channel(1, 64) as channel:
        name = channel.name + "-later"
        with pytest.raises(ChannelNotFound):
            Channel.attach(name)
        with pytest.raises(ChannelNotFound):
            Channel.attach(name, timeout=0.05)
        with pytest.raises(ValueError, match="timeout"):
            Channel.attach(name, timeout=-1)
        source = "import sys, ringshm; print(ringshm.Channel.attach(sys.argv[1], timeout=60).get())"
        waiting = workers.started("print(flush=True);" + source, name)
        with Channel(1, 64, name=name) as later:
            later.put("here")
            assert workers.finish(waiting).split() == ["here"]


@pytest.mark.parametrize("method", workers.METHODS)
@pytest.mark.parametrize("role", ["sender", "receiver", "either"])
def test_a_handle_travels_through_queues_of_either_kind(method: str, role: str) -> None:
    with Channel(2, 64) as channel, Channel(1, 1000) as carrier, workers.Crew(method) as crew:
        post = crew.context.Queue()
        handle = channel if role == "either" else getattr(channel, role)()
        member = crew.start(_use_handles, post, carrier, role)
        post.put(handle)
        carrier.put(handle)
        if role == "receiver":
            channel.put_many([1, 2])
            assert member.result() == [1, 2]
        else:
            assert [channel.get(), channel.get()] == [1, 2]
            member.result()
        post.close()
        post.join_thread()
        handle.close()


def _use_handles(post: Any, carrier: Channel, role: str) -> Any:
    by_queue, by_channel = post.get(), carrier.get()
    if role == "receiver":
        return [by_queue.get(), by_channel.get()]
    by_queue.put(1)
    by_channel.put(2)
    return None


# --- who closed against who was waiting


def _wait(channel: Channel, how: str) -> Any:
    """Wait in one of the ways there are; what came of it."""
    try:
        if how == "put":
            return channel.put("more")
        if how == "put_many":
            return channel.put_many(["more"])
        if how == "get":
            return channel.get()
        if how == "get_many":
            return channel.get_many(3)
        if how == "iterate":
            return list(channel)
        if how == "flush":
            channel.put("to be received")
            return channel.flush()
        return channel.wait_for_peers(senders=100)
    except Exception as error:
        return type(error)


def _waits(channel: Channel, how: str) -> Callable[[], bool]:
    awaited = {"put": "space", "put_many": "space", "flush": "event", "peers": "event"}.get(how, "message")
    return lambda: any(person.waiting_for == awaited for person in channel.stats().participants)


SHUT_DOWN = {
    "put": (ChannelClosed, ChannelClosed), "put_many": (ChannelClosed, ChannelClosed),
    "get": (EndOfChannel, EndOfChannel), "get_many": (EndOfChannel, EndOfChannel), "iterate": ([], []),
    "flush": (True, True), "peers": (ChannelClosed, ChannelClosed),
}  # fmt: skip


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("how", SHUT_DOWN)
@pytest.mark.parametrize("method", ["thread", "fork"])
def test_shutdown_wakes_who_waits(method: str, how: str, immediate: bool) -> None:
    with Channel(1, 64) as channel, workers.Crew(method) as crew:
        if how in ("put", "put_many"):
            channel.put("message")
        members = [crew.start(_wait, channel, how) for _ in range(1 if how == "flush" else 3)]
        workers.until(_waits(channel, how))
        channel.shutdown(immediate)
        with pytest.raises(ChannelClosed, match=channel.name):
            channel.put("too late")
        if how in ("put", "put_many", "flush") and not immediate:
            assert channel.get() == ("to be received" if how == "flush" else "message")
        with pytest.raises(EndOfChannel, match="shut down"):
            channel.get()
        assert [member.result() for member in members] == [SHUT_DOWN[how][immediate]] * len(members)
        assert channel.stats().dropped == (immediate and how in ("put", "put_many", "flush"))


@pytest.mark.parametrize("how", SHUT_DOWN)
def test_close_ends_the_waits_of_other_threads_on_the_handle(how: str) -> None:
    with Channel(1, 64) as channel, Channel.attach(channel.name) as handle, workers.Crew("thread") as crew:
        if how in ("put", "put_many"):
            channel.put("message")
        member = crew.start(_wait, handle, how)
        workers.until(_waits(channel, how))
        handle.close()
        assert member.result() is ChannelClosed


@pytest.mark.parametrize("how", [*SHUT_DOWN, "qsize", "stats", "sender", "receiver", "shutdown", "__enter__"])
def test_a_closed_handle_is_refused(how: str) -> None:
    channel = Channel(1, 64)
    channel.close()
    outcome = _wait(channel, how) if how in SHUT_DOWN else _outcome(channel, how, (), {})
    assert outcome is ChannelClosed


@pytest.mark.parametrize("how", ["put", "get"])
def test_close_against_calls_that_never_wait(how: str) -> None:
    outcomes: list[type[Exception]] = []

    def call() -> None:
        try:
            while True:
                with suppress(queue.Full, queue.Empty):
                    handle.put_nowait(1) if how == "put" else handle.get_nowait()
        except Exception as error:
            outcomes.append(type(error))

    with Channel(1, 64, when_full="drop_oldest") as channel:
        for _ in range(50):
            handle = Channel.attach(channel.name)
            with workers.in_threads(call, call):
                workers.until(lambda handle=handle: handle._seat.sent or handle._seat.received)
                handle.close()
    assert set(outcomes) == {ChannelClosed}


def test_shutdown_sends_nothing_that_is_not_received() -> None:
    """What `put` has accepted before a shutdown comes out, in a race of both."""
    for _ in range(20):
        with Channel(2, 64) as channel, workers.Crew("thread") as crew:
            putting = [crew.start(_put_until_closed, channel) for _ in range(2)]
            getting = crew.start(workers.get_all, channel.receiver())
            workers.until(lambda channel=channel: channel.stats().received > 5)
            channel.shutdown()
            assert sum(member.result() for member in putting) == len(getting.result())


def _put_until_closed(channel: Channel) -> int:
    count = 0
    with suppress(ChannelClosed, BrokenChannel):
        while True:
            channel.put(count)
            count += 1
    return count
