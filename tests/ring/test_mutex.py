"""The fenced mutex on a fake machine: granted once, recovered when its holder died, and only then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.fakes import FakeSemaphore, Machine, Process
from support.tracer import Interrupt, bytecodes, count_bytecodes, interrupt_at

from ringshm.errors import ReentrantCall
from ringshm.ring.mutex import FencedMutex, reentrant_call
from ringshm.segment.layout import GEN, LOCK_RECOVERY, P_SENDER_HOLD, RECOVERIES, TAIL


@pytest.fixture(autouse=True)
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fake machine nobody runs meanwhile: there is nothing to wait for."""
    monkeypatch.setattr("ringshm.ring.mutex.SLICE", 0.0)


def two() -> tuple[Machine, Process, Process]:
    machine = Machine.of(2)
    return machine, machine.start(), machine.start()


def senders(process: Process) -> FencedMutex:
    return process.ring.senders


def hold_of(process: Process) -> int:
    return process.machine.words[process.participants.entry + P_SENDER_HOLD]


def section(process: Process) -> int:
    """Enter and leave as the ring does; the generation, or 0."""
    mutex = senders(process)
    if mutex.owned():
        raise reentrant_call("c")
    try:
        gen = mutex.enter()
        if gen:
            mutex.leave(gen)
    except BaseException:
        mutex.abandon()
        raise
    return gen


def tries_until_granted(process: Process, at_most: int = 8) -> int:
    for tries in range(1, at_most + 1):
        if section(process):
            return tries
    raise AssertionError(f"not granted in {at_most} slices")


def test_a_grant_says_its_generation_and_its_holder_until_it_is_left() -> None:
    machine, a, b = two()
    gen = senders(a).enter()
    assert gen == machine.words[GEN] == hold_of(a)
    assert hold_of(b) == 0
    assert senders(a).owned()
    senders(a).leave(gen)
    assert hold_of(a) == 0
    assert not senders(a).owned()
    machine.check_at_rest()


def test_while_one_holds_it_another_gets_nothing_and_suspects_nothing() -> None:
    machine, a, b = two()
    gen = senders(a).enter()
    before = bytes(machine.memory)
    assert [section(b) for _ in range(20)] == [0] * 20
    assert machine.memory == before, "a live holder is never suspected, however long it takes"
    senders(a).leave(gen)
    assert section(b) == gen


def test_the_two_mutexes_are_held_apart() -> None:
    machine, a, b = two()
    gen = a.ring.senders.enter()
    assert b.ring.receivers.enter() == gen
    b.ring.receivers.leave(gen)
    a.ring.senders.leave(gen)
    machine.check_at_rest()


def test_a_dead_holder_is_recovered_from_after_one_slice() -> None:
    machine, a, b = two()
    gen = senders(a).enter()
    a.die()
    assert section(b) == 0
    assert machine.words[GEN] == gen + 2
    assert hold_of(a) == 0
    assert section(b) == gen + 2
    assert machine.words[RECOVERIES] == 1
    machine.check_at_rest()


def test_a_lost_token_is_replaced_after_two_slices_without_progress() -> None:
    machine, _, b = two()
    machine.semaphores[0].tokens = 0  # died between the kernel's grant and the store that says so
    gen = machine.words[GEN]
    assert section(b) == 0
    assert machine.words[GEN] == gen, "one slice without progress means nothing"
    assert section(b) == 0
    assert machine.words[GEN] == gen + 2
    assert section(b) == gen + 2
    machine.check_at_rest()


def test_progress_between_two_slices_dispels_a_suspicion() -> None:
    machine, _, b = two()
    machine.semaphores[0].tokens = 0
    for _ in range(10):
        assert section(b) == 0
        machine.words[TAIL] += 1  # somebody does get it, now and then
    assert machine.words[RECOVERIES] == 0
    machine.words[TAIL] = 0


def test_generations_alternate_between_two_semaphores_and_each_recovery_adds_two() -> None:
    machine, _, b = two()
    gens = []
    for _ in range(5):
        machine.semaphores[0].tokens = machine.semaphores[1].tokens = 0
        tries_until_granted(b)
        gens.append(machine.words[GEN])
        machine.check_at_rest()
    assert gens == [gens[0] + 2 * n for n in range(5)]
    assert all(gen % 2 == 0 for gen in gens)


def test_while_a_recovery_is_under_way_nothing_is_granted() -> None:
    machine, a, b = two()
    words = machine.words
    words[GEN] += 1
    machine.locks[LOCK_RECOVERY] = a.pid
    for semaphore in machine.semaphores[:4]:
        semaphore.tokens = 1  # even if there were tokens
    assert [section(b) for _ in range(5)] == [0] * 5
    del machine.locks[LOCK_RECOVERY]  # the recoverer has died
    assert tries_until_granted(b) == 2
    machine.check_at_rest()


def test_a_recoverer_waits_for_a_live_holder_and_leaves_the_rest_to_whoever_comes_next() -> None:
    machine, a, b = two()
    gen = senders(a).enter()
    b.fence.recover()  # a wrong suspicion
    assert machine.words[GEN] == gen + 1
    assert hold_of(a) == gen
    assert section(b) == 0
    senders(a).leave(gen)
    assert tries_until_granted(b) <= 2
    assert machine.words[GEN] == gen + 2
    machine.check_at_rest()


def test_who_is_granted_an_older_generation_backs_off_and_posts_nothing() -> None:
    machine, a, b = two()
    gen = machine.words[GEN]

    class Late(FakeSemaphore):
        """A grant after which its process is not scheduled for long."""

        def acquire(self, block: bool, /) -> bool:
            granted = super().acquire(block)
            tries_until_granted(b)
            return granted

    late = Late(machine.semaphores[0].tokens)
    even, odd = late, machine.semaphores[1]
    machine.semaphores[0] = FakeSemaphore(0)
    senders(b).acquires = (machine.semaphores[0].acquire, *senders(b).acquires[1:])
    senders(b).waits = (machine.semaphores[0].wait, *senders(b).waits[1:])
    mutex = senders(a)
    mutex.acquires = (even.acquire, mutex.acquires[1], odd.acquire, mutex.acquires[3])
    assert mutex.enter() == 0
    assert machine.words[GEN] == gen + 2
    assert hold_of(a) == 0
    assert not mutex.owned()
    assert late.tokens == 0
    machine.check_at_rest()


@pytest.mark.parametrize("mutex", ["senders", "receivers"])
def test_re_entry_by_the_same_thread_is_refused(mutex: str) -> None:
    machine, a, _ = two()
    payload = b"x"
    assert a.send(payload)
    held: FencedMutex = getattr(a.ring, mutex)
    gen = held.enter()
    calls: list[Callable[[], Any]] = [
        lambda: a.ring.send(1 << 16, b"y", b""),
        lambda: a.ring.send(1 << 20 << 16, bytes(1 << 20), b""),
        a.ring.close_for_senders,
    ]
    if mutex == "receivers":
        calls = [
            lambda: a.ring.receive(lambda *_: None),
            lambda: a.ring.receive_many(2, lambda *_: None),
            a.ring.drop_oldest,
            lambda: a.ring.requeue([(a.ring._records[0], 0)]),
        ]
    for call in calls:
        with pytest.raises(ReentrantCall, match="interrupted inside a call on it"):
            call()
    assert held.owned()
    held.leave(gen)
    machine.check_at_rest()
    assert a.drain() == [payload]


def test_another_thread_of_the_same_process_waits_its_turn() -> None:
    machine, a, _ = two()
    mutex = senders(a)
    gen = mutex.enter()
    order = []

    def other() -> None:
        gen = mutex.enter()
        order.append("other")
        mutex.leave(gen)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(0.05)
    order.append("first")
    mutex.leave(gen)
    thread.join()
    assert order == ["first", "other"]
    machine.check_at_rest()


@pytest.mark.parametrize("state", ["free", "held by another", "its holder has died", "token lost"])
def test_a_section_left_by_an_exception_at_any_bytecode_holds_nothing(state: str) -> None:
    def set_up() -> tuple[Machine, Process, Process]:
        machine, a, b = two()
        if state in ("held by another", "its holder has died"):
            senders(b).enter()
        if state == "its holder has died":
            b.die()
        elif state == "token lost":
            machine.semaphores[0].tokens = 0
            section(a)  # the first of two slices
        return machine, a, b

    _, a, _ = set_up()
    total = count_bytecodes(lambda: section(a))
    for at in range(total):
        machine, a, b = set_up()
        interrupted, _ = interrupt_at(lambda a=a: section(a), at)
        assert interrupted
        assert not senders(a).owned(), f"interrupted at bytecode {at}"
        assert hold_of(a) == 0, f"interrupted at bytecode {at}"
        assert not a.fence.owned(), f"interrupted at bytecode {at}: still at a recovery"
        assert machine.locks.get(LOCK_RECOVERY) is None, f"interrupted at bytecode {at}"
        if state == "held by another":
            senders(b).leave(hold_of(b))
        later = machine.start()
        tries_until_granted(later)
        tries_until_granted(a)
        later.settle()  # the other mutex, if it was in the middle of a recovery
        machine.check_at_rest()


def test_a_second_exception_while_the_first_is_dealt_with_leaves_no_hold() -> None:
    _, a, _ = two()
    senders(a).enter()
    total = count_bytecodes(senders(a).abandon)
    left = []
    for at in range(total):
        machine, a, _ = two()
        senders(a).enter()
        interrupt_at(senders(a).abandon, at)
        if hold_of(a) or senders(a).owned():
            left.append(at)
        else:
            tries_until_granted(machine.start())
            tries_until_granted(a)
    # before its `try` begins, and nowhere else
    print(f"abandon: {len(left)} of {total} bytecodes before its try")
    assert left == list(range(len(left)))
    assert len(left) <= 12


def test_a_recoverer_killed_at_any_bytecode_is_replaced() -> None:
    machine, a, b = two()
    senders(a).enter()
    a.die()
    copies: list[Machine] = []
    bytecodes(lambda: section(b), lambda _: copies.append(machine.after_death_of(a, b)))
    for at, copy in enumerate(copies):
        survivor = copy.start()
        assert tries_until_granted(survivor) <= 4, f"killed at bytecode {at}"
        survivor.reap_the_dead()
        copy.check_at_rest()


@pytest.mark.parametrize(
    "call",
    [
        lambda b: b.fence.recover(),
        lambda b: b.ring.receive(lambda *_: None),
        lambda b: b.ring.receive_many(2, lambda *_: None),
        lambda b: b.ring.drop_oldest(),
    ],
    ids=["a recovery", "receive", "receive_many", "drop_oldest"],
)
def test_a_call_from_within_a_recovery_is_refused_and_the_recovery_goes_on(call: Callable[[Process], Any]) -> None:
    machine, a, b = two()
    b.ring.send(1 << 16, b"x", b"")
    senders(a).enter()
    a.die()
    rebuild = b.fence.rebuild
    refused = []

    def reenter() -> None:
        assert machine.locks[LOCK_RECOVERY] == b.pid
        with pytest.raises(ReentrantCall):
            call(b)
        refused.append(machine.locks.get(LOCK_RECOVERY))
        rebuild()

    b.fence.rebuild = reenter
    tries_until_granted(b)
    assert refused == [b.pid]
    assert machine.locks.get(LOCK_RECOVERY) is None
    machine.check_at_rest()
    assert b.drain() == [b"x"]


def test_a_rebuild_that_fails_leaves_the_recovery_to_the_next() -> None:
    machine, a, b = two()
    senders(a).enter()
    a.die()
    b.fence.rebuild = lambda: (_ for _ in ()).throw(Interrupt())  # type: ignore[assignment]
    with pytest.raises(Interrupt):
        section(b)
    assert machine.words[GEN] % 2 == 1
    assert machine.locks.get(LOCK_RECOVERY) is None
    survivor = machine.start()
    tries_until_granted(survivor)
    machine.check_at_rest()
