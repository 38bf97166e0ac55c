"""Streams end as pipes do: when nobody is left, or may still come, who would send or receive."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from support import workers
from support.checks import check_empty, check_full
from support.payloads import Unpickles
from support.tracer import Tracer

from ringshm import BrokenChannel, Channel, EndOfChannel, Receiver, Sender, create_shared_memory_pair

pytestmark = workers.may_fork


def _put_after(channel: Channel, event: Any, *messages: Any) -> None:
    event.wait()
    workers.put_each(channel, *messages)


def _slow_start(_: None, channel: Channel, *messages: Any) -> None:
    workers.put_each(channel, *messages)


# --- who may still come


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_stream_waits_for_a_child_that_starts_slowly(method: str) -> None:
    with Channel(2, 64) as channel, workers.Crew(method) as crew:
        # as a child that imports a lot before it comes to its channel
        crew.start(_slow_start, Unpickles(time.sleep, 0.5), channel, "late")
        crew.start(workers.put_each, channel, "early", method="fork").result()
        receiver = crew.start(workers.get_all, channel, method="fork")
        channel.close()
        assert receiver.result() == ["early", "late"]


@pytest.mark.parametrize("method", workers.METHODS)
def test_the_stream_waits_for_an_actor_that_has_not_put_yet(method: str) -> None:
    with Channel(2, 64) as channel, workers.Crew(method) as crew:
        begin = crew.context.Event()
        crew.start(_put_after, channel, begin, "second")
        crew.start(workers.put_each, channel, "first").result()
        assert channel.get() == "first"
        check_empty(channel.get, timeout=0.2)
        begin.set()
        assert list(channel) == ["second"]


def test_the_stream_waits_for_a_child_that_has_just_been_forked() -> None:
    for _ in range(30):
        with Channel(2, 64) as channel, workers.Crew("fork") as crew:
            crew.start(workers.put_each, channel, "first").result()
            receiver = crew.start(workers.get_all, channel)
            crew.start(workers.put_each, channel, "second")
            channel.close()
            assert receiver.result() == ["first", "second"]


def test_a_parents_loop_ends_when_its_last_actor_has() -> None:
    for method in workers.METHODS:
        with Channel(4, 64) as channel, workers.Crew(method) as crew:
            for s in range(3):
                crew.start(workers.put_numbered, channel, s, 20)
            assert sorted(channel) == [(s, k) for s in range(3) for k in range(20)]
            with pytest.raises(EndOfChannel, match=r"no sender any more: process \d+ closed"):
                channel.get()


@pytest.mark.parametrize("method", workers.METHODS)
def test_children_go_on_when_their_parent_closes_first(method: str) -> None:
    with Channel(2, 64) as channel, workers.Crew(method) as crew:
        receiver = crew.start(workers.get_all, channel)
        sender = crew.start(workers.put_numbered, channel, 0, 100)
        channel.close()
        assert receiver.result() == [(0, k) for k in range(100)]
        sender.result()


def _stage(source: Receiver, sink: Sender) -> int:
    count = 0
    for message in source:
        sink.put(message + 1)
        count += 1
    return count


@pytest.mark.parametrize("method", workers.METHODS)
def test_a_pipeline_of_three_stages_ends_from_front_to_back(method: str) -> None:
    with Channel(2, 64) as one, Channel(1, 64) as two, Channel(3, 64) as three, workers.Crew(method) as crew:
        stages = [crew.start(_stage, one.receiver(), two.sender()), crew.start(_stage, two.receiver(), three.sender())]
        feeder = crew.start(workers.put_each, one.sender(), *range(50))
        one.close()
        two.close()
        assert list(three.receiver()) == [k + 2 for k in range(50)]
        feeder.result()
        assert [stage.result() for stage in stages] == [50, 50]


def test_a_child_does_not_count_for_handles_that_it_inherited_by_accident() -> None:
    with Channel(2, 64) as channel, Channel(1, 64) as other, workers.Crew("fork") as crew:
        stays = crew.start(_put_after, other, crew.context.Event(), "never")
        crew.start(workers.put_each, channel, "message").result()
        assert list(channel) == ["message"]
        assert stays.process.is_alive()


def _put_to_the_global_after(_: Channel, event: Any) -> None:
    event.wait()
    _put_to_the_global()


def _put_to_the_global() -> None:
    _global[0].put("second")


_global: list[Channel] = []


@pytest.mark.parametrize("how", ["closure", "global"])
def test_a_child_counts_for_handles_that_its_function_leads_to(how: str) -> None:
    with Channel(2, 64) as channel, Channel(1, 64) as other, workers.Crew("fork") as crew:
        begin = crew.context.Event()

        def put_to_the_enclosed(_: Channel) -> None:
            begin.wait()
            channel.put("second")

        _global[:] = [channel]
        crew.start(put_to_the_enclosed, other) if how == "closure" else crew.start(
            _put_to_the_global_after, other, begin
        )
        _global.clear()
        crew.start(workers.put_each, channel, "first").result()
        assert channel.get() == "first"
        check_empty(channel.get, timeout=0.2)
        begin.set()
        assert list(channel) == ["second"]


def _pickle_and_wait(channel: Channel, end: str, pickled: Any, leave: Any) -> None:
    receiver = channel.receiver()
    pickle.dumps(channel)
    channel.close()
    pickled.set()
    leave.wait()
    if end == "closes":
        receiver.close()
        leave.clear()
        leave.wait()
    elif end == "dies":
        workers.die()


@pytest.mark.parametrize("end", ["closes", "exits", "dies"])
def test_a_handle_that_was_never_unpickled_counts_until_its_maker_goes(end: str) -> None:
    with Channel(2, 64) as channel, workers.Crew("fork") as crew:
        pickled, leave = crew.context.Event(), crew.context.Event()
        crew.start(_pickle_and_wait, channel, end, pickled, leave)
        pickled.wait()
        crew.start(workers.put_each, channel, "message").result()
        assert channel.get() == "message"
        check_empty(channel.get, timeout=0.3)
        leave.set()
        with pytest.raises(EndOfChannel):
            channel.get()
        leave.set()


def test_keep_open_outlives_everybody_but_the_creator() -> None:
    with Channel(2, 64, keep_open=True) as channel, workers.Crew("fork") as crew:
        for message in ("first", "second"):
            crew.start(workers.put_each, channel, message).result()
            assert channel.get() == message
            check_empty(channel.get, timeout=0.15)
        crew.start(workers.put_each, channel, "third").result()
        assert crew.start(workers.get_some, channel, 1).result() == ["third"]
        for message in ("fourth", "fifth"):
            crew.start(workers.put_each, channel, message).result()
        receiver = crew.start(workers.get_all, channel)
        channel.close()
        assert receiver.result() == ["fourth", "fifth"]


def test_keep_open_keeps_senders_waiting_for_the_next_receiver() -> None:
    with Channel(1, 64, keep_open=True) as channel, workers.Crew("fork") as crew:
        channel.put("first")
        crew.start(workers.get_some, channel, 1).result()
        channel.put("second")
        check_full(channel.put, "third", timeout=0.15)
        assert not channel.flush(timeout=0.15)
        assert crew.start(workers.get_some, channel, 1).result() == ["second"]


# --- one process


def test_a_process_that_puts_and_gets_through_one_handle_keeps_the_stream_open() -> None:
    with Channel(2, 64) as channel:
        channel.put("message")
        assert channel.get() == "message"
        check_empty(channel.get, timeout=0.15)
        with channel.receiver() as receiver:
            channel.close()
            with pytest.raises(EndOfChannel):
                receiver.get()


def test_a_receiver_waits_for_the_first_sender() -> None:
    with Channel(1, 64) as channel, channel.receiver() as receiver:
        channel.close()
        check_empty(receiver.get, timeout=0.15)
        check_empty(receiver.get_nowait)


def test_a_pair_ends_within_one_process() -> None:
    sender, receiver = create_shared_memory_pair(2, slot_size=64)
    sender.put(1)
    sender.put(2)
    assert not sender.has_space()
    assert not sender.wait_for_all_ack(timeout=0)
    assert receiver.get_nowait() == 1
    sender.close()
    assert list(receiver) == [2]
    receiver.close()


def test_a_pair_serves_two_threads() -> None:
    sender, receiver = create_shared_memory_pair(2, slot_size=64)
    with workers.in_threads(partial(workers.put_numbered, sender, 0, 200)):
        assert workers.get_all(receiver) == [(0, k) for k in range(200)]


@pytest.mark.parametrize("method", workers.METHODS)
def test_a_pair_serves_two_processes(method: str) -> None:
    sender, receiver = create_shared_memory_pair(2, slot_size=64)
    with workers.Crew(method) as crew:
        there = crew.start(workers.put_numbered, sender, 0, 50)
        sender.close()
        assert list(receiver) == [(0, k) for k in range(50)]
        there.result()
    receiver.close()


# --- how it broke


def test_a_sender_is_told_that_the_receiver_has_closed() -> None:
    with Channel(2, 64) as channel, workers.Crew("fork") as crew:
        channel.put("message")
        receiver = crew.start(workers.get_some, channel, 1)
        receiver.result()
        with pytest.raises(BrokenChannel, match=rf"{channel.name}.*no receiver.*process {receiver.pid} closed"):
            _put_forever(channel)


def test_a_sender_is_told_that_the_receiver_was_killed() -> None:
    with Channel(2, 64) as channel, workers.Crew("fork") as crew:
        receiver = crew.start(workers.get_some, channel, 2)
        channel.put("message")
        assert channel.flush()
        receiver.kill()
        with pytest.raises(BrokenChannel, match=rf"no receiver.*process {receiver.pid} died"):
            _put_forever(channel)


def test_a_receiver_is_told_that_the_sender_was_killed() -> None:
    with Channel(1, 64) as channel, workers.Crew("fork") as crew:
        sender = crew.start(workers.put_each, channel, "first", "second")
        workers.until(lambda: channel.stats().waiting_senders)
        sender.kill()
        assert channel.get() == "first"
        with pytest.raises(EndOfChannel, match=rf"no sender.*process {sender.pid} died"):
            channel.get()


def _put_forever(channel: Channel) -> None:
    while True:
        channel.put("more")


@pytest.mark.parametrize("how", ["exits", "is killed"])
@pytest.mark.parametrize("call", ["put", "flush"])
def test_a_waiting_sender_wakes_when_the_last_receiver_goes(call: str, how: str) -> None:
    with Channel(1, 64) as channel, workers.Crew("fork") as crew:
        leave = crew.context.Event()
        receiver = crew.start(_get_and_wait, channel, leave)
        channel.put("taken")
        sender = crew.start(_broken, channel, call)
        workers.until(lambda: channel.stats().received == 1 and channel.full() and sender.pid in _waiting(channel))
        channel.close()
        if how == "exits":
            leave.set()
        else:
            receiver.kill()
        assert f"process {receiver.pid} {'died' if how == 'is killed' else 'closed'}" in sender.result()


def _get_and_wait(channel: Channel, leave: Any) -> None:
    channel.get()
    leave.wait()


def _broken(channel: Channel, call: str) -> str:
    try:
        channel.put("fills the ring")
        channel.put("waits") if call == "put" else channel.flush()
    except BrokenChannel as error:
        return str(error)
    return "not broken"


def _waiting(channel: Channel) -> set[int]:
    return {person.pid for person in channel.stats().participants if person.waiting_for}


# --- interleavings: the receiver stands at each step of its look at who is left, while somebody else comes


@pytest.mark.parametrize("how", ["decides", "is forked"])
def test_nobody_is_missed_who_comes_while_a_receiver_looks_who_is_left(how: str) -> None:
    for step in workers.each_step(400):
        with Channel(2, 64) as channel, workers.Crew("fork") as crew:
            begin = crew.context.Event()
            crew.start(workers.put_each, channel, "first").result()
            receiver = crew.start(_get_in_steps, channel, step)
            if not receiver.wait_stopped():
                break
            if how == "decides":
                late = crew.start(_put_after, channel.sender(), begin, "second", method="thread")
            else:
                late = crew.start(_put_after, channel, begin, "second")
            channel.close()
            receiver.send_signal(signal.SIGCONT)
            looked = receiver.wait_stopped()
            begin.set()
            late.result()
            del late
            crew.members.pop()
            assert looked, "the receiver has ended"
            receiver.send_signal(signal.SIGCONT)
            assert receiver.result() == ["first", "second"]
    assert step > 10


def _get_in_steps(channel: Channel, step: int) -> list[Any]:
    """Get two messages; stop at that step of the look for the second, and again after that look."""
    first = channel.get()
    looks = (
        "_check_receivers", "over_for_receivers", "_all_gone", "others_may", "others_have", "invited", "drained_for",
    )  # fmt: skip
    with suppress(queue.Empty), Tracer(workers.stop, step, functions=looks, lines=True) as steps:
        return [first, channel.get_nowait()]
    if steps.count < step:  # nobody came: the parent waits for this process to stop, or to end
        os._exit(0)
    workers.stop()
    return [first, channel.get()]


# --- interrupted between the slot's word and the ring


def _lend(channel: Channel) -> None:
    with channel.loan() as loan:
        loan.buffer[:3] = b"abc"
        loan.nbytes = 3


#: Calls that publish, and where they are between the two: a function, and a fragment of its line.
PUBLISHING: dict[str, tuple[Callable[[Channel], Any], str, str]] = {
    "put": (lambda channel: channel.put("x"), "send", "words[self._ring + (tail & self._mask)] = slot"),
    "put many": (lambda channel: channel.put_many(["x", "y"]), "send_each", "words[TAIL] = tail = tail + 1"),
    "put large": (
        lambda channel: channel.put(bytes(200_000)),
        "_append",
        "words[self._ring + (tail & self._mask)] = slot",
    ),
    "loan": (_lend, "_append", "words[TAIL] = tail + 1"),
}


def _be_interrupted(channel: Channel, call: str, then: str) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    send, function, fragment = PUBLISHING[call]
    channel.put_many([])  # takes the role
    with pytest.raises(KeyboardInterrupt), Tracer(interrupt, functions=(function,), fragment=fragment):
        send(channel)
    if then == "flush":
        assert channel.flush()
    elif then == "die":
        workers.die()
    channel.close()


@pytest.mark.parametrize("call", PUBLISHING)
@pytest.mark.parametrize("then", ["close", "flush", "die"])
def test_what_was_interrupted_while_it_was_published_arrives_and_the_stream_ends(call: str, then: str) -> None:
    """The mutex is left without its token, and nobody but receivers is there to see it."""
    with Channel(3, 256 * 1024) as channel, channel.receiver() as receiver, workers.Crew("fork") as crew:
        member = crew.start(_be_interrupted, channel.sender(), call, then)
        channel.close()
        assert len([*receiver]) == 1
        member.process.join()
        assert member.process.exitcode == (-signal.SIGKILL if then == "die" else 0)
        stats = receiver.stats()
        assert (stats.free, stats.sent, stats.received) == (3, 1, 1)
