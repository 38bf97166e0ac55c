"""Named semaphores: `posix_ipc` makes and removes the names, `multiprocessing`'s SemLock tries and posts.

Both libraries open the same POSIX semaphore. SemLock is faster, and lets the exception of a signal handler through
(posix_ipc turns it into a bare SignalError). Both wait by the wall clock, which may be stepped: a step of an hour back
makes a wait of 50 ms one of an hour. So waits go to the C library's `sem_clockwait` (glibc 2.30), on the monotonic
clock; without it, to SemLock.

A token wakes a waiter and says nothing else: what the waiter waits for, the ring alone can tell.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable
from typing import Any, Protocol

import posix_ipc

from ..errors import ChannelCorrupted
from ..system import monotonic

try:
    from _multiprocessing import SemLock as _SemLock
except ImportError:  # a Python that was built where no semaphore could be made, as in a container without /dev/shm
    _SemLock = None

#: Whether it is known where the sem_t of a semaphore lies.
HAS_ADDRESSES = _SemLock is not None

SHM_DIRECTORY = "/dev/shm"
#: What the names of all files begin with, after the "sem." of semaphores. Processes with different ones see nothing of
#: each other: so two suites of tests, or tests and the programs of the same user, can share a /dev/shm.
STEM = os.environ.get("RINGSHM_STEM", "ringshm")
_SEMAPHORE_KIND = 1  # multiprocessing.synchronize.SEMAPHORE
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


class _Filled:
    def fill(self: Semaphore, tokens: int) -> None:
        for _ in range(tokens - self._get_value()):
            self.release()


class _PosixSemaphore(_Filled):
    """A semaphore of posix_ipc with SemLock's manners, for a Python whose `multiprocessing` has none."""

    address = 0

    def __init__(self, name: str) -> None:
        self._semaphore = posix_ipc.Semaphore(name)
        self.release: Callable[[], None] = self._semaphore.release

    def acquire(self, _: bool, /) -> bool:
        return self.wait(0)

    def wait(self, seconds: float) -> bool:
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
    """A SemLock, whose waits go by the monotonic clock."""

    def __init__(self, name: str) -> None:
        self._lock = lock = _SemLock._rebuild(0, _SEMAPHORE_KIND, 2**31 - 1, name)
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


def create(name: str, tokens: int) -> None:
    """Make a semaphore of that name, which must be new, for this user alone."""
    try:
        posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=tokens).close()
    except (posix_ipc.PermissionsError, MemoryError, OSError) as error:
        raise _with_errno(error, name) from error
    os.chmod(f"{SHM_DIRECTORY}/sem.{name[1:]}", 0o600)  # whatever the umask


def _with_errno(error: Exception, name: str) -> OSError:
    """As Python's own functions raise it: posix_ipc leaves out `errno`, or raises what is no OSError."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, OSError):
        number = errno.ENFILE if "system" in str(error) else errno.EMFILE
    else:
        number = errno.ENOMEM if isinstance(error, MemoryError) else errno.EACCES
    return OSError(number, os.strerror(number), name)


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
        return _PosixSemaphore(name)
    return _SemLockSemaphore(name)


def remove(name: str) -> None:
    """Remove the name, if it is there; PermissionError if it is another user's."""
    try:
        posix_ipc.unlink_semaphore(name)
    except posix_ipc.ExistentialError:
        pass
    except posix_ipc.PermissionsError as error:
        raise _with_errno(error, name) from error
