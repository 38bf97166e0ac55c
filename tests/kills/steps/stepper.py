"""Runs a child one machine instruction at a time where it runs compiled code of ringshm, and kills it there.

By ptrace, on x86-64. The compiled code is overwritten with breakpoints, so that all else runs at full speed and no
entry is missed. At an entry the code is put back, and the child steps through it until it calls, or returns to, code
that does not count. The C library counts while it runs on behalf of the compiled code (sem_trywait, sem_post, memcpy),
but for what follows in it after many instructions: a copy of many bytes steps through each of them.

What is counted is either instructions, or *stores*: changes of the shared memory that a channel's processes agree by,
seen after each instruction. What Python code has stored is one change, seen when compiled code is entered again or the
operation ends. A step takes some 35 microseconds.

The child is forked by the process that steps it, so both have the same mappings at the same addresses. It calls
`stop_here` before the operation and after it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringshm.ring.acceleration import accelerated, compiled

# linux/ptrace.h, sys/user.h
_TRACEME, _PEEKUSER, _POKEUSER, _CONT, _SINGLESTEP, _SETOPTIONS = 0, 3, 6, 7, 9, 0x4200
_EXITKILL, _RIP = 0x100000, 128
_BREAKPOINT = b"\xcc"
_LONG_COPY = 2000  # instructions of the C library
_C_LIBRARY = r"/(libc|libpthread|ld-linux[^/]*)[.-][^/]*$"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def why_not() -> str:
    """Why nothing can be stepped here; "" if it can."""
    if compiled is None:
        return accelerated
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return "The stepper knows x86-64 under Linux only."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the fork of a process with threads, from 3.12 on
        pid = os.fork()
    if not pid:
        os._exit(_libc.ptrace(_TRACEME, 0, None, None) != 0)
    return "ptrace is not permitted here." if os.waitpid(pid, 0)[1] else ""


def trace_me() -> None:
    """Let the parent step this process."""
    _libc.ptrace(_TRACEME, 0, None, None)


def stop_here() -> None:
    """Stop until the parent goes on."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _code(pattern: str) -> list[tuple[int, int]]:
    """Where code is mapped whose file's path matches: (low, high)."""
    ranges = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            place, mode, _, _, _, *path = line.split(None, 5)
            if "x" in mode and path and re.search(pattern, path[0].rstrip("\n")):
                low, high = (int(number, 16) for number in place.split("-"))
                ranges.append((low, high))
    return ranges


class _Stores:
    """Whether memory has changed since it was asked last."""

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        self._parts = [(low, n, ctypes.create_string_buffer(ctypes.string_at(low, n), n)) for low, n in parts]

    def changed(self) -> bool:
        changed = [part for part in self._parts if _libc.memcmp(part[0], part[2], part[1])]
        for low, n, copy in changed:
            ctypes.memmove(copy, low, n)
        return bool(changed)


@dataclass(frozen=True)
class Steps:
    """What was counted, up to the end of the operation or the child's death."""

    instructions: int
    stores: int
    killed: bool


class Stepper:
    """Steps one child, which has stopped before its operation.

    Args:
        pid: of the child.
        shared: the memory whose changes are stores: (address, bytes).
    """

    def __init__(self, pid: int, shared: Sequence[tuple[int, int]]) -> None:
        self._pid = pid
        compiled_code = _code(re.escape(compiled.__file__) + "$")
        self._texts = [(low, ctypes.string_at(low, high - low)) for low, high in compiled_code]
        self._compiled, self._library = compiled_code, _code(_C_LIBRARY)
        self._in_library = 0  # for so many instructions
        self._stores = _Stores(shared)
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)

    def run(self, unit: str, at: int, between: Callable[[], None] | None = None) -> Steps:
        """Run it to the end of its operation; or kill it after instruction or store (`unit`) number `at`, from 1.

        With `between` the child lives: that is called while it is stopped, after that store and each further one.
        """
        _libc.ptrace(_SETOPTIONS, self._pid, None, _EXITKILL)
        self._guard(True)
        inside, instructions, stores, passed_on = False, 0, 0, 0
        try:
            while True:
                _libc.ptrace(_SINGLESTEP if inside else _CONT, self._pid, None, passed_on)
                _, status = os.waitpid(self._pid, 0)
                assert os.WIFSTOPPED(status), f"the victim ended by itself, with {os.waitstatus_to_exitcode(status)}"
                stop, passed_on = os.WSTOPSIG(status), 0
                if stop not in (signal.SIGTRAP, signal.SIGSTOP):
                    passed_on = stop
                    continue
                if self._stores.changed():
                    stores += 1
                    if between and stores >= at:
                        between()
                        self._stores.changed()  # what that has stored is none of the child's
                if unit == "store" and stores == at > 0 and not between:
                    return self._kill(instructions, stores)
                if stop == signal.SIGSTOP:
                    self._guard(False)
                    return Steps(instructions, stores, killed=False)
                place = self._place()
                if not inside:
                    place -= len(_BREAKPOINT)
                    _libc.ptrace(_POKEUSER, self._pid, _RIP, place)
                    self._guard(False)
                inside = self._counts(place)
                instructions += inside
                if unit == "instruction" and inside and instructions == at:
                    return self._kill(instructions, stores)
                if not inside:
                    self._guard(True)
        finally:
            os.close(self._memory)

    def _kill(self, instructions: int, stores: int) -> Steps:
        os.kill(self._pid, signal.SIGKILL)
        return Steps(instructions, stores, killed=True)

    def _guard(self, on: bool) -> None:
        """Put breakpoints in place of all compiled code, or the code."""
        for low, text in self._texts:
            os.pwrite(self._memory, _BREAKPOINT * len(text) if on else text, low)

    def _place(self) -> int:
        return int(_libc.ptrace(_PEEKUSER, self._pid, _RIP, None))

    def _counts(self, place: int) -> bool:
        if any(low <= place < high for low, high in self._compiled):
            self._in_library = 0
            return True
        self._in_library += 1
        return self._in_library < _LONG_COPY and any(low <= place < high for low, high in self._library)


def let_go(pid: int) -> None:
    """Let a child go on that was stepped to its second stop."""
    _libc.ptrace(_CONT, pid, None, None)
