"""Named semaphores: `posix_ipc` makes and removes the names, `multiprocessing`'s SemLock tries and posts.

Both libraries open the same POSIX semaphore. SemLock is the faster one, and lets a signal handler's own exception
through (posix_ipc turns it into a bare SignalError). Both wait by the wall clock, which may be stepped: a step of an
hour back makes a wait of 50 ms one of an hour. So waits go to the C library's `sem_clockwait` (glibc 2.30), on the
monotonic clock; without it, to SemLock. Where there is no timed wait at all, it is tried again and again; where the
value is not told, tokens are taken out to be counted (host.py). A semaphore here is a wake-up, never a fact: nobody
concludes from a token what the ring alone can say.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import time
from collections.abc import Callable
from typing import Any, Protocol

import posix_ipc

from . import host
from .errors import ChannelCorrupted

try:
    from _multiprocessing import SemLock as _SemLock
except ImportError:  # a platform on which multiprocessing has no semaphores
    _SemLock = None

SHM_DIRECTORY = "/dev/shm"
_SEMAPHORE_KIND = 1  # multiprocessing.synchronize.SEMAPHORE
_SEMAPHORE_NBYTES = 32  # sizeof(sem_t), which is the size of glibc's file
_FIRST_PAUSE, _LONGEST_PAUSE = 50e-6, 0.005  # seconds between two tries, where there is no timed wait


class Semaphore(Protocol):
    """What the rest of ringshm asks of a semaphore."""

    def acquire(self, block: bool, /) -> bool:
        """`acquire(False)`: take a token; False if there is none."""

    def release(self) -> None:
        """Add a token."""

    def wait(self, seconds: float) -> bool:
        """Take a token; False if there was none in so many seconds."""

    def _get_value(self) -> int:
        """Tokens there are; where host.SEMAPHORE_VALUES."""

    def fill(self, tokens: int) -> None:
        """Add tokens until there are so many. Two that do it at once may add a few too many."""


class _Filled:
    """`fill`, in the two ways."""

    if host.SEMAPHORE_VALUES:

        def fill(self: Semaphore, tokens: int) -> None:
            for _ in range(tokens - self._get_value()):
                self.release()

    else:

        def fill(self: Semaphore, tokens: int) -> None:
            for _ in range(tokens):
                if not self.acquire(False):
                    break
            for _ in range(tokens):
                self.release()


def _poll(acquire: Callable[[bool], bool], seconds: float) -> bool:
    """Take a token by trying; False if there was none in so many seconds."""
    end, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while not acquire(False):
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


class _PosixSemaphore(_Filled):
    """Where `multiprocessing` has no semaphores: one of posix_ipc with SemLock's manners."""

    def __init__(self, name: str) -> None:
        self._semaphore = posix_ipc.Semaphore(name)
        self.release: Callable[[], None] = self._semaphore.release

    def acquire(self, _: bool, /) -> bool:
        return self._take(0)

    def wait(self, seconds: float) -> bool:
        return self._take(seconds) if host.TIMED_WAITS else _poll(self.acquire, seconds)

    def _take(self, seconds: float) -> bool:
        try:
            self._semaphore.acquire(seconds)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False  # every wait is a slice of a longer one, so that an interrupted one may end early
        return True

    def _get_value(self) -> int:
        return int(self._semaphore.value)


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_clockwait: Any = getattr(ctypes.CDLL(None), "sem_clockwait", None)
if _clockwait is not None:
    _clockwait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_TimeSpec)]


class _SemLockSemaphore(_Filled):
    """SemLock, but for its waits."""

    def __init__(self, name: str) -> None:
        self._lock = lock = _SemLock._rebuild(0, _SEMAPHORE_KIND, 2**31 - 1, name)
        self.acquire: Callable[[bool], bool] = lock.acquire
        self.release: Callable[[], None] = lock.release
        self._get_value: Callable[[], int] = lock._get_value
        self._handle: int = lock.handle  # the address of the sem_t, which stays while the lock does

    def wait(self, seconds: float) -> bool:
        if not host.TIMED_WAITS:
            return _poll(self.acquire, seconds)
        if _clockwait is None:
            return bool(self._lock.acquire(True, seconds))
        end = time.monotonic() + seconds
        until = _TimeSpec(int(end), int(end % 1 * 1e9))
        while _clockwait(self._handle, time.CLOCK_MONOTONIC, until):
            if time.monotonic() >= end:  # else a signal has interrupted it
                return False
        return True


def create(name: str, tokens: int) -> None:
    """Make a semaphore of that name, which must be new, for this user alone."""
    posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=tokens).close()
    os.chmod(f"{SHM_DIRECTORY}/sem.{name[1:]}", 0o600)  # whatever the umask


def open_existing(name: str) -> Semaphore:
    """Open a semaphore, after its file has been checked: a file of zero bytes would be a SIGBUS.

    Raises:
        FileNotFoundError: if there is none.
        ChannelCorrupted: if its file is none of a semaphore of this user.
    """
    path = f"{SHM_DIRECTORY}/sem.{name[1:]}"
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size != _SEMAPHORE_NBYTES or status.st_uid != os.geteuid():
        raise ChannelCorrupted(f"{path} is no semaphore of this user ({status.st_size} bytes): remove it")
    if _SemLock is None:
        return _PosixSemaphore(name)
    return _SemLockSemaphore(name)


def remove(name: str) -> None:
    """Remove the name, if it is there."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_semaphore(name)
