"""Finalisers amid calls of their own thread: the collector may run one at any allocation, whatever is locked."""

from __future__ import annotations

import gc
import os
import signal
import threading
from functools import partial
from typing import Any

import pytest
from support import workers
from support.tracer import Tracer

from ringshm import BrokenChannel, Channel
from ringshm.ring.mutex import critical


def _roles(channel: Channel) -> tuple[int, int, int]:
    """How many handles of this process count as senders, receivers, undecided ones."""
    (own,) = [one for one in channel.stats().participants if one.pid == os.getpid()]
    return own.senders, own.receivers, own.undecided


@pytest.mark.parametrize("doomed", ["sender", "receiver", "attach"])
def test_a_handle_that_goes_while_the_roles_are_counted_counts_no_more(doomed: str) -> None:
    seen = 0
    for step in workers.each_step(200):
        with Channel(4, 64) as channel:
            going = [Channel.attach(channel.name) if doomed == "attach" else getattr(channel, doomed)()]
            functions = ("update_roles", "_write_roles", "expected_of", "has_entry", "set_roles")
            with Tracer(going.clear, step, functions=functions, lines=True) as steps:
                other = channel.receiver()
            going.clear()
            assert _roles(channel) == (0, 1, 1), f"step {step}"
            other.close()
        seen += 1
        if steps.count < step:
            break
    assert seen > 10


@workers.may_fork
def test_a_process_waits_for_nobody_whose_handle_went_while_another_was_closed() -> None:
    """The creator closes its handle, and amid that another one goes, of which the child would wait for messages."""
    with workers.Crew("fork") as crew:
        channel = Channel(4, 64)
        mine, theirs = channel.receiver(), channel.receiver()
        going = [Channel.attach(channel.name)]
        sender = channel.sender()
        sender.put("first")
        member = crew.start(workers.get_all, theirs)
        workers.until(lambda: mine.stats().waiting_receivers)
        theirs.close()
        sender.close()
        with Tracer(going.clear, functions=("_write_roles",), fragment="receivers = sum", lines=True):
            channel.close()
        assert member.result() == ["first"]
        mine.close()


@pytest.mark.parametrize("seen", [False, True])
def test_a_borrow_that_is_collected_amid_a_critical_section_leaves_the_mutex_alone(seen: bool) -> None:
    with Channel(4, 64) as channel:
        channel.put(b"first")
        channel.put(b"second")
        borrow = channel.borrow().__enter__()
        if seen:
            assert bytes(borrow.value) == b"first"
        borrow.requeue()
        cycle: list[Any] = [borrow]
        cycle.append(cycle)
        del borrow, cycle
        receivers = channel._open().ring.receivers

        def collect() -> bool:
            gc.collect()
            return receivers.owned()

        assert critical(receivers, collect) is True
        workers.until(lambda: channel.qsize() == 2 or bool(channel._open().reaper.look()))
        assert channel.get_many(2, timeout=10) == [b"first", b"second"]
        assert channel.stats().recoveries == 0


def test_a_borrow_that_is_collected_waits_for_no_thread() -> None:
    """Which may wait for what this one has locked."""
    with Channel(4, 64) as channel:
        channel.put("message")
        borrow = channel.borrow().__enter__()
        borrow.requeue()
        entered, leave = threading.Event(), threading.Event()
        left: list[bool] = []

        def stay() -> None:
            entered.set()
            left.append(leave.wait(20))

        with workers.in_threads(partial(critical, channel._open().ring.receivers, stay)):
            assert entered.wait(60)
            del borrow
            leave.set()
        assert left == [True]
        assert channel.get(timeout=60) == "message"
        assert channel.stats().recoveries == 0


def _drop_what_is_inherited(channel: Channel, inherited: list[Any]) -> tuple[str, bool]:
    workers.stop()
    with channel.borrow(timeout=60) as own:
        value = str(own.value)
        inherited.clear()
        channel._open().reaper.look()
        return value, channel.empty()


@workers.may_fork
@pytest.mark.parametrize("seen", [False, True])
def test_a_borrow_that_a_child_inherits_and_drops_takes_nothing_from_it(seen: bool) -> None:
    with Channel(1, 64) as channel, workers.Crew("fork") as crew:
        channel.put("first")
        borrows = [channel.borrow().__enter__()]
        if seen:
            assert borrows[0].value == "first"
            borrows[0].requeue()
        member = crew.start(_drop_what_is_inherited, channel, borrows)
        assert member.wait_stopped()
        borrows.clear()
        assert channel.get(timeout=60) == "first"
        channel.put("second")
        member.send_signal(signal.SIGCONT)
        assert member.result() == ("second", True)


@pytest.mark.parametrize("seen", [False, True])
def test_a_message_that_its_own_process_feeds_comes_again_where_a_borrow_is_collected(seen: bool) -> None:
    message = bytes(range(250)) * 4
    with Channel(3, 100) as channel, workers.in_threads(partial(channel.put, message, timeout=60)):
        borrow = channel.borrow(timeout=60).__enter__()
        if seen:
            assert bytes(borrow.value) == message
            borrow.requeue()
        del borrow
        assert channel.get(timeout=60) == message


def test_no_thread_waits_for_the_table_for_ever() -> None:
    """The other thread may wait for what this one holds, since a finaliser asks for the table amid anything."""
    with Channel(4, 64) as channel:
        participants, entered, leave = channel._open().participants, threading.Event(), threading.Event()

        def hold() -> None:
            with participants.table() as held:
                assert held
                entered.set()
                leave.wait()

        with workers.in_threads(hold):
            try:
                assert entered.wait(60)
                with participants.table(patience=0) as held:
                    assert not held
                with pytest.raises(BrokenChannel, match="table of participants"), participants.table(patience=0.1):
                    raise AssertionError("it was entered")
            finally:
                leave.set()
        with participants.table(patience=0) as held:
            assert held


@workers.may_fork
def test_who_comes_amid_a_wait_for_the_table_does_not_take_it_for_held() -> None:
    with Channel(4, 64) as channel, workers.Crew("fork") as crew:
        member = crew.start(workers.stop_with_the_table, channel)
        assert member.wait_stopped()
        participants = channel._open().participants
        heard: list[object] = []

        def come() -> None:
            with participants.table(patience=0) as held:
                heard.append(held)
            with pytest.raises(BrokenChannel), participants.table(patience=1):
                raise AssertionError("it was entered")
            member.send_signal(signal.SIGCONT)

        with Tracer(come, functions=("_lock_table",), fragment="sleep("), participants.table() as held:
            heard.append(held)
        assert heard == [False, True]
        member.result()
