"""The process that makes one call of OPERATIONS and is killed or interrupted in it.

The victim prepares, says "ready", and makes its call under a tracer that acts before the chosen bytecode. The tracer's
act reports where the victim is, and what the segment holds at that moment; then it sends this process SIGKILL, or
raises as a signal handler would. After an exception the victim lives on, and uses the channel again.

Reports, in order, each at most once:

    ready     it has prepared
    at        the act: a Sight
    finished  the call returned: the messages that it received
    count     after that: how many bytecodes the call took
    order     after that: in which order the call decoded and released, as text, "" if rightly
    raised    the exception came out of the call
    again     after that: the messages that it received meanwhile
    failed    the trial itself went wrong: a traceback
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import queue
import random
import secrets
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from support.seams import Words, exit_as_python_does
from support.tracer import Tracer, folder_of
from support.workers import die_with_parent

from ringshm import Channel

from .operations import TYPED, Operation, Spot

_INTERRUPTS: dict[str, type[BaseException]] = {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}
ACTIONS = ("kill", *_INTERRUPTS)


@dataclass(frozen=True)
class Sight:
    """What the victim sees before the chosen bytecode.

    Attributes:
        place: in the package, for people.
        function: the same, by its name.
        unreceived: the sequences of the messages that somebody is still to receive.
        sent, dropped: the channel's counts.
        decoding: whether a message is being decoded: a call into the folder `messages` is under way.
    """

    place: str
    function: str
    unreceived: frozenset[int]
    sent: int
    dropped: int
    decoding: bool


class Timer:
    """Kills this process, at some time that depends on `at`; 0 does not."""

    count = 0

    def __init__(self, at: int, seconds: float) -> None:
        self._delay = random.Random(at).uniform(1e-6, seconds) if at else 0.0

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends it as SIGKILL does: no Python code runs any more
        signal.setitimer(signal.ITIMER_REAL, self._delay)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def recognisable_nonces() -> None:
    """Begin this process's nonces with its pid, so that its files are known as its own."""
    counter = itertools.count()
    secrets.token_hex = lambda _=0: f"{os.getpid():08x}{next(counter):08x}"  # type: ignore[assignment]


class Victim:
    """What the calls of OPERATIONS are made on, in the victim's process."""

    def __init__(self, name: str, operation: Operation, parcel: bytes) -> None:
        self.name = name
        self.operation = operation
        self.parcel = parcel
        self.channel: Channel = None  # type: ignore[assignment]
        self.held: list[Any] = []
        self.out = {"body": np.empty(500, np.uint8)}
        self.looks = False  # at what it has borrowed: that is the user's business, and no part of the call

    def message(self, number: int) -> Any:
        return self.operation.message("v", number)

    def put(self) -> None:
        self.channel.put(self.message(0))

    def get(self) -> list[Any]:
        return [self.channel.get()]

    def loan(self, discard: bool = False) -> None:
        message = self.message(0)
        with self.channel.loan() as loan:
            if discard:
                loan.discard()
            if isinstance(message, dict):
                for name, value in message.items():
                    loan[name] = value
            else:
                for part in map(np.asarray, message):
                    loan.array(part.shape, part.dtype)[...] = part

    @contextmanager
    def looking(self) -> Iterator[None]:
        """For the block, nothing is traced. Itself it comes by no code of the package."""
        self.looks = True
        yield
        self.looks = False

    def borrow(self, keep: bool = False) -> list[Any]:
        with self.channel.borrow() as borrow, self.looking():
            self.held = [borrow.value if keep else copy.deepcopy(borrow.value)]
        return self.held

    async def aloan(self) -> None:
        async with self.channel.aloan() as loan:
            for part in map(np.asarray, self.message(0)):
                loan.array(part.shape, part.dtype)[...] = part

    async def aborrow(self) -> list[Any]:
        async with self.channel.aborrow() as borrow:
            with self.looking():
                self.held = [copy.deepcopy(borrow.value)]
        return self.held

    def requeue(self) -> list[Any]:
        with self.channel.borrow() as borrow:
            borrow.requeue()
        return []

    def get_into(self, timeout: float | None = None) -> list[Any]:
        with suppress(queue.Empty):
            return [copy.deepcopy(self.channel.get(timeout=timeout, out=self.out))]
        return []

    def batch(self, n: int) -> dict[str, Any]:
        messages = [self.message(number) for number in range(n)]
        return {name: np.stack([message[name] for message in messages]) for name in TYPED}

    def put_batch(self, n: int) -> None:
        self.channel.put_batch(self.batch(n))

    async def aput_batch(self, n: int) -> None:
        await self.channel.aput_batch(self.batch(n))

    def pickle(self) -> None:
        pickle.dumps(self.channel)

    def borrow_again(self) -> list[Any]:
        """What was borrowed is received, also if the block was left by an exception."""
        return copy.deepcopy(self.held) or self.get_again()

    def get_batch(self, n: int, **others: Any) -> list[Any]:
        return self.rows(self.channel.get_batch(n, **others))

    async def aget_batch(self, n: int) -> list[Any]:
        return self.rows(await self.channel.aget_batch(n))

    @staticmethod
    def rows(batch: Any) -> list[Any]:
        return [{name: array[k] for name, array in batch.items()} for k in range(len(batch["who"]))]

    def get_batch_again(self, n: int) -> list[Any]:
        with suppress(queue.Empty):
            return self.get_batch(n, min=1, timeout=1.0)
        return []

    # --- on a Latest

    def publish(self, number: int = 0) -> list[Any]:
        message = self.message(number)
        return [(self.channel.publish(message), message)]

    def publish_again(self) -> list[Any]:
        return self.publish(1)

    def read(self) -> list[Any]:
        return [self.channel.read()]

    def borrow_newest(self, keep: bool = False) -> list[Any]:
        with self.channel.borrow() as borrow, self.looking():
            value = borrow.value if keep else copy.deepcopy(borrow.value)
            self.held = [(borrow.version, value)]
            del value  # a view that would outlive the block's `held`
        return self.held

    def read_again(self) -> list[Any]:
        """What was read is no more pinned, once another pin was taken."""
        got = copy.deepcopy(self.held)
        self.held = []
        got += copy.deepcopy(self.borrow_newest())
        self.held = []
        assert not [held for held in self.channel.stats().held if held.pid == os.getpid()]
        return got

    # --- any

    def expect(self, error: type[Exception], call: Callable[[], Any]) -> None:
        with suppress(error):
            call()
            raise AssertionError(f"no {error.__name__}")

    def attach(self) -> None:
        self.channel = self.operation.kind.attach(self.name)

    def arrive(self) -> None:
        self.channel = pickle.loads(self.parcel)

    def create(self) -> None:
        self.channel = Channel(**self.operation.arguments(self.name))

    def exit(self) -> None:
        exit_as_python_does()

    def fork(self) -> int:
        pid = os.fork()
        if self.operation.forks == "parent" and not pid:
            os._exit(0)
        return pid

    # --- after an exception

    def put_again(self) -> list[Any]:
        self.channel.put(self.message(self.operation.sends))
        return []

    def get_again(self) -> list[Any]:
        got: list[Any] = []
        with suppress(queue.Empty):
            for _ in range(self.operation.takes):
                got.append(self.channel.get(timeout=1.0))
        return got

    def repeat(self) -> list[Any]:
        self.operation.call(self)
        return []


class Order:
    """Whether an undisturbed call releases a message only when all is decoded.

    That is what makes the few bytecodes few in which a message goes with its receiver: behind the release nothing is
    left to do but to wake and to return. It is told by what is seen before each bytecode: when a message is no longer
    in the channel, and when a call into the folder `messages` was last under way.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._decoded = 0
        self._gone: dict[int, int] = {}  # sequence -> the first bytecode at which it was gone
        self._held = words.unreceived()

    def look(self, tracer: Tracer) -> None:
        assert tracer.frame is not None
        if folder_of(tracer.frame.f_code) == "messages":
            self._decoded = tracer.count
        held = self._words.unreceived()
        for sequence in self._held - held:
            self._gone.setdefault(sequence, tracer.count)
        self._held = held

    def told(self, received: list[int], count: int) -> str:
        """What is wrong with it, given what the call returned."""
        held = self._words.unreceived()
        if received and not self._decoded:
            return "the call returned a message, and came by no code of the folder messages: was it renamed?"
        for sequence in received:
            gone = self._gone.get(sequence, count + 1)
            if sequence in held:
                return f"message {sequence} was returned, and is still in the channel"
            if gone <= self._decoded:
                return f"message {sequence} was gone at bytecode {gone}, the call decoded until {self._decoded}"
        return ""


def _live_and_die(victim: Victim, action: str, at: int, spot: Spot | None, reports: Any, go: Any) -> None:
    operation = victim.operation
    die_with_parent()
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None  # an interrupt inside a finaliser or at-fork hook: CPython prints it, no more
    recognisable_nonces()
    gc.disable()  # finalisers of what came before are no part of the call
    if operation.owner == "victim":
        victim.channel = Channel(**operation.arguments(victim.name))
    elif operation.attached:
        victim.attach()
    operation.prepare(victim)
    reports.send(("ready", None))
    go.recv()

    me = os.getpid()
    words = Words(victim.name) if operation.accounts else None
    order = Order(words) if words and not (at or spot or operation.seconds) else None

    def concerns() -> bool:
        return not victim.looks and (not operation.forks or (os.getpid() == me) == (operation.forks == "parent"))

    def act() -> None:
        if order:
            order.look(tracer)
            return
        held = (words.unreceived(), words.sent, words.dropped) if words else (frozenset(), 0, 0)
        assert tracer.frame is not None
        function = tracer.frame.f_code.co_name
        reports.send(("at", Sight(tracer.place(), function, *held, tracer.is_in("messages"))))
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise _INTERRUPTS[action]("as a signal handler would")

    where: dict[str, Any] = {"functions": (spot.function,), "fragment": spot.fragment} if spot else {}
    # whether anything came by is for the sweep to say: in the parent of a traced child, say, nothing does
    tracer = Tracer(act, None if order else at, when=concerns, may_miss=True, **where)
    interrupted = False
    try:
        with Timer(at, operation.seconds) if operation.seconds else tracer:
            value = operation.call(victim)
        if operation.forks == "child" and os.getpid() == me:
            return  # the child makes the report
        received = [operation.number_of(got) for got in value] if operation.takes else []
        reports.send(("finished", received))
        reports.send(("count", tracer.count))
        reports.send(("order", order.told([number for _, number in received], tracer.count) if order else ""))
    except tuple(_INTERRUPTS.values()):
        interrupted = True
    if interrupted:  # and its traceback is gone, which would keep what the call has made
        reports.send(("raised", None))
        reports.send(("again", [operation.number_of(got) for got in operation.again(victim)]))
    victim.channel.close()


def victim_process(victim: Victim, action: str, at: int, spot: Spot | None, reports: Any, go: Any) -> None:
    """What a forked process does that is a victim; it does not return."""
    status = 1
    parent = os.getpid()
    try:
        _live_and_die(victim, action, at, spot, reports, go)
        status = 0
    except BaseException:
        with suppress(OSError):
            reports.send(("failed", "".join(traceback.format_exc().splitlines(keepends=True)[-5:])))
    finally:
        with suppress(BaseException):
            exit_as_python_does()
        if os.getpid() == parent and victim.operation.forks == "child":
            with suppress(ChildProcessError):
                os.wait()
        os._exit(status)
