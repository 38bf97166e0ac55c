"""A machine without a kernel: shared memory as a bytearray, semaphores and record locks as plain numbers.

The ring, the mutexes, the participants' table and the reaper are the real ones; only what the kernel does is played.
Nobody runs at the same time, so a wait that finds nothing is over at once. `tracer.bytecodes` stops a call before each
of its bytecodes: there a process may be killed (look at a copy of the machine), be interrupted (raise), or another
process may run (call it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ringshm.ring.changes import Changes
from ringshm.ring.mutex import Fence, FencedMutex
from ringshm.ring.outcomes import CONTENDED, EMPTY, NOTICE, SENT, Outcome
from ringshm.ring.participants import Participants
from ringshm.ring.reaper import Reaper
from ringshm.ring.rebuild import rebuild
from ringshm.ring.slots import Ring
from ringshm.ring.waiters import Waiters
from ringshm.segment import layout as at
from ringshm.segment.files import FIRST_GEN


class FakeSemaphore:
    """Tokens; a wait for one that is not there ends at once."""

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens

    def acquire(self, _: bool, /) -> bool:
        return self.wait(0)

    def wait(self, _: float) -> bool:
        if not self.tokens:
            return False
        self.tokens -= 1
        return True

    def release(self) -> None:
        self.tokens += 1

    def fill(self, tokens: int) -> None:
        self.tokens = max(self.tokens, tokens)


class FakeFile:
    """A segment's record locks, as one process sees them."""

    def __init__(self, machine: Machine, pid: int) -> None:
        self.machine = machine
        self.pid = pid

    def try_lock(self, byte: int) -> bool:
        return self.machine.locks.setdefault(byte, self.pid) == self.pid

    def unlock(self, byte: int) -> None:
        if self.machine.locks.get(byte) == self.pid:
            del self.machine.locks[byte]

    def holds(self, byte: int) -> bool:
        return self.machine.locks.get(byte) == self.pid

    def locked_elsewhere(self, byte: int, length: int = 1) -> bool:
        inside = (b for b in self.machine.locks if byte <= b and (not length or b < byte + length))
        return any(self.machine.locks[b] != self.pid for b in inside)


class FakeSegment:
    """What Participants asks of a segment."""

    name = "fake"

    def __init__(self, machine: Machine, pid: int) -> None:
        self.layout = machine.layout
        self.words, self.memory = machine.words, machine.memory
        self.numbers = np.frombuffer(machine.words, np.uint64)
        self.options = at.Options("pickle", kind="Channel")
        self.file = FakeFile(machine, pid)

    def remove_names(self, unless_used: bool = False) -> None:
        """There are none."""


class Machine:
    """What outlives its processes: the shared memory, and what the kernel holds."""

    def __init__(self, layout: at.Layout, memory: bytes = b"", tokens: tuple[int, ...] = (1, 0, 1, 0, 0, 0, 0)) -> None:
        self.layout = layout
        self.memory = bytearray(memory or layout.total_size)
        self.words = memoryview(self.memory)[: layout.slots].cast("Q")
        self.semaphores = [FakeSemaphore(count) for count in tokens]
        self.locks: dict[int, int] = {}
        self.processes: list[Process] = []
        if not memory:
            self.words[at.GEN] = FIRST_GEN

    @classmethod
    def of(cls, capacity: int, slot_size: int = 64, processes: int = 8) -> Machine:
        return cls(at.Layout(capacity, slot_size, processes))

    def start(self) -> Process:
        """A new process, attached."""
        self.processes.append(Process(self, 1 + len(self.processes)))
        return self.processes[-1]

    def after_death_of(self, *dead: Process) -> Machine:
        """A copy of this machine at this moment, in which those processes are dead and nobody else is running."""
        copy = Machine(self.layout, bytes(self.memory), tuple(s.tokens for s in self.semaphores))
        pids = {process.pid for process in dead}
        copy.locks = {byte: pid for byte, pid in self.locks.items() if pid not in pids}
        copy.processes = list(self.processes)  # only so that new ones get new pids
        return copy

    # --- what must hold between calls

    def states(self) -> list[int]:
        words, layout = self.words, self.layout
        return [words[layout.record(slot) + at.R_STATE] & at.STATE_MASK for slot in range(layout.capacity)]

    def check_at_rest(self, waiting_nbytes: int | None = None) -> None:
        """Nobody is inside a mutex, there is one token for each, and the counters agree with the slots."""
        words, layout = self.words, self.layout
        for index in range(layout.max_participants + 1):
            assert words[layout.entry(index) + at.P_SENDER_HOLD] == 0, f"entry {index} holds the senders' mutex"
            assert words[layout.entry(index) + at.P_RECEIVER_HOLD] == 0, f"entry {index} holds the receivers' mutex"
        gen = words[at.GEN]
        assert gen % 2 == 0
        used = gen >> 1 & 1
        assert [s.tokens for s in self.semaphores[:4]] == [1 - used, used] * 2
        ready = [slot for slot, state in enumerate(self.states()) if state == 1]
        positions = range(words[at.HEAD], words[at.TAIL])
        in_ring = [words[layout.ring + (position & layout.ring_mask)] for position in positions]
        assert sorted(in_ring) == ready
        nbytes = sum(words[layout.record(slot) + at.R_META] >> 16 for slot in ready)
        assert words[at.SENT_NBYTES] - words[at.TAKEN_NBYTES] == nbytes
        if waiting_nbytes is not None:
            assert nbytes == waiting_nbytes


class Process:
    """One attached process: the parts that an Attachment builds, on a fake machine."""

    def __init__(self, machine: Machine, pid: int, max_deliveries: int = 3) -> None:
        words, layout, semaphores = machine.words, machine.layout, machine.semaphores
        self.machine = machine
        self.pid = pid
        segment: Any = FakeSegment(machine, pid)
        self.participants = Participants(segment)
        self.fence = Fence("fake", words, self.participants, lambda: rebuild("fake", words, layout))
        senders = FencedMutex(words, at.P_SENDER_HOLD, semaphores[:2], (at.TAIL,), self.fence)
        receivers = FencedMutex(words, at.P_RECEIVER_HOLD, semaphores[2:4], (at.HEAD,), self.fence)
        messages = Waiters(words, self.participants, semaphores[4], at.P_WAITING_MESSAGE, at.MESSAGE_HINT)
        space = Waiters(words, self.participants, semaphores[5], at.P_WAITING_SPACE, at.SPACE_HINT)
        events = Waiters(words, self.participants, semaphores[6], at.P_WAITING_EVENT, at.SPACE_HINT)
        self.ring = Ring("fake", words, machine.memory, layout, senders, receivers, messages, space, events)
        changes = Changes(segment, self.participants, messages, space, events, events, events)
        self.reaper = Reaper("fake", max_deliveries, self.participants, self.fence, self.ring, changes)
        self.participants.join()
        senders.rebind(self.participants.entry)
        receivers.rebind(self.participants.entry)
        self.ring.rebind(self.participants.entry, self.participants.owner, self.participants.sender)

    def die(self) -> None:
        """What the kernel does: give up the record locks."""
        self.machine.locks = {byte: pid for byte, pid in self.machine.locks.items() if pid != self.pid}

    def settle(self) -> None:
        """Take each mutex once: a token that was lost is found missing only by whoever wants it."""
        for mutex in (self.ring.senders, self.ring.receivers):
            mutex.leave(patiently(lambda mutex=mutex: mutex.enter() or CONTENDED))

    def reap_the_dead(self) -> None:
        """Look for the dead until there are none."""
        for _ in range(6):
            self.reaper.reap()
            self.settle()
            if not self.participants.dead():
                return
        raise AssertionError("the dead are still there")

    # --- calls that wait as a channel's would, for a mutex

    def send(self, payload: bytes) -> Outcome:
        outcome = patiently(lambda: self.ring.send(len(payload) << 16, payload, b""))
        if outcome is NOTICE and not self.machine.words[at.SHUTDOWN]:  # somebody came or went: look round, and go on
            outcome = patiently(lambda: self.ring.send(len(payload) << 16, payload, b""))
        return outcome

    def receive(self) -> Any:
        return patiently(lambda: self.ring.receive(read))

    def receive_many(self, limit: int) -> Any:
        return patiently(lambda: self.ring.receive_many(limit, read))

    def drop_oldest(self, limit: int = 1) -> Outcome:
        return patiently(lambda: self.ring.drop_oldest(limit))

    def drain(self) -> list[bytes]:
        """All messages there are."""
        found = []
        while (message := self.receive()) is not EMPTY:
            assert isinstance(message, bytes), message
            found.append(message)
        return found

    def fill(self) -> list[bytes]:
        """Send until nothing more fits, from an empty ring."""
        payloads = [b"fill %d" % index for index in range(self.machine.layout.capacity)]
        for payload in payloads:
            assert self.send(payload) is SENT
        return payloads


def patiently(call: Callable[[], Any]) -> Any:
    """Repeat a call while the mutex is not to be had; a mutex is recovered within a few tries."""
    for _ in range(8):
        if (outcome := call()) is not CONTENDED:
            return outcome
    raise AssertionError("the mutex was never to be had")


def read(memory: Any, offset: int, meta: int, description: int) -> bytes:
    """A codec for bytes."""
    return bytes(memory[offset : offset + (meta >> 16)])


__all__ = ["FakeSemaphore", "Machine", "Process", "patiently", "read"]
