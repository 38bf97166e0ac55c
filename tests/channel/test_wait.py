"""`ringshm.wait`, and `fileno()` in selectors: when a channel is ready, and when not."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import random
import select
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from support import workers
from support.checks import check_empty, check_whole

import ringshm
from ringshm import Channel, ChannelClosed, EndOfChannel, Latest, Receiver, wait
from ringshm.channel import selecting
from ringshm.ring.slots import Ring
from ringshm.segment import fifos
from ringshm.segment.layout import LISTENED, P_LISTENS_MESSAGE, P_WATCHED

pytestmark = workers.may_fork


def readable(channel: Any) -> bool:
    """Whether its descriptor is, now."""
    return bool(select.select([channel], [], [], 0)[0])


# --- wait


def test_those_that_have_a_message_are_returned_in_their_order() -> None:
    channels = [Channel(2, 64) for _ in range(4)]
    assert wait(channels, timeout=0) == []
    assert wait(channels, timeout=0.02) == []
    for number in (3, 1):
        channels[number].put(number)
    assert wait(channels) == wait(iter(channels), timeout=0) == [channels[1], channels[3]]
    assert channels[1].get_nowait() == 1
    assert wait(channels) == [channels[3]]
    for channel in channels:
        channel.close()


def test_nothing_to_wait_for_is_nothing_ready() -> None:
    assert wait([]) == []


def test_one_channel_in_place_of_a_list_is_refused_and_keeps_its_messages() -> None:
    with Channel(1, 64) as channel:
        channel.put("x")
        channel.shutdown()  # else to iterate over it would wait
        with pytest.raises(TypeError, match="give a list of it"):
            wait(channel, timeout=0)  # type: ignore[call-overload]
        assert channel.get_nowait() == "x"


def test_what_is_no_receiving_handle_is_refused() -> None:
    with Channel(1, 64) as channel, channel.sender() as sender, Latest(64) as latest:
        for other in (sender, latest, 3, None):
            with pytest.raises(TypeError, match="wait takes channels and receivers"):
                wait([channel, other], timeout=0)
        with pytest.raises(ValueError, match="timeout"):
            wait([channel], timeout=-1)
    with pytest.raises(ChannelClosed):
        wait([channel])


def test_waiting_takes_the_receivers_role_and_leaves_no_registration() -> None:
    with Channel(1, 64) as channel:
        assert wait([channel], timeout=0.01) == []
        (person,) = channel.stats().participants
        assert (person.receivers, person.waiting_for) == (1, "")
        assert sum(channel._open().participants.column(P_LISTENS_MESSAGE)) == 0
        assert channel.stats().waits == 1


@pytest.mark.parametrize("handles", ["one", "two of one channel"])
def test_a_message_of_another_process_ends_the_wait(handles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "SLICE", 3600.0)  # no lost wake-up is made up for
    with (
        workers.Crew("fork") as crew,
        Channel(2, 64) as channel,
        Channel(2, 64) as other,
        channel.receiver() as receiver,
    ):
        waiting = [other, channel] if handles == "one" else [receiver, other, channel]
        sender = crew.start(workers.put_at_random_times, channel, 0, 500, 0)
        for k in range(500):
            assert wait(waiting) == [handle for handle in waiting if handle is not other]
            assert channel.get_nowait() == (0, k)
        sender.result()


def test_many_channels_are_waited_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "SLICE", 3600.0)
    channels = [Channel(2, 64) for _ in range(30)]

    def send() -> None:
        chance = random.Random(1)
        for k in range(600):
            chance.choice(channels).put(k)

    pid = workers.fork_off(send)
    received: list[int] = []
    while len(received) < 600:
        for channel in wait(channels):
            with suppress(queue.Empty, EndOfChannel):
                received.append(channel.get_nowait())
    assert sorted(received) == list(range(600))
    assert workers.exit_code(pid) == 0
    for channel in channels:
        channel.close()


def _send_one_and_stop(channel: Any) -> None:
    channel.put("hello")
    workers.stop()
    channel.close()


@contextmanager
def of_a_stopped_sender(receivers: int = 1) -> Iterator[tuple[workers.Member, list[Receiver]]]:
    """The only sender of a channel, which is stopped, and its receivers, which have received what it had sent."""
    with workers.Crew("fork") as crew, Channel(2, 64) as channel, ExitStack() as stack:
        receiving = [stack.enter_context(channel.receiver()) for _ in range(receivers)]
        sender = crew.start(_send_one_and_stop, channel.sender())
        channel.close()
        assert sender.wait_stopped()
        assert receiving[0].get() == "hello"
        yield sender, receiving


@pytest.mark.parametrize("how", ["closed", "killed", "shutdown"])
def test_an_ended_channel_is_ready(how: str) -> None:
    with of_a_stopped_sender() as (sender, (receiver,)), Channel(2, 64) as other:
        assert wait([other, receiver], timeout=0.01) == []
        end: Callable[[], None] = {
            "closed": lambda: sender.send_signal(signal.SIGCONT),
            "killed": sender.kill,
            "shutdown": receiver.shutdown,
        }[how]
        threading.Timer(0.02, end).start()
        assert wait([other, receiver]) == [receiver]
        with pytest.raises(EndOfChannel):
            receiver.get()
        assert wait([other, receiver], timeout=0) == [receiver]
        sender.kill()


def test_a_sender_that_was_killed_is_seen_by_a_wait_without_time() -> None:
    with of_a_stopped_sender() as (sender, (receiver,)):
        sender.kill()
        workers.until(lambda: wait([receiver], timeout=0))
        assert receiver.stats().reaped == 1


def test_a_handle_that_another_thread_closes_ends_the_wait() -> None:
    with Channel(1, 64) as channel:
        attached = Channel.attach(channel.name)
        threading.Timer(0.05, attached.close).start()
        with pytest.raises(ChannelClosed):
            wait([channel, attached])


def test_several_threads_wait_for_the_same_channels() -> None:
    def serve() -> list[Any]:
        received = []
        while True:
            for handle in wait([other, receiver]):
                try:
                    received.append(handle.get_nowait())
                except queue.Empty:
                    continue
                except EndOfChannel:
                    return received

    with (
        workers.Crew("thread") as threads,
        workers.Crew("fork") as crew,
        Channel(2, 64) as other,
        Channel(4, 64) as channel,
    ):
        receiver = channel.receiver()
        sender = crew.start(workers.put_numbered, channel.sender(), 0, 500)
        channel.close()
        members = [threads.start(serve) for _ in range(3)]
        sender.result()
        workers.check_delivery([500], [member.result() for member in members])
        receiver.close()


def test_an_idle_wait_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = 0
    look = selecting._look

    def counting(attachments: Any) -> bool:
        nonlocal polls
        polls += 1
        return look(attachments)

    monkeypatch.setattr(selecting, "_look", counting)
    channels = [Channel(1, 64) for _ in range(4)]
    before = workers.voluntary_switches()
    assert wait(channels, timeout=1.0) == []
    switches = workers.voluntary_switches() - before
    print(f"{switches} switches, {polls} looks for the dead")
    assert switches < 4 * polls
    assert polls < 50
    for channel in channels:
        channel.close()


# --- fileno


def test_a_descriptor_is_readable_while_a_message_is_there() -> None:
    with Channel(4, 64) as channel, channel.sender() as sender:
        assert not readable(channel)
        for k in range(4):
            sender.put(k)
            assert readable(channel)
        for k in range(4):
            assert readable(channel)
            assert channel.get() == k
        assert not readable(channel)
        sender.put(4)
        assert readable(channel)
        assert channel.get_many(5) == [4]
        assert not readable(channel)


def test_a_descriptor_asked_for_late_is_readable() -> None:
    with Channel(4, 64) as channel:
        channel.put(1)
        assert readable(channel)
        assert channel.get() == 1
        assert not readable(channel)


def test_every_way_of_receiving_makes_it_unreadable() -> None:
    spec = {"x": np.int64}
    with Channel(4, spec=spec) as channel:
        assert isinstance(channel.fileno(), int)

        def borrow() -> None:
            with channel.borrow():
                pass

        async def aborrow() -> None:
            async with channel.aborrow():
                pass

        ways: list[Callable[[], Any]] = [
            channel.get, channel.get_nowait, lambda: channel.get(out={"x": np.zeros((), np.int64)}),
            lambda: channel.get_many(3), lambda: channel.get_batch(1), borrow, lambda: asyncio.run(channel.aget()),
            lambda: asyncio.run(aborrow()),
        ]  # fmt: skip
        for number, way in enumerate(ways):
            channel.put({"x": number})
            assert readable(channel)
            way()
            assert not readable(channel), number
        channel.put({"x": 1})
        with channel.borrow() as message:
            assert not readable(channel)
            message.requeue()
        assert readable(channel)


def test_a_message_that_another_receiver_took_makes_it_readable_once_in_vain() -> None:
    with Channel(2, 64, keep_open=True) as channel:
        assert not readable(channel)

        def take() -> None:
            attached = Channel.attach(channel.name)
            attached.put(1)
            assert attached.get() == 1

        assert workers.exit_code(workers.fork_off(take)) == 0
        assert readable(channel)
        check_empty(channel.get_nowait)
        assert not readable(channel)
        channel.put(2)
        assert readable(channel)


def test_handles_have_their_own_descriptors_which_close_with_them() -> None:
    with Channel(2, 64) as channel:
        receivers = [channel.receiver() for _ in range(2)]
        fds = [receiver.fileno() for receiver in receivers]
        assert fds == [receiver.fileno() for receiver in receivers]
        assert len(set(fds)) == 2
        channel.put(1)
        assert readable(receivers[0])
        assert readable(receivers[1])
        receivers[0].close()
        with pytest.raises(ChannelClosed):
            receivers[0].fileno()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fds[0])
        assert readable(receivers[1])
        assert receivers[1].get() == 1
        assert not readable(receivers[1])
        receivers[1].close()
        words = channel._open().words
        assert words[channel._open().participants.entry + P_WATCHED] == 0


def test_a_handle_that_is_forgotten_closes_its_descriptor() -> None:
    with Channel(2, 64) as channel:
        fd = channel.receiver().fileno()
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_child_has_its_own_descriptor() -> None:
    with Channel(2, 64) as channel:
        fd = channel.fileno()

        def child() -> None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
            assert not readable(channel)
            channel.put("from the child")
            assert readable(channel)

        assert workers.exit_code(workers.fork_off(child)) == 0
        assert readable(channel)
        assert channel.get() == "from the child"
        assert not readable(channel)


@pytest.mark.parametrize("selector", [selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector])
def test_a_selector_serves_channels_and_sockets_together(selector: Any) -> None:
    """With no time-out: a lost wake-up would be a hang."""
    here, there = socket.socketpair()
    channels = [Channel(2, 64) for _ in range(3)]

    pids = [
        workers.fork_off(partial(workers.put_at_random_times, channels[number], number, 400, number))
        for number in range(3)
    ]
    views: list[list[Any]] = [[] for _ in channels]
    with selector() as watching:
        watching.register(here, selectors.EVENT_READ)
        for number, channel in enumerate(channels):
            watching.register(channel, selectors.EVENT_READ, number)
        there.send(b"x")
        vain = bytes_read = 0
        while sum(map(len, views)) < 1200 or not bytes_read:
            for key, _ in watching.select():
                if key.fileobj is here:
                    bytes_read += len(here.recv(1))
                    continue
                try:
                    views[key.data].append(key.fileobj.get_nowait())  # type: ignore[union-attr]
                except queue.Empty:
                    vain += 1
                except EndOfChannel:  # which makes it readable for good
                    watching.unregister(key.fileobj)
    for number, pid in enumerate(pids):
        assert workers.exit_code(pid) == 0
        workers.check_delivery([0] * number + [400], [views[number]])
    print(f"{vain} readable in vain")
    assert vain < 400  # by those who came and went, and by who was faster
    for channel in channels:
        channel.close()
    here.close()
    there.close()


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_add_reader_calls_back_while_messages_are_there(kind: str) -> None:
    async def main() -> list[Any]:
        received: list[Any] = []
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def ready() -> None:
            with suppress(queue.Empty):
                received.append(channel.get_nowait())
            if len(received) == 500:
                done.set()

        loop.add_reader(channel.fileno(), ready)
        await done.wait()
        loop.remove_reader(channel.fileno())
        return received

    loop = asyncio.new_event_loop() if kind == "asyncio" else pytest.importorskip("uvloop").new_event_loop()
    with workers.Crew("fork") as crew, Channel(2, 64) as channel:
        sender = crew.start(workers.put_at_random_times, channel, 0, 500, 0)
        assert loop.run_until_complete(main()) == [(0, k) for k in range(500)]
        sender.result()
    loop.close()


@pytest.mark.parametrize("how", ["closed", "shutdown"])
def test_the_end_makes_it_readable_and_it_stays_so(how: str) -> None:
    with of_a_stopped_sender(2) as (sender, (receiver, second)):
        assert not readable(receiver)
        assert not readable(second)
        if how == "closed":
            sender.send_signal(signal.SIGCONT)
        else:
            receiver.shutdown()
        for _ in range(3):
            for handle in (receiver, second):
                while True:  # who comes and goes makes it readable too
                    assert select.select([handle], [], [])[0] == [handle]
                    try:
                        handle.get_nowait()
                    except queue.Empty:
                        continue
                    except EndOfChannel:
                        break
        sender.kill()


def test_a_killed_sender_makes_it_readable_once_somebody_looks() -> None:
    with of_a_stopped_sender() as (sender, (receiver,)):
        assert not readable(receiver)
        sender.kill()
        workers.until(lambda: receiver.wait_for_peers(senders=9, timeout=0.01) or receiver.stats().reaped)
        assert readable(receiver)
        with pytest.raises(EndOfChannel):
            receiver.get_nowait()


def test_an_interrupt_while_a_descriptor_is_made_unreadable_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any) -> bytes:
        raise workers.Interrupt

    spec = {"x": np.int64}
    ways: list[tuple[Callable[[Channel], Any], Callable[[Any], int]]] = [
        (Channel.get, lambda got: got["x"]),
        (lambda channel: channel.get_many(4), lambda got: got[0]["x"]),
        (lambda channel: channel.get_batch(1), lambda got: got["x"][0]),
    ]
    for way, number_of in ways:
        with Channel(4, spec=spec) as channel:
            fd = channel.fileno()
            channel.put({"x": 7})
            with monkeypatch.context() as patch:
                patch.setattr(selecting.Listener, "drain", interrupted)
                with pytest.raises(workers.Interrupt):
                    way(channel)
            assert select.select([fd], [], [], 0)[0] == [fd]
            assert number_of(way(channel)) == 7
            check_empty(channel.get_nowait)
            assert not readable(channel)


def test_nobody_pays_while_nobody_listens() -> None:
    with Channel(2, 64) as channel, channel.receiver() as receiver:
        channel.put(1)
        assert receiver.get() == 1
        assert type(channel._open().ring) is Ring
        assert channel._open().words[LISTENED] == 0
        nonce = channel._open().segment.nonce
        assert not [name for name in workers.ringshm_files() if name.startswith(f"{fifos.PREFIX}{nonce}")]


def test_more_descriptors_than_there_are_bits_are_refused() -> None:
    with Channel(2, 64) as channel:
        receivers = [channel.receiver() for _ in range(65)]
        for receiver in receivers[:64]:
            receiver.fileno()
        with pytest.raises(OSError, match="64 event loops"):
            receivers[64].fileno()
        receivers[0].close()
        assert receivers[64].fileno() >= 0
        channel.put(1)
        assert readable(receivers[64])
        for receiver in receivers:
            receiver.close()
        check_whole(channel, 1)


def test_wait_is_of_the_package() -> None:
    assert ringshm.wait is wait
    assert "wait" in ringshm.__all__
