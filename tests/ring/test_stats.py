"""What `stats()` says of a channel that stands still: who holds what, who waits, who died."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from support.checks import reap
from support.payloads import trap
from support.tracer import Tracer
from support.workers import Crew, act_holding, die, may_fork, stop, until

from ringshm import Channel, EndOfChannel, Latest, ParticipantStats
from ringshm.ring.mutex import ORDERED_STORES
from ringshm.ring.participants import Participants
from ringshm.ring.stats import take_stats
from ringshm.segment.files import Segment

pytestmark = may_fork


def _person(channel: Channel, pid: int) -> ParticipantStats:
    (person,) = (person for person in channel.stats().participants if person.pid == pid)
    return person


@pytest.mark.parametrize(("call", "mutex"), [("put", "senders"), ("get", "receivers")])
def test_who_holds_a_mutex_is_named_and_since_when(call: str, mutex: str) -> None:
    with Channel(4, 64) as channel, Crew("fork") as crew:
        channel.put("first")
        before = time.monotonic()
        holder = crew.start(act_holding, stop, channel, call, *(["message"] if call == "put" else []))
        assert holder.wait_stopped()
        time.sleep(0.1)
        person = _person(channel, holder.pid)
        assert (person.holds, person.alive) == ((mutex,) if ORDERED_STORES else ("senders", "receivers"), True)
        assert person.called is not None
        assert 0.1 <= person.called <= time.monotonic() - before
        holder.send_signal(signal.SIGCONT)
        holder.result()
        assert all(not person.holds for person in channel.stats().participants)


def _stop_copying(channel: Channel) -> None:
    channel.full()
    with Tracer(stop, folders=("ring",), when=lambda: bool(channel.stats().slots)):
        channel.put(bytes(200_000))


@pytest.mark.parametrize("state", ["reading", "writing"])
def test_who_reads_or_writes_a_slot_is_named_and_since_when(state: str) -> None:
    with Channel(2, 200_000) as channel, Crew("fork") as crew:
        if state == "reading":
            channel.put(trap(stop, "decoded"))
        before = time.monotonic()
        member = crew.start(channel.get) if state == "reading" else crew.start(_stop_copying, channel)
        assert member.wait_stopped()
        time.sleep(0.1)
        (slot,) = channel.stats().slots
        assert (slot.state, slot.pid, slot.alive) == (state, member.pid, True)
        assert slot.seconds is not None
        assert 0.1 <= slot.seconds <= time.monotonic() - before
        member.send_signal(signal.SIGCONT)
        assert member.result() == ("decoded" if state == "reading" else None)
        if state == "writing":
            assert channel.get() == bytes(200_000)
        assert channel.stats().slots == ()


@pytest.mark.parametrize(("call", "what"), [("get", "message"), ("put", "space"), ("flush", "event")])
def test_who_waits_is_named_for_what_and_since_when(call: str, what: str) -> None:
    with Channel(1, 64, keep_open=True) as channel, Crew("fork") as crew:
        if call == "put":
            channel.put("first")
        before = time.monotonic()
        waiter = crew.start(_wait, channel, call)
        until(lambda: any(person.waiting_for for person in channel.stats().participants))
        time.sleep(0.1)
        people: list[ParticipantStats] = []  # between two slices of its wait it waits for nothing
        until(lambda: people.append(_person(channel, waiter.pid)) or people[-1].waiting_for)
        person = people[-1]
        assert (person.waiting_for, person.waits > 0) == (what, True)
        assert person.called is not None
        assert 0.1 <= person.called <= time.monotonic() - before
        channel.put("message") if call == "get" else channel.get()
        waiter.result()


def _wait(channel: Channel, call: str) -> None:
    if call == "put":
        channel.put("second")
    elif call == "get":
        channel.get()
    else:
        channel.put("sent")
        assert channel.flush()


def test_the_dead_are_named_first_as_such_and_then_as_reaped() -> None:
    with Channel(2, 200) as channel, Crew("fork") as crew:
        channel.put("message")
        victim = crew.start(_die_decoding, channel)
        victim.process.join()
        stats = channel.stats()
        assert [person.pid for person in stats.dead] == [victim.pid]
        (slot,) = stats.slots
        assert (slot.pid, slot.alive) == (victim.pid, False)
        assert (stats.deaths, stats.last_receiver_gone) == ((), None)

        reap(channel, 1)
        stats = channel.stats()
        assert (stats.dead, stats.slots) == ((), ())
        (death,) = stats.deaths
        assert (death.pid, death.senders, death.receivers, death.slots) == (victim.pid, 0, 1, 1)
        assert death.seconds >= 0
        assert str(stats.last_receiver_gone) == f"process {victim.pid} died"
        assert channel.get() == "message"


@pytest.mark.parametrize("what", ["put", "get", "read"])
def test_who_has_died_while_it_waited_waits_no_more(what: str) -> None:
    made: Any = Latest(64) if what == "read" else Channel(1, 64)
    with made as handle, Crew("fork") as crew:
        if what == "put":
            handle.put("fills it")
        victim = crew.start(getattr(handle, what), *(["another"] if what == "put" else []))
        until(lambda: _waiting(handle) == 1)
        victim.kill()
        assert [person.pid for person in handle.stats().dead] == [victim.pid]  # nobody has reaped it
        assert _waiting(handle) == 0


def _waiting(handle: Any) -> int:
    stats = handle.stats()
    return int(stats.waiting_receivers + getattr(stats, "waiting_senders", 0))


def test_a_channel_whose_senders_have_died_says_so() -> None:
    with Channel(2, 64) as channel, channel.receiver() as receiver, Crew("fork") as crew:
        sender = channel.sender()
        victim = crew.start(_put_and_die, sender)
        sender.close()
        victim.process.join()
        assert [(person.pid, person.alive) for person in receiver.stats().dead] == [(victim.pid, False)]
        reap(channel, 1)
        assert str(receiver.stats().last_sender_gone) == f"process {victim.pid} died"
        assert receiver.get() == "message"
        with pytest.raises(EndOfChannel, match=f"no sender any more: process {victim.pid} died"):
            receiver.get()
        command = [sys.executable, "-m", "ringshm", "stats", channel.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.search(rf"^died +{victim.pid}, found [\d.]+ s ago; handles: sender; ", told, re.MULTILINE), told


def _put_and_die(sender: Any) -> None:
    sender.put("message")
    die()


def _die_decoding(channel: Channel) -> None:
    channel.full()
    with Tracer(die, folders=("messages",)):
        channel.get()


def test_the_last_deaths_are_kept_newest_first() -> None:
    with Channel(2, 64) as channel, Crew("fork") as crew:
        pids = []
        for count in range(1, 11):
            victim = crew.start(channel.get)
            until(lambda: channel.stats().waiting_receivers)
            victim.kill()
            pids.append(victim.pid)
            reap(channel, count)
        deaths = channel.stats().deaths
        assert [death.pid for death in deaths] == pids[::-1][: len(deaths)]
        assert len(deaths) == 8
        ages = [death.seconds for death in deaths]
        assert ages == sorted(ages)


def test_a_process_that_only_closed_has_gone_and_not_died() -> None:
    with Channel(2, 64, keep_open=True) as channel, Crew("fork") as crew:
        member = crew.start(_send_and_close, channel)
        member.result()
        stats = channel.stats()
        assert str(stats.last_sender_gone) == f"process {member.pid} closed its handle or exited"
        assert (stats.deaths, stats.last_receiver_gone, stats.shut_down) == ((), None, False)
        assert (stats.keep_open, stats.on_their_way) == (True, ())
        pickled = pickle.dumps(channel)
        channel.shutdown()
        stats = channel.stats()
        (on_its_way,) = stats.on_their_way
        assert (stats.shut_down, on_its_way.role, on_its_way.maker) == (True, "undecided", os.getpid())
        assert (on_its_way.pid, on_its_way.started) == (0, False)
        assert re.search(r"test_stats\.py:\d+$", on_its_way.place)
        pickle.loads(pickled).close()
        assert channel.stats().on_their_way == ()


def _send_and_close(channel: Channel) -> None:
    channel.put("message")
    channel.close()


def test_an_observer_sees_what_a_participant_sees_and_changes_nothing() -> None:
    with Channel(3, 64) as channel:
        channel.put("message")
        assert channel.get() == "message"
        channel.put("another")
        before = bytes(channel._ring.words)
        segment = Segment.observe(channel.name)
        seen = take_stats(segment, Participants(segment))
        assert bytes(channel._ring.words) == before
        own = channel.stats()
        assert [(person.pid, person.alive) for person in seen.participants] == [(os.getpid(), True)]
        assert (seen.sent, seen.received, seen.free, seen.ready) == (2, 1, 2, 1)
        assert (own.sent, own.received, own.free, own.ready) == (2, 1, 2, 1)
        with pytest.raises(TypeError):
            segment.words[0] = 0
