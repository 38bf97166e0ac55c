"""Who is woken that a process comes, goes or changes its role: those whose answer it can have changed, nobody else.

Waiters are stopped in their sleep, so that the tokens stay with which others wake them.
"""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.workers import Crew, Member, may_fork, until

from ringshm import BrokenChannel, Channel, EndOfChannel, Latest
from ringshm.process.attachment import Attachment
from ringshm.segment import files, layout

pytestmark = may_fork

CAPACITY = 3
WAITERS = 3
#: The tokens of each kind of waiter, as `_tokens` gives them.
KINDS = {
    "message": (files.MESSAGES, layout.P_WAITING_MESSAGE),
    "space": (files.SPACE, layout.P_WAITING_SPACE),
    "event": (files.EVENTS, layout.P_WAITING_EVENT),
    "piece": (files.PIECES, layout.P_WAITING_PIECE),
    "room": (files.ROOM, layout.P_WAITING_ROOM),
}


def _tokens(attachment: Attachment) -> dict[str, int]:
    """How many waiters are being woken, of each kind of which there are any."""
    values = {kind: attachment.segment.semaphores[index]._get_value() for kind, (index, _) in KINDS.items()}
    return {kind: value for kind, value in values.items() if value}


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _stop_asleep(member: Member, attachment: Attachment, kind: str) -> None:
    """Stop a process while it is announced as a waiter of that kind: it holds nothing then."""
    while True:
        pids, waits = (attachment.participants.column(word) for word in (layout.P_PID, KINDS[kind][1]))
        if member.pid in pids and waits[pids.index(member.pid)]:
            member.send_signal(signal.SIGSTOP)
            until(lambda: _is_stopped(member.pid))
            if attachment.participants.column(KINDS[kind][1])[pids.index(member.pid)]:
                return
            member.send_signal(signal.SIGCONT)


def _end_of(call: Callable[[], Any]) -> str:
    """How a call ends."""
    try:
        return repr(call())
    except (EndOfChannel, BrokenChannel) as error:
        return type(error).__name__


def _get(receiver: Any, *_also_has: Any) -> str:
    return _end_of(receiver.get)


def _put(sender: Any) -> str:
    return _end_of(lambda: sender.put("more"))


def _flush(sender: Any) -> str:
    sender.put("one")
    return _end_of(sender.flush)


def _put_large(sender: Any) -> str:
    return _end_of(lambda: sender.put(bytes(50 * CAPACITY * 1024)))


def _await_senders(channel: Channel, senders: int) -> bool:
    return channel.wait_for_peers(senders=senders)


def _start_waiters(
    crew: Crew, attachment: Attachment, kind: str, wait: Callable[..., Any], *handles: Any
) -> list[Member]:
    """Processes that wait, stopped in their sleep."""
    # a message larger than the ring takes all slots, so that there can be one
    waiters = [crew.start(wait, *handles) for _ in range(1 if kind == "room" else WAITERS)]
    for waiter in waiters:
        _stop_asleep(waiter, attachment, kind)
    while attachment.segment.semaphores[KINDS[kind][0]].acquire(False):
        pass
    attachment.words[layout.ATTENTION] = 0
    return waiters


def _go_on(waiters: list[Member]) -> list[Any]:
    for waiter in waiters:
        waiter.send_signal(signal.SIGCONT)
    return [waiter.result() for waiter in waiters]


# --- nobody


def _send_nothing(sender: Any) -> None:
    sender.put_many([])


def _receive_nothing(receiver: Any) -> None:
    with suppress(queue.Empty):
        receiver.get_nowait()


def _hold(_: Any) -> None:
    """Hold the handle, and leave."""


def _stay(*_: Any) -> None:
    signal.pause()


def _die_idle(handle: Any) -> None:
    _send_nothing(handle)
    os.kill(os.getpid(), signal.SIGKILL)


def _come_and_go(crew: Crew, *handles: Any) -> None:
    """Processes that come with each of these handles, and leave; most in one way or other take a role."""
    for handle in handles:
        works: list[Callable[[Any], None]] = [_hold]
        works += [_send_nothing, _die_idle] if hasattr(handle, "put") else []
        works += [_receive_nothing] if hasattr(handle, "get") and handle.empty() else []
        for work in works:
            member = crew.start(work, handle)
            member.process.join()
            crew.members.remove(member)


def _reap(channel: Channel) -> None:
    """Look for the dead until there are none."""
    attachment = channel._open()
    attachment.reaper.reap()
    assert not attachment.participants.dead()


@pytest.mark.parametrize(
    ("kind", "wait"),
    [("message", _get), ("space", _put), ("event", _flush), ("room", _put_large), ("event", _await_senders)],
    ids=["get", "put", "flush", "put of a large message", "wait for peers"],
)
def test_processes_that_come_and_go_wake_nobody_while_others_are_left(kind: str, wait: Callable[..., Any]) -> None:
    """What each wakes is nothing, so what all of them wake does not grow with those that wait."""
    with Channel(CAPACITY, 1024) as channel, Crew() as crew, channel.sender() as sender, channel.receiver() as receiver:
        attachment = channel._open()
        channel.put("first")
        channel.get()
        handles = {_get: [receiver], _await_senders: [channel, 99]}.get(wait, [sender])
        if wait is _put:
            channel.put_many(range(CAPACITY))
        crew.start(_stay, sender, receiver)
        waiters = _start_waiters(crew, attachment, kind, wait, *handles)
        _come_and_go(crew, channel, sender, receiver)
        _reap(channel)
        assert len(attachment.participants.in_use()) == 2 + len(waiters)
        assert (_tokens(attachment), attachment.words[layout.ATTENTION]) == ({}, 0)


# --- those whose answer it is


@pytest.mark.parametrize("how", ["closes", "exits", "is killed"])
def test_the_last_sender_that_goes_wakes_all_receivers(how: str) -> None:
    with Channel(CAPACITY, 1024) as channel, Crew() as crew:
        attachment, sender = channel._open(), channel.sender()
        waiters = _start_waiters(crew, attachment, "message", _get, channel.receiver())
        with channel.receiver() as witness:
            channel.close()
            assert _tokens(attachment) == {}
            if how == "closes":
                sender.put_many([])
                sender.close()
            else:
                last = crew.start(_die_idle if how == "is killed" else _send_nothing, sender)
                until(lambda: last.process.exitcode is not None or witness.wait_for_peers(senders=1, timeout=0))
                sender.close()
                last.process.join()
                crew.members.remove(last)
                attachment.reaper.reap()
            assert _tokens(attachment) == {"message": WAITERS}
            assert attachment.words[layout.ATTENTION] == 0
            assert _go_on(waiters) == ["EndOfChannel"] * WAITERS


@pytest.mark.parametrize(("kind", "wait"), [("space", _put), ("event", _flush), ("room", _put_large)])
def test_the_last_receiver_that_goes_wakes_all_senders(kind: str, wait: Callable[..., Any]) -> None:
    with Channel(CAPACITY, 1024) as channel, Crew() as crew, channel.sender() as sender:
        attachment, receiver = channel._open(), channel.receiver()
        _receive_nothing(receiver)
        if wait is _put:
            sender.put_many(range(CAPACITY))
        waiters = _start_waiters(crew, attachment, kind, wait, sender)
        receiver.close()
        assert (_tokens(attachment), attachment.words[layout.ATTENTION]) == (
            {},
            1,
        )  # this process may receive, and sends
        channel.close()
        assert (_tokens(attachment), attachment.words[layout.ATTENTION]) == ({kind: len(waiters)}, 1)
        assert _go_on(waiters) == ["BrokenChannel"] * len(waiters)


def test_one_that_waits_and_is_itself_the_last_that_might_send_is_woken() -> None:
    with Channel(CAPACITY, 1024) as channel, Crew() as crew:
        attachment, sender, receiver = channel._open(), channel.sender(), channel.receiver()
        sender.put("first")
        assert receiver.get() == "first"
        waiter = crew.start(_get, receiver, sender)
        _stop_asleep(waiter, attachment, "message")
        sender.close()
        assert _tokens(attachment) == {}
        channel.close()
        assert _tokens(attachment) == {"message": 1}
        receiver.close()
        assert _go_on([waiter]) == ["EndOfChannel"]


def test_a_receiver_that_decides_is_the_last_possible_sender_that_goes() -> None:
    with Channel(CAPACITY, 1024) as channel, Crew() as crew:
        attachment = channel._open()
        receiver = channel.receiver()
        crew.start(_send_nothing, channel.sender()).result()
        waiters = _start_waiters(crew, attachment, "message", _get, receiver)
        with pytest.raises(EndOfChannel):
            channel.get()  # as one that might have sent, it kept the others waiting
        assert _tokens(attachment) == {"message": WAITERS}
        assert _go_on(waiters) == ["EndOfChannel"] * WAITERS


def test_peers_are_told_when_all_that_are_waited_for_have_come_and_not_before() -> None:
    with Channel(CAPACITY, 1024) as channel, Crew() as crew:
        attachment = channel._open()
        waiters = _start_waiters(crew, attachment, "event", _await_senders, channel, 2)
        channel.put_many([])
        assert _tokens(attachment) == {}
        crew.start(_send_nothing_and_stay, channel.sender())
        until(lambda: _tokens(attachment) == {"event": WAITERS})  # which come one by one
        assert _go_on(waiters) == [True] * WAITERS
        assert set(attachment.participants.column(layout.P_AWAITS)) == {0}


def _send_nothing_and_stay(sender: Any) -> None:
    _send_nothing(sender)
    signal.pause()


@pytest.mark.parametrize(("newest", "kind"), [(1, "message"), (2, "space")])
def test_the_last_publisher_that_goes_wakes_those_that_wait_for_the_next_version(newest: int, kind: str) -> None:
    with Latest(1024) as latest, Crew() as crew, Latest.attach(latest.name) as watching:
        attachment = latest._open()
        for version in range(newest):
            latest.publish(version)
        waiters = _start_waiters(crew, attachment, kind, _read_newer, latest, newest)
        assert watching.read()[0] == newest
        latest.close()
        assert _tokens(attachment) == {kind: WAITERS}
        assert _go_on(waiters) == ["EndOfChannel"] * WAITERS


def _read_newer(latest: Latest[Any], version: int) -> str:
    return _end_of(lambda: latest.read(newer_than=version))
