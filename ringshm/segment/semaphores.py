"""Named semaphores, by the SemLock of `multiprocessing`; where that has none, by `posix_ipc` (posix_semaphores.py).

Both libraries open the same POSIX semaphore. SemLock is faster, lets the exception of a signal handler through
(posix_ipc turns it into a bare SignalError), and leaves the GIL off where it is. Both wait by the wall clock, which may
be stepped: a step of an hour back makes a wait of 50 ms one of an hour. So waits go to the C library's `sem_clockwait`
(glibc 2.30), on the monotonic clock; without it, to SemLock.

A token wakes a waiter and says nothing else: what the waiter waits for, the ring alone can tell.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import time
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import ChannelCorrupted
from ..system import monotonic

try:
    from _multiprocessing import SemLock as _SemLock
    from _multiprocessing import sem_unlink as _unlink
except ImportError:
    from . import posix_semaphores

    _SemLock, _unlink = None, posix_semaphores.unlink

#: Whether it is known where the sem_t of a semaphore lies.
HAS_ADDRESSES = _SemLock is not None

SHM_DIRECTORY = "/dev/shm"
#: What the names of all files begin with, after the "sem." of semaphores. Processes with different ones see nothing of
#: each other: so two suites of tests, or tests and the programs of the same user, can share a /dev/shm.
STEM = os.environ.get("RINGSHM_STEM", "ringshm")
_SEMAPHORE_KIND = 1  # multiprocessing.synchronize.SEMAPHORE
_MOST_TOKENS = 2**31 - 1  # SEM_VALUE_MAX
_SEMAPHORE_NBYTES = 32  # sizeof(sem_t), which is the size of glibc's file


class Semaphore(Protocol):
    """What the rest of ringshm asks of a semaphore.

    Attributes:
        address: of its sem_t, as long as this object lives; 0 if that is unknown.
    """

    address: int

    def acquire(self, block: bool, /) -> bool:
        """`acquire(False)`: take a token; False if there is none."""

    def release(self) -> None:
        """Add a token."""

    def wait(self, seconds: float) -> bool:
        """Take a token; False if there was none in so many seconds."""

    def _get_value(self) -> int:
        """Tokens there are."""

    def fill(self, tokens: int) -> None:
        """Add tokens until there are so many. Two that do it at once may add a few too many."""


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_clockwait: Any = getattr(ctypes.CDLL(None), "sem_clockwait", None)
if _clockwait is not None:
    _clockwait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_TimeSpec)]
#: Where `sem_clockwait` is, for the compiled path; 0 if the C library has none.
CLOCKWAIT_ADDRESS = ctypes.cast(_clockwait, ctypes.c_void_p).value or 0 if _clockwait is not None else 0


class _SemLockSemaphore:
    """A SemLock, whose waits go by the monotonic clock."""

    def __init__(self, name: str) -> None:
        self._lock = lock = _SemLock._rebuild(0, _SEMAPHORE_KIND, _MOST_TOKENS, name)
        self.acquire: Callable[[bool], bool] = lock.acquire
        self.release: Callable[[], None] = lock.release
        self._get_value: Callable[[], int] = lock._get_value
        self.address: int = lock.handle

    def wait(self, seconds: float) -> bool:
        if _clockwait is None:
            return bool(self._lock.acquire(True, seconds))
        end = monotonic() + seconds
        until = _TimeSpec(int(end), int(end % 1 * 1e9))
        while _clockwait(self.address, time.CLOCK_MONOTONIC, until):
            if monotonic() >= end:  # else a signal has interrupted it
                return False
        return True

    def fill(self, tokens: int) -> None:
        for _ in range(tokens - self._get_value()):
            self.release()


def create(name: str, tokens: int) -> None:
    """Make a semaphore of that name, which must be new, for this user alone."""
    if _SemLock is None:
        posix_semaphores.create(name, tokens)
    else:
        _SemLock(_SEMAPHORE_KIND, tokens, _MOST_TOKENS, name, False)  # O_CREAT | O_EXCL
    os.chmod(f"{SHM_DIRECTORY}/sem.{name[1:]}", 0o600)  # whatever the umask


def open_existing(name: str) -> Semaphore:
    """Open a semaphore, after its file has been checked: a file of zero bytes would be a SIGBUS.

    Raises:
        FileNotFoundError: if there is none.
        ChannelCorrupted: if its file is not that of a semaphore of this user.
    """
    path = f"{SHM_DIRECTORY}/sem.{name[1:]}"
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size != _SEMAPHORE_NBYTES or status.st_uid != os.geteuid():
        raise ChannelCorrupted(f"{path} is no semaphore of this user ({status.st_size} bytes): remove it")
    if _SemLock is None:
        return posix_semaphores.PosixSemaphore(name)
    return _SemLockSemaphore(name)


def remove(name: str) -> None:
    """Remove the name, if it is there; PermissionError if it is another user's."""
    with contextlib.suppress(FileNotFoundError):
        _unlink(name)
