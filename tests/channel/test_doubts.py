"""Waits that may never end: which of them say so, and what they say."""

from __future__ import annotations

import asyncio
import pickle
import queue
import re
import signal
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from support import workers
from support.checks import check_whole
from support.workers import get_some

from ringshm import Channel, Latest, Queue
from ringshm.channel import doubts

pytestmark = [workers.may_fork, pytest.mark.usefixtures("soon")]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts, "SECONDS", 0.1)


def doubt_of(call: Callable[[], Any]) -> str:
    """The doubt of a call, which raises it, since warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(RuntimeWarning) as caught:
            call()
    return str(caught.value)


def _fill(channel: Channel) -> None:
    for number in range(channel.capacity):
        channel.put(number)


def _receive_own(channel: Channel) -> Any:
    channel.put("x")
    assert channel.get() == "x"
    return channel.get()


def _large(channel: Channel) -> None:
    channel.put(bytes(1000))


IN_VAIN: dict[str, tuple[Callable[[Channel], Any], str]] = {
    "get": (lambda channel: channel.get(), "the ring is empty.*Only this process itself could send: start a sender"),
    "get after put": (_receive_own, r"by the handle made at .*test_doubts\.py:\d+: close what it does not need"),
    "borrow": (lambda channel: channel.borrow().__enter__(), "Only this process itself could send"),
    "for": (lambda channel: list(channel), "Only this process itself could send"),
    "put": (lambda channel: [_fill(channel), channel.put("more")], "the ring is full: 2 of 2 slots.*"
            "no receiver is attached.*Only this thread itself could receive"),
    "put_many": (lambda channel: channel.put_many(range(3)), "Only this thread itself could receive"),
    "a large message": (_large, "Only this thread itself could receive"),
    "flush": (lambda channel: [channel.put(1), channel.flush()], "Only this thread itself could receive"),
    "aget": (lambda channel: asyncio.run(channel.aget()), "Only this process itself could send"),
}  # fmt: skip


@pytest.mark.parametrize("how", IN_VAIN)
def test_a_call_that_only_its_own_process_could_end_says_so_and_leaves_the_channel_whole(how: str) -> None:
    call, text = IN_VAIN[how]
    with Channel(2, 64) as channel:
        doubt = doubt_of(lambda: call(channel))
        assert re.search(rf"channel '{channel.name}': this call has waited for \d+ s: .*{text}", doubt), doubt
        left = []
        while not channel.empty():
            left.append(channel.get_nowait())
        assert left == {"put": [0, 1], "put_many": [0, 1], "flush": [1]}.get(how, [])
        check_whole(channel)


def test_a_reader_of_a_latest_that_nobody_publishes_says_so() -> None:
    with Latest(64) as latest:
        assert "Only this process itself could send" in doubt_of(lambda: latest.read())
        assert latest.publish(1) == 1
        assert latest.read() == (1, 1)


@pytest.mark.parametrize("end", ["killed", "exited"])
def test_a_put_into_a_queue_whose_workers_have_all_gone_says_so(end: str) -> None:
    with workers.Crew("fork") as crew:
        tasks: Queue[int] = Queue(2)
        pair = [crew.start(_get_one_and_end, tasks, end) for _ in range(2)]
        for _ in pair:
            tasks.put(0)
        for worker in pair:
            worker.process.join()
        for number in range(2):
            tasks.put(number)
        doubt = doubt_of(lambda: tasks.put(2))
        went = "died" if end == "killed" else "closed its handle or exited"
        assert re.search(rf"the ring is full.*Nobody is left who would receive \(process \d+ {went}\): start", doubt)
        tasks.put_many([], timeout=0.1)
        with pytest.raises(queue.Full):
            tasks.put(2, timeout=0.5)  # a time limit never warns
        assert crew.start(get_some, tasks, 2).result() == [0, 1]  # it goes on with new workers
        tasks.close()


def _get_one_and_end(tasks: Queue[int], end: str) -> None:
    tasks.get()
    if end == "killed":
        workers.die()


def test_the_warning_comes_once_and_names_the_users_line() -> None:
    with Channel(1, 64) as channel, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timer = threading.Timer(0.5, lambda: channel.put("at last"))
        timer.start()
        assert channel.get() == "at last"
        timer.join()
    (warning,) = caught
    assert warning.filename == __file__
    assert issubclass(warning.category, RuntimeWarning)


def _hold(channel: Any) -> None:
    signal.pause()


HONEST = ["a time limit", "a name", "a child that starts", "a child that may send", "keep_open", "on its way"]


@pytest.mark.parametrize("why", HONEST)
def test_an_honest_wait_says_nothing(why: str, name: str) -> None:
    options: dict[str, Any] = {"a name": {"name": name}, "keep_open": {"keep_open": True}}.get(why, {})
    with Channel(1, 64, **options) as channel, workers.Crew("fork") as crew, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        if why == "a child that starts":
            crew.start(_hold, channel.sender(), method="spawn")
        elif why == "a child that may send":
            crew.start(_hold, channel)
        elif why == "on its way":
            pickle.dumps(channel)
        if why == "a time limit":
            with pytest.raises(queue.Empty):
                channel.get(timeout=0.5)
        else:
            timer = threading.Timer(0.5, partial(channel.put, "work"))
            timer.start()
            assert channel.get() == "work"
            timer.join()


def test_who_waits_for_a_stopped_process_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(doubts, "SECONDS", 1.5)  # a slot that is read for a second is told of
    with Channel(1, 64, name=name) as channel, workers.Crew("fork") as crew:
        channel.put("held")
        member = crew.start(_borrow_and_stop, channel)
        assert member.wait_stopped()
        doubt = doubt_of(lambda: channel.put("more"))
        assert re.search(rf"{member.pid}.* is stopped", doubt), doubt
        member.send_signal(signal.SIGCONT)
        member.result()
        assert not channel.full()


def _borrow_and_stop(channel: Channel) -> None:
    with channel.borrow():
        workers.stop()
