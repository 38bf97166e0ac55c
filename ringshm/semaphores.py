"""Named semaphores: `posix_ipc` makes and removes the names, `multiprocessing`'s SemLock waits.

Both libraries open the same POSIX semaphore. SemLock retries a wait that a signal interrupted, lets the handler's own
exception through (posix_ipc turns it into a bare SignalError) and tries before it lets go of the GIL. A semaphore here
is a wake-up, never a fact: nobody concludes from a token what the ring alone can say.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Protocol

import posix_ipc

from .errors import ChannelCorrupted

try:
    from _multiprocessing import SemLock as _SemLock
except ImportError:  # a platform on which multiprocessing has no semaphores
    _SemLock = None

SHM_DIRECTORY = "/dev/shm"
_SEMAPHORE_KIND = 1  # multiprocessing.synchronize.SEMAPHORE
_SEMAPHORE_NBYTES = 32  # sizeof(sem_t), which is the size of glibc's file


class Semaphore(Protocol):
    """What the rest of ringshm asks of a semaphore."""

    def acquire(self, block: bool = True, timeout: float | None = None, /) -> bool:
        """Take a token; False if there was none in time (seconds)."""

    def release(self) -> None:
        """Add a token."""

    def _get_value(self) -> int:
        """Tokens there are."""


class _PosixSemaphore:
    """The fallback: a semaphore of posix_ipc with SemLock's manners."""

    def __init__(self, name: str) -> None:
        self._semaphore = posix_ipc.Semaphore(name)
        self.release = self._semaphore.release

    def acquire(self, block: bool = True, timeout: float | None = None, /) -> bool:
        try:
            self._semaphore.acquire(timeout if block else 0)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False  # every wait is a slice of a longer one, so that an interrupted one may end early
        return True

    def _get_value(self) -> int:
        return int(self._semaphore.value)


def create(name: str, tokens: int) -> None:
    """Make a semaphore of that name, which must be new, for this user alone."""
    posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=tokens).close()


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
    semaphore: Semaphore = _SemLock._rebuild(0, _SEMAPHORE_KIND, 2**31 - 1, name)
    return semaphore


def remove(name: str) -> None:
    """Remove the name, if it is there."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_semaphore(name)
