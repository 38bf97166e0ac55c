"""Who dies, or is interrupted, between two stores that belong together leaves nobody with the half of it.

The sweeps of tests/kills do this at each operation; here are the calls of which others learn only by a further store.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from support import workers
from support.tracer import Tracer
from support.workers import may_fork

import ringshm
from ringshm import BrokenChannel, Channel, Sender, SpecMismatch

#: Slots: more than are filled until a sender looks round. In a full ring, a `put` finds out by itself.
_MANY = 4096


def _is_broken(sender: Sender) -> bool:
    """Whether a `put` says so."""
    assert not sender.full()
    try:
        sender.put_nowait("to nobody")
    except BrokenChannel:
        return True
    return False


def _get_and_close(channel: Channel, step: int) -> bool:
    """Whether the close took fewer steps; or else this process dies at that one."""
    receiver = channel.receiver()
    channel.close()
    receiver.get()
    calls = ("_leave", "remove", "update_roles", "set_roles", "ended", "_wake_if_last", "closed")
    with Tracer(workers.die, step, functions=calls, lines=True) as steps:
        receiver.close()
    return steps.count < step


@may_fork
def test_wherever_the_last_receiver_dies_in_its_close_senders_are_told() -> None:
    for step in workers.each_step(400):
        with Channel(_MANY, 64) as channel, channel.sender() as sender, workers.Crew("fork") as crew:
            receiver = crew.start(_get_and_close, channel, step)
            sender.put("first")
            channel.close()
            if survived := receiver.process.join() or not receiver.process.exitcode:
                assert receiver.result() is True
            workers.until(lambda sender=sender: _is_broken(sender))
            assert _is_broken(sender)
        if survived:
            break
    assert step > 20


@pytest.fixture
def broken() -> Any:
    """A sender without a receiver, which has been told so."""
    with Channel(_MANY, 64) as channel, channel.sender() as sender, workers.Crew("fork") as crew:
        crew.start(_get_one, channel)
        sender.put("first")
        channel.close()
        crew.results()
        workers.until(lambda: _is_broken(sender))
        yield sender


def _get_one(channel: Channel) -> None:
    receiver = channel.receiver()
    channel.close()
    receiver.get()
    receiver.close()


@may_fork
def test_put_many_is_told_that_no_receiver_is_left_as_put_is(broken: Sender) -> None:
    for _ in range(3):
        with pytest.raises(BrokenChannel) as told:
            broken.put_many(["to", "nobody"], timeout=0.1)
        assert told.value.sent == 0  # type: ignore[attr-defined]
        assert _is_broken(broken)


@may_fork
def test_a_sender_that_is_interrupted_as_it_is_told_is_told_again(broken: Sender) -> None:
    for step in workers.each_step(1000):
        with (
            suppress(KeyboardInterrupt, BrokenChannel),
            Tracer(workers.interrupt, step, folders=("channel",), lines=True) as steps,
        ):
            broken.put("to nobody")
        workers.until(lambda: _is_broken(broken))
        if steps.count < step:
            break
    assert step > 20


def test_senders_are_told_when_the_child_that_was_to_receive_dies_before_it_attaches() -> None:
    with Channel(_MANY, 64) as channel, channel.sender() as sender, channel.receiver() as receiver:
        child = multiprocessing.get_context("spawn").Process(target=_receive, args=(receiver,))
        child.start()
        channel.close()
        receiver.close()
        sender.put("first")
        child.kill()
        child.join()
        workers.until(lambda: _is_broken(sender))
        assert _is_broken(sender)


def _receive(receiver: Any) -> None:
    receiver.get()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where a generator is being closed
@pytest.mark.parametrize("lines", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lines", "bytecodes"])
def test_a_close_that_is_interrupted_anywhere_ends_the_handles_role(lines: bool) -> None:
    for step in workers.each_step(3000):
        with Channel(2, 64) as channel, channel.receiver():
            sender = channel.sender()
            sender.put("first")
            with (
                suppress(KeyboardInterrupt),
                Tracer(workers.interrupt, step, folders=("channel", "process", "ring"), lines=lines) as steps,
            ):
                sender.close()
            sender.close()
            (here,) = channel.stats().participants
            assert here.senders == 0, f"step {step}: the handle still counts"
        if steps.count < step:
            break
    assert step > 100


def test_a_call_that_is_interrupted_as_it_makes_its_fifo_leaves_none() -> None:
    before = workers.ringshm_files()
    for step in workers.each_step(1000):
        with (
            Channel(2, 64) as channel,
            channel.receiver() as receiver,
            suppress(KeyboardInterrupt),
            Tracer(workers.interrupt, step, functions=("_make", "make")) as steps,
        ):
            receiver.fileno()
        assert workers.ringshm_files() == before, f"step {step}"
        if steps.count < step:
            break
    assert step > 50


def _borrow_and_requeue(channel: Channel) -> None:
    with channel.borrow(timeout=1) as message:
        message.requeue()


def _borrow_and_requeue_as_an_error_is_handled(channel: Channel) -> None:
    try:
        raise LookupError
    except LookupError:
        _borrow_and_requeue(channel)


def _fail_to_get(channel: Channel) -> None:
    with suppress(SpecMismatch):
        channel.get(out=np.zeros(5), timeout=1)


@pytest.mark.parametrize("fail", [_fail_to_get, _borrow_and_requeue, _borrow_and_requeue_as_an_error_is_handled])
def test_a_message_that_is_given_back_amid_an_interrupt_is_there(fail: Any) -> None:
    calls = ("_put_back", "_insert", "_store_and_count")
    for step in workers.each_step(1000):
        with Channel(2, 4096) as channel:
            channel.put(np.arange(3.0))
            interrupted = False
            with Tracer(workers.interrupt, step, functions=calls, lines=True) as steps:
                try:
                    fail(channel)
                except KeyboardInterrupt:
                    interrupted = True
            assert interrupted == (steps.count >= step), f"step {step}: Ctrl-C is lost"
            assert channel.get(timeout=10).tolist() == [0, 1, 2], f"step {step}"
        if steps.count < step:
            break
    assert step > 15


def test_what_has_gone_back_and_been_taken_again_does_not_go_back_for_an_interrupt() -> None:
    with Channel(2, 64) as channel:
        channel.put("message")
        others: list[Any] = []

        def take_and_interrupt() -> None:
            others.append(channel.borrow(timeout=10).__enter__())
            raise KeyboardInterrupt

        with (
            pytest.raises(KeyboardInterrupt),
            Tracer(take_and_interrupt, functions=("requeue",), fragment="elif self.words[layout.MESSAGE_HINT]"),
        ):
            _borrow_and_requeue(channel)
        assert channel.empty()
        (other,) = others
        assert (other.value, other.delivery_count) == ("message", 1)
        other.__exit__(None, None, None)
        assert not channel.stats().slots


def test_an_interrupt_amid_the_end_of_a_put_whose_time_is_up_is_told_and_nothing_is_sent() -> None:
    calls = (
        "take_back",
        "withdraw",
        "mark",
        "mark_and_drop",
        "_drop_ready",
        "_free_and_count",
        "wake_freed",
        "discard",
    )
    for step in workers.each_step(1000):
        with Channel(3, 100) as channel, channel.receiver():
            interrupt: BaseException | None = None
            with Tracer(workers.interrupt, step, functions=calls, lines=True) as steps:
                try:
                    assert channel.put_many([bytes(1000)], timeout=0.02) == 0  # it has written all that has room
                except KeyboardInterrupt as error:
                    interrupt = error
            assert (interrupt is not None) == (steps.count >= step), f"step {step}: Ctrl-C is lost"
            assert interrupt is None or interrupt.sent == 0, f"step {step}"  # type: ignore[attr-defined]
            channel.put("next")
            assert channel.get(timeout=10) == "next", f"step {step}"
            workers.until(lambda channel=channel: not channel.stats().slots)
        if steps.count < step:
            break
    assert step > 30


def _put_in_vain(tasks: Any) -> None:
    """Stop where the message has left its slot, and is not counted as withdrawn."""
    with suppress(queue.Full), Tracer(workers.stop, functions=("_store_and_count",), fragment="words[counter] = total"):
        tasks.put(bytes(100_000), timeout=0.1)


@may_fork
def test_a_task_that_is_being_withdrawn_is_not_taken_for_lost() -> None:
    with workers.Crew("fork") as crew:
        tasks = ringshm.JoinableQueue(4, slot_size=4096)
        sender = crew.start(_put_in_vain, tasks)
        assert sender.wait_stopped()
        assert tasks._channel.join(timeout=0.3) is False
        sender.send_signal(signal.SIGCONT)
        sender.result()
        assert tasks._channel.join(timeout=10) is True
        tasks.close()


def test_a_task_that_comes_and_is_done_while_join_counts_disturbs_it_not() -> None:
    for step in workers.each_step(200):
        tasks = ringshm.JoinableQueue(4, slot_size=4096)

        def do_another(tasks: Any = tasks) -> None:
            tasks.put("another")
            tasks.get()
            tasks.task_done()

        with Tracer(do_another, step, functions=("unfinished", "_over")) as steps:
            assert tasks._channel.join(timeout=10) is True
        tasks.close()
        if steps.count < step:
            break
    assert step > 10
