"""Why a channel stands still: the sentences, for made-up channels and for real ones that were brought to it."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

import pytest
from support.workers import Crew, act_holding, die, fork_off, may_fork, stop, until

from ringshm import Channel
from ringshm.ring.diagnosis import Finding, Process, diagnose, process_of
from ringshm.ring.mutex import ORDERED_STORES
from ringshm.ring.stats import ChannelStats, Departure, OnTheirWay, ParticipantStats, SlotStats

pytestmark = may_fork

EMPTY = ChannelStats(
    sent=10, sent_nbytes=0, received=10, received_nbytes=0, withdrawn=0, dropped=0, redelivered=0, capacity=4, free=4,
    ready=0, pieces=0, slots=(), waiting_senders=0, waiting_receivers=0, waits=0, recoveries=0, recovering=False,
    shut_down=False, keep_open=False, on_their_way=(), reaped=0, deaths=(), last_sender_gone=None,
    last_receiver_gone=None, participants=(),
)  # fmt: skip
FULL = dataclasses.replace(EMPTY, sent=14, free=0, ready=4)
ELAPSED = 0.2


def person(pid: int, **changes: Any) -> ParticipantStats:
    one = ParticipantStats(pid, True, 0, 0, 0, False, "", (), None, 0, attached=100.0)
    return dataclasses.replace(one, **changes)


def earlier(stats: ChannelStats) -> ChannelStats:
    """The same channel a moment before, when nothing else was different."""

    def before(seconds: float | None) -> float | None:
        return None if seconds is None else seconds - ELAPSED

    people = [
        dataclasses.replace(one, attached=one.attached - ELAPSED, called=before(one.called))
        for one in stats.participants
    ]
    slots = [dataclasses.replace(slot, seconds=before(slot.seconds)) for slot in stats.slots]
    return dataclasses.replace(stats, participants=tuple(people), slots=tuple(slots))


def find(stats: ChannelStats, processes: dict[int, Process] | None = None, **changes: Any) -> list[Finding]:
    stats = dataclasses.replace(stats, **changes)
    return diagnose(earlier(stats), stats, processes)


SENDER = person(7, senders=1, called=0.3)
WAITING_SENDER = person(8, senders=1, waiting_for="space", called=5.0)
RECEIVER = person(9, receivers=1, called=12.3)
WAITING_RECEIVER = person(5, receivers=1, waiting_for="message", called=3.0)
UNDECIDED = person(6, undecided=1, may_receive=True)
STOPPED = {9: Process("learner", "T")}
RUNNING = {9: Process("learner", "R")}

STUCK: list[tuple[str, ChannelStats, dict[str, Any], dict[int, Process], list[str]]] = [
    (
        "no receiver takes anything", FULL, {"participants": (WAITING_SENDER, RECEIVER), "waiting_senders": 3}, {},
        ["the ring is full: 4 of 4 slots", "3 threads wait for space (pid 8)", "receiver began 12.3 s ago (pid 9)"],
    ),
    (
        "the last receiver died", FULL,
        {"participants": (WAITING_SENDER,), "waiting_senders": 1, "last_receiver_gone": Departure(123, True)}, {},
        ["1 thread waits for space", "no receiver is attached; the last one: process 123 died"],
    ),
    (
        "there has been no receiver", FULL, {"participants": (SENDER,)}, {},
        ["no receiver is attached, nor has there been one"],
    ),
    (
        "somebody has not decided", FULL, {"participants": (WAITING_SENDER, UNDECIDED), "waiting_senders": 1}, {},
        ["pid 6 holds the handle that made the channel, so may still receive"],
    ),
    (
        "a receiver has another handle, that may still send", EMPTY,
        {"participants": (WAITING_RECEIVER, person(4, receivers=1, undecided=1)), "waiting_receivers": 1}, {},
        ["nor has one been; pid 4 holds a handle that has neither sent nor received yet, so may still send"],
    ),
    (
        "a handle is on its way to a child", FULL,
        {
            "participants": (WAITING_SENDER,), "waiting_senders": 1,
            "on_their_way": (OnTheirWay("receiver", 8, 77, True, 70.0, "train.py:12"),),
        }, {},
        ["a handle of process 77, which was started 70.0 s ago at train.py:12 and has not", "yet, may still receive"],
    ),
    (
        "a handle is on its way to nobody in particular", EMPTY,
        {
            "participants": (WAITING_RECEIVER,), "waiting_receivers": 1,
            "on_their_way": (OnTheirWay("undecided", 8, 0, False, 3.0, "train.py:9"),),
        }, {},
        ["a handle that process 8 pickled 3.0 s ago at train.py:9, and that counts until it", "own, may still send"],
    ),
    (
        "the receiver sends itself", FULL,
        {"participants": (person(8, senders=1, receivers=1, waiting_for="space", called=5.0),), "waiting_senders": 1},
        {}, ["all receivers wait for space themselves (pid 8)"],
    ),
    (
        "a message larger than a slot waits and nobody is there to receive it",
        dataclasses.replace(FULL, free=1, ready=1, pieces=2), {"participants": (WAITING_SENDER,), "waiting_senders": 1},
        {},
        ["pid 8 waits until a message larger than a slot is received; no receiver is attached, nor has there been one"],
    ),
    (
        "the ring is full of a message larger than a slot", dataclasses.replace(FULL, ready=1, pieces=3),
        {"participants": (WAITING_SENDER,), "waiting_senders": 1}, {},
        ["the ring is full: 1 of 4 slots hold messages that wait, and 3 hold pieces of messages larger than a slot"],
    ),
    (
        "messages wait and nobody is there to receive them", dataclasses.replace(FULL, free=3, ready=1),
        {"participants": (SENDER,), "last_receiver_gone": Departure(123, False)}, {},
        ["1 message waits; no receiver is attached; the last one: process 123 closed its handle or exited"],
    ),
    (
        "no sender is left", EMPTY,
        {"participants": (WAITING_RECEIVER,), "waiting_receivers": 1, "last_sender_gone": Departure(77, True)}, {},
        ["the ring is empty; 1 thread waits for a message (pid 5)", "the last one: process 77 died"],
    ),
    (
        "the senders are idle", EMPTY,
        {"participants": (WAITING_RECEIVER, person(7, senders=1, called=60.0)), "waiting_receivers": 1}, {},
        ["the latest call of a sender began 60.0 s ago (pid 7)"],
    ),
    (
        "a stopped process holds a mutex", EMPTY,
        {"participants": (SENDER, person(9, receivers=1, holds=("receivers",), called=3.2))}, STOPPED,
        ["process 9 (learner, state T) holds the receivers' mutex since at most 3.2 s ago", "kill -CONT 9"],
    ),
    (
        "a slow process holds a mutex", EMPTY,
        {"participants": (person(9, senders=1, holds=("senders",), called=3.2),)}, RUNNING,
        ["process 9 (learner, state R) holds the senders' mutex", "short of a core"],
    ),
    (
        "a dead process holds a mutex", EMPTY,
        {"participants": (SENDER, person(9, alive=False, senders=1, holds=("senders",), called=3.2))}, {},
        ["process 9 died while it held the senders' mutex", "1 participant (pid 9) died and is not reaped yet"],
    ),
    (
        "a stopped process has slots", dataclasses.replace(EMPTY, free=2),
        {"participants": (RECEIVER,), "slots": tuple(SlotStats(k, "reading", 9, True, 60.0) for k in (2, 3))}, STOPPED,
        ["has been reading (decoding, or borrowing) slots 2, 3 for 60.0 s and is stopped", "kill -CONT 9"],
    ),
    (
        "views keep all slots",
        dataclasses.replace(EMPTY, free=0),
        {
            "participants": (RECEIVER, WAITING_SENDER),
            "waiting_senders": 1,
            "slots": tuple(SlotStats(k, "kept", 9, True, 60.0) for k in range(4)),
        },
        {},
        ["process 9 keeps views of slots 0, 1, 2, 3", "all slots are in use"],
    ),
    (
        "everybody has died", FULL, {"participants": (person(9, alive=False, receivers=1),)}, {},
        ["no process that uses this channel is alive; 4 messages unread", "ringshm clean"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stats", "changes", "processes", "texts"), [case[1:] for case in STUCK], ids=[c[0] for c in STUCK]
)
def test_what_is_stuck_is_told(
    stats: ChannelStats, changes: dict[str, Any], processes: dict[int, Process], texts: list[str]
) -> None:
    problems = " | ".join(finding.text for finding in find(stats, processes, **changes) if finding.problem)
    for text in texts:
        assert text in problems


def test_the_most_telling_comes_first() -> None:
    holder = person(9, receivers=1, holds=("receivers",), called=3.2)
    findings = find(FULL, STOPPED, participants=(WAITING_SENDER, holder), waiting_senders=1)
    assert "mutex" in findings[0].text
    assert "full" in findings[1].text
    assert [finding.problem for finding in findings] == sorted((f.problem for f in findings), reverse=True)


WELL: list[tuple[str, ChannelStats, dict[str, Any]]] = [
    ("idle", EMPTY, {"participants": (SENDER, RECEIVER)}),
    ("a receiver waits for a sender that is at it", EMPTY, {"participants": (SENDER, WAITING_RECEIVER)}),
    ("a short hold", EMPTY, {"participants": (person(7, senders=1, called=0.0, holds=("senders",)),)}),
    ("shut down", EMPTY, {"participants": (SENDER,), "shut_down": True}),
    ("somebody flushes", EMPTY, {"participants": (person(7, senders=1, waiting_for="event", called=9.0),)}),
    (
        "a long borrow while others go on",
        EMPTY,
        {"participants": (RECEIVER,), "free": 3, "slots": (SlotStats(0, "reading", 9, True, 9.0),)},
    ),
]


@pytest.mark.parametrize(("stats", "changes"), [case[1:] for case in WELL], ids=[case[0] for case in WELL])
def test_what_is_well_is_no_problem(stats: ChannelStats, changes: dict[str, Any]) -> None:
    after = dataclasses.replace(stats, **changes)
    before = dataclasses.replace(earlier(after), participants=earlier(stats).participants)
    findings = diagnose(before, after)
    assert findings
    assert not any(finding.problem for finding in findings)


def test_a_mutex_held_in_two_different_calls_is_not_held_for_long() -> None:
    before = dataclasses.replace(EMPTY, participants=(person(7, senders=1, called=0.1, holds=("senders",)),))
    after = dataclasses.replace(
        EMPTY, participants=(person(7, senders=1, called=0.1, holds=("senders",), attached=100.0 + ELAPSED),)
    )
    assert not any(finding.problem for finding in diagnose(before, after))


def test_a_full_ring_that_moves_is_merely_slow() -> None:
    after = dataclasses.replace(FULL, sent=24, received=20, participants=(WAITING_SENDER, RECEIVER), waiting_senders=1)
    findings = diagnose(FULL, after)
    assert not any(finding.problem for finding in findings)
    assert "10 messages sent and 10 received" in findings[-1].text


def test_a_handle_of_who_waits_alone_ends_no_wait() -> None:
    people = (person(5, receivers=1, undecided=1, waiting_for="message", called=3.0),)
    (finding, *_) = find(EMPTY, participants=people, waiting_receivers=1)
    assert finding.text.endswith("no other process is attached as sender, nor has one been")


def test_many_pids_are_cut_short() -> None:
    people = tuple(person(pid, senders=1, waiting_for="space", called=1.0) for pid in range(100, 150))
    text = find(FULL, participants=people, waiting_senders=50)[0].text
    assert "pids 100, 101, 102, 103, 104, 105, 106, 107 and 42 more" in text


# --- real ones


def look(channel: Channel) -> str:
    """The problems of a channel of which nothing moves, as text."""
    before, after = channel.stats(), channel.stats()
    attachment = channel._attachment
    assert attachment is not None
    identity = attachment.segment.file.identity
    pids = [one.pid for one in after.participants]
    processes = {pid: process for pid in pids if (process := process_of(pid, identity)) is not None}
    return " | ".join(finding.text for finding in diagnose(before, after, processes) if finding.problem)


@pytest.mark.parametrize(("what", "stats"), [("space", FULL), ("message", EMPTY)])
def test_who_looks_round_between_two_slices_of_a_wait_still_waits(what: str, stats: ChannelStats) -> None:
    senders, receivers = int(what == "space"), int(what == "message")
    one = person(8, senders=senders, receivers=receivers, called=5.0)
    waiting = dataclasses.replace(one, waiting_for=what)
    before = earlier(
        dataclasses.replace(stats, participants=(waiting,), waiting_senders=senders, waiting_receivers=receivers)
    )
    after = dataclasses.replace(stats, participants=(one,))
    assert f"1 thread waits for {'a message' if what == 'message' else what} (pid 8)" in diagnose(before, after)[0].text
    moved = dataclasses.replace(after, participants=(dataclasses.replace(one, called=0.1),))
    assert "1 thread waits" not in " ".join(finding.text for finding in diagnose(before, moved))


def test_senders_that_wait_while_the_receiver_is_away_are_told_with_their_pids() -> None:
    with Channel(2, 64) as channel, Crew("fork") as crew:
        for k in range(2):
            channel.put(k)
        child = crew.start(channel.put, 2)
        said: list[str] = []  # the child waits for nothing before it blocks, and for a moment between two slices
        until(lambda: said.append(look(channel)) or "waits for space" in said[-1])
        says = said[-1]
        assert "2 of 2 slots hold messages that wait; 1 thread waits for space" in says
        assert f"pid {child.pid}" in says
        assert "no receiver is attached" in says
        assert [channel.get() for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(("mutex", "call"), [("senders", ("put", "second")), ("receivers", ("get",))])
def test_who_holds_a_mutex_and_is_stopped_is_told(mutex: str, call: tuple[str, ...]) -> None:
    with Channel(4, 64) as channel, Crew("fork") as crew:
        channel.put("first")
        child = crew.start(act_holding, stop, channel, *call)
        assert child.wait_stopped()
        says = look(channel)
        assert f"process {child.pid} (" in says
        held = mutex if ORDERED_STORES else "senders and the receivers"  # which are one
        assert f"state T) holds the {held}' mutex" in says
        assert f"kill -CONT {child.pid}" in says
        child.send_signal(signal.SIGCONT)
        child.result()
        assert "mutex" not in look(channel)


def test_the_dead_that_nobody_has_reaped_are_told() -> None:
    with Channel(4, 64) as channel:
        pid = fork_off(lambda: (channel.put(1), die()))
        assert os.waitpid(pid, 0)[0] == pid
        assert f"1 participant (pid {pid}) died and is not reaped yet" in look(channel)


def test_a_process_that_has_not_the_segment_open_is_not_described() -> None:
    with Channel(1, 64) as channel:
        attachment = channel._attachment
        assert attachment is not None
        device, inode = attachment.segment.file.identity
        own = process_of(os.getpid(), (device, inode))
        assert own is not None
        assert (own.state, own.stopped) == ("R", False)
        assert process_of(os.getpid(), (device, inode + 1_000_000)) is None  # the pid is somebody else's
        assert process_of(2**22 + 1, (device, inode)) is None
