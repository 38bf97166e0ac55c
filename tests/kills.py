"""One operation of ringshm, killed or interrupted at a chosen bytecode, and what its survivors find.

A trial has two survivors, a sender and a receiver, each in a process of its own, and a victim, a third process. The
victim makes one call of the table OPERATIONS. Before its k-th bytecode inside the package it is killed with SIGKILL, or
an exception is raised there as by a signal handler, and it lives on and uses the channel again. Meanwhile a survivor
may be blocked in a call of its own. Then the survivors go on, and `Arena` checks their account against what every
`put` and `get` has returned: nothing lost, doubled or out of order, the whole capacity there, true figures, no file
left. What dies with the victim is counted: a message between the release of its slot and the return of `get` (lost),
a message of a sender that was killed before its `put` returned (in doubt).

    python -m pytest tests/test_kills.py --every-bytecode        every bytecode of every operation, and a table
                                                                 (some 300,000 trials: hours on two cores)
    python tests/kills.py put "get many" --action kill           the same for some operations, without pytest
    python tests/kills.py put --action kill --at 17              one trial

A Latest has an arena of its own, LatestArena: there the survivors find the versions consecutive and whole.

A new operation is one entry in OPERATIONS. A place that has ever failed goes to PLACES in tests/test_kills.py.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dis
import faulthandler
import gc
import itertools
import linecache
import multiprocessing.util
import os
import pickle
import queue
import random
import secrets
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Pipe
from types import CodeType, FrameType
from typing import Any, ClassVar

import numpy as np
from workers import die_with_parent, until

import ringshm
from ringshm import Channel, Latest, host
from ringshm.layout import LAST_CHECK
from ringshm.leftovers import look
from ringshm.mutex import SLICE
from ringshm.segment import LOCKS_PREFIX
from ringshm.waiting import Spin

PACKAGE = os.path.dirname(ringshm.__file__)
CAPACITY = 3
PARTICIPANTS = 6  # a table of 256 takes many bytecodes that are all alike
BORROWS = 2
LARGE_NBYTES = 200_000  # copied outside of the critical sections
SLOT_SIZE = 256 * 1024
#: Seconds after which a call of a survivor counts as hanging: hundreds of times what the contract allows it.
PATIENCE = 40.0
TURNS = "turns"

# --- messages: (who, number), and for some a body that tells whether they are whole


def array(nbytes: int) -> Callable[[int], Any]:
    """Bodies of so many bytes."""
    return lambda number: np.full(nbytes, number % 256, np.uint8)


def objects(count: int) -> Callable[[int], Any]:
    """Bodies that take long to unpickle."""
    return lambda number: [(number, str(item)) for item in range(count)]


#: The fields of messages of channels with a spec.
TYPED = {"who": "U1", "number": np.int64, "body": (np.uint8, (500,))}

# --- the operations


@dataclass(frozen=True)
class Operation:
    """A call that a victim makes.

    Attributes:
        call: what is traced.
        prepare: what the victim does before, untraced.
        again: what it does after an exception was raised in the call; returns the messages that it received.
        sends, takes: how many messages the call sends (v 0, v 1, …), and takes at most.
        ready: how many messages of the sender wait; all slots are full if it is blocked in put, none if the receiver
            is blocked in get.
        blocked: which calls a survivor may be blocked in: "get", "put", "flush", or "" for none. Each is swept; or all
            in one sweep, if
        turns: they take turns.
        body: makes the body of the messages,
        bodies: and of whose: "s" the survivors', "v" the victim's.
        streams: whether messages with a body are larger than a slot. Then no ring is filled with them; who is blocked
            in put is so amid one.
        options: of the channel.
        owner: who makes the channel: the "sender", or the "victim" before the call, or "in it".
        attached: whether the victim attaches before the call.
        corpse: where another process, that makes the call `put` or `get`, was killed before.
        ends: whether the call shuts the channel down.
        forks: whether the call forks, and is traced in the "child" or the "parent".
        tickets: whether the victim gets a pickled handle.
        resends: whether `again` sends a further message, number `sends`.
        returning: how many bytecodes lie between the release of the slot, or slots, and the return, at most: only in
            these a victim may take a message with it. WAKING more if a sender waits.
        seconds: if not 0, a timer kills the victim some time within so many, inside a long call in C.
    """

    call: Callable[[Victim], Any]
    prepare: Callable[[Victim], Any] = lambda victim: None
    again: Callable[[Victim], list[Any]] = lambda victim: victim.repeat()
    sends: int = 0
    takes: int = 0
    ready: int = 1
    blocked: tuple[str, ...] = ("", "get")
    body: Callable[[int], Any] | None = None
    bodies: str = "sv"
    streams: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    owner: str = "sender"
    attached: bool = True
    corpse: Spot | None = None
    ends: bool = False
    forks: str = ""
    tickets: bool = False
    turns: bool = False
    seconds: float = 0.0
    resends: bool = False
    returning: int = 25

    kind: ClassVar[type[Any]] = Channel

    def message(self, who: str, number: int) -> Any:
        message = (who, number, self.body(number)) if self.body and who in self.bodies else (who, number)
        return dict(zip(TYPED, message, strict=True)) if "spec" in self.options else message

    def number_of(self, got: Any) -> Any:
        """(who, number) of a message, if it is whole."""
        who, number, *body = got.values() if isinstance(got, dict) else got
        who, number = str(who), int(number)  # a loan's are arrays
        assert not body or np.array_equal(body[0], self.body(number)), f"message {(who, number)} is torn"
        return who, number

    @property
    def sweeps(self) -> tuple[str, ...]:
        """What may be blocked in each of its sweeps."""
        return (TURNS,) if self.turns else self.blocked

    def arguments(self, name: str) -> dict[str, Any]:
        """What the channel is made with; nobody spins, which would take a varying number of bytecodes."""
        chosen = {"name": name, "max_deliveries": 99, "max_participants": PARTICIPANTS, "wait": "block"}
        size = {} if "spec" in self.options else {"slot_size": SLOT_SIZE}
        return {"capacity": CAPACITY, **size, **chosen, **self.options}


@dataclass(frozen=True)
class LatestOperation(Operation):
    """A call on a Latest; what it returns, and reports, are (version, message) of what it published or read."""

    kind: ClassVar[type[Any]] = Latest

    def number_of(self, got: Any) -> Any:
        version, message = got
        return version, super().number_of(message)

    def arguments(self, name: str) -> dict[str, Any]:
        return {"name": name, "slot_size": SLOT_SIZE, "readers": PARTICIPANTS, "borrows": BORROWS, **self.options}


@dataclass(frozen=True)
class Spot:
    """A place in the package: a function, and a fragment of a line of its source."""

    function: str
    fragment: str
    call: str = ""  # for a corpse: what it was doing


def _take_part(victim: Victim) -> None:
    """Take the receiver's role."""
    victim.expect(queue.Empty, victim.channel.get_nowait)


def _warm_up(victim: Victim, sends: bool = False) -> None:
    """Take the call's role, and have just looked for the dead: what is left is the call itself."""
    channel = victim.channel
    if sends or victim.operation.sends:
        channel._start_sending()
    else:
        channel._start_receiving()
    channel._look_at = time.monotonic() + 60


def _look_at_once(victim: Victim) -> None:
    """Wait until a slice has passed since anybody has looked for the dead, so that the call does."""
    words = victim.channel._open().words
    until(lambda: time.monotonic_ns() - words[LAST_CHECK] > SLICE * 1e9)


def _leave_a_corpse_of_a_channel(victim: Victim) -> None:
    if not (pid := os.fork()):
        _kept = Channel(CAPACITY, SLOT_SIZE, name=victim.name, max_participants=PARTICIPANTS)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


_HUGE = 20_000_000
_IN_SEND = Spot("send", "words[record + R_META] = meta", "put")
_IN_RECEIVE = Spot("receive", "words[TAKEN_NBYTES]", "get")
_IN_DECODE = Spot("decode", "", "get")


def _puts(blocked: tuple[str, ...] = ("", "get"), **others: Any) -> Operation:
    given = {"call": lambda v: v.put(), "prepare": _warm_up, "again": lambda v: v.put_again(), "sends": 1}
    return Operation(**{**given, "resends": True, "blocked": blocked, **others})


def _gets(blocked: tuple[str, ...] = ("", "put"), **others: Any) -> Operation:
    given = {"call": lambda v: v.get(), "prepare": _warm_up, "again": lambda v: v.get_again(), "takes": 1, "ready": 2}
    return Operation(**{**given, "blocked": blocked, **others})


#: Bytecodes between the end of a message larger than a slot and the return of what it was received by: its slots are
#: freed and its sender is woken meanwhile.
LEAVING = 500


def _larger(bodies: str, slots: int, nbytes: int = 0) -> dict[str, Any]:
    """Messages that take so many slots; those without a body take one."""
    nbytes = nbytes or 1000 * slots - 300
    return {"body": array(nbytes), "bodies": bodies, "streams": True, "options": {"slot_size": max(1000, nbytes // 50)}}


def _never_spin(victim: Victim) -> None:
    """Take the role, and have just looked for the dead; and do not spin, which takes a varying number of bytecodes."""
    _warm_up(victim)
    victim.channel._receive_spin = Spin("block")


def _publishes(**others: Any) -> Operation:
    given = {"call": lambda v: v.publish(), "prepare": _never_spin, "again": lambda v: v.publish_again(), "sends": 1}
    return LatestOperation(**{**given, "blocked": ("", "read"), "body": array(500), "takes": 1, **others})


def _reads(call: Callable[[Victim], Any] = lambda v: v.read(), **others: Any) -> Operation:
    given = {"prepare": _never_spin, "again": lambda v: v.read_again()}
    return LatestOperation(call, **{**given, "blocked": ("", "read"), "body": array(500), "takes": 1, **others})


_IN_PUBLISH = Spot("publish", "words[record + R_META] = meta", "publish")
_IN_PIN = Spot("_pin_newest", "self._cells[cell] = slot + 1", "read")

OPERATIONS: dict[str, Operation] = {
    "put": _puts(("", "get", "flush")),
    "put in parts": _puts(body=array(500)),
    "put large": _puts(body=array(LARGE_NBYTES)),
    "put that waits": _puts(("", "put"), ready=CAPACITY),
    "put that drops": _puts(("",), ready=CAPACITY, options={"when_full": "drop_oldest"}),
    "put many": _puts(call=lambda v: v.channel.put_many([v.message(0), v.message(1)]), sends=2),
    "put larger than a slot": _puts(**_larger("v", 2), ready=0),
    "put larger than the ring": _puts(**_larger("v", 5)),
    "get larger than a slot": _gets(("",), **_larger("s", 2), ready=1, returning=LEAVING),
    "get larger than the ring": _gets(("put",), **_larger("s", 5), ready=0, returning=LEAVING),
    "borrow larger than the ring": _gets(
        ("put",),
        call=lambda v: v.borrow(),
        again=lambda v: v.borrow_again(),
        **_larger("s", 5),
        ready=0,
        returning=LEAVING,
    ),
    "first put": _puts(prepare=_look_at_once),
    "get": _gets(),
    "get in parts": _gets(body=array(500)),
    "get that waits": _gets(("", "get"), ready=0),
    "get nowait": _gets(call=lambda v: [v.channel.get_nowait()]),
    "get many": _gets(call=lambda v: v.channel.get_many(2), takes=2, returning=80),
    "loan": _puts(call=lambda v: v.loan(), body=array(500)),
    "loan that waits": _puts(("", "put"), call=lambda v: v.loan(), body=array(500), ready=CAPACITY),
    "loan, discarded": _puts(
        prepare=lambda v: _warm_up(v, sends=True),
        call=lambda v: v.loan(discard=True),
        again=lambda v: v.repeat(),
        body=array(500),
        sends=0,
        resends=False,
    ),
    "borrow": _gets(call=lambda v: v.borrow(), again=lambda v: v.borrow_again(), body=array(500), returning=80),
    "borrow, and keep a view": _gets(
        call=lambda v: v.borrow(keep=True), again=lambda v: v.borrow_again(), body=array(500), returning=80
    ),
    "borrow, and requeue": _gets(call=lambda v: v.requeue(), again=lambda v: v.repeat(), body=array(500), returning=0),
    "typed put": _puts(body=array(500), options={"spec": TYPED}),
    "typed get": _gets(body=array(500), options={"spec": TYPED}),
    "get into an array": _gets(
        call=lambda v: v.get_into(),
        again=lambda v: v.get_into(timeout=1.0),
        body=array(500),
        options={"spec": TYPED},
        returning=30,
    ),
    "put batch": _puts(call=lambda v: v.put_batch(2), body=array(500), options={"spec": TYPED}, sends=2),
    "typed loan": _puts(call=lambda v: v.loan(), body=array(500), options={"spec": TYPED}),
    "get batch": _gets(
        call=lambda v: v.get_batch(2),
        again=lambda v: v.get_batch_again(2),
        takes=2,
        body=array(500),
        options={"spec": TYPED},
    ),
    "get nowait of nothing": _gets(
        ("", "get"), call=lambda v: v.expect(queue.Empty, v.channel.get_nowait), ready=0, takes=0
    ),
    "first get": _gets(prepare=_look_at_once),
    "get that quietens": _gets(
        prepare=lambda v: (_warm_up(v), v.channel.fileno()), ready=1, blocked=("",), returning=200
    ),
    "fileno": Operation(turns=True, call=lambda v: v.channel.fileno(), prepare=_take_part, ready=0),
    "wait": Operation(turns=True, call=lambda v: ringshm.wait([v.channel]), prepare=_take_part, ready=0),
    # in an event loop; how many bytecodes a wait takes depends on its timer
    "aput": _puts(call=lambda v: asyncio.run(v.channel.aput(v.message(0)))),
    "aput that waits": _puts(
        ("", "put"), turns=True, call=lambda v: asyncio.run(v.channel.aput(v.message(0))), ready=CAPACITY
    ),
    "aget": _gets(call=lambda v: [asyncio.run(v.channel.aget())]),
    "aget that waits": _gets(("", "get"), turns=True, call=lambda v: [asyncio.run(v.channel.aget())], ready=0),
    "aput larger than the ring": _puts(
        turns=True, call=lambda v: asyncio.run(v.channel.aput(v.message(0))), **_larger("v", 5)
    ),
    "aget larger than the ring": _gets(
        ("put",), turns=True, call=lambda v: [asyncio.run(v.channel.aget())], **_larger("s", 5), ready=0
    ),
    "aloan that waits": _puts(
        ("", "put"), turns=True, call=lambda v: asyncio.run(v.aloan()), body=array(500), ready=CAPACITY
    ),
    "aborrow that waits": _gets(
        ("", "get"),
        turns=True,
        call=lambda v: asyncio.run(v.aborrow()),
        again=lambda v: v.borrow_again(),
        body=array(500),
        ready=0,
    ),
    "flush": Operation(lambda v: v.channel.flush(), prepare=lambda v: v.put(), sends=1, ready=0, blocked=("",)),
    "wait for peers": Operation(lambda v: v.channel.wait_for_peers(receivers=1), ready=0, blocked=("",)),
    "shutdown": Operation(lambda v: v.channel.shutdown(), ends=True),
    "shutdown at once": Operation(lambda v: v.channel.shutdown(immediate=True), ready=2, ends=True),
    "close": Operation(turns=True, call=lambda v: v.channel.close(), prepare=_take_part, ready=0),
    "close of the creator": Operation(turns=True, call=lambda v: v.channel.close(), owner="victim"),
    "attach": Operation(turns=True, call=lambda v: v.attach(), attached=False),
    "pickle": Operation(turns=True, call=lambda v: v.pickle(), prepare=_take_part, ready=0),
    "arrive": Operation(turns=True, call=lambda v: v.arrive(), attached=False, tickets=True),
    "create": Operation(lambda v: v.create(), owner="in it", attached=False, blocked=("",)),
    "create over the dead": Operation(
        lambda v: v.create(),
        prepare=_leave_a_corpse_of_a_channel,
        owner="in it",
        attached=False,
        blocked=("",),
    ),
    "fork, in the parent": Operation(turns=True, call=lambda v: v.fork(), forks="parent"),
    "fork, and put in the child": Operation(
        turns=True,
        call=lambda v: v.fork() or v.put(),
        sends=1,
        forks="child",
        again=lambda v: v.put_again(),
        resends=True,
    ),
    "exit": Operation(turns=True, call=lambda v: v.exit(), prepare=_take_part, ready=0),
    "exit of the creator": Operation(turns=True, call=lambda v: v.exit(), owner="victim"),
    "put that recovers": _puts(turns=True, corpse=_IN_SEND),
    "put that reaps": _puts(turns=True, prepare=_look_at_once, corpse=_IN_SEND),
    "get that recovers": _gets(turns=True, corpse=_IN_RECEIVE),
    "get that requeues": _gets(turns=True, prepare=_look_at_once, corpse=_IN_DECODE),
    "get that drops": _gets(("",), prepare=_look_at_once, corpse=_IN_DECODE, options={"max_deliveries": 1}),
    # of a Latest
    "publish": _publishes(),
    "publish large": _publishes(body=array(LARGE_NBYTES)),
    "first publish": _publishes(prepare=_look_at_once),
    "publish that takes over": _publishes(turns=True, corpse=_IN_PUBLISH),
    "read": _reads(),
    "read once more": _reads(prepare=lambda v: (_never_spin(v), v.read())),
    "first read": _reads(prepare=_look_at_once),
    "read that waits": _reads(lambda v: [v.channel.read(newer_than=1)]),
    "read that recovers": _reads(turns=True, corpse=_IN_PIN),
    "borrow newest": _reads(lambda v: v.borrow_newest()),
    "borrow newest, keep a view": _reads(lambda v: v.borrow_newest(keep=True)),
    "attach to the newest": _reads(
        lambda v: v.attach(), prepare=lambda v: None, again=lambda v: v.repeat(), attached=False, takes=0
    ),
    "close of a reader": _reads(lambda v: v.channel.close(), takes=0, again=lambda v: []),
    # killed by a timer
    "put that waits long": _puts(ready=CAPACITY, blocked=("", "put"), seconds=0.02),
    "get that waits long": _gets(ready=0, blocked=("", "get"), seconds=0.02),
    "put of 20 MB": _puts(ready=0, body=array(_HUGE), options={"slot_size": _HUGE + 4096}, seconds=0.02),
    "get of 20 MB": _gets(("",), ready=1, body=array(_HUGE), options={"slot_size": _HUGE + 4096}, seconds=0.03),
    "loan that waits long": _puts(
        call=lambda v: v.loan(), body=array(500), ready=CAPACITY, blocked=("",), seconds=0.02
    ),
    "borrow that waits long": _gets(
        call=lambda v: v.borrow(),
        again=lambda v: v.borrow_again(),
        body=array(500),
        ready=0,
        blocked=("",),
        seconds=0.02,
    ),
    "flush that waits long": Operation(
        lambda v: v.channel.flush(), prepare=lambda v: v.put(), sends=1, ready=0, blocked=("",), seconds=0.02
    ),
    "read that waits long": _reads(lambda v: [v.channel.read(newer_than=1)], seconds=0.02),
    "publish of 20 MB": _publishes(body=array(_HUGE), options={"slot_size": _HUGE + 4096}, blocked=("",), seconds=0.02),
    "read of 20 MB": _reads(body=array(_HUGE), options={"slot_size": _HUGE + 4096}, blocked=("",), seconds=0.03),
    "put of 20 MB, larger than the ring": _puts(**_larger("v", 0, _HUGE), ready=0, seconds=0.02),
    "get of 20 MB, larger than the ring": _gets(("put",), **_larger("s", 0, _HUGE), ready=0, seconds=0.02),
    "get of objects": _gets(("",), ready=1, body=objects(50_000), options={"slot_size": 4 << 20}, seconds=0.03),
}

# --- the victim


#: At these CPython never runs a signal handler, and they raise nothing: they stand where a `try` begins.
_UNINTERRUPTED = {dis.opmap[name] for name in ("NOP", "SETUP_FINALLY", "SETUP_WITH") if name in dis.opmap}


class Tracer:
    """Counts this thread's bytecodes inside the package (or at one spot of it), and acts before one of them."""

    def __init__(self, act: Callable[[FrameType], None], at: int, spot: Spot | None, concerns: Callable[[], bool]):
        self.count = 0
        self._act = act
        self._at = at
        self._spot = spot
        self._concerns = concerns
        self._codes: dict[CodeType, bytes | None] = {}

    def _in_package(self, code: CodeType) -> bytes | None:
        """Its bytecodes, if it is of the package."""
        inside = os.path.dirname(code.co_filename) == PACKAGE
        return code.co_code if inside and (not self._spot or self._spot.function == code.co_name) else None

    def _in_call(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if code not in self._codes:
            self._codes[code] = self._in_package(code)
        if self._codes[code] is None:
            return None
        frame.f_trace = self._in_frame  # before f_trace_opcodes: Python 3.13 looks for it then
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._in_frame

    def _in_frame(self, frame: FrameType, event: str, arg: object) -> Any:
        bytecodes = self._codes[frame.f_code]
        if event != "opcode" or bytecodes is None or bytecodes[frame.f_lasti] in _UNINTERRUPTED:
            return self._in_frame
        if self._is_there(frame) and self._concerns():
            self.count += 1
            if self.count == self._at:
                self._act(frame)
        return self._in_frame

    def _is_there(self, frame: FrameType) -> bool:
        spot = self._spot
        return not spot or spot.fragment in linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)

    def __enter__(self) -> Tracer:
        sys._getframe().f_trace_opcodes = True  # Python 3.12 wants it set on some frame before it begins to trace
        sys.settrace(self._in_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


class Timer:
    """Kills this process, at some time that depends on `at`; 0 does not."""

    def __init__(self, at: int, seconds: float) -> None:
        self._delay = random.Random(at).uniform(1e-6, seconds) if at else 0.0

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends it as SIGKILL does: no Python code runs any more
        signal.setitimer(signal.ITIMER_REAL, self._delay)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def place_of(frame: FrameType) -> str:
    code, line = frame.f_code, frame.f_lineno or 0
    source = linecache.getline(code.co_filename, line).strip()
    opcode = dis.opname[code.co_code[frame.f_lasti]]
    return f"{os.path.basename(code.co_filename)}:{line} {code.co_name}: {source} [{opcode}]"


_INTERRUPTS: dict[str, type[BaseException]] = {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}
ACTIONS = ("kill", *_INTERRUPTS)


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

    def borrow(self, keep: bool = False) -> list[Any]:
        with self.channel.borrow() as borrow:
            self.held = [borrow._value]  # without a bytecode of the package's
            if not keep:
                self.held = [copy.deepcopy(self.held[0])]
        return self.held

    async def aloan(self) -> None:
        async with self.channel.aloan() as loan:
            for part in map(np.asarray, self.message(0)):
                loan.array(part.shape, part.dtype)[...] = part

    async def aborrow(self) -> list[Any]:
        async with self.channel.aborrow() as borrow:
            self.held = copy.deepcopy([borrow._value])
        return self.held

    def requeue(self) -> list[Any]:
        with self.channel.borrow() as borrow:
            borrow.requeue()
        return []

    def get_into(self, timeout: float | None = None) -> list[Any]:
        with suppress(queue.Empty):
            return [copy.deepcopy(self.channel.get(timeout=timeout, out=self.out))]
        return []

    def put_batch(self, n: int) -> None:
        messages = [self.message(number) for number in range(n)]
        self.channel.put_batch({name: np.stack([message[name] for message in messages]) for name in TYPED})

    def pickle(self) -> None:
        pickle.dumps(self.channel)

    def borrow_again(self) -> list[Any]:
        """What was borrowed is received, also if the block was left by an exception."""
        return copy.deepcopy(self.held) or self.get_again()

    def get_batch(self, n: int, **others: Any) -> list[Any]:
        batch = self.channel.get_batch(n, **others)
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
        with self.channel.borrow() as borrow:
            self.held = [(borrow._pin.version, borrow._value)]  # without a bytecode of the package's
            if not keep:
                self.held = copy.deepcopy(self.held)
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
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]

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

    def act(frame: FrameType) -> None:
        reports.send(("at", place_of(frame)))
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise _INTERRUPTS[action]("as a signal handler would")

    me = os.getpid()
    concerns = lambda: True  # noqa: E731
    if operation.forks:
        concerns = lambda: (os.getpid() == me) == (operation.forks == "parent")  # noqa: E731
    tracer = Tracer(act, at, spot, concerns)
    interrupted = False
    try:
        with Timer(at, operation.seconds) if operation.seconds else tracer:
            value = operation.call(victim)
        if operation.forks == "child" and os.getpid() == me:
            return  # the child makes the report
        reports.send(("finished", [operation.number_of(got) for got in value] if operation.takes else []))
        reports.send(("count", tracer.count))
    except tuple(_INTERRUPTS.values()):
        interrupted = True
    if interrupted:  # and its traceback is gone, which would keep what the call has made
        reports.send(("raised", None))
        reports.send(("again", [operation.number_of(got) for got in operation.again(victim)]))
    victim.channel.close()


def victim_process(victim: Victim, action: str, at: int, spot: Spot | None, reports: Any, go: Any) -> None:
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
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        if os.getpid() == parent and victim.operation.forks == "child":
            with suppress(ChildProcessError):
                os.wait()
        os._exit(status)


# --- the survivors


class Hang(AssertionError):
    """A survivor's call did not end."""


class Refused(AssertionError):
    """A survivor's call raised an error."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Survivor:
    """A process that makes calls on a channel of its own, one at a time."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.call_made = ""
        self._pipe, pipe = Pipe()
        self.pid = os.fork()
        if not self.pid:
            self._pipe.close()
            try:
                self._serve(pipe)
            finally:
                os._exit(1)
        pipe.close()

    def _serve(self, pipe: Any) -> None:
        die_with_parent()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        warnings.simplefilter("ignore")
        recognisable_nonces()
        channel: Any = None
        held: list[Any] = []
        while True:
            method, args, kwargs = pipe.recv()
            try:
                if method == "create":
                    channel = args[0](**kwargs)
                    value = None
                elif method == "attach":
                    channel = args[0].attach(args[1])
                    value = None
                elif method == "hold":  # the newest version of a Latest, by a view
                    with channel.borrow() as borrow:
                        held.append(borrow.value)
                        value = borrow.version
                elif method == "let go":
                    value, held = copy.deepcopy(held), []
                elif method == "take":
                    with channel.borrow(timeout=PATIENCE / 4) as borrow:
                        value = copy.deepcopy(borrow.value), borrow.delivery_count
                elif method == "pickle":
                    value = pickle.dumps(channel)
                elif method == "exit":
                    channel = None
                    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
                    os._exit(0)
                else:
                    value = getattr(channel, method)(*args, **kwargs)
                pipe.send((True, value, ""))
            except Exception as error:
                pipe.send((False, type(error).__name__, traceback.format_exc()))

    def start(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Begin a call."""
        assert not self.call_made
        self.call_made = method
        self._pipe.send((method, args, kwargs))

    def has_result(self) -> bool:
        """Whether the call has ended."""
        return bool(self._pipe.poll())

    def result(self) -> Any:
        """What the call returned; Refused if it raised."""
        if not self._pipe.poll(PATIENCE):
            os.kill(self.pid, signal.SIGUSR1)
            raise Hang(f"the {self.role}'s {self.call_made} did not end")
        done, value, text = self._pipe.recv()
        self.call_made = ""
        if not done:
            raise Refused(value, text)
        return value

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.start(method, *args, **kwargs)
        return self.result()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._pipe.close()


# --- trials


@dataclass
class Trial:
    """What was done, and how it ended."""

    operation: str
    blocked: str
    action: str
    at: int
    spot: Spot | None = None
    place: str = ""
    ended: str = ""  # "finished", "killed" or "raised"
    count: int = 0  # bytecodes, if it finished
    lost: int = 0
    doubt: int = 0
    redelivered: int = 0
    recoveries: int = 0
    left: int = 0  # files of the dead victim, which nobody but it has used
    failure: str = ""

    def __str__(self) -> str:
        spot = f" of {self.spot.function}: {self.spot.fragment}" if self.spot else ""
        place = f" ({self.place})" if self.place else ""
        calls = OPERATIONS[self.operation].blocked
        call = calls[self.at % len(calls)] if self.blocked == TURNS else self.blocked
        blocked = f", a survivor blocked in {call}" if call else ""
        return f"{self.operation}{blocked}: {self.action} at bytecode {self.at}{spot}{place}: {self.failure or 'well'}"


def patiently(condition: Callable[[], Any], complaint: str) -> None:
    """Wait until the condition holds; Hang if that takes too long."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            raise Hang(complaint)
        time.sleep(0.002)


def _files(*parts: str) -> list[str]:
    """Files of ringshm whose names contain any of these."""
    names = os.listdir("/dev/shm")
    return sorted(name for name in names if "ringshm" in name and any(part in name for part in parts))


class Arena:
    """Two survivors, and the victims that come and go."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.sender = Survivor("sender")
        self.receiver = Survivor("receiver")

    def end(self) -> None:
        for survivor in (self.sender, self.receiver):
            survivor.end()

    def run(self, name: str, blocked: str, action: str, at: int, spot: Spot | None = None) -> Trial:
        """Make one trial; failures stand in it."""
        self.operation = OPERATIONS[name]
        self.trial = Trial(name, blocked, action, at, spot)
        self.blocked = self.operation.blocked[at % len(self.operation.blocked)] if blocked == TURNS else blocked
        self.name = f"kills-{os.getpid()}-{next(self._numbers)}"
        self.sent: list[int] = []  # numbers of the sender's messages whose put has returned
        self.received: list[tuple[str, int]] = []  # by the receiver, in its order
        self.victims: list[tuple[str, int]] = []  # by victims
        self.deliveries: list[int] = []  # of what the receiver took in the end
        self.pids: list[int] = []
        try:
            self._run()
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            text = str(error) if isinstance(error, AssertionError) else ""
            line = traceback.extract_tb(error.__traceback__)[-1]
            self.trial.failure = f"{text or repr(error)}\n    in {line.name}: {line.line}"
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            owners = [self.name, *(f"{pid:08x}" for pid in (*self.pids, self.sender.pid, self.receiver.pid))]
            self.end()
            self._start()
            for file in _files(*owners):
                os.unlink(f"/dev/shm/{file}")
        return self.trial

    # --- one trial, from begin to end

    def _run(self) -> None:
        operation, trial = self.operation, self.trial
        parcel = self._open()
        self._run_victims(parcel)
        if operation.owner == "in it":
            self._open_as_survivors()
        reading = self._reading()
        if operation.ends:
            self._end()
        else:
            self._see_the_dead()
            self._unblock()
            while self.receiver("qsize"):
                self._take()
        self._check_account()
        redelivered = trial.redelivered
        if trial.action == "kill" and operation.corpse is None and not self.blocked:
            assert self.deliveries.count(2) == redelivered, f"{redelivered} redelivered, deliveries {self.deliveries}"
            assert set(self.deliveries) <= {1, 2}
        assert reading in (None, redelivered), f"{redelivered} redelivered by the stats, {reading} in truth"
        if not operation.ends:
            self._check_capacity()
        self._check_stats()
        self._close()

    def _run_victims(self, parcel: bytes) -> None:
        operation, trial = self.operation, self.trial
        if operation.corpse is not None:
            doing = replace(operation, call=lambda v: getattr(v, operation.corpse.call)(), prepare=lambda v: None)
            self._run_victim(doing, b"", "kill", 1, operation.corpse)
            assert trial.ended == "killed", "the corpse lives"
        self._run_victim(operation, parcel, trial.action, trial.at, trial.spot, serve=True)

    def _open(self) -> bytes:
        """Make the channel and what waits in it."""
        operation = self.operation
        if operation.owner != "sender":
            return b""
        self._open_as_survivors()
        self._fill()
        return self.sender("pickle") if operation.tickets else b""

    def _open_as_survivors(self) -> None:
        if self.operation.owner == "victim":
            self.sender("attach", self.operation.kind, self.name)
        else:
            self.sender("create", self.operation.kind, **self.operation.arguments(self.name))
        self.receiver("attach", self.operation.kind, self.name)

    def _fill(self) -> None:
        ready = self.operation.ready
        ready = {"get": 0, "put": ready if self.operation.streams else CAPACITY}.get(self.blocked, ready)
        while len(self.sent) < ready:
            self._put()

    def _block(self) -> None:
        """Have a survivor blocked in its call."""
        blocked = self.blocked
        if not blocked:
            return
        if blocked == "get":
            self.receiver.start("get")
        elif blocked == "flush":
            self.sender.start("flush")
        else:
            self.sender.start("put", self._next())
        pid = self.receiver.pid if blocked == "get" else self.sender.pid
        patiently(lambda: self._waiting_for(pid), f"the {blocked} does not block")

    def _waiting_for(self, pid: int) -> str:
        people = self._idle("stats").participants
        return next((person.waiting_for for person in people if person.pid == pid), "")

    @property
    def _idle(self) -> Survivor:
        """The survivor that is not blocked."""
        return self.receiver if self.sender.call_made else self.sender

    def _next(self) -> Any:
        return self.operation.message("s", len(self.sent))

    def _put(self, body: bool = True) -> None:
        self.sender("put", self._next() if body else self._small(len(self.sent)))
        self.sent.append(len(self.sent))

    def _small(self, number: int) -> Any:
        return self.operation.message("s", number) if "spec" in self.operation.options else ("s", number)

    def _get(self, method: str = "get") -> None:
        self.received.append(self.operation.number_of(self.receiver(method)))

    def _take(self) -> None:
        """As `_get`, by a borrow, which knows how often the message was delivered."""
        message, deliveries = self.receiver("take")
        self.received.append(self.operation.number_of(message))
        self.deliveries.append(deliveries)

    # --- the victim's life

    def _run_victim(
        self, operation: Operation, parcel: bytes, action: str, at: int, spot: Spot | None, serve: bool = False
    ) -> None:
        trial = self.trial
        reports, sending = Pipe(duplex=False)
        going, go = Pipe(duplex=False)
        pid = os.fork()
        if not pid:
            reports.close()
            go.close()
            victim_process(Victim(self.name, operation, parcel), action, at, spot, sending, going)
        self.pids.append(pid)
        sending.close()
        going.close()
        reports.poll(PATIENCE)
        what, said = reports.recv()
        assert what == "ready", f"the victim did not come up: {said}"
        if serve and operation.owner == "victim":
            self._open_as_survivors()
            self._fill()
        if serve:
            self._block()
        go.send(None)
        self._serve(pid, serve)
        said = {}
        with suppress(EOFError):  # when the last process that the victim has forked is gone
            while reports.poll(PATIENCE):
                what, value = reports.recv()
                said[what] = value
        reports.close()
        go.close()
        trial.place = said.get("at", "")
        assert "failed" not in said, f"the victim failed: {said['failed']}"
        trial.ended = "finished" if "finished" in said else "raised" if "raised" in said else "killed"
        assert operation.seconds or (trial.ended == "killed") == ("at" in said and action == "kill"), said
        trial.count = said.get("count", 0)
        self.victims += [*said.get("finished", []), *said.get("again", [])]

    def _serve(self, pid: int, serve: bool) -> None:
        """Wait for the victim's end; give it what it waits for."""
        give_up = time.monotonic() + PATIENCE
        for rounds in itertools.count(1):
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                return
            if time.monotonic() > give_up:
                raise Hang("the victim did not end")
            time.sleep(0.001)
            if not serve or rounds % 4 or self.operation.owner == "in it":
                continue
            stats = self._idle("stats")
            waiting = next((person.waiting_for for person in stats.participants if person.pid == pid), "")
            self._give(waiting, stats)

    def _give(self, waiting: str, stats: Any) -> None:
        """What the victim waits for."""
        if waiting == "message" and not stats.ready:
            if not self.sender.call_made:  # else it was blocked in put, has room now, and sends by itself
                self._put()
        elif (waiting == "space" and stats.ready) or waiting == "event":
            if self.blocked == "get" and self.receiver.call_made and self.receiver.has_result():
                self._collect()  # it was blocked in get, and has taken what came before this
            if not self.receiver.call_made:
                self._try(lambda: self._get("get_nowait"))

    # --- what the survivors find

    def _reading(self) -> int | None:
        """How many messages the dead were receiving; None if somebody may have reaped them already."""
        corpse = self.operation.corpse
        if self.blocked or "max_deliveries" in self.operation.options:
            return None
        slots = self.sender("stats").slots
        reading = sum(slot.state == "reading" and slot.pid == self.pids[-1] for slot in slots)
        return reading + (corpse is not None and corpse.call == "get")

    def _see_the_dead(self) -> None:
        """Wait until only the living take part: who is blocked looks for the dead, or else the sender does."""
        living = {self.sender.pid, self.receiver.pid}
        give_up = time.monotonic() + PATIENCE
        while {person.pid for person in self._idle("stats").participants} != living:
            if not self._blocked:
                self.sender("wait_for_peers", senders=99, timeout=0.01)
            elif self._blocked.has_result():
                self._collect()
            assert time.monotonic() < give_up, f"the dead are still there: {self._idle('stats').participants}"
            time.sleep(0.005)

    def _collect(self) -> None:
        """The result of the survivor that was blocked."""
        if self.blocked == "get":
            self.received.append(self.operation.number_of(self.receiver.result()))
        elif self.blocked == "put":
            self.sender.result()
            self.sent.append(len(self.sent))
        else:
            assert self.sender.result() is True

    @property
    def _blocked(self) -> Survivor | None:
        """The survivor that is blocked in its call, or has just come out of it."""
        return next((survivor for survivor in (self.sender, self.receiver) if survivor.call_made), None)

    def _make_room(self) -> bool:
        """Receive a message, if there is one; whether that was enough for the sender."""
        if self.receiver("qsize"):
            self._get()
        return self.sender.has_result()

    def _unblock(self) -> None:
        """Let a survivor that is still blocked go on, as it must."""
        if self._blocked is self.receiver:
            self._put()
        elif self._blocked is self.sender:
            patiently(self._make_room, f"the sender's {self.blocked} did not end")
        if self._blocked:
            self._collect()

    def _end(self) -> None:
        """After a call that shuts the channel down: it has, or did not begin to; then a survivor can."""
        open_ = self.trial.ended != "finished" and self._try(self._put) is None
        if self.blocked == "get":
            outcome = self._try(self._collect)
            assert outcome == (None if open_ else "EndOfChannel"), outcome
        self.sender("shutdown", immediate="at once" in self.trial.operation)
        while (outcome := self._try(self._get)) is None:
            pass
        assert outcome == "EndOfChannel", outcome
        living = {self.sender.pid, self.receiver.pid}

        def over() -> bool:
            assert self._try(self._put) == "ChannelClosed"
            return {person.pid for person in self.sender("stats").participants} == living

        patiently(over, "the dead are still there")

    @staticmethod
    def _try(call: Callable[[], None]) -> str | None:
        """The name of the error that the survivor's call raises."""
        try:
            call()
        except Refused as error:
            return error.kind
        return None

    def _check_account(self) -> None:
        operation, trial = self.operation, self.trial
        stats = self.sender("stats")
        got = self.received + self.victims
        double = [what for what, times in Counter(got).items() if times > 1]
        assert not double, f"received more than once: {double}"
        theirs = sorted(number for who, number in got if who == "v")
        whole = operation.sends + (1 if trial.ended == "raised" and operation.sends else 0)
        if trial.ended == "finished":
            assert theirs == list(range(operation.sends)), f"of the victim's messages came {theirs}"
        elif trial.ended == "killed":
            assert theirs == list(range(len(theirs))) and len(theirs) <= whole, f"of the victim's came {theirs}"
            trial.doubt = len(theirs)
        else:
            first = [number for number in theirs if number < operation.sends]
            assert first == list(range(len(first))) and set(theirs) <= set(range(whole)), (
                f"of the victim's came {theirs}"
            )
            assert not operation.resends or operation.sends in theirs, f"what it put then is lost: {theirs}"
        ours = [number for who, number in got if who == "s"]
        missing = sorted(set(self.sent) - set(ours))
        assert set(ours) <= set(self.sent), f"received what was not sent: {ours}, {self.sent}"
        trial.lost = len(missing) - stats.dropped
        allowed = 0 if trial.ended == "finished" else operation.takes
        assert 0 <= trial.lost <= allowed, f"{missing} are missing, {stats.dropped} were dropped"
        trial.redelivered, trial.recoveries = stats.redelivered, stats.recoveries
        for view in (self.received, self.victims):
            for who in "sv":
                numbers = [number for whose, number in view if whose == who]
                if operation.takes and self.blocked == "get":
                    continue  # two receive at once: what one gave back passes what the other took
                assert numbers == sorted(numbers), f"out of order: {numbers}"

    def _check_capacity(self) -> None:
        """All slots can be filled, no more, and emptied."""
        begin = len(self.sent)
        for _ in range(CAPACITY):
            self._put(body=False)
        if self.operation.options.get("when_full") != "drop_oldest":
            try:
                self.sender("put_nowait", self._small(-1))
                raise AssertionError("more messages than slots")
            except Refused as error:
                assert error.kind == "Full", error
        assert self.sender("qsize") == CAPACITY and self.receiver("full")
        got = [self.operation.number_of(self.receiver("get_nowait")) for _ in range(CAPACITY)]
        assert got == [("s", number) for number in range(begin, begin + CAPACITY)]

    def _check_stats(self) -> None:
        stats = self.sender("stats")
        free = (stats.free, stats.slots, stats.ready, stats.waiting_senders, stats.waiting_receivers)
        assert free == (CAPACITY, (), 0, 0, 0), free
        assert stats.sent == stats.received + stats.dropped, stats
        got = len(self.received) + len(self.victims) + self.trial.lost + CAPACITY * (not self.operation.ends)
        assert stats.received == got, f"{stats.received} received by the stats, {got} in truth; {stats.dropped} dropped"
        assert stats.dropped or stats.sent_nbytes == stats.received_nbytes, stats
        assert stats.withdrawn <= 2 * self.operation.streams, stats
        assert {person.pid for person in stats.participants} == {self.sender.pid, self.receiver.pid}

    def _close(self) -> None:
        """Nothing is left but what the dead victim alone knew of."""
        order = [self.sender, self.receiver]
        for survivor in order if self.trial.at % 2 else reversed(order):
            survivor("close")
        if self.operation.tickets:  # an unclaimed ticket keeps the names while its maker lives
            self.sender.start("exit")
            os.waitpid(self.sender.pid, 0)
            left = self._left()
            self.sender = Survivor("sender")
        else:
            left = self._left()
        if self.operation.owner == "in it" and self.trial.ended == "killed":
            victims = _files(f"{self.pids[-1]:08x}")
            self.trial.left = len(victims)
            left = [file for file in left if file not in victims]
            for file in victims:
                os.unlink(f"/dev/shm/{file}")
        if not host.RECORD_LOCKS and left:  # the file of locks goes last: who is killed just before leaves an orphan
            for path in look().orphans:  # no `clean`: it would take the corpses of other trials
                if (file := os.path.basename(path)) in left and file.startswith(LOCKS_PREFIX):
                    os.unlink(path)
                    left.remove(file)
        assert not left, f"left behind: {left}"

    def _left(self) -> list[str]:
        return _files(self.name, *(f"{pid:08x}" for pid in (self.sender.pid, self.receiver.pid, *self.pids)))


class LatestArena(Arena):
    """Two survivors that share a Latest: a publisher, the "sender", and a reader, the "receiver"."""

    def _run(self) -> None:
        trial = self.trial
        self.versions: dict[int, tuple[str, int]] = {}  # what is known of them, from whoever saw them
        self.begun = 0  # versions that the victims may have published
        self._open_as_survivors()
        self._put()
        self._run_victims(b"")
        self._see_the_dead()
        self._unblock()
        self._check_versions()
        self._check_borrows()
        stats = self.sender("stats")
        assert (stats.held, stats.waiting_receivers) == ((), 0), stats
        trial.recoveries = stats.recoveries
        self._close()

    def _block(self) -> None:
        if self.blocked:
            self.receiver.start("read", len(self.sent))
            patiently(lambda: self._waiting_for(self.receiver.pid), "the read does not block")

    def _give(self, waiting: str, stats: Any) -> None:
        if waiting == "version":
            self._put()

    def _put(self, body: bool = True) -> None:
        message = self._next()
        self.sent.append(len(self.sent))
        self._saw(self.sender("publish", message), message)

    def _get(self, method: str = "read") -> None:
        self._saw(*self.receiver(method))

    def _collect(self) -> None:
        self._saw(*self.receiver.result())

    def _saw(self, version: int, message: Any) -> None:
        _, what = self.operation.number_of((version, message))
        assert self.versions.setdefault(version, what) == what, f"{version} is {self.versions[version]}, and {what}"

    def _check_versions(self) -> None:
        """They are consecutive, and each is one that somebody has published."""
        trial = self.trial
        for version, what in self.victims:
            assert self.versions.setdefault(version, what) == what, f"{version} is {self.versions[version]}, and {what}"
        newest, message = self.receiver("read")
        self._saw(newest, message)
        self._put()
        self._get()
        assert max(self.versions) == newest + 1, f"{newest} was the newest, now {self.versions}"
        theirs = self.operation.sends * (2 if trial.ended == "raised" else 1) + (self.operation.corpse is not None)
        unknown = newest + 1 - len(self.sent)  # how many are not the sender's
        assert 0 <= unknown <= theirs, f"{newest + 1} versions, of which the sender published {len(self.sent)}"
        ours = [what for _, what in sorted(self.versions.items()) if what[0] == "s"]
        assert ours == [("s", number) for number in self.sent], f"the sender's versions are {ours}"
        trial.doubt = unknown if trial.ended == "killed" else 0

    def _check_borrows(self) -> None:
        """So many versions can be held as were promised, no more, and the sender goes on."""
        held = []
        for _ in range(BORROWS):
            self._put()
            held.append(self.receiver("hold"))
        self._put()
        try:
            self.receiver("hold")
            raise AssertionError("more versions held than `borrows`")
        except Refused as error:
            assert error.kind == "TooManyBorrows", error
        self._put()
        for version, message in zip(held, self.receiver("let go"), strict=True):
            self._saw(version, message)
        self._saw(self.receiver("hold"), self.receiver("let go")[0])


# --- sweeps


#: Arenas at a time; most of their time they wait for slices.
PROCESSES = 8 * (os.cpu_count() or 1)


@dataclass(frozen=True)
class Task:
    """Some trials of one operation, made one after the other in one process.

    Attributes:
        ats: the bytecodes, or, if empty, `sample` of them drawn with `seed`; none of a sample of 0, which only counts.
        count: of the undisturbed call's bytecodes, if it is known.
    """

    operation: str
    blocked: str
    action: str
    ats: tuple[int, ...] = ()
    spot: Spot | None = None
    sample: int = 0
    seed: int = 0
    count: int = 0


#: Bytecodes that it takes to wake a sender, and whoever waits for messages to be received.
WAKING = 270 if host.SEMAPHORE_VALUES else 320


def check_lost(trial: Trial, count: int) -> None:
    """A victim may have taken a message with it only behind the release, in the last bytecodes of its call."""
    operation = OPERATIONS[trial.operation]
    if not operation.returning and trial.action != "kill":
        return  # a block that is left by an exception before it has asked for a requeue has received its message
    if not operation.ready and not host.TIMED_WAITS:
        return  # how many bytecodes a call takes that tries again and again depends on the time
    if trial.lost and not (operation.turns or operation.seconds or trial.spot or trial.failure):
        allowed = operation.returning + (WAKING if trial.blocked == "put" else 0)
        if trial.at <= count - allowed:
            trial.failure = f"lost {trial.lost}, {count - trial.at} bytecodes before the end, {allowed} are allowed"


def perform(task: Task) -> list[Trial]:
    """Make the trials, with a count of the undisturbed call's bytecodes before a sample."""
    arena = LatestArena() if OPERATIONS[task.operation].kind is Latest else Arena()
    try:
        trials, ats = [], task.ats
        if not ats:
            trials.append(arena.run(task.operation, task.blocked, task.action, 0, task.spot))
            count = trials[0].count
            ats = tuple(random.Random(task.seed).sample(range(1, count + 1), min(task.sample, count)))
        trials += [arena.run(task.operation, task.blocked, task.action, at, task.spot) for at in ats]
        for trial in trials:
            check_lost(trial, task.count or trials[0].count)
        return trials
    finally:
        arena.end()


def perform_all(tasks: Iterable[Task], processes: int = PROCESSES) -> Iterator[list[Trial]]:
    """The trials of each task."""
    with ProcessPoolExecutor(processes, get_context("fork"), die_with_parent) as pool:
        yield from pool.map(perform, tasks)


#: Those that are killed at their bytecodes, and those that a timer kills.
TRACED = [name for name, operation in OPERATIONS.items() if not operation.seconds]
TIMED = [name for name, operation in OPERATIONS.items() if operation.seconds]


def every_bytecode(
    names: Sequence[str], actions: Sequence[str], processes: int = PROCESSES, chunk: int = 20
) -> list[Trial]:
    """All trials of those operations."""
    counts = [Task(name, blocked, "kill") for name in names for blocked in OPERATIONS[name].blocked]
    trials = [trial for (trial,) in perform_all(counts, processes)]
    longest: dict[tuple[str, str], int] = {}
    for trial in trials:
        key = trial.operation, TURNS if OPERATIONS[trial.operation].turns else trial.blocked
        longest[key] = max(trial.count, longest.get(key, 0))
    tasks = [
        Task(name, blocked, action, tuple(range(start, min(start + chunk, count + 1))), count=count)
        for action in actions
        for (name, blocked), count in longest.items()
        for start in range(1, count + 1, chunk)
    ]
    print(HEADING, flush=True)
    for _, group in itertools.groupby(itertools.chain.from_iterable(perform_all(tasks, processes)), _kind):
        some = list(group)
        print(_line(some), *(trial for trial in some if trial.failure), sep="\n", flush=True)
        trials += some
    return trials


#: Of the trials of a kind: those that failed, those that finished undisturbed, those in which a message was lost with
#: the victim, those in which one was sent though `put` had not returned, those with redeliveries and recoveries, those
#: in which the exception went nowhere (a finaliser, an at-fork hook), the most files that were left, and between which
#: bytecodes a message went with the victim.
HEADING = (
    f"{'operation':28}{'blocked':8}{'action':18}{'trials':>7}{'failed':>8}{'finished':>9}{'lost':>6}{'in doubt':>9}"
    f"{'redelivered':>12}{'recovered':>10}{'swallowed':>10}{'left':>5}  lost at"
)


def _kind(trial: Trial) -> tuple[str, str, str]:
    return trial.operation, trial.blocked, trial.action


def _line(trials: Sequence[Trial]) -> str:
    name, blocked, action = _kind(trials[0])
    undisturbed = sum(trial.ended == "finished" and not trial.place for trial in trials)
    swallowed = sum(trial.ended == "finished" and bool(trial.place) for trial in trials)
    lost = [trial.at for trial in trials if trial.lost]
    return (
        f"{name:28}{blocked or '-':8}{action:18}{len(trials):7}{sum(bool(t.failure) for t in trials):8}{undisturbed:9}"
        f"{sum(t.lost > 0 for t in trials):6}{sum(t.doubt > 0 for t in trials):9}"
        f"{sum(t.redelivered > 0 for t in trials):12}{sum(t.recoveries > 0 for t in trials):10}{swallowed:10}"
        f"{max(t.left for t in trials):5}  {f'{min(lost)} to {max(lost)}' if lost else ''}"
    )


def table(trials: Iterable[Trial]) -> str:
    """What was seen, a line for each operation, blocked survivor and action."""
    groups = itertools.groupby(sorted((trial for trial in trials if trial.at), key=_kind), _kind)
    return "\n".join([HEADING, *(_line(list(group)) for _, group in groups)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill or interrupt operations of ringshm at their bytecodes.")
    parser.add_argument("operation", nargs="*", help=f"of {', '.join(OPERATIONS)}; all if none is given")
    parser.add_argument("--action", action="append", choices=ACTIONS)
    parser.add_argument("--at", type=int, action="append", help="these bytecodes only; 0 disturbs nothing")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args()
    names = options.operation or TRACED
    actions = options.action or ACTIONS
    if options.at:
        tasks = [Task(n, b, a, tuple(options.at)) for n in names for b in OPERATIONS[n].sweeps for a in actions]
        trials = [trial for some in perform_all(tasks, options.processes) for trial in some]
        print(*trials, table(trials), sep="\n")
    else:
        trials = every_bytecode(names, actions, options.processes)
    sys.exit(any(trial.failure for trial in trials))


if __name__ == "__main__":
    main()
