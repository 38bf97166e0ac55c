"""What tests run in other processes, and how they start, stop and hear of them.

Children import this module by name under every start method: `multiprocessing` hands its parent's `sys.path` on, and
`script` puts the folder on PYTHONPATH for processes that know a channel's name only.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
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
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from ringshm import Channel, EndOfChannel, Receiver, Sender
from ringshm.segment import path_of

TESTS = Path(__file__).resolve().parent
METHODS = ("fork", "spawn", "forkserver")

#: CPython 3.12 warns of every fork of a process with threads, and the watchdog is one.
may_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


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


def script(source: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
    """Start `python -c source argv`: a process that has inherited nothing and is no child of `multiprocessing`."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    command = [sys.executable, "-W", "error", "-c", source, *argv]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


def finish(process: subprocess.Popen[str]) -> str:
    """What a script wrote; it must have ended well."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return output


def until(condition: Callable[[], Any]) -> None:
    """Wait until the condition holds; the watchdog sees to it that this ends."""
    while not condition():
        time.sleep(0.002)


def ringshm_files() -> set[str]:
    """Names of ringshm's files in shared memory."""
    return {name for name in os.listdir("/dev/shm") if "ringshm" in name}


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


# --- stopping, or dying, at a chosen step of ringshm's own code


class Steps:
    """Count the lines that this thread comes by in some files or functions of ringshm, and call `act` at line `at`.

    So a process can be made to stop or to be interrupted at each step of a call; kills.py has it die at each bytecode.
    """

    def __init__(
        self,
        at: int,
        act: Callable[[], None],
        files: Sequence[str] = ("ring.py", "mutex.py"),
        functions: Sequence[str] = (),
        when: Callable[[], bool] = lambda: True,
    ) -> None:
        self.count = 0
        self._at = at
        self._act = act
        self._files = files
        self._functions = functions
        self._when = when
        self._known: dict[CodeType, bool] = {}

    def _concerns(self, code: CodeType) -> bool:
        path = Path(code.co_filename)
        return (
            path.parent.name == "ringshm"
            and path.name in self._files
            and (not self._functions or code.co_name in self._functions)
        )

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if code not in self._known:
            self._known[code] = self._concerns(code)
        if not self._known[code]:
            return None
        if event == "line" and self._when():
            self.count += 1
            if self.count == self._at:
                self._act()
        return self._trace

    def __enter__(self) -> Steps:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


def die() -> None:
    """Die at once, as by the kernel's hand."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stop until SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


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
        # what Py_Exit would call; pytest's own handlers and buffers are the parent's
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        os._exit(status)


def exit_code(pid: int) -> int:
    """Wait for a child of `fork_off`; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- interruptions


class Interrupt(BaseException):
    """What a signal handler raises."""


class Interrupts:
    """SIGALRM every few microseconds to milliseconds of real time; it raises Interrupt while `armed`.

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
        signal.signal(signal.SIGALRM, self._handle)
        self._again()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def die_with_parent() -> None:
    """So that nothing is left when the watchdog ends the tests."""
    assert ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) == 0


def each_step(most: int) -> Iterator[int]:
    """1, 2, 3, … up to a bound that no call comes near."""
    yield from range(1, most)
    raise AssertionError(f"a call took more than {most} steps")
