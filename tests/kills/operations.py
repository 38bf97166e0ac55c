"""The calls that victims make: OPERATIONS, by name. A new operation is one entry.

A message is `(who, number)`, for some operations with a body that tells whether the message is whole: `who` is "s" for
the sender that survives and "v" for the victim, and each numbers its own messages from 0.

An entry says what the victim calls, what stands ready before, in which call a survivor may be blocked meanwhile, and
how the account comes out: how many messages the call sends and takes. It says nothing about how many bytecodes anything
takes. The arena finds by itself in which of them a message goes with its receiver (arena.py).
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from support.seams import look_is_due, never_spin, warm_up
from support.workers import until

import ringshm
from ringshm import Channel, Latest
from ringshm.ring.acceleration import compiled

CAPACITY = 3
PARTICIPANTS = 6  # a table of 256 takes many bytecodes that are all alike
BORROWS = 2
SLOT_SIZE = 4096  # of one page each, since each trial makes a segment
LARGE_NBYTES = 200_000  # copied outside of the critical sections
TURNS = "turns"

#: A call on a victim (victim.py).
Call = Callable[[Any], Any]

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
class Spot:
    """A place in the package: a function, and a fragment of a line of its source.

    Attributes:
        call: for a corpse: what it was doing there.
    """

    function: str
    fragment: str = ""
    call: str = ""

    def __str__(self) -> str:
        return f"{self.function}: {self.fragment}" if self.fragment else self.function


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
        blocked: which calls a survivor may be blocked in: "get", "put", "flush", or "" for none. Each has a sweep.
        turns: these calls take turns in one sweep instead.
        body: makes the body of a message from its number.
        bodies: whose messages have one: "s" the survivors', "v" the victim's.
        streams: whether messages with a body are larger than a slot. No ring is filled with these; a sender that is
            blocked in `put` is amid one.
        options: of the channel.
        owner: who makes the channel: the "sender", or the "victim" before the call, or "in it".
        attached: whether the victim attaches before the call.
        corpse: where another process, that makes the call `put` or `get`, was killed before.
        ends: whether the call shuts the channel down.
        forks: whether the call forks, and is traced in the "child" or the "parent".
        invited: whether the victim gets a pickled handle.
        resends: whether `again` sends a further message, number `sends`.
        requeues: whether the call gives back what it takes: so no death loses a message. A block that is left by an
            exception before it has asked for that has received its message.
        seconds: if not 0, a timer kills the victim some time within so many seconds, inside a long call in C.
    """

    call: Call
    prepare: Call = lambda victim: None
    again: Callable[[Any], list[Any]] = lambda victim: victim.repeat()
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
    invited: bool = False
    turns: bool = False
    seconds: float = 0.0
    resends: bool = False
    requeues: bool = False

    kind: ClassVar[type[Any]] = Channel

    @property
    def accounts(self) -> bool:
        """Whether the call may take a message with it: then all messages are the surviving sender's, and a message's
        number is its sequence.
        """
        return bool(self.takes) and self.kind is Channel

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
        """What the channel is made with. Nobody spins: that would take a varying number of bytecodes."""
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


def _take_part(victim: Any) -> None:
    """Take the receiver's role."""
    victim.expect(queue.Empty, victim.channel.get_nowait)


def _warm_up(victim: Any, sends: bool = False) -> None:
    """Take the call's role, and have just looked for the dead: what is left is the call itself."""
    warm_up(victim.channel, sends or bool(victim.operation.sends))


def _look_at_once(victim: Any) -> None:
    """Wait until a slice has passed since anybody has looked for the dead, so that the call does."""
    until(lambda: look_is_due(victim.name))


def _leave_a_corpse_of_a_channel(victim: Any) -> None:
    if not (pid := os.fork()):
        _kept = Channel(CAPACITY, SLOT_SIZE, name=victim.name, max_participants=PARTICIPANTS)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


_LARGE = {"slot_size": 256 * 1024}
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


def _larger(bodies: str, slots: int, nbytes: int = 0) -> dict[str, Any]:
    """Messages that take so many slots; those without a body take one."""
    nbytes = nbytes or 1000 * slots - 300
    return {"body": array(nbytes), "bodies": bodies, "streams": True, "options": {"slot_size": max(1000, nbytes // 50)}}


def _never_spin(victim: Any) -> None:
    """Take the role, and have just looked for the dead; and do not spin, which takes a varying number of bytecodes."""
    _warm_up(victim)
    never_spin(victim.channel)


def _read_in_python(victim: Any) -> None:
    """Read by the reference, whatever is compiled: it leaves a pin for the next read to reclaim."""
    _never_spin(victim)
    before = compiled is not None and compiled.pause(True)
    victim.read()
    if compiled is not None:
        compiled.pause(before)


def _publishes(**others: Any) -> Operation:
    given = {"call": lambda v: v.publish(), "prepare": _never_spin, "again": lambda v: v.publish_again(), "sends": 1}
    return LatestOperation(**{**given, "blocked": ("", "read"), "body": array(500), "takes": 1, **others})


def _reads(call: Call = lambda v: v.read(), **others: Any) -> Operation:
    given = {"prepare": _never_spin, "again": lambda v: v.read_again()}
    return LatestOperation(call, **{**given, "blocked": ("", "read"), "body": array(500), "takes": 1, **others})


_IN_PUBLISH = Spot("_describe", "words[record + R_META] = meta", "publish")
_IN_PIN = Spot("_pin_newest", "self._cells[cell] = slot + 1", "read")

OPERATIONS: dict[str, Operation] = {
    "put": _puts(("", "get", "flush")),
    "put in parts": _puts(body=array(500)),
    "put large": _puts(body=array(LARGE_NBYTES), options=_LARGE),
    "put that waits": _puts(("", "put"), ready=CAPACITY),
    "put that drops": _puts(("",), ready=CAPACITY, options={"when_full": "drop_oldest"}),
    "put many": _puts(call=lambda v: v.channel.put_many([v.message(0), v.message(1)]), sends=2),
    "put larger than a slot": _puts(**_larger("v", 2), ready=0),
    "put larger than the ring": _puts(**_larger("v", 5)),
    "get larger than a slot": _gets(("",), **_larger("s", 2), ready=1),
    "get larger than the ring": _gets(("put",), **_larger("s", 5), ready=0),
    "borrow larger than the ring": _gets(
        ("put",),
        call=lambda v: v.borrow(),
        again=lambda v: v.borrow_again(),
        **_larger("s", 5),
        ready=0,
    ),
    "first put": _puts(prepare=_look_at_once),
    "get": _gets(),
    "get in parts": _gets(body=array(500)),
    "get that waits": _gets(("", "get"), ready=0),
    "get nowait": _gets(call=lambda v: [v.channel.get_nowait()]),
    "get many": _gets(call=lambda v: v.channel.get_many(2), takes=2),
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
    "borrow": _gets(call=lambda v: v.borrow(), again=lambda v: v.borrow_again(), body=array(500)),
    "borrow, and keep a view": _gets(
        call=lambda v: v.borrow(keep=True), again=lambda v: v.borrow_again(), body=array(500)
    ),
    "borrow, and requeue": _gets(
        call=lambda v: v.requeue(), again=lambda v: v.repeat(), body=array(500), requeues=True
    ),
    "typed put": _puts(body=array(500), options={"spec": TYPED}),
    "typed get": _gets(body=array(500), options={"spec": TYPED}),
    "get into an array": _gets(
        call=lambda v: v.get_into(),
        again=lambda v: v.get_into(timeout=1.0),
        body=array(500),
        options={"spec": TYPED},
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
    "get batch that waits": _gets(
        ("", "get"),
        turns=True,
        call=lambda v: v.get_batch(2),
        again=lambda v: v.get_batch_again(2),
        takes=2,
        body=array(500),
        options={"spec": TYPED},
        ready=0,
    ),
    "get nowait of nothing": _gets(
        ("", "get"), call=lambda v: v.expect(queue.Empty, v.channel.get_nowait), ready=0, takes=0
    ),
    "first get": _gets(prepare=_look_at_once),
    "get that quietens": _gets(prepare=lambda v: (_warm_up(v), v.channel.fileno()), ready=1, blocked=("",)),
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
    "aput many": _puts(call=lambda v: asyncio.run(v.channel.aput_many([v.message(0), v.message(1)])), sends=2),
    "aput many that waits": _puts(
        ("", "put"),
        turns=True,
        call=lambda v: asyncio.run(v.channel.aput_many([v.message(0), v.message(1)])),
        sends=2,
        ready=CAPACITY,
    ),
    "aget many": _gets(call=lambda v: asyncio.run(v.channel.aget_many(2)), takes=2),
    "aget many that waits": _gets(
        ("", "get"), turns=True, call=lambda v: asyncio.run(v.channel.aget_many(2)), takes=2, ready=0
    ),
    "aput batch": _puts(call=lambda v: asyncio.run(v.aput_batch(2)), body=array(500), options={"spec": TYPED}, sends=2),
    "aput batch that waits": _puts(
        ("", "put"),
        turns=True,
        call=lambda v: asyncio.run(v.aput_batch(2)),
        body=array(500),
        options={"spec": TYPED},
        sends=2,
        ready=CAPACITY,
    ),
    "aget batch": _gets(
        call=lambda v: asyncio.run(v.aget_batch(2)),
        again=lambda v: v.get_batch_again(2),
        takes=2,
        body=array(500),
        options={"spec": TYPED},
    ),
    "aget batch that waits": _gets(
        ("", "get"),
        turns=True,
        call=lambda v: asyncio.run(v.aget_batch(2)),
        again=lambda v: v.get_batch_again(2),
        takes=2,
        body=array(500),
        options={"spec": TYPED},
        ready=0,
    ),
    "aflush": Operation(
        lambda v: asyncio.run(v.channel.aflush()), prepare=lambda v: v.put(), sends=1, ready=0, blocked=("",)
    ),
    "flush": Operation(lambda v: v.channel.flush(), prepare=lambda v: v.put(), sends=1, ready=0, blocked=("",)),
    "wait for peers": Operation(lambda v: v.channel.wait_for_peers(receivers=1), ready=0, blocked=("",)),
    "shutdown": Operation(lambda v: v.channel.shutdown(), ends=True),
    "shutdown at once": Operation(lambda v: v.channel.shutdown(immediate=True), ready=2, ends=True),
    "close": Operation(turns=True, call=lambda v: v.channel.close(), prepare=_take_part, ready=0),
    "close of the creator": Operation(turns=True, call=lambda v: v.channel.close(), owner="victim"),
    "attach": Operation(turns=True, call=lambda v: v.attach(), attached=False),
    "pickle": Operation(turns=True, call=lambda v: v.pickle(), prepare=_take_part, ready=0),
    "arrive": Operation(turns=True, call=lambda v: v.arrive(), attached=False, invited=True),
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
    "publish large": _publishes(body=array(LARGE_NBYTES), options=_LARGE),
    "first publish": _publishes(prepare=_look_at_once),
    "publish that takes over": _publishes(turns=True, corpse=_IN_PUBLISH),
    "read": _reads(),
    "read once more": _reads(prepare=_read_in_python),
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
