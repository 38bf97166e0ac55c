"""Trials of tests/process/test_start.py: a child is started, and it or its maker is killed meanwhile.

They run in a program of their own (`python -c "from support.starts import main; main(...)"`), whose children have no
main module to import: that of pytest takes seconds. The late child is a daemon, so that a trial that fails ends it.
"""

from __future__ import annotations

import multiprocessing
import queue
import random
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from ringshm import Channel, Sender
from support import workers
from support.checks import check_empty
from support.payloads import Unpickles
from support.tracer import Tracer


def _die_at(at: int, report: Connection) -> None:
    """From here on the process counts bytecodes in ringshm, and dies at that one."""
    tracer = Tracer(workers.die, at, may_miss=True)
    tracer.__enter__()
    _tracers.append((tracer, report))


_tracers: list[tuple[Tracer, Connection]] = []


class _Waits(Unpickles):
    """What makes a child wait before it unpickles the next argument; or, forked, before it uses it."""

    def __init__(self, begin: Connection) -> None:
        super().__init__(Connection.recv, begin)


def _put_once(wait: Any, sender: Sender[Any], message: str) -> None:
    if isinstance(wait, _Waits):
        Connection.recv(*wait.args)
    sender.put(message)
    for tracer, report in _tracers:
        report.send("sent")
        sender.close()
        tracer.__exit__(None, None, None)
        report.send(tracer.count)


def _told(reports: Connection) -> list[Any]:
    """What a process has reported, once it has ended."""
    told = []
    try:
        while True:
            told.append(reports.recv())
    except EOFError:
        return told


def _start(method: str, *args: Any, daemon: bool = False) -> Any:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_put_once, args=args, daemon=daemon)
    process.start()
    return process


def _check_stream(receiver: Any, wait: Connection, told: list[Any], late: Any) -> None:
    """The messages that were sent are there, the stream goes on until the late child has come and gone, and ends."""
    if "sent" in told:
        assert receiver.get() == "message"
    else:
        with suppress(queue.Empty):  # a sender that dies before its put returned may or may not have sent
            assert receiver.get(timeout=0.12) == "message"
    check_empty(receiver.get, timeout=0.12)
    wait.send(None)
    assert list(receiver) == ["late"]
    late.join()


def _child_trial(method: str, at: int) -> list[Any]:
    context: Any = multiprocessing.get_context(method)
    with Channel(4, 64).receiver() as receiver:
        channel = Channel.attach(receiver.name)
        begin, wait = context.Pipe()
        late = _start(method, _Waits(begin), channel.sender(), "late", daemon=True)
        reports, report = context.Pipe(duplex=False)
        if method == "fork":
            victim = context.Process(target=_put_forked, args=(at, report, channel.sender()))
            victim.start()
        else:
            victim = _start(method, Unpickles(_die_at, at, report), channel.sender(), "message")
        report.close()
        channel.close()
        told = _told(reports)
        victim.join()
        assert victim.exitcode in (0, -signal.SIGKILL), victim.exitcode
        assert (victim.exitcode == 0) == (len(told) == 2)
        _check_stream(receiver, wait, told, late)
    return told


def _put_forked(at: int, report: Connection, sender: Sender[Any]) -> None:
    _die_at(at, report)
    _put_once(None, sender, "message")


def _make(method: str, channel: Channel, at: int, report: Connection) -> None:
    """The maker: it starts a child at whose start it is killed, at a bytecode, or (negative) after so many us."""
    sender = channel.sender()
    channel.close()
    if at < 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, -at / 1e6)
    with Tracer(workers.die, max(at, 0), may_miss=True) as tracer:
        child = _start(method, None, sender, "message")
    report.send(tracer.count)
    child.join()


def _maker_trial(method: str, at: int) -> list[Any]:
    context: Any = multiprocessing.get_context("fork")
    with Channel(4, 64).receiver() as receiver:
        channel = Channel.attach(receiver.name)
        begin, wait = context.Pipe()
        late = context.Process(target=_put_late, args=(begin, channel.sender()), daemon=True)
        late.start()
        reports, report = context.Pipe(duplex=False)
        maker = context.Process(target=_make, args=(method, channel, at, report))
        maker.start()
        report.close()
        channel.close()
        told = _told(reports)
        maker.join()
        _check_stream_of(receiver, wait, late)
    return told


def _put_late(begin: Connection, sender: Sender[Any]) -> None:
    begin.recv()
    sender.put("late")


def _check_stream_of(receiver: Any, wait: Connection, late: Any) -> None:
    """The child of a dead maker may come or not, and at any time; the late one comes, and the stream ends then."""
    wait.send(None)
    assert sorted(receiver) in (["late"], ["late", "message"])
    late.join()


def main(what: str, method: str, trials: int, seed: int) -> None:
    """Make so many trials, of the first and the last bytecode and a sample of the others; all of them if `trials` is 0.

    Prints how many bytecodes there are, and how many trials were made.

    Args:
        what: who is killed, "child" or "maker".
        method: by which the child is started.
    """
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["support.starts"])
    trial = _child_trial if what == "child" else _maker_trial
    count = trial(method, 0)[-1]
    chance = random.Random(seed)
    places = range(1, count + 1)
    chosen = sorted({1, count, *chance.sample(places, min(count, trials))}) if trials else places
    for at in chosen:
        trial(method, at)
    if what == "maker":
        for _ in range(trials):
            trial(method, -chance.randrange(1, 20_000))
    print(count, len(chosen))
