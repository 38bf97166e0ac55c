"""One trial: victims come to a channel one after the other, and are killed; then who is left must go on.

A victim dies after an instruction or a store of the compiled code (stepper.py), or, to die while it recovers what the
one before it has left, before a bytecode (support/tracer.py). The process that steps it made the channel and survives.
Another may be blocked in a call meanwhile. The survivors are compiled, or all is Python's in them (`pure`).

What must come out, for a channel:

1. All messages whose `put` returned are received, in their order. What a victim was sending is there whole, or not at
   all; of several the first ones.
2. A message may go with a receiver that was killed, but none that was still in a slot, READY or READING, when it died,
   and none that it had not decoded to its end.
3. Then the channel is as good as new: each slot is free, every figure is true, nothing stays in /dev/shm.
4. No call of a survivor hangs.

For a Latest: the newest version is whole, and is the one before or after; readers' deaths leave no version pinned.
"""

from __future__ import annotations

import itertools
import os
import queue
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.checks import check_whole
from support.foreign import semaphores_of
from support.seams import Words, look, shared_state, warm_up
from support.tracer import Tracer
from support.workers import die, die_with_parent

from ringshm import Channel, Latest
from ringshm.ring.acceleration import compiled
from ringshm.segment.files import path_of

from . import decoded
from .operations import CAPACITY, KINDS, MARKED, OPERATIONS, PARTICIPANTS, SLOT_SIZES, SPEC, Operation, tag_of
from .stepper import Stepper, Steps, let_go, stop_here, trace_me

#: Seconds after which a call of a survivor counts as hanging.
PATIENCE = 40
#: Slices in which the dead are found, and then some.
_PAUSE = 0.2
#: Seconds within which a process that waits for a mutex suspects its holder, and recovers.
_SUSPICION = 0.5
#: Tags: of messages before the victims' (from 0), of the victims' (ten each), of who is blocked or helps, of the last.
_VICTIMS, _PEER, _LAST = 100, 230, 231


@dataclass(frozen=True)
class Death:
    """What a victim calls, and where it dies.

    Attributes:
        operation: of OPERATIONS.
        unit: what is counted: "instruction", "store" or "bytecode".
        at: after which of them, from 1; 0: it lives.
    """

    operation: str
    unit: str = "instruction"
    at: int = 0

    def __str__(self) -> str:
        return f"{self.operation}:{self.unit}:{self.at}"


@dataclass(frozen=True)
class Trial:
    """What is done.

    Attributes:
        deaths: of the victims, in their order.
        kind: of the messages.
        ready: how many messages are there when the first victim comes.
        turn: how many messages went through the ring before: where in it the next one comes.
        cold: whether the victims have not used the channel yet.
        blocked: whether a survivor is blocked meanwhile: in `get` if victims send, in `put` if they receive.
        pure: whether the survivors run no compiled code.
        stops: whether the victim lives, and is stopped after that store and each one after it, for long enough that
            others suspect that it is dead; the survivor then sends and receives.
    """

    deaths: tuple[Death, ...]
    kind: str
    ready: int = 2
    turn: int = 1
    cold: bool = False
    blocked: bool = False
    pure: bool = False
    stops: bool = False

    def __str__(self) -> str:
        flags = "".join(f",{name}" for name in ("cold", "blocked", "pure", "stops") if getattr(self, name))
        return f"{'+'.join(map(str, self.deaths))},{self.kind},{self.ready},{self.turn}{flags}"

    @classmethod
    def parse(cls, text: str) -> Trial:
        """From what str() gives."""
        deaths, kind, ready, turn, *flags = text.split(",")
        parts = (death.split(":") for death in deaths.split("+"))
        return cls(
            tuple(Death(operation, unit, int(at)) for operation, unit, at in parts),
            kind,
            int(ready),
            int(turn),
            **dict.fromkeys(flags, True),
        )

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.deaths[-1].operation]


@dataclass
class Outcome:
    """How it ended."""

    trial: Trial
    steps: list[Steps] = field(default_factory=list)
    #: Messages that went with the victims.
    lost: int = 0
    failure: str = ""

    def __str__(self) -> str:
        return f"{self.trial}: {self.failure or 'well'}"


# --- processes


def _forked(function: Callable[[], object]) -> tuple[int, int]:
    """A child that runs it; its pid, and the descriptor from which to read what it returned."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        signal.alarm(0)
        die_with_parent()
        os.write(writing, repr(function()).encode())
    except BaseException:
        os.write(writing, repr(traceback.format_exc()[-500:]).encode())
    finally:
        os._exit(0)


@dataclass(frozen=True)
class _Child:
    pid: int
    reports: int  # a descriptor

    def said(self, seconds: float = 0) -> Any:
        """What it returned, or None; once."""
        readable, _, _ = select.select([self.reports], [], [], seconds)
        text = os.read(self.reports, 10_000) if readable else b""
        os.close(self.reports)
        return eval(text) if text else None


@contextmanager
def _patience() -> Iterator[None]:
    """Raise where a call hangs."""

    def too_long(*_: object) -> None:
        raise TimeoutError("a survivor's call hangs")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


def pause(on: bool) -> None:
    """Whether all is Python's in this process from now on."""
    if compiled is not None:
        compiled.pause(on)


# --- the trial

_numbers = itertools.count()


def run(trial: Trial) -> Outcome:
    """Make it; a failure stands in the outcome."""
    outcome = Outcome(trial)
    kind = _LatestRun if trial.operation.handle is Latest else _StoppedRun if trial.stops else _ChannelRun
    run = kind(outcome)
    try:
        with _patience():
            run.run()
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        outcome.failure = f"{error or repr(error)} (in {line.name}: {line.line})"
    finally:
        pause(False)
        run.end()
    if not outcome.failure and (left := [path for path in run.paths if path.exists()]):
        outcome.failure = f"{left} stays"
    return outcome


class _Run:
    """What trials on both kinds of handles share."""

    handle: Any
    sends: bool

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.trial = trial = outcome.trial
        self.operation = trial.operation
        self.message = KINDS[trial.kind]
        self.name = f"steps-{os.getpid()}-{next(_numbers)}"
        self.children: list[_Child] = []
        self.paths: list[Path] = []

    def open(self, make: Callable[..., Any], **arguments: Any) -> None:
        decoded.renew()
        kind = {"spec": SPEC} if self.trial.kind == "typed" else {"slot_size": SLOT_SIZES[self.trial.kind]}
        self.handle = make(**kind, **arguments, name=self.name)
        self.paths = [Path(path_of(self.name)), *semaphores_of(self.handle)]
        if make is Channel:
            # a handle knows the forms of arrays that it has sent, but for its first message, which is Python's; the
            # victims are its copies
            for _ in range(2):
                self.handle.put(self.message(9))
                self.handle.get()

    def fork(self, function: Callable[[], object], sends: bool, traced: bool = False, cold: bool = False) -> _Child:
        """A child that has joined, and goes on to run the function when it is let go."""

        def prepare() -> object:
            self.handle.stats()  # joins
            if not cold:
                warm_up(self.handle, sends)
            if traced:
                trace_me()
            stop_here()
            return function()

        child = _Child(*_forked(prepare))
        self.children.append(child)
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), child.said()
        return child

    def fork_victims(self) -> list[_Child]:
        victims = []
        for number, death in enumerate(self.trial.deaths):
            operation = OPERATIONS[death.operation]
            messages = [self.message(tag) for tag in self.sent_by(number)]

            def call(operation: Operation = operation, messages: list[Any] = messages) -> list[Any]:
                got = operation.call(self.handle, messages)
                stop_here()
                return got

            def call_in_python(at: int = death.at, call: Callable[[], Any] = call) -> list[Any]:
                with Tracer(die, at, may_miss=True):
                    return list(call())

            traced = death.unit != "bytecode"
            victims.append(self.fork(call if traced else call_in_python, operation.sends > 0, traced, self.trial.cold))
        return victims

    def run_victim(self, child: _Child, death: Death) -> Any:
        """Have it make its call and die; what the call returned if it did not die."""
        if death.unit == "bytecode":
            os.kill(child.pid, signal.SIGCONT)
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
            os.kill(child.pid, signal.SIGCONT)
        else:
            steps = Stepper(child.pid, shared_state(self.handle)).run(
                death.unit, death.at, self.between if self.trial.stops else None
            )
            self.outcome.steps.append(steps)
            if not steps.killed:
                let_go(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, as it mostly does in life
        got = child.said()
        assert not isinstance(got, str), f"the victim failed: {got}"
        return got

    def between(self) -> None:
        """What the survivor does after a store of the victim's."""

    def sent_by(self, number: int) -> list[int]:
        """The tags of that victim's messages."""
        first = _VICTIMS + 10 * number
        return list(range(first, first + OPERATIONS[self.trial.deaths[number].operation].sends))

    def end(self) -> None:
        for child in self.children:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        self.handle.close()


class _ChannelRun(_Run):
    def run(self) -> None:
        trial, operation = self.trial, self.operation
        self.sends = operation.sends > 0
        self.open(Channel, capacity=CAPACITY, max_participants=PARTICIPANTS, max_deliveries=9, keep_open=True)
        victims = self.fork_victims()
        pause(trial.pure)
        peer = None
        if operation.waits or trial.blocked:
            peer = self.fork(self._help if operation.waits else self._block, not self.sends)
        for _ in range(1 + trial.turn):  # once at least, so that nothing is left to do after the joins
            self.handle.put(self.message(9))
            self.handle.get()
        ready = list(range(self._ready()))
        for tag in ready:
            self.handle.put(self.message(tag))
        first = self.handle.stats().sent - len(ready)  # the sequence of the oldest message
        if peer:
            self._let_go(peer)
        marks = decoded.count()
        returned = [self.run_victim(child, death) for child, death in zip(victims, trial.deaths, strict=True)]
        in_slots = Words(self.name).unreceived()
        marks = decoded.count() - marks
        time.sleep(_PAUSE)
        before, tail = ready, []
        if operation.waits:
            helped = self._collect(peer)
            assert helped == (ready[:1] if self.sends else []), f"the helper: {helped}"
            before = ready[1:] if self.sends else [_PEER]
        elif trial.blocked:
            tail = [_LAST] if self.sends else [_PEER]
        got = self._receive_all(peer)
        self._check_account(got, before, tail, returned, first, in_slots, marks)
        for tag in range(CAPACITY):
            self.handle.put(self.message(tag), timeout=PATIENCE)
        assert [tag_of(self.handle.get(timeout=PATIENCE)) for _ in range(CAPACITY)] == list(range(CAPACITY))
        if trial.kind != "typed":
            check_whole(self.handle)

    def _ready(self) -> int:
        """How many messages are there at first."""
        trial, operation = self.trial, self.operation
        if operation.waits or trial.blocked:
            return CAPACITY if self.sends == operation.waits else 0
        room = sum(OPERATIONS[death.operation].sends for death in trial.deaths)
        takes = sum(OPERATIONS[death.operation].takes for death in trial.deaths)
        return min(max(trial.ready, takes), CAPACITY - room)

    # --- the other survivor

    def _let_go(self, peer: _Child) -> None:
        os.kill(peer.pid, signal.SIGCONT)
        if self.trial.blocked:
            while not any(one.pid == peer.pid and one.waiting_for for one in self.handle.stats().participants):
                time.sleep(0.002)

    def _help(self) -> list[Any]:
        """Once somebody waits, or when it has died, do what it waits for."""
        look(self.handle)
        for _ in range(500):
            stats = self.handle.stats()
            if stats.waiting_senders or stats.waiting_receivers:
                break
            time.sleep(0.002)
        if self.sends:
            return [tag_of(self.handle.get(timeout=PATIENCE))]
        self.handle.put(self.message(_PEER), timeout=PATIENCE)
        return []

    def _block(self) -> list[Any]:
        look(self.handle)
        if not self.sends:
            self.handle.put(self.message(_PEER), timeout=PATIENCE)
            return []
        got: list[Any] = []
        while _LAST not in got:
            got.append(tag_of(self.handle.get(timeout=PATIENCE)))
        return got

    @staticmethod
    def _collect(peer: _Child | None) -> list[Any]:
        assert peer is not None
        said = peer.said(PATIENCE)
        assert isinstance(said, list), f"the other survivor: {said}"
        return said

    # --- the account

    def _receive_all(self, peer: _Child | None) -> list[Any]:
        if self.trial.blocked and self.sends:
            self.handle.put(self.message(_LAST), timeout=PATIENCE)
            return self._collect(peer)
        got = self._receive_until_empty()
        if self.trial.blocked:
            self._collect(peer)
            got += self._receive_until_empty()  # on a busy machine the peer may put later than that
        return got

    def _receive_until_empty(self) -> list[Any]:
        got = []
        with suppress(queue.Empty):
            while True:
                got.append(tag_of(self.handle.get(timeout=0.25)))
        return got

    def _check_account(
        self,
        got: list[Any],
        before: list[int],
        tail: list[int],
        returned: list[Any],
        first: int,
        in_slots: frozenset[int],
        marks: int,
    ) -> None:
        if self.sends:
            sent: list[list[int]] = [[]]
            for number, tags in enumerate(returned):
                own = self.sent_by(number)
                counts = range(len(own) + 1) if tags is None else [len(own)]
                sent = [some + own[:count] for some in sent for count in counts]
            may = [before + some + tail for some in sent]
            assert got in may, f"received {got} instead of {may[0]} or the like"
            return
        every = before + tail
        taken = [tag for tags in returned for tag in tags or ()]
        came = [tag for tag in every if tag in got or tag in taken]
        assert sorted(got + taken, key=str) == sorted(came, key=str), f"received {got}, and victims {taken}, of {every}"
        # while a death is not yet seen, what the dead had taken comes later than what was behind it
        most = sum(OPERATIONS[death.operation].takes for death in self.trial.deaths)
        late = every[:most] if len(returned) > 1 else []
        in_order = [tag for tag in got if tag not in late]
        assert in_order == [tag for tag in every if tag in in_order], f"out of order: {got}"
        missing = [tag for tag in every if tag not in came]
        assert missing == [tag for tag in every[:most] if tag in missing], f"{missing} are lost of {every}"
        kept = [tag for tag in missing if first + every.index(tag) in in_slots]
        assert not kept, f"messages {kept} were in their slots when the last victim died, and were lost"
        self.outcome.lost = len(missing)
        if self.trial.kind in MARKED:
            assert len(missing) <= marks, f"{missing} were taken along, {marks} had been decoded"


class _StoppedRun(_Run):
    def run(self) -> None:
        operation = self.operation
        self.sends = operation.sends > 0
        self.open(Channel, capacity=CAPACITY, max_participants=PARTICIPANTS, keep_open=True)
        (victim,) = self.fork_victims()
        pause(self.trial.pure)
        self.handle.put(self.message(9))
        self.handle.get()
        self.sent = [0, 1, 2]
        for tag in self.sent:
            self.handle.put(self.message(tag))
        self.got: list[Any] = []
        returned = self.run_victim(victim, self.trial.deaths[0])
        with suppress(queue.Empty):
            while True:
                self.got.append(tag_of(self.handle.get(timeout=0.25)))
        theirs = self.sent_by(0)
        came = sorted([*self.got, *returned], key=str)
        assert came == sorted([*self.sent, *theirs], key=str), (
            f"of {self.sent} and {theirs} came {self.got}, {returned}"
        )
        for whose in (self.sent, theirs):
            order = [tag for tag in self.got if tag in whose]
            assert order == sorted(order), f"out of order: {self.got}"
        if self.trial.kind != "typed":
            check_whole(self.handle)

    def between(self) -> None:
        """Send and receive one, in vain where the victim holds the mutex."""
        if self.sends:
            with suppress(queue.Full):
                self.handle.put(self.message(len(self.sent)), timeout=_SUSPICION)
                self.sent.append(len(self.sent))
                self.got.append(tag_of(self.handle.get(timeout=PATIENCE)))
        else:
            with suppress(queue.Empty):
                self.got.append(tag_of(self.handle.get(timeout=_SUSPICION)))
                self.handle.put(self.message(len(self.sent)), timeout=PATIENCE)
                self.sent.append(len(self.sent))


class _LatestRun(_Run):
    def run(self) -> None:
        trial = self.trial
        self.open(Latest, borrows=2, readers=PARTICIPANTS)
        for tag in range(1 + trial.turn):
            self.handle.publish(self.message(tag))
        tag_of(self.handle.read()[1])
        newest = trial.turn
        may = [newest]
        victims = self.fork_victims()
        pause(trial.pure)
        for number, (child, death) in enumerate(zip(victims, trial.deaths, strict=True)):
            got = self.run_victim(child, death)
            sent = self.sent_by(number)
            if got is None:
                may += sent
            elif sent:
                may = sent
            else:
                assert got[0] in may, f"read {got} instead of one of {may}"
        time.sleep(_PAUSE)
        version, value = self.handle.read(timeout=PATIENCE)
        assert tag_of(value) in may, f"the newest is {tag_of(value)}, not one of {may}"
        for tag in range(9):  # more than there are slots: none is pinned for ever
            assert self.handle.publish(self.message(tag)) == version + 1 + tag
            version_read, value = self.handle.read(timeout=PATIENCE)
            assert (version_read, tag_of(value)) == (version + 1 + tag, tag)
        del value
        assert not self.handle.stats().held
