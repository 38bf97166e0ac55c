"""Signals, threads, garbage collections, forks and steps of the clock, while calls are blocked or at work."""

from __future__ import annotations

import _thread
import dis
import gc
import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import workers
from support.checks import check_whole
from support.tracer import Tracer, bytecodes, interrupt_at

import ringshm
from ringshm import Channel, ChannelClosed, EndOfChannel, Latest
from ringshm.channel.event_loop import until_received_in_loop
from ringshm.channel.steps import finish, until_received
from ringshm.errors import ReentrantCall
from ringshm.ring.mutex import SLICE
from ringshm.ring.outcomes import EMPTY

pytestmark = workers.may_fork

#: What may block, with a time-out (None: for ever).
CALLS: dict[str, Callable[[Channel, float | None], Any]] = {
    "get": lambda channel, timeout: channel.get(timeout=timeout),
    "get_many": lambda channel, timeout: channel.get_many(2, timeout=timeout),
    "put": lambda channel, timeout: channel.put("put", timeout=timeout),
    "put_many": lambda channel, timeout: channel.put_many(["put"], timeout=timeout),
    "flush": lambda channel, timeout: channel.flush(timeout=timeout),
    "wait_for_peers": lambda channel, timeout: channel.wait_for_peers(receivers=1, timeout=timeout),
}
#: What each answers when its time is up.
TIMED_OUT = {
    "get": queue.Empty, "get_many": queue.Empty, "put": queue.Full, "put_many": 0, "flush": False,
    "wait_for_peers": False,
}  # fmt: skip
#: What each answers when it is over, after `_help`.
ANSWERS = {"get": "help", "get_many": ["help"], "put": None, "put_many": 1, "flush": True, "wait_for_peers": True}


def _prepare(channel: Channel, call: str) -> list[str]:
    """Bring a channel of one slot into the state in which that call blocks; what it holds then."""
    if call in ("get", "get_many", "wait_for_peers"):
        return []
    channel.put("before")
    return ["before"]


def _help(channel: Channel, call: str) -> None:
    """End that call of another process."""
    if call in ("get", "get_many"):
        channel.put("help")
    elif call == "wait_for_peers":
        with suppress(queue.Empty, EndOfChannel):  # the end, if that process has seen the role and exited meanwhile
            channel.get_nowait()  # takes the role
    else:
        assert channel.get() == "before"


def _answer(channel: Channel, call: str, timeout: float | None) -> tuple[Any, float]:
    """What a call answered (or the class of what it raised), and how long it took."""
    began = time.monotonic()
    try:
        answer = CALLS[call](channel, timeout)
    except (queue.Empty, queue.Full) as error:
        answer = type(error)
    return answer, time.monotonic() - began


def _blocked(channel: Channel, pid: int) -> bool:
    return any(person.pid == pid and person.waiting_for for person in channel.stats().participants)


# --- handlers that return


@contextmanager
def ticks(act: Callable[[], object] = lambda: None) -> Iterator[list[int]]:
    """SIGALRM a thousand times a second, with a handler that counts, and acts."""
    count = [0]

    def handle(*_: object) -> None:
        count[0] += 1
        act()

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        yield count
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def _answer_under_ticks(channel: Channel, call: str, timeout: float) -> tuple[Any, float, int]:
    _prepare(channel, call)
    with ticks() as count:
        answer, seconds = _answer(channel, call, timeout)
    return answer, seconds, count[0]


def _time_out_under_ticks(channel: Channel, call: str, tries: int) -> tuple[set[Any], list[float], int]:
    _prepare(channel, call)
    with ticks() as count:
        answers = [_answer(channel, call, 0.3) for _ in range(tries)]
    return {answer for answer, _ in answers}, [seconds for _, seconds in answers], count[0]


def test_calls_time_out_as_ever_while_signals_pour_in() -> None:
    """Never early, and late by a slice at most: the best of several tries counts, since the machine may be busy."""
    with ExitStack() as stack:
        channels = {call: stack.enter_context(Channel(1, 64)) for call in CALLS}
        crew = stack.enter_context(workers.Crew("fork"))
        for call, channel in channels.items():
            crew.start(_time_out_under_ticks, channel, call, 8)
        for call, (answers, seconds, count) in zip(CALLS, crew.results(), strict=True):
            assert answers == {TIMED_OUT[call]}, call
            assert 0.3 <= min(seconds) <= 0.3 + SLICE, (call, seconds)
            assert count > 200, call


def test_blocked_calls_end_as_ever_while_signals_pour_in() -> None:
    with ExitStack() as stack:
        channels = {call: stack.enter_context(Channel(1, 64)) for call in CALLS}
        crew = stack.enter_context(workers.Crew("fork"))
        for call, channel in channels.items():
            crew.start(_answer_under_ticks, channel, call, 300)
        for member, (call, channel) in zip(crew.members, channels.items(), strict=True):
            workers.until(lambda channel=channel, member=member: _blocked(channel, member.pid))
            _help(channel, call)
        assert dict(zip(CALLS, [answer for answer, _, _ in crew.results()], strict=True)) == ANSWERS


# --- handlers that raise


class _Signals:
    """What arrives as None, and leaves a signal pending when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _thread.interrupt_main, (signal.SIGUSR1,)  # which runs no handler itself, as os.kill does


@pytest.mark.skipif(ringshm.accelerated != "", reason=f"only the compiled path returns so: {ringshm.accelerated}")
def test_what_was_received_when_a_compiled_call_returns_into_a_handler_comes_first() -> None:
    with Channel(8, 256) as channel:
        before = signal.signal(signal.SIGUSR1, _raise_own)
        try:
            channel.put("first")
            assert channel.get() == "first"  # the roles are taken
            channel.put_many([_Signals(), "second"])
            with pytest.raises(_Own):
                channel.get()
            assert channel.qsize() == 1  # the first was received, and is not back in its place
            assert channel.get() is None
            assert channel.get() == "second"
            channel.put_many([_Signals(), "second"])
            with pytest.raises(_Own):
                channel.get_many(2)
            assert channel.empty()
            assert channel.get_many(2) == [None, "second"]
        finally:
            signal.signal(signal.SIGUSR1, before)
        check_whole(channel)


class _Own(Exception):
    """What a user's handler raises."""


def _raise_own(*_: object) -> None:
    raise _Own


RAISES: dict[str, BaseException] = {
    "KeyboardInterrupt": KeyboardInterrupt(), "SystemExit": SystemExit(7), "an exception of its own": _Own(),
    "a BaseException of its own": workers.Interrupt(), "TimeoutError": TimeoutError("as of an alarm"),
}  # fmt: skip


def _raising(what: str) -> BaseException:
    """Install the handler of `_number(what)`, which raises once each time; what it raises, but for Ctrl-C's."""
    raises = RAISES[what]

    def handle(*_: object) -> None:
        raise raises

    signal.signal(_number(what), signal.default_int_handler if what == "KeyboardInterrupt" else handle)
    return raises


def _number(what: str) -> int:
    return signal.SIGINT if what == "KeyboardInterrupt" else signal.SIGTERM


def _caught(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


def _is(caught: BaseException | None, raised: BaseException) -> bool:
    return caught is raised or (type(caught) is type(raised) is KeyboardInterrupt)


def _interrupted(channel: Channel, call: str, what: str, ready: Any) -> None:
    """Block until a signal's handler raises, twice; then the channel must be whole."""
    raised = _raising(what)
    left = _prepare(channel, call)
    for _ in range(2):
        ready.release()
        caught = _caught(lambda: CALLS[call](channel, None))
        assert _is(caught, raised), caught
    check_whole(channel, *left)


@pytest.mark.parametrize("what", RAISES)
def test_a_handlers_own_exception_ends_a_blocked_call_and_leaves_the_channel_whole(what: str) -> None:
    with ExitStack() as stack:
        crew = stack.enter_context(workers.Crew("fork"))
        blocking = []
        for call in CALLS:
            channel, ready = stack.enter_context(Channel(1, 64)), crew.context.Semaphore(0)
            blocking.append((channel, ready, crew.start(_interrupted, channel, call, what, ready)))
        for _ in range(2):
            for channel, ready, member in blocking:
                ready.acquire()
                workers.until(lambda channel=channel, member=member: _blocked(channel, member.pid))
                member.send_signal(_number(what))
        crew.results()


def _interrupted_at_a_mutex(channel: Channel, call: str, what: str, ready: Any) -> None:
    raised = _raising(what)
    channel.full()
    with Tracer(ready.release, folders=("ring",), functions=("enter_slowly",)):
        caught = _caught(lambda: CALLS[call](channel, None))
    assert _is(caught, raised), caught


@pytest.mark.parametrize("what", RAISES)
def test_a_handlers_own_exception_ends_the_wait_for_a_mutex(what: str) -> None:
    with ExitStack() as stack:
        crew = stack.enter_context(workers.Crew("fork"))
        channels = {call: stack.enter_context(Channel(2, 64, keep_open=True)) for call in ("put", "get")}
        holding, blocked = [], []
        for call, channel in channels.items():
            channel.put("before")
            holding.append(
                crew.start(workers.act_holding, workers.stop, channel, call, *(["put"] if call == "put" else []))
            )
            assert holding[-1].wait_stopped()
            ready = crew.context.Semaphore(0)
            blocked.append((ready, crew.start(_interrupted_at_a_mutex, channel, call, what, ready)))
        for ready, member in blocked:
            ready.acquire()
            member.send_signal(_number(what))
            member.result()
        for member in holding:
            member.send_signal(signal.SIGCONT)
        assert [member.result() for member in holding] == [None, "before"]
        check_whole(channels["put"], "before", "put")
        check_whole(channels["get"])


#: Where calls announce themselves, wait and withdraw.
FILES = ("waiters.py", "steps.py", "sender.py", "receiver.py", "sending.py", "receiving.py", "handle.py")


@pytest.mark.parametrize("call", ["get", "put", "wait_for_peers"])
def test_nobody_seems_to_wait_after_an_interruption_at_any_bytecode(call: str) -> None:
    with Channel(1, 64, wait="block") as channel:
        left = _prepare(channel, call)
        _answer(channel, call, 0)  # takes the role
        for step in workers.each_step(800):
            at = 5 * step  # each of the places in question has more bytecodes than that
            if not interrupt_at(lambda: _answer(channel, call, 0.02), at, ("ring", "channel"))[0]:
                break
            assert not any(person.waiting_for for person in channel.stats().participants), at
        assert at > 100
        check_whole(channel, *left)


# --- handlers that call the channel

HANDLERS: dict[str, tuple[Callable[[Channel], Any], Any]] = {
    "puts": (lambda channel: channel.put("message"), "message"),
    "puts and gets": (lambda channel: [channel.put("first"), channel.put("message"), channel.get()], "message"),
    "attaches": (lambda channel: Channel.attach(channel.name).put("message"), "message"),
    "forks": (lambda channel: workers.fork_off(lambda: channel.put("message")), "message"),
    "waits in vain": (lambda channel: [channel.wait_for_peers(9, timeout=0.01), channel.put("message")], "message"),
    "closes": (Channel.close, ChannelClosed),
    "shuts down": (Channel.shutdown, EndOfChannel),
}


@pytest.mark.parametrize("what", HANDLERS)
def test_a_handler_may_call_the_channel_that_its_thread_waits_for(what: str) -> None:
    act, expected = HANDLERS[what]
    handled = []
    with Channel(2, 64) as channel:
        signal.signal(signal.SIGALRM, lambda *_: handled.append(act(channel)))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        if isinstance(expected, type):
            with pytest.raises(expected):
                channel.get()
        else:
            assert channel.get() == expected
            check_whole(channel)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    if what == "forks":
        assert workers.exit_code(*handled) == 0


def test_a_handler_that_comes_in_the_middle_of_a_call_is_refused_and_harms_nothing() -> None:
    sent: list[int] = []
    refused: list[int] = []

    def act() -> None:
        number = len(sent)
        if channel.qsize() < 4:  # leave room, or the main program waits for itself
            try:
                channel.put_nowait(("handler", number))
                sent.append(number)
            except ReentrantCall:
                refused.append(number)

    received = []
    with Channel(8, 64) as channel:
        with ticks(act):
            k = 0
            while not len(sent) > 20 or not (refused or ringshm.accelerated == ""):  # compiled, no handler comes in
                channel.put(("main", k))
                received.append(channel.get())
                if not channel.empty():
                    received += channel.get_many(4)
                k += 1
        received += [channel.get() for _ in range(channel.qsize())]
        assert [number for who, number in received if who == "main"] == list(range(k))
        assert [number for who, number in received if who == "handler"] == sent
        check_whole(channel)


@pytest.mark.parametrize("driver", [until_received, until_received_in_loop])
def test_no_handler_runs_while_a_call_that_has_waited_has_its_message_in_hand(driver: Callable[..., Any]) -> None:
    """CPython runs handlers at jumps backward and calls: none comes between the receiving attempt and the return."""
    attempts: list[Any] = [EMPTY, EMPTY, "message"]
    steps: list[str] = []

    def attempt() -> Any:
        steps.clear()
        return attempts.pop(0)

    def between(outcome: Any) -> Any:
        yield from ()
        return outcome

    def note() -> None:
        frame = tracer.frame
        assert frame is not None
        steps.append(dis.opname[frame.f_code.co_code[frame.f_lasti]])

    with Tracer(note, None, functions=[driver.__name__]) as tracer:
        answer = driver(EMPTY, attempt, between)
        assert (answer if driver is until_received else finish(answer)) == "message"
    assert steps
    assert not [step for step in steps if "CALL" in step or "BACKWARD" in step or "ABSOLUTE" in step]


# --- threads


@pytest.mark.parametrize("signals", [False, True], ids=["no signals", "signals"])
def test_eight_threads_that_put_and_get_share_one_handle(signals: bool) -> None:
    counts = [150] * 8
    views: list[list[Any]] = [[] for _ in counts]

    def put_and_get(s: int) -> None:
        for k in range(counts[s]):
            channel.put((s, k))
            views[s].append(channel.get())

    with Channel(3, 64) as channel, ticks() if signals else nullcontext():
        with workers.in_threads(*(partial(put_and_get, s) for s in range(1, len(counts)))):
            put_and_get(0)
        check_whole(channel)
    workers.check_delivery(counts, views)


# --- garbage collections


class _Garbage:
    """Goes in a collection only, and its handle with it."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.cycle = self


class _ClosingGarbage(_Garbage):
    def __del__(self) -> None:
        self.handle.close()


@contextmanager
def _only_new_objects_collected() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    threshold = gc.get_threshold()
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()


@pytest.mark.parametrize("call", ["put", "get", "get_many"])
@pytest.mark.parametrize("kind", [_Garbage, _ClosingGarbage])
def test_a_handle_may_go_at_any_bytecode_of_a_call(kind: type[_Garbage], call: str) -> None:
    before: list[Any] = [] if call == "put" else [1, 2]
    answer, left = {"put": (None, ["put"]), "get": (1, [2]), "get_many": ([1, 2], [])}[call]
    with Channel(2, 64) as channel, Channel.attach(channel.name) as other, _only_new_objects_collected():
        channel.put("takes the roles")
        assert channel.get() == "takes the roles"
        for at in workers.each_step(2000):
            garbage = [other.receiver() if call == "put" else other.sender()]

            def collect(step: int, at: int = at, garbage: list[Any] = garbage) -> None:
                if step == at:
                    kind(garbage.pop())
                    gc.collect()

            channel.put_many(before)
            assert bytecodes(lambda: CALLS[call](channel, None), collect) == answer
            assert [channel.get_nowait() for _ in range(channel.qsize())] == left
            (own,) = channel.stats().participants
            assert own.senders + own.receivers == 2 + len(garbage)
            if garbage:
                break
        assert at > 100
        check_whole(channel)


def test_slots_are_given_back_while_every_allocation_collects_garbage() -> None:
    collections = [0]

    def collected(phase: str, _: object) -> None:
        collections[0] += phase == "start"
        assert channel.qsize() <= channel.capacity

    with Channel(4, 200) as channel, _only_new_objects_collected():
        gc.callbacks.append(collected)
        gc.set_threshold(1)
        try:
            for k in range(300):
                _Garbage(channel.receiver())
                _ClosingGarbage(channel.sender())
                assert channel.put_many([[k], {"k": (k, [k])}]) == 2
                channel.put([k])
                assert channel.get() == [k]
                assert channel.get_many(9) == [{"k": (k, [k])}, [k]]
        finally:
            gc.callbacks.remove(collected)
        assert collections[0] > 300
        gc.collect()
        check_whole(channel)


def test_views_give_their_slots_back_while_every_allocation_collects_garbage() -> None:
    """The finalisers of the last views run amid the calls that claim, take, pin and publish."""
    with Channel(3, 200) as channel, Latest(200, borrows=2) as latest, _only_new_objects_collected():
        gc.set_threshold(1)
        for k in range(300):
            channel.put(np.full(5, k))
            with channel.borrow() as message:
                cycle: list[Any] = [message.value]
            cycle.append(cycle)
            with channel.loan() as loan:
                loan.array(5, int)[...] = -k
            assert (cycle[0] == k).all()
            assert latest.publish(np.full(5, k)) == 3 * k + 1
            with latest.borrow() as newest:
                cycle.append(newest.value)
            del message, newest, loan
            latest.publish("another" if k % 2 else np.zeros(3))
            latest.publish(np.full(5, k))
            assert (cycle[2] == k).all()
            del cycle
            assert (channel.get() == -k).all()
        gc.collect()
        check_whole(channel)
        assert latest.stats().held == ()


# --- forks


def _put_and_flush(channel: Channel, message: Any) -> None:
    channel.put(message)
    assert channel.flush()


def test_children_forked_amid_the_calls_of_threads_use_the_channel_at_once() -> None:
    counts = [0, 0, *[1] * 12]
    received: list[Any] = []
    forked = threading.Event()
    with Channel(2, 64) as channel, workers.Crew("fork") as crew:

        def put(s: int) -> None:
            while not forked.is_set():
                channel.put((s, counts[s]))
                counts[s] += 1

        with workers.in_threads(lambda: received.extend(iter(channel.get, None))):
            with workers.in_threads(partial(put, 0), partial(put, 1)):
                # by hand first: at its exit such a child would wait for children of multiprocessing not its own
                pids = [workers.fork_off(lambda s=s: _put_and_flush(channel, (s, 0))) for s in range(2, 8)]
                for s in range(8, 14):
                    crew.start(_put_and_flush, channel, (s, 0))
                assert [workers.exit_code(pid) for pid in pids] == [0] * 6
                crew.results()
                forked.set()
            channel.put(None)
        assert min(counts) > 0
        check_whole(channel)
    workers.check_delivery(counts, [received])


# --- the wall clock

_SHIM = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long *step;  /* seconds, in a file that the test writes */

__attribute__((constructor)) static void begin(void)
{
    step = mmap(0, sizeof *step, PROT_READ, MAP_SHARED, open(getenv("STEP"), O_RDONLY), 0);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *step;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    return now ? (*now = precise.tv_sec) : precise.tv_sec;
}
"""

#: Runs under the shim: each call times out, and one that is helped ends, while a thread steps the clock to and fro.
_STEPS = """
import mmap, os, sys, threading, time
import ringshm
from test_signals import CALLS, TIMED_OUT, _answer, _prepare

with open(os.environ["STEP"], "r+b") as file:
    step = memoryview(mmap.mmap(file.fileno(), 0)).cast("l")
channel = ringshm.Channel.attach(sys.argv[1])
began, jumps, running = time.time(), set(), True

def jump():
    while running:
        for seconds in (3600, 0, -3600, 0):
            step[0] = seconds
            jumps.add(round((time.time() - began) / 3600))
            time.sleep(0.02)

stepping = threading.Thread(target=jump)
stepping.start()
try:
    for call in CALLS:
        with ringshm.Channel(1, 64) as own:
            _prepare(own, call)
            answer, seconds = _answer(own, call, 0.2)
            assert answer == TIMED_OUT[call], (call, answer)
            assert 0.2 <= seconds < 20, (call, seconds)
    before = time.monotonic()
    try:
        ringshm.Channel.attach("test-there-is-none", timeout=0.2)
    except ringshm.ChannelNotFound:
        assert 0.2 <= time.monotonic() - before < 20
    assert channel.get() == "message"
finally:
    running = False
    stepping.join()
assert jumps == {-1, 0, 1}, jumps
"""


def test_waits_end_in_time_while_the_wall_clock_is_stepped(tmp_path: Path) -> None:
    """What is faked is the reading of the clock: a wait that is computed from it ends by the kernel's, an hour late."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler `cc`")
    source, shim, step = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "step"
    source.write_text(_SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(source)], check=True)
    step.write_bytes(bytes(8))
    with Channel(1, 64) as channel, pytest.MonkeyPatch.context() as environment:
        environment.setenv("LD_PRELOAD", str(shim))
        environment.setenv("STEP", str(step))
        process = workers.script(_STEPS, channel.name)
        environment.undo()
        watch = threading.Timer(30, process.kill)
        watch.start()
        workers.until(lambda: channel.stats().waiting_receivers or process.poll() is not None)
        channel.put("message")
        workers.finish(process)
        watch.cancel()
