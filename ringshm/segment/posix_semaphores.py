"""Semaphores of `posix_ipc`, for a Python whose `multiprocessing` has none: one that was built where no semaphore could
be made, as in a container without /dev/shm.

posix_ipc runs signal handlers where it waits, and drops what they raise, but for KeyboardInterrupt: so it never waits
here. A waiter looks again and again, ever more seldom.

Without the GIL CPython switches it on where `posix_ipc` is imported, so nothing else imports it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import posix_ipc

from ..system import monotonic, sleep

#: Seconds between two looks of a waiter: at first, and at last.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.002


class PosixSemaphore:
    """A semaphore of posix_ipc with SemLock's manners."""

    address = 0

    def __init__(self, name: str) -> None:
        try:
            self._semaphore = posix_ipc.Semaphore(name)
        except posix_ipc.ExistentialError as error:
            raise _not_there(name) from error
        except (posix_ipc.PermissionsError, MemoryError, OSError) as error:
            raise _with_errno(error, name) from error
        self.release: Callable[[], None] = self._semaphore.release

    def acquire(self, _: bool, /) -> bool:
        """As Semaphore.acquire."""
        try:
            self._semaphore.acquire(0)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """As Semaphore.wait."""
        give_up, pause = monotonic() + seconds, _SHORTEST_PAUSE
        while not self.acquire(False):
            left = give_up - monotonic()
            if left <= 0:
                return False
            sleep(min(left, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _get_value(self) -> int:
        return int(self._semaphore.value)

    def fill(self, tokens: int) -> None:
        """As Semaphore.fill."""
        for _ in range(tokens - self._get_value()):
            self.release()


def create(name: str, tokens: int) -> None:
    """Make a semaphore of that name, which must be new."""
    try:
        posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=tokens).close()
    except (posix_ipc.PermissionsError, MemoryError, OSError) as error:
        raise _with_errno(error, name) from error


def unlink(name: str) -> None:
    """Remove the name; FileNotFoundError if there is none, PermissionError if it is another user's."""
    try:
        posix_ipc.unlink_semaphore(name)
    except posix_ipc.ExistentialError as error:
        raise _not_there(name) from error
    except posix_ipc.PermissionsError as error:
        raise _with_errno(error, name) from error


def _not_there(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def _with_errno(error: Exception, name: str) -> OSError:
    """As Python's own functions raise it: posix_ipc leaves out `errno`, or raises what is no OSError."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, OSError):
        number = errno.ENFILE if "system" in str(error) else errno.EMFILE
    else:
        number = errno.ENOMEM if isinstance(error, MemoryError) else errno.EACCES
    return OSError(number, os.strerror(number), name)
