"""Processes are killed, stopped and interrupted anywhere; the others go on, and nobody sees half a message."""

from __future__ import annotations

import os
import pickle
import queue
import random
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from support import workers
from support.checks import check_empty, check_full, reap
from support.payloads import trap
from support.tracer import Tracer

from ringshm import Channel
from ringshm.ring.outcomes import CONTENDED

pytestmark = workers.may_fork

LARGE = bytes(100_000)  # copied outside of the critical sections


def _drain(channel: Channel) -> list[Any]:
    """What is there; then every slot must be free, and all of them usable."""
    messages = []
    while not channel.empty():
        messages.append(channel.get())
    stats = channel.stats()
    assert (stats.free, stats.slots, stats.ready) == (channel.capacity, (), 0)
    assert stats.sent == stats.received + stats.dropped
    assert stats.sent_nbytes == stats.received_nbytes or stats.dropped
    for k in range(channel.capacity):
        channel.put_nowait(k)
    assert channel.full()
    assert [channel.get_nowait() for _ in range(channel.capacity)] == list(range(channel.capacity))
    return messages


# --- redelivery


def test_a_message_whose_receiver_died_comes_again_in_its_old_place() -> None:
    with Channel(3, 200) as channel, workers.Crew("fork") as crew:
        channel.put_many(["first", trap(workers.die, "second"), "third"])
        victim = crew.start(workers.get_all, channel)
        victim.process.join()
        assert victim.process.exitcode == -signal.SIGKILL
        reap(channel, 1)
        assert channel.stats().redelivered == 1
        assert _drain(channel) == ["second", "third"]


def test_a_batch_whose_receiver_died_comes_again_in_its_old_order() -> None:
    with Channel(4, 200) as channel, workers.Crew("fork") as crew:
        channel.put_many([1, 2, trap(workers.die, "third"), 4])
        crew.start(channel.get_many, 4).process.join()
        reap(channel, 1)
        assert _drain(channel) == [1, 2, "third", 4]


@pytest.mark.parametrize("deliveries", [1, 2, 3])
def test_a_message_that_kills_its_receivers_is_dropped_in_the_end(deliveries: int) -> None:
    with Channel(3, 200, max_deliveries=deliveries) as channel, workers.Crew("fork") as crew:
        channel.put_many([trap(workers.die, "first"), "second"])
        for k in range(1, deliveries):
            crew.start(channel.get).process.join()
            reap(channel, k)
            assert channel.qsize() == 2
        crew.start(channel.get).process.join()
        with pytest.warns(RuntimeWarning, match=rf"{channel.name}.*dropped 1 .*max_deliveries={deliveries}"):
            reap(channel, deliveries)
        stats = channel.stats()
        assert (stats.dropped, stats.redelivered) == (1, deliveries - 1)
        assert _drain(channel) == ["second"]


def test_flush_counts_a_dropped_message_as_done() -> None:
    with Channel(1, 200, max_deliveries=1) as channel, workers.Crew("fork") as crew:
        channel.put(trap(workers.die, "message"))
        crew.start(channel.get).process.join()
        with pytest.warns(RuntimeWarning, match="dropped"):
            assert channel.flush()


#: Traffic that never waits, each by other calls.
TRAFFIC: dict[str, Callable[[Channel], Any]] = {
    "put, get": lambda channel: (channel.put({"n": 1}), channel.get()),
    "put_many, get_many": lambda channel: (channel.put_many([{"n": 1}] * 2), channel.get_many(2)),
    "put_batch, get_batch": lambda channel: (channel.put_batch({"n": np.arange(2)}), channel.get_batch(2)),
    "loan, borrow": lambda channel: (_lend(channel), _read(channel)),
}


def _lend(channel: Channel) -> None:
    with channel.loan() as loan:
        loan["n"] = 1


def _read(channel: Channel, then: Callable[[], Any] = lambda: None) -> None:
    with channel.borrow():
        then()


@pytest.mark.parametrize("traffic", TRAFFIC)
def test_a_death_is_noticed_while_messages_flow_and_nobody_waits(traffic: str) -> None:
    with Channel(4, spec={"n": np.int64}) as channel, workers.Crew("fork") as crew:
        TRAFFIC[traffic](channel)
        channel.put({"n": 0})
        crew.start(_read, channel, workers.die).process.join()
        assert [slot.state for slot in channel.stats().slots] == ["reading"]

        def noticed() -> bool:
            TRAFFIC[traffic](channel)
            return channel.stats().redelivered == 1

        workers.until(noticed)
        assert channel.stats().reaped == 1


# --- killed while they wait


@pytest.mark.parametrize("killed", ["get", "put"])
def test_who_was_killed_while_it_waited_leaves_nothing_behind(killed: str) -> None:
    with Channel(1, 64, keep_open=True) as channel, workers.Crew("fork") as crew:
        for round_ in range(1, 4):
            if killed == "put":
                channel.put("message")
            victim = crew.start(channel.get) if killed == "get" else crew.start(channel.put, "never")
            survivor = crew.start(channel.get) if killed == "get" else crew.start(channel.put, "message")
            workers.until(lambda: sum(bool(person.waiting_for) for person in channel.stats().participants) == 2)
            victim.kill()
            if killed == "get":
                channel.put("message")
                assert survivor.result() == "message"
            else:
                assert channel.get() == "message"
                survivor.result()
                assert channel.get() == "message"
            reap(channel, round_)
            stats = channel.stats()
            assert (stats.waiting_receivers, stats.waiting_senders) == (0, 0)
            assert _drain(channel) == []


# --- killed inside a mutex

CALLS: dict[str, Callable[[Channel], Any]] = {
    "put": lambda channel: channel.put("the victim's"),
    "get": lambda channel: channel.get(),
    "get many": lambda channel: channel.get_many(2),
}
SENT: dict[str, tuple[str, ...]] = {"put": ("the victim's",), "get": ()}
FOLDERS = ("ring", "channel")


def _call_in_steps(channel: Channel, call: str, step: int, act: Callable[[], None]) -> None:
    channel.full()  # joins, before the steps are counted
    with Tracer(act, step, folders=FOLDERS, lines=True):
        CALLS[call](channel)


@pytest.mark.parametrize("call", ["put", "get"])
def test_calls_that_do_not_wait_recover_a_dead_holders_mutex(call: str) -> None:
    with Channel(2, 64) as channel, workers.Crew("fork") as crew:
        channel.put("message")
        crew.start(workers.act_holding, workers.die, channel, call, *SENT[call]).process.join()
        if call == "put":
            channel.put_nowait("second")
        else:
            assert channel.get_nowait() == "message"


def test_many_survivors_recover_together() -> None:
    counts = [300] * 3
    with Channel(2, 64) as channel, workers.Crew("fork") as crew:
        for s, count in enumerate(counts):
            crew.start(workers.put_numbered, channel, s, count)
        choose = random.Random(1)
        for _ in range(5):
            crew.start(_call_in_steps, channel, "put", choose.randrange(1, 60), workers.die)
        received = list(channel)
    assert received.count("the victim's") <= 5
    rest = [message for message in received if message != "the victim's"]
    for s, count in enumerate(counts):
        assert [k for who, k in rest if who == s] == list(range(count))


def _call_counting_slices(channel: Channel, call: str, barrier: Any) -> int:
    """Make the call together with others; how many slices it waited for the mutex."""
    ring, slices = channel._ring, 0
    name = "send" if call == "put" else "receive"
    attempt = getattr(ring, name)

    def count(*args: Any) -> Any:
        nonlocal slices
        outcome = attempt(*args)
        slices += outcome is CONTENDED
        return outcome

    setattr(ring, name, count)
    barrier.wait()
    CALLS[call](channel)
    return slices


@pytest.mark.parametrize("call", ["put", "get"])
@pytest.mark.parametrize("waiters", [1, 24])
def test_survivors_wait_a_few_slices_however_many_they_are(call: str, waiters: int) -> None:
    with Channel(64, 64) as channel, workers.Crew("fork") as crew:
        if call == "get":
            channel.put_many(range(40))
        victim = crew.start(workers.act_holding, workers.die, channel, call, *SENT[call])
        victim.process.join()
        assert victim.process.exitcode == -signal.SIGKILL
        barrier = crew.context.Barrier(waiters)
        members = [crew.start(_call_counting_slices, channel, call, barrier) for _ in range(waiters)]
        slices = [member.result() for member in members]
        assert max(slices) <= 10
        assert channel.stats().recoveries >= 1  # more if a living holder does not run for two slices: it is suspected


# --- stopped, not dead


@pytest.mark.parametrize("call", ["put", "get"])
def test_a_stopped_holder_is_waited_for_in_vain_but_not_for_ever(call: str) -> None:
    with Channel(4, 64) as channel, workers.Crew("fork") as crew:
        channel.put("first")
        member = crew.start(workers.act_holding, workers.stop, channel, call, *SENT[call])
        assert member.wait_stopped()
        for timeout in (0, 0.2):
            if call == "put":
                check_full(channel.put, "second", timeout=timeout)
                assert channel.put_many(["second"], timeout=timeout) == 0
            else:
                check_empty(channel.get, timeout=timeout)
                check_empty(channel.get_many, 2, timeout=timeout)
        assert channel.qsize() == 1
        assert not channel.flush(timeout=0)
        waiting = crew.start(CALLS[call], channel, method="thread") if call == "put" else None
        member.send_signal(signal.SIGCONT)
        assert member.result() == (None if call == "put" else "first")
        if waiting is not None:
            waiting.result()
        expected = {"put": ["first", "the victim's", "the victim's"], "get": []}[call]
        assert [channel.get() for _ in expected] == expected
        _drain(channel)


def _stop_at_each_step(call: str, stride: int) -> None:
    """Others go on, or time out, while a process stands at any step of a call; then all that was sent is received."""
    for step in workers.each_step(1000):
        with Channel(4, 64) as channel, workers.Crew("fork") as crew:
            channel.put_many([0, 1])
            member = crew.start(_call_in_steps_and_tell, channel, call, stride * step)
            if not member.wait_stopped():
                break
            sent: list[Any] = [0, 1]
            received: list[Any] = []
            for k in (2, 3):
                if channel.put_many([k], timeout=0.3):
                    sent.append(k)
            try:
                received.append(channel.get(timeout=0.3))
            except queue.Empty:
                pass
            member.send_signal(signal.SIGCONT)
            theirs = member.result()
            if call == "put":
                sent.append("the victim's")
            else:
                received += [theirs] if call == "get" else theirs
            received += _drain(channel)
            assert sorted(map(str, received)) == sorted(map(str, sent))
    assert step * stride > 20


def _call_in_steps_and_tell(channel: Channel, call: str, step: int) -> Any:
    channel.full()
    with Tracer(workers.stop, step, folders=FOLDERS, lines=True) as steps:
        result = CALLS[call](channel)
    if steps.count < step:
        os._exit(0)
    return result


@pytest.mark.parametrize("call", ["put", "get", "get many"])
def test_a_process_may_stop_for_any_time_at_any_step(call: str) -> None:
    _stop_at_each_step(call, stride=9)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["put", "get", "get many"])
def test_a_process_may_stop_for_any_time_at_any_line(call: str) -> None:
    _stop_at_each_step(call, stride=1)


# --- interrupted, and living on

MESSAGES = 400


def _put_interrupted(channel: Channel, seed: int, large: bool) -> int:
    """Put 0, 1, 2, …, once more where it was interrupted; how often it was.

    The second time nothing interrupts: a mutex is recovered in some slices, for which somebody must be left in peace.
    """
    with workers.Interrupts(seed, longest=3e-4) as interrupts:
        for k in range(MESSAGES):
            message = (k, LARGE) if large else k
            try:
                interrupts.armed = True
                channel.put(message)
                interrupts.armed = False
            except workers.Interrupt:
                channel.put(message)
    return interrupts.count


def _get_interrupted(channel: Channel, seed: int, limit: int) -> tuple[list[Any], int]:
    """Get up to the message None, once more where it was interrupted, and how often it was."""
    received: list[Any] = []
    with workers.Interrupts(seed, longest=3e-4) as interrupts:
        while not received or received[-1] is not None:
            try:
                if limit == 1:
                    interrupts.armed = True
                    message = channel.get()
                    interrupts.armed = False
                    received.append(message)
                else:
                    interrupts.armed = True
                    batch = channel.get_many(limit)
                    interrupts.armed = False
                    received += batch
            except workers.Interrupt:
                received.append(channel.get())
    return received, interrupts.count


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("capacity", [1, 3])
def test_interrupted_puts_lose_nothing(capacity: int, large: bool) -> None:
    with Channel(capacity, 2 * len(LARGE)) as channel, workers.Crew("fork") as crew:
        sender = crew.start(_put_interrupted, channel, 1, large)
        received = [message[0] if large else message for message in channel]
        interrupts = sender.result()
        assert interrupts
        assert [k for i, k in enumerate(received) if not i or received[i - 1] != k] == list(range(MESSAGES))
        assert len(received) <= MESSAGES + interrupts
        _drain_in_new_handle(channel)


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="CPython 3.10 runs signal handlers also between the return of a call and the store of its result: what "
    "`get` has returned then is lost to the caller",
)
@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("capacity", [1, 3])
def test_interrupted_gets_lose_nothing(capacity: int, limit: int) -> None:
    with Channel(capacity, 64) as channel, workers.Crew("fork") as crew:
        receiver = crew.start(_get_interrupted, channel, 1, limit)
        for k in range(MESSAGES):
            channel.put(k)
        channel.put(None)
        received, interrupts = receiver.result()
        assert interrupts
        assert received == [*range(MESSAGES), None]
        _drain_in_new_handle(channel)


def _drain_in_new_handle(channel: Channel) -> None:
    stats = channel.stats()
    assert (stats.free, stats.slots) == (channel.capacity, ())
    assert not stats.waiting_senders + stats.waiting_receivers


# --- forks


def test_a_child_forked_by_hand_is_a_participant_of_its_own() -> None:
    with Channel(2, 64) as channel:

        def child() -> None:
            assert channel.get() == "to the child"
            channel.put(("from", os.getpid()))

        channel.put("to the child")
        pid = workers.fork_off(child)
        assert channel.flush()
        assert workers.exit_code(pid) == 0
        assert channel.get() == ("from", pid)


def test_the_parent_lives_on_when_its_forked_child_dies_at_once() -> None:
    with Channel(2, 64) as channel:
        for _ in range(10):
            assert workers.exit_code(workers.fork_off(workers.die)) == -signal.SIGKILL
            channel.put("message")
            assert channel.get() == "message"
        with Channel.attach(channel.name) as attached:
            assert attached.empty()
        pids = {person.pid for person in channel.stats().participants if person.alive}
        assert pids == {os.getpid()}


def test_a_fork_while_other_threads_are_inside_calls_disturbs_nobody() -> None:
    counts = [300, 300]
    with Channel(2, 64) as channel, Channel(4, 64) as back:
        received: list[Any] = []

        def get() -> None:
            while len(received) < sum(counts):
                received.append(channel.get())

        def put(s: int) -> None:
            for k in range(counts[s]):
                channel.put((s, k))

        with workers.in_threads(get, partial(put, 0), partial(put, 1)):
            children = [workers.fork_off(lambda k=k: back.put(k)) for k in range(15)]
            answers = [back.get() for _ in children]
        assert [workers.exit_code(pid) for pid in children] == [0] * 15
        assert sorted(answers) == list(range(15))
        for s, count in enumerate(counts):
            assert [k for who, k in received if who == s] == list(range(count))


def test_a_fork_leaves_handles_alone_that_are_on_their_way() -> None:
    with Channel(1, 64).receiver() as receiver:  # the creator is gone: only this process's names are left
        pickled = pickle.dumps(receiver)
        assert workers.exit_code(workers.fork_off(lambda: None)) == 0
        assert len(receiver.stats().on_their_way) == 1
        with pickle.loads(pickled) as arrived:
            assert arrived.name == receiver.name
            assert receiver.stats().on_their_way == ()


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_role_is_taken_by_the_next_call_if_the_first_was_interrupted(role: str) -> None:
    def interrupt() -> None:
        raise workers.Interrupt

    for step in workers.each_step(1000):
        with Channel(1, 64) as channel:
            try:
                with Tracer(interrupt, step, folders=("channel", "process", "ring"), lines=True):
                    _call_as(role, channel)
                break
            except workers.Interrupt:
                _call_as(role, channel)
            (own,) = channel.stats().participants
            assert (own.senders, own.receivers, own.undecided) == ((1, 0, 0) if role == "sender" else (0, 1, 0)), step
    assert step > 10


def _call_as(role: str, channel: Channel) -> None:
    with suppress(queue.Full, queue.Empty):
        channel.put_nowait("message") if role == "sender" else channel.get_nowait()
