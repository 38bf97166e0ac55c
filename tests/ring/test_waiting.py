"""How calls wait: spinning while it pays, asleep otherwise, and never in the way of other threads."""

from __future__ import annotations

import os
import queue
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.workers import Crew, Member, may_fork, until

from ringshm import Channel
from ringshm.ring.spin import SPIN_LOOKS, SPIN_RETRY, Spin

pytestmark = may_fork

two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nobody spins")


@two_cores
def test_a_spin_that_does_not_pay_is_given_up_and_tried_again_now_and_then() -> None:
    spin = Spin("adaptive")
    assert spin.looks == SPIN_LOOKS
    while spin.looks:
        spin.wasted()
    waits = 0
    while not spin.looks:
        waits += 1
    assert 0 < waits < SPIN_RETRY
    assert spin.looks == SPIN_LOOKS
    spin.wasted()
    assert 0 < spin.looks < SPIN_LOOKS
    for _ in range(20):
        spin.paid()
    assert spin.looks == SPIN_LOOKS


@two_cores
def test_two_who_answer_each_other_and_have_given_up_find_back() -> None:
    """In a model of a machine that wakes a sleeper in 40 us, and where one who is awake answers in 1."""
    spins = Spin("adaptive"), Spin("adaptive")
    for spin in spins:
        while spin.looks:
            spin.wasted()
    asleep = [True, True]
    for turn in range(8 * SPIN_RETRY):
        one, other = turn % 2, 1 - turn % 2
        looks = spins[one].looks
        asleep[one] = looks * 0.03 < (40 if asleep[other] else 1)
        if looks and asleep[one]:
            spins[one].wasted()
        elif looks:
            spins[one].paid()
    assert asleep == [False, False]


def test_block_never_spins_and_spin_always_does() -> None:
    block, spin = Spin("block"), Spin("spin")
    for _ in range(2 * SPIN_RETRY):
        assert block.looks == 0 and spin.looks == SPIN_LOOKS
        spin.wasted()
    spin.adapt_to(10_000)
    assert spin.looks == SPIN_LOOKS


@two_cores
def test_nobody_spins_while_more_processes_send_and_receive_than_there_are_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    with Channel(4, 64) as channel, Crew() as crew:
        spins = channel._send_spin, channel._receive_spin
        channel.put(1)
        channel._look_around()
        assert all(spin.looks == SPIN_LOOKS for spin in spins)
        assert channel.get() == 1
        waiting = [crew.start(channel.receiver().get) for _ in range(cores)]
        until(lambda: channel.stats().waiting_receivers == cores)
        channel._look_around()
        assert all(spin.looks == 0 for spin in spins)
        for number in range(cores):
            channel.put(number)
        assert sorted(member.result() for member in waiting) == list(range(cores))
        until(lambda: len(channel.stats().participants) == 1)
        channel._look_around()
        assert all(spin.looks == SPIN_LOOKS for spin in spins)


def _switches(pid: int) -> int:
    """How often a process has gone to sleep by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("voluntary")).split()[1])


def _on_core(pid: int) -> float:
    """Its time on a core, in seconds, as the scheduler counts it: what ticks say of so short times is chance."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _start_waiter(crew: Crew, channel: Channel, call: str) -> Member:
    if call == "put":
        channel.put(0)
    message = bytes(1000) if "larger" in call else 1
    return crew.start(channel.get) if call == "get" else crew.start(channel.put, message)


@pytest.mark.parametrize("wait", ["adaptive", "block"])
@pytest.mark.parametrize("call", ["get", "put", "put larger than the ring"])
def test_an_idle_waiter_hardly_uses_its_core(wait: str, call: str) -> None:
    """It wakes up once a slice of 50 ms, and then for some 0.1 ms: less than a tick in half a second."""
    with Channel(1, 64, wait=wait, keep_open=True) as channel, Crew() as crew:
        waiter = _start_waiter(crew, channel, call)
        until(lambda: any(person.waiting_for for person in channel.stats().participants))
        before, switches = _on_core(waiter.pid), _switches(waiter.pid)
        until(lambda: _switches(waiter.pid) >= switches + 40)
        assert _on_core(waiter.pid) - before <= 0.04  # of about 2 s
        channel.put(2) if call == "get" else channel.get()
        waiter.result()


@pytest.mark.parametrize("wait", ["adaptive", "block", "spin"])
@pytest.mark.parametrize("call", ["get", "put", "put larger than the ring"])
def test_other_threads_run_while_one_waits(wait: str, call: str) -> None:
    with Channel(1, 64, wait=wait) as channel, Crew("thread") as crew:
        waiter = _start_waiter(crew, channel, call)
        total = sum(k * k for k in range(300_000))
        assert total == 299_999 * 300_000 * 599_999 // 6
        channel.put(2) if call == "get" else channel.get()
        waiter.result()
        if call == "put":
            assert channel.get() == 1


@pytest.mark.parametrize("end", ["receiver", "sender"])
def test_who_spins_never_sleeps(end: str) -> None:
    with Channel(1, 64, wait="spin") as channel:
        if end == "sender":
            channel.put(0)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        with pytest.raises((queue.Empty, queue.Full)):
            channel.get(timeout=0.2) if end == "receiver" else channel.put(0, timeout=0.2)
        slept = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
    assert slept < 50  # it was once each time round, which is thousands


def test_a_thread_begins_to_wait_while_another_counts_those_that_wait(name: str) -> None:
    with Channel(1, 64, name=name) as channel:
        channel.put(0)
        other = threading.Thread(target=channel.put, args=(1,))
        received: list[int] = []

        def receive() -> None:
            until(lambda: channel.stats().waiting_senders == 2 or not sending)
            received.extend(channel.get(timeout=5) for _ in range(3))

        receiving, sending = threading.Thread(target=receive), [True]

        def trace(frame: Any, event: str, arg: Any) -> None:
            if frame.f_code.co_name == "<genexpr>" and "deadlock" in frame.f_code.co_filename and other.ident is None:
                other.start()
                until(lambda: channel.stats().waiting_senders == 1)
                receiving.start()

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            channel.put(2)
        finally:
            sys.settrace(before)
            sending.clear()
            other.join()
            receiving.join()
        assert sorted(received) == [0, 1, 2]
