"""What tests run in other processes, and how they start, stop and hear of them.

Children import this module by name under every start method: `multiprocessing` hands its parent's `sys.path` on, and
`script` puts the folder on PYTHONPATH for processes that know a channel's name only.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ringshm import Channel, EndOfChannel, Receiver, Sender
from ringshm.segment.files import path_of
from ringshm.segment.semaphores import STEM
from support.seams import exit_as_python_does
from support.tracer import Tracer

TESTS = Path(__file__).resolve().parents[1]
METHODS = ("fork", "spawn", "forkserver")

#: CPython, from 3.12 on, warns of a fork of a process with threads, and the watchdog is one. So may be NumPy's, which
#: OpenBLAS ends amid the fork: the kernel may count it a moment longer, and CPython counts after the fork. Where
#: warnings are errors the fork then raises in a parent that has a child, of which nobody knows.
may_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
_MAY_FORK = "ignore:This process (pid=:DeprecationWarning"


# --- starting and stopping processes


class Failed(AssertionError):
    """What a member ran raised an exception; its traceback is the message."""


class Member:
    """A process (or thread) of a crew: it runs one function, whose result it reports."""

    def __init__(self, process: Any, reports: Any) -> None:
        self.process = process
        self._reports = reports

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def result(self) -> Any:
        """What the function returned; raises Failed if it raised, or if the process died."""
        if isinstance(self._reports, queue.SimpleQueue):
            done, value = self._reports.get()
        else:
            multiprocessing.connection.wait([self._reports, self.process.sentinel])
            try:
                done, value = self._reports.recv() if self._reports.poll() else (False, "")
            except EOFError:
                done, value = False, ""
            if not done and not value:
                self.process.join()
                raise Failed(f"process {self.pid} ended with {self.process.exitcode} before it reported")
        self.process.join()
        if not done:
            raise Failed(value)
        return value

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def wait_stopped(self) -> bool:
        """Wait until the (forked) process has stopped itself; False if it ended instead."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self.process._popen.returncode = os.waitstatus_to_exitcode(status)  # what multiprocessing can no more ask for
        return False


class Crew:
    """Processes of one start method, or threads ("thread"); none is left when the block ends."""

    def __init__(self, method: str = "fork") -> None:
        self.method = method
        self.context: Any = multiprocessing.get_context(None if method == "thread" else method)
        self.members: list[Member] = []

    def start(self, function: Callable[..., Any], *args: Any, method: str | None = None) -> Member:
        """Run `function(*args)` in a new member."""
        method = method or self.method
        if method == "thread":
            results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
            thread = threading.Thread(target=_perform, args=(results.put, function, args), daemon=True)
            member = Member(thread, results)
            thread.start()
        else:
            context: Any = multiprocessing.get_context(method)
            reports, sending = context.Pipe(duplex=False)
            process = context.Process(target=_perform_in_process, args=(sending, function, args), daemon=False)
            process.start()
            sending.close()
            member = Member(process, reports)
        self.members.append(member)
        return member

    def results(self) -> list[Any]:
        """The results of all members, in the order in which they were started."""
        return [member.result() for member in self.members]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for member in self.members:
            process = member.process
            if not isinstance(process, threading.Thread) and process.exitcode is None:
                with suppress(ProcessLookupError):
                    process.kill()
            if kind is None or not isinstance(process, threading.Thread):
                process.join()


def _perform(report: Callable[[tuple[bool, Any]], None], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        outcome = True, function(*args)
    except Exception:
        outcome = False, traceback.format_exc()
    report(outcome)


def _perform_in_process(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    die_with_parent()
    _perform(pipe.send, function, args)


@contextmanager
def in_threads(*functions: Callable[[], Any]) -> Iterator[list[threading.Thread]]:
    """Run each function in a thread of its own beside the block, which ends when they have."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join()


@contextmanager
def switching_often() -> Iterator[None]:
    """Have threads take turns every ten microseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def script(source: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
    """Start `python -c source argv`: a process that has inherited nothing and is no child of `multiprocessing`."""
    folders = [str(TESTS.parent), *(path for path in sys.path if path.startswith(str(TESTS)))]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(folders))
    command = [sys.executable, "-W", "error", "-W", _MAY_FORK, "-c", source, *argv]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that a script writes, without its end."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def started(source: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
    """As `script`, once it has written a line."""
    process = script(source, *argv, **options)
    line_of(process)
    return process


def finish(process: subprocess.Popen[str]) -> str:
    """What a script wrote; it must have ended well."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return output


def voluntary_switches() -> int:
    """How often this thread has gone to sleep."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))


def until(condition: Callable[[], Any]) -> None:
    """Wait until the condition holds; the watchdog sees to it that this ends."""
    while not condition():
        time.sleep(0.002)


def ringshm_files() -> set[str]:
    """Names of ringshm's files in shared memory, but for those of other programs and of tests in other workers."""
    return {name for name in os.listdir("/dev/shm") if STEM in name}


def shm_files() -> set[str]:
    """Names of all files in shared memory; where other programs see it too, of ringshm's own only."""
    return ringshm_files() if "RINGSHM_STEM" in os.environ else set(os.listdir("/dev/shm"))


def in_segment(address: int, name: str) -> bool:
    """Whether the kernel says that an address lies in the mapping of that channel's file."""
    inode = os.stat(path_of(name)).st_ino
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, _, number, *_ = line.split()
        start, end = (int(part, 16) for part in place.split("-"))
        if start <= address < end and int(number) == inode:
            return True
    return False


# --- numbered messages, and the model they are checked against


def put_numbered(channel: Channel | Sender, sender: int, count: int) -> int:
    """Put (sender, 0), (sender, 1), …; how many."""
    for k in range(count):
        channel.put((sender, k))
    channel.close()
    return count


def put_each(channel: Channel | Sender, *messages: Any) -> None:
    for message in messages:
        channel.put(message)


def put_at_random_times(channel: Channel, sender: int, count: int, seed: int) -> None:
    """As `put_numbered`, with breaks."""
    chance = random.Random(seed)
    for k in range(count):
        channel.put((sender, k))
        if chance.random() < 0.2:
            time.sleep(chance.random() * 0.002)
    channel.close()


def get_some(channel: Any, count: int) -> list[Any]:
    return [channel.get() for _ in range(count)]


def get_all(channel: Channel | Receiver) -> list[Any]:
    """Everything up to the end of the stream."""
    messages = list(channel)
    channel.close()
    return messages


def get_all_by_many(channel: Channel | Receiver, at_most: int) -> list[Any]:
    """As `get_all`, by `get_many`."""
    messages: list[Any] = []
    with suppress(EndOfChannel):
        while True:
            batch = channel.get_many(at_most)
            assert 1 <= len(batch) <= at_most
            messages += batch
    channel.close()
    return messages


def check_delivery(counts: Sequence[int], received: Iterable[Sequence[tuple[int, int]]]) -> None:
    """Each of sender s's messages (s, 0) … (s, counts[s] - 1) came to one receiver, which saw each sender in order."""
    views = [list(view) for view in received]
    sent = Counter((sender, k) for sender, count in enumerate(counts) for k in range(count))
    assert Counter(message for view in views for message in view) == sent
    for view in views:
        for sender in range(len(counts)):
            numbers = [k for who, k in view if who == sender]
            assert numbers == sorted(numbers)


# --- stopping, or dying, at a step of ringshm's own code that a Tracer chooses


def holding(channel: Channel | Sender | Receiver, mutex: str) -> Callable[[], bool]:
    """A condition for a Tracer: this process holds that mutex, "senders" or "receivers"."""
    return lambda: any(mutex in one.holds for one in channel.stats().participants if one.pid == os.getpid())


def act_holding(act: Callable[[], None], channel: Channel, call: str, *args: Any) -> Any:
    """Make a call, "put" or "get", and act while it holds the mutex of its role."""
    channel.full()  # joins, before anything is traced
    with Tracer(act, folders=("ring",), when=holding(channel, "senders" if call == "put" else "receivers")):
        return getattr(channel, call)(*args)


def die() -> None:
    """Die at once, as by the kernel's hand."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stop until SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_with_the_table(handle: Any) -> None:
    """Stop this process while it holds the lock of the table of participants."""
    with handle._open().participants.table():
        stop()


def interrupt() -> None:
    """Raise what the handler of Ctrl-C raises."""
    raise KeyboardInterrupt


def fork_off(function: Callable[[], object]) -> int:
    """`os.fork()` without `multiprocessing`; the child runs `function` and exits as a Python program does. Its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        exit_as_python_does()
        os._exit(status)


def exit_code(pid: int) -> int:
    """Wait for a child of `fork_off`; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- interruptions


class Interrupt(BaseException):
    """What a signal handler raises."""


class Interrupts:
    """SIGALRM every few microseconds to milliseconds of real time; it raises Interrupt while `armed`.

    Python prints what is raised within a callback of its collector, and goes on: those of other libraries (hypothesis
    has one) are not called meanwhile.

    Between the return of an interruptible call and `armed = False` CPython runs no handler, if no call lies between.
    """

    def __init__(self, seed: int, longest: float) -> None:
        self.armed = False
        self.count = 0
        self._running = True
        self._random = random.Random(seed)
        self._longest = longest

    def _handle(self, *_: object) -> None:
        self._again()
        if self.armed:
            self.armed = False
            self.count += 1
            raise Interrupt

    def _again(self) -> None:
        if self._running:
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(20e-6, self._longest))

    def __enter__(self) -> Interrupts:
        self._callbacks = gc.callbacks.copy()
        gc.callbacks.clear()
        signal.signal(signal.SIGALRM, self._handle)
        self._again()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        gc.callbacks.extend(self._callbacks)


def die_with_parent() -> None:
    """So that nothing is left when the watchdog ends the tests."""
    assert ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) == 0


def each_step(most: int) -> Iterator[int]:
    """1, 2, 3, … up to a bound that no call comes near."""
    yield from range(1, most)
    raise AssertionError(f"a call took more than {most} steps")
